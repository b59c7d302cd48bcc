"""Tables of the benchmark of engines, from the `bench.csv` that `python -m harness.bench` has written.

Writes ``bench.md`` beside it.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.style import name_of
from analysis.table_writer import TextTable, markdown

__all__ = ["add_arguments", "run"]

# What the ratios are to.
BASES = {"lora": "LoRA", "frozen": "frozen layer", "lors_three_pass": "LoRS, three passes"}
NAMES = {
    "frozen": "frozen layer",
    "lors_three_pass": "LoRS, three passes",
    "lors": "LoRS, one pass",
    "lors_compressed": "LoRS, compressed",
    "lors_exact": "LoRS, exact gradient",
    "lors_quarter": "LoRS, gradient of a quarter",
    "lors_eighth": "LoRS, gradient of an eighth",
    "lors_2_4": "LoRS, 2:4 forward product",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench"), help="where bench.csv is")


def run(options: argparse.Namespace) -> int:
    """Write the tables and print them; exit code 0."""
    file = options.folder / "bench.csv"
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; python -m harness.bench --output {options.folder} makes it")
    text = "\n\n".join(_sections(pd.read_csv(file, keep_default_na=False, na_values=[""]))) + "\n"
    (options.folder / "bench.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _sections(table: pd.DataFrame) -> Iterator[str]:
    """Markdown: the setting, and a table for each level."""
    first = table.iloc[0]
    yield (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}: {first['dtype']}, width "
        f"{first['width']}, {first['tokens']} tokens, rank {first['rank']}, sparsity {first['sparsity']:g} "
        f"({first['pattern']}). Median of {first['rounds']} rounds, in brackets the 10th and 90th percentile. Roofs: "
        f"{first['roof_gflops']:,.0f} GFLOP/s of a square product, {first['roof_gbs']:,.1f} GB/s of a copy."
    )
    for level, rows in table.groupby("level", sort=False):
        bases = [base for base in BASES if rows[f"to_{base}"].notna().any()]
        bases = [base for base in bases if level == "merge" or base != "lors_three_pass"]
        header = ["variant", "ms", *(f"of {BASES[base]}" for base in bases), "GFLOP", "GFLOP/s", "MB", "GB/s"]
        yield f"### {level}"
        yield markdown(TextTable(header, [_cells(row, bases) for row in rows.to_dict("records")]))


def _cells(row: dict[str, Any], bases: list[str]) -> list[str]:
    ratios = [_with_spread(row, f"to_{base}", 3) for base in bases]
    work = [f"{row['flops'] / 1e9:,.2f}", f"{row['gflops']:,.0f}", f"{row['bytes'] / 1e6:,.1f}", f"{row['gbs']:,.1f}"]
    return [NAMES.get(row["variant"]) or name_of(row["variant"]), _with_spread(row, "ms", 2), *ratios, *work]


def _with_spread(row: dict[str, Any], name: str, digits: int) -> str:
    if math.isnan(row[name]):
        return "-"
    return f"{row[name]:.{digits}f} [{row[f'{name}_p10']:.{digits}f}, {row[f'{name}_p90']:.{digits}f}]"
