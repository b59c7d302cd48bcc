"""Pack the run folders of each experiment into one Parquet file."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from analysis.parquet_file import SUFFIX, Row, write_rows
from analysis.results import results_in

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, and the file."""
    parser.add_argument("folders", type=Path, nargs="+", help="folders of run folders; they stay as they are")
    parser.add_argument(
        "--output", type=Path, help=f"for a single experiment: the file; default: its folder's name with {SUFFIX}"
    )


def run(options: argparse.Namespace) -> int:
    """Write a file for each folder that holds run folders, and print its name and number of rows."""
    experiments: dict[Path, list[Row]] = defaultdict(list)
    for path, result in results_in(options.folders):
        if path.parent.suffix != SUFFIX:
            experiments[path.absolute().parents[1]].append(result | {"steps": _steps(path.with_name("steps.jsonl"))})
    if options.output and len(experiments) > 1:
        names = ", ".join(folder.name for folder in experiments)
        raise ValueError(f"--output: for a single experiment, and here are {len(experiments)}: {names}")
    for folder, rows in experiments.items():
        output = options.output or folder.with_name(f"{folder.name}{SUFFIX}")
        write_rows(output, rows)
        print(f"{output}: {len(rows)} runs")
    return 0


def _steps(file: Path) -> list[Row] | None:
    """The steps of a run; None if it wrote none. A last line that a kill or a full disk tore is left out, and said."""
    if not file.exists():
        return None
    steps, lines = [], file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            int(step["step"]), float(step["loss"] or 0)
            steps.append(step)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{file}: line {number} is damaged") from None
            print(f"warning: {file}: the last line is torn and left out", file=sys.stderr)
    return steps
