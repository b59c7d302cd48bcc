"""Make run folders of packed experiments, so that a sweep goes on where another machine has stopped."""

import argparse
import json
from pathlib import Path

from analysis.parquet_file import read_rows
from harness.files import write_text
from harness.store import RunStore

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, and the folder."""
    parser.add_argument("files", type=Path, nargs="+", help="packed experiments; they stay as they are")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where the folders of the experiments go")


def run(options: argparse.Namespace) -> int:
    """Write the results and steps of every run that has no result there, and print how many there are."""
    for file in options.files:
        rows = read_rows(file)
        made = 0
        for row in rows:
            store = RunStore(options.output / row["config"]["name"] / row["key"])
            if store.result() is None:
                steps = row.pop("steps")
                if steps is not None:
                    lines = "".join(json.dumps(step) + "\n" for step in steps)
                    store.directory.mkdir(parents=True, exist_ok=True)
                    write_text(store.directory / "steps.jsonl", lines)
                names = {"steps": None if steps is None else "steps.jsonl", "adapter": None, "merged": None}
                store.write(row | {"artifacts": names})
                made += 1
        print(f"{file}: {made} of {len(rows)} runs written to {options.output}")
    return 0
