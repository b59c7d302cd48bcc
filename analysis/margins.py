"""Is the embedded model a useful instrument? Its margins, from the results of `make margins`.

Written with s for a standard error and, per pruned model, gap = accuracy of the dense model minus that of the pruned
one. The share of the gap that fine-tuning wins back is measured against the dense model with the same fine-tuning,

    recovered = 1 - (dense tuned - pruned tuned) / (dense - pruned),

so that continued training is not mistaken for recovery. The milder measure beside it, (pruned tuned - pruned) / (dense
tuned - pruned), is the share of the way from the pruned model to that control.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import pairwise

import pandas as pd

from analysis.columns import chance_level
from analysis.results import add_run_arguments as add_arguments
from analysis.results import load, publish
from analysis.table_writer import TextTable, markdown

__all__ = ["add_arguments", "checks", "run"]

PRUNERS = ("wanda", "sparsegpt", "magnitude")


def checks(table: pd.DataFrame) -> Iterator[tuple[str, str, bool]]:
    """(statement, measured, whether it holds) for every margin that the instrument must show.

    Raises:
        ValueError: A run that one of them needs is missing.
    """
    dense = _rows(table, "dense", "none", "0").iloc[0]
    chance, s = chance_level(dense.tasks), dense.accuracy_stderr
    above = dense.accuracy - chance
    yield "dense mean at least 30 above chance", f"{dense.accuracy:.1f} - {chance:.1f}", above >= 30
    for task, value in dense.tasks.items():
        margin = (value - chance_level([task])) / (dense.task_stderr[task] or math.nan)
        holds = margin >= 3 and value <= 98
        yield f"{task}: 3 s above chance, at most 98", f"{value:.1f} ({margin:.1f} s)", holds
    for label, least in (("0.5", 3 * s), ("2:4", 6.0), ("0.6", 6.0), ("0.7", 12.0)):
        loss = dense.accuracy - _rows(table, "pruned", "wanda", label).accuracy.iloc[0]
        yield f"wanda {label} costs at least {least:.1f}", f"{loss:.1f}", loss >= least
    for pruner in PRUNERS:
        pruned = [_rows(table, "pruned", pruner, label) for label in ("0.5", "0.6", "0.7")]
        losses = [dense.heldout_loss, *(rows.heldout_loss.iloc[0] for rows in pruned)]
        rising = all(a < b for a, b in pairwise(losses))
        yield f"{pruner}: held-out loss rises with sparsity", " < ".join(f"{x:.3f}" for x in losses), rising
    control = _rows(table, "lors", "none", "0").set_index("seed").accuracy
    for label in ("0.5", "2:4"):
        pruned = _rows(table, "pruned", "wanda", label).accuracy.iloc[0]
        tuned = _rows(table, "lors", "wanda", label).set_index("seed").accuracy
        shares = {
            "of the gap": 1 - (control - tuned) / (dense.accuracy - pruned),
            "of the way to the control": (tuned - pruned) / (control - pruned),
        }
        for of, share in shares.items():
            spread = f" ± {share.std():.2f}" if len(share) > 1 else ""
            shown = f"{share.mean():.2f}{spread} (n {len(share)}, least {share.min():.2f})"
            yield f"LoRS wins back a third {of} at {label}, mean over seeds", shown, bool(share.mean() >= 1 / 3)


def _rows(table: pd.DataFrame, method: str, pruner: str, label: str) -> pd.DataFrame:
    rows = table[(table.method == method) & (table.pruner == pruner) & (table.label == label)]
    if rows.empty:
        raise ValueError(f"no run with prune={pruner} at {label} for {method}: run make margins")
    return rows


def _scores(table: pd.DataFrame) -> TextTable:
    """One row for the dense model, each pruned one and each fine-tuned one (mean ± std over seeds)."""
    tasks = list(table.iloc[0].tasks)
    rows = []
    for names, same in table.groupby(["pruner", "label", "method"]):
        if same.tasks.iloc[0]:
            of_tasks = [f"{mean:.1f}" for mean in pd.DataFrame(list(same.tasks), columns=tasks).mean()]
            mean = f"{same.accuracy.mean():.2f}" + (f" ± {same.accuracy.std():.2f}" if len(same) > 1 else "")
            rows.append([*names, str(len(same)), *of_tasks, mean, f"{same.heldout_loss.mean():.3f}"])
    short = [task.removeprefix("microworld_") for task in tasks]
    return TextTable(["pruner", "sparsity", "method", "n", *short, "mean acc", "held-out loss"], rows)


def run(options: argparse.Namespace) -> int:
    """Print the table and the verdicts and write them to `margins.md`; returns 0 only if all margins hold."""
    table = load(options.runs)
    table = table[table.status == "ok"]
    found = list(checks(table))
    verdicts = TextTable(["margin", "measured", "holds"], [[*row, "yes" if holds else "NO"] for *row, holds in found])
    publish(f"{markdown(_scores(table))}\n\n{markdown(verdicts)}\n", options, "margins.md")
    return 0 if all(holds for *_, holds in found) else 1
