"""Time of LoRS and its rivals, as a linear, a decoder block and a whole step, with ratios, GFLOP/s and GB/s.

Measures in this process, see `cases` for what and `measure` for how, and writes ``bench.csv``, a row for each level and
variant. ``python -m analysis bench FOLDER`` makes the tables from it.

    python -m harness.bench --width 2048 --tokens 1024 --output runs/bench
    python -m harness.bench --model llama2_7b --tokens 2048 --pattern 2:4 --layers 4      on a GPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from harness.bench.cases import FROZEN, LEVELS, VARIANTS, Case, Setting, build, shape_of
from harness.bench.measure import Roofs, roofs, sample, work_of
from harness.bfloat16_products import has_bfloat16
from harness.environment import default_device, environment
from harness.method import PRECISIONS
from lors.sparsity import UNSTRUCTURED, resolve_sparsity

__all__ = ["main", "measure"]

# What the ratios are to: the method that loses the zeros, the floor, and of a merge the published formula.
BASES = ("lora", FROZEN, "lors_three_pass")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; exit code 0, or 2 after one line about bad input."""
    parser = argparse.ArgumentParser(prog="python -m harness.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="what is timed")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="methods")
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
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure, write ``bench.csv`` and print its columns in brief."""
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
    if PRECISIONS[setting.precision].base is torch.bfloat16 and not has_bfloat16(setting.device):
        print(f"this CPU has no bfloat16 products: --dtype {setting.precision} times plain loops; use --dtype float32")
    options.output.mkdir(parents=True, exist_ok=True)
    cases = build(setting, options.levels, options.variants)
    if not cases:
        raise ValueError(f"--levels {' '.join(options.levels)}: none of {', '.join(options.variants)} has it")
    roof = roofs(PRECISIONS[setting.precision].base, setting.device)
    measured = []
    for _, level in groupby(cases, key=lambda case: case.level):
        measured.append(measure(list(level), setting, roof, options.rounds, options.warmup, options.model))
        table = pd.concat(measured, ignore_index=True)
        table.to_csv(options.output / "bench.csv", index=False)  # a level is not lost with the next one
    print(table[["level", "variant", "ms", "to_lora", "to_frozen", "gflops", "gbs"]].to_string(index=False, na_rep="-"))
    print(f"\ntables: python -m analysis bench {options.output}")


def measure(
    cases: Sequence[Case], setting: Setting, roof: Roofs, rounds: int, warmup: int, model: str | None = None
) -> pd.DataFrame:
    """One row for each case.

    Columns: level, variant; ms (median), ms_p10, ms_p90, rounds; for each of the bases of the ratios ``to_...`` (median
    over the rounds) with ``_p10`` and ``_p90``, NaN where the base is not measured; flops, bytes, gflops, gbs (per
    second); roof_gflops, roof_gbs; the setting and the machine.

    Args:
        cases: Those of one level.
        setting: What they were built with.
        rounds: Samples of each.
        warmup: Calls of each before the first sample.
        model: Name of the shape, for the table.
    """
    works = [work_of(case) for case in cases]
    samples = sample(cases, setting.device, rounds=rounds, warmup=warmup)
    seconds = {variant: np.array(times) for variant, times in samples.items()}
    facts = _facts(setting, model)
    rows = []
    for case, work in zip(cases, works, strict=True):
        times = seconds[case.variant]
        row = {"level": case.level, "variant": case.variant, **_quantiles("ms", 1e3 * times), "rounds": rounds}
        for base in BASES:
            row |= _quantiles(f"to_{base}", times / seconds.get(base, np.nan))
        row |= {"flops": work.flops, "bytes": work.bytes}
        row |= {"gflops": work.flops / row["ms"] / 1e6, "gbs": work.bytes / row["ms"] / 1e6}
        rows.append(row | {"roof_gflops": roof.flops / 1e9, "roof_gbs": roof.bytes / 1e9} | facts)
    return pd.DataFrame(rows)


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return {name: float(p50), f"{name}_p10": float(p10), f"{name}_p90": float(p90)}


def _facts(setting: Setting, model: str | None) -> dict[str, Any]:
    """Setting and machine, the same in every row."""
    machine = environment(setting.device)
    of_machine = ("device", "threads", "torch", "transformers", "peft", "git_commit", "git_dirty", "platform")
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
        **{name: machine[name] for name in of_machine},
    }


if __name__ == "__main__":
    sys.exit(main())
