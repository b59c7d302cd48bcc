"""Tables and a roofline of the benchmark, from the `bench.csv` that `python -m harness.bench` has written.

Writes ``bench.md``, ``bench.png`` and ``bench.pdf`` beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.style import METHODS, name_of, style_of

__all__ = ["plot", "table_of"]

# What the ratios are to.
BASES = {"lora": "LoRA", "frozen": "frozen layer", "lors_three_pass": "LoRS, three passes"}
NAMES = {
    "frozen": "frozen layer",
    "lors_three_pass": "LoRS, three passes",
    "lors": "LoRS, one pass",
    "lors_compressed": "LoRS, compressed",
    "lors_2_4": "LoRS, 2:4 forward product",
}
MARKERS = {"merge": "v", "linear": "o", "block": "s", "step": "D"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench"), help="where bench.csv is")


def run(options: argparse.Namespace) -> int:
    """Write the tables and the plot, print the tables; exit code 0."""
    file = options.folder / "bench.csv"
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; python -m harness.bench --output {options.folder} makes it")
    table = pd.read_csv(file, keep_default_na=False, na_values=[""])
    lines = "\n".join(table_of(table))
    (options.folder / "bench.md").write_text(lines + "\n", encoding="utf-8")
    plot(table, options.folder / "bench.png")
    print(lines)
    return 0


def table_of(table: pd.DataFrame) -> Iterator[str]:
    """Lines of Markdown: one table for each level."""
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
        yield f"\n### {level}\n"
        yield f"| {' | '.join(header)} |"
        yield "|---" + "|---:" * (len(header) - 1) + "|"
        for row in rows.to_dict("records"):
            ratios = [_with_spread(row, f"to_{base}", 3) for base in bases]
            work = [
                f"{row['flops'] / 1e9:,.2f}",
                f"{row['gflops']:,.0f}",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{row['gbs']:,.1f}",
            ]
            yield f"| {' | '.join([_name(row['variant']), _with_spread(row, 'ms', 2), *ratios, *work])} |"


def plot(table: pd.DataFrame, file: Path) -> None:
    """Roofline: FLOP/s against FLOPs for each byte, with the measured roofs."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    rows = table[table.flops > 0]
    intensity = rows.flops / rows.bytes
    x = np.geomspace(intensity.min() / 2, intensity.max() * 4, 200)
    roof = table.iloc[0]
    axis.plot(x, np.minimum(x * roof.roof_gbs, roof.roof_gflops), color="#444444", linewidth=1.2)
    for row, flops_per_byte in zip(rows.itertuples(), intensity, strict=True):
        axis.plot(
            flops_per_byte,
            row.gflops,
            linestyle="none",
            markersize=6,
            marker=MARKERS[row.level],
            **_marker(row.variant),
        )
    for variant in dict.fromkeys(rows.variant):
        axis.plot([], [], linestyle="none", marker="o", label=_name(variant), **_marker(variant))
    for level in dict.fromkeys(rows.level):
        axis.plot(
            [], [], linestyle="none", marker=MARKERS[level], color="#444444", markerfacecolor="white", label=level
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for suffix in (".png", ".pdf"):
        figure.savefig(file.with_suffix(suffix), dpi=160)
    plt.close(figure)


def _with_spread(row: dict[str, Any], name: str, digits: int) -> str:
    if np.isnan(row[name]):
        return "-"
    return f"{row[name]:.{digits}f} [{row[f'{name}_p10']:.{digits}f}, {row[f'{name}_p90']:.{digits}f}]"


def _name(variant: str) -> str:
    return NAMES.get(variant) or name_of(variant)


def _marker(variant: str) -> dict[str, Any]:
    """Colour of the method; of LoRS, hollow without the one-pass merge, half filled when compressed."""
    if variant == "frozen":
        return {"color": style_of("dense").colour}
    method = variant if variant in METHODS else variant.partition("_")[0]
    fill = {"lors_three_pass": "none", "lors_compressed": "left"}.get(variant, "full")
    if variant.endswith("_gc"):
        fill = "bottom"
    return {"color": style_of(method).colour, "fillstyle": fill}
