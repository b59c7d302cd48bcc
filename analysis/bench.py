"""Time of LoRS and its rivals, as a linear, a decoder block and a whole step, with ratios, GFLOP/s and GB/s.

Measures in this process, see `bench_cases` for what and `bench_measure` for how, and writes ``bench.csv`` (a row for
each level and variant), ``bench.md``, ``bench.png`` and ``bench.pdf`` (a roofline).

    python -m analysis bench --width 2048 --tokens 1024 --output runs/bench
    python -m analysis bench --model llama2_7b --tokens 2048 --pattern 2:4 --layers 4      on a GPU
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.bench_cases import FROZEN, LEVELS, METHODS, VARIANTS, Case, Setting, build, shape_of
from analysis.bench_measure import Roofs, roofs, sample, work_of
from analysis.style import name_of, style_of
from lors.harness.environment import environment
from lors.harness.method import PRECISIONS
from lors.harness.models import default_device
from lors.sparsity import UNSTRUCTURED, resolve_sparsity

__all__ = ["measure", "plot", "table_of"]

# What the ratios are to: the floor, and the method that loses the zeros. Of a merge: the published formula.
FLOOR, RIVAL, FORMULA = FROZEN, "lora", "lors_three_pass"
NAMES = {
    FROZEN: "frozen layer",
    "lors_three_pass": "LoRS, three passes",
    "lors": "LoRS, one pass",
    "lors_compressed": "LoRS, compressed",
    "lors_2_4": "LoRS, 2:4 forward product",
}
MARKERS = {"merge": "v", "linear": "o", "block": "s", "step": "D"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="what is timed")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *METHODS], default=list(VARIANTS), help="methods")
    parser.add_argument("--width", type=int, default=2048, help="of a Llama, a multiple of 128")
    parser.add_argument("--model", help="a shape of conf/model instead of a width, such as llama2_7b")
    parser.add_argument("--layers", type=int, default=2, help="decoder blocks of the whole step")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the whole step, with --width")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the one sequence")
    parser.add_argument("--rank", type=int, default=16, help="of all adapters")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bf16", help="as train.precision")
    parser.add_argument("--pattern", default=UNSTRUCTURED, help="unstructured or n:m")
    parser.add_argument("--sparsity", type=float, help="fraction of zeros; default: what the pattern implies")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each case")
    parser.add_argument("--warmup", type=int, default=3, help="calls of each case before the first sample")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for what is written")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write the files; exit code 0."""
    for name in ("layers", "vocabulary", "tokens", "rank", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be a whole number >= 1")
    setting = Setting(
        shape=shape_of(options.width, options.layers, options.vocabulary, options.model),
        tokens=options.tokens,
        r=options.rank,
        precision=options.dtype,
        pattern=options.pattern,
        sparsity=resolve_sparsity(options.sparsity, options.pattern),
        device=default_device(),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    cases = build(setting, options.levels, options.variants)
    roof = roofs(PRECISIONS[setting.precision].base, setting.device)
    measured = []
    for level in dict.fromkeys(case.level for case in cases):
        here = [case for case in cases if case.level == level]
        measured.append(measure(here, setting, roof, rounds=options.rounds, warmup=options.warmup, model=options.model))
        _write(pd.concat(measured, ignore_index=True), options.output)  # a level is not lost with the next one
    print((options.output / "bench.md").read_text(encoding="utf-8"))
    return 0


def _write(table: pd.DataFrame, folder: Path) -> None:
    (folder / "bench.md").write_text("\n".join(table_of(table)) + "\n", encoding="utf-8")
    table.to_csv(folder / "bench.csv", index=False)
    plot(table, folder / "bench.png")


def measure(
    cases: Sequence[Case], setting: Setting, roof: Roofs, *, rounds: int, warmup: int, model: str | None = None
) -> pd.DataFrame:
    """One row for each case.

    Columns: level, variant; ms (median), ms_p10, ms_p90, rounds; for each of the bases of the ratios ``to_...`` (median
    over the rounds) with ``_p10`` and ``_p90``, NaN where the base is not measured; flops, bytes, gflops, gbs (per
    second); roof_gflops, roof_gbs; the setting and the machine.

    Args:
        cases: Of any number of levels.
        setting: What they were built with.
        roof: Of the machine.
        rounds: Samples of each.
        warmup: Calls of each before the first sample.
        model: Name of the shape, for the table.
    """
    rows = []
    for level in dict.fromkeys(case.level for case in cases):
        here = [case for case in cases if case.level == level]
        works = {case.variant: work_of(case) for case in here}
        seconds = {
            variant: np.array(times)
            for variant, times in sample(here, setting.device, rounds=rounds, warmup=warmup).items()
        }
        for variant, times in seconds.items():
            work, median = works[variant], float(np.median(times))
            row = {"level": level, "variant": variant, **_quantiles("ms", 1e3 * times), "rounds": rounds}
            for base in (RIVAL, FLOOR, FORMULA):
                row |= _quantiles(f"to_{base}", times / seconds[base] if base in seconds else np.array([np.nan]))
            row |= {"flops": work.flops, "bytes": work.bytes}
            row |= {"gflops": work.flops / median / 1e9, "gbs": work.bytes / median / 1e9}
            rows.append(row | {"roof_gflops": roof.flops / 1e9, "roof_gbs": roof.bytes / 1e9} | _facts(setting, model))
    return pd.DataFrame(rows)


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
        bases = [base for base in (RIVAL, FLOOR, FORMULA) if rows[f"to_{base}"].notna().any()]
        bases = [base for base in bases if level == "merge" or base != FORMULA]
        header = ["variant", "ms", *(f"of {_name(base)}" for base in bases), "GFLOP", "GFLOP/s", "MB", "GB/s"]
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
            flops_per_byte, row.gflops, linestyle="none", markersize=6, marker=MARKERS[row.level], **_look(row.variant)
        )
    for variant in dict.fromkeys(rows.variant):
        axis.plot([], [], linestyle="none", marker="o", label=_name(variant), **_look(variant))
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


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return {name: float(p50), f"{name}_p10": float(p10), f"{name}_p90": float(p90)}


def _with_spread(row: dict[str, Any], name: str, digits: int) -> str:
    if np.isnan(row[name]):
        return "-"
    return f"{row[name]:.{digits}f} [{row[f'{name}_p10']:.{digits}f}, {row[f'{name}_p90']:.{digits}f}]"


def _facts(setting: Setting, model: str | None) -> dict[str, Any]:
    """Setting and machine, the same in every row."""
    machine = environment(setting.device)
    return {
        "model": model or "",
        "width": setting.shape.hidden_size,
        "feed_forward": setting.shape.intermediate_size,
        "layers": setting.shape.num_hidden_layers,
        "vocabulary": setting.shape.vocab_size,
        "tokens": setting.tokens,
        "rank": setting.r,
        "dtype": setting.precision,
        "pattern": setting.pattern,
        "sparsity": setting.sparsity,
        **{
            name: machine[name]
            for name in ("device", "threads", "torch", "transformers", "peft", "git_commit", "git_dirty")
        },
        "platform": platform.platform(),
    }


def _name(variant: str) -> str:
    return NAMES.get(variant) or name_of(variant)


def _look(variant: str) -> dict[str, Any]:
    """Colour of the method; of LoRS, hollow without the one-pass merge, half filled when compressed."""
    if variant == FLOOR:
        return {"color": style_of("dense").colour}
    method = VARIANTS.get(variant, (variant,))[0]
    fill = {"lors_three_pass": "none", "lors_compressed": "left"}.get(variant, "full")
    if variant.endswith("_gc"):
        fill = "bottom"
    return {"color": style_of(method).colour, "fillstyle": fill}
