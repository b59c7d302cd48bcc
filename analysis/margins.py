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
from pathlib import Path

import pandas as pd

from analysis.results import add_run_arguments, load, output_folder

CHANCE = {"boolq": 50.0, "rte": 50.0, "winogrande": 50.0}  # the other tasks have four choices
FOUR_CHOICES = 25.0


def _chance(task: str) -> float:
    return CHANCE.get(task.removeprefix("microworld_"), FOUR_CHOICES)


def _pruned(table: pd.DataFrame, pruner: str, label: str) -> pd.Series:
    rows = table[(table.method == "pruned") & (table.pruner == pruner) & (table.label == label)]
    if rows.empty:
        raise ValueError(f"no run with prune={pruner} at {label}: run make margins")
    return rows.iloc[0]


def _tuned(table: pd.DataFrame, pruner: str, label: str) -> pd.Series:
    """Accuracy by seed of the models fine-tuned with LoRS."""
    rows = table[(table.method == "lors") & (table.pruner == pruner) & (table.label == label)]
    if rows.empty:
        raise ValueError(f"no LoRS run with prune={pruner} at {label}: run make margins")
    return rows.set_index("seed").accuracy


def checks(table: pd.DataFrame) -> Iterator[tuple[str, str, bool]]:
    """(statement, measured, whether it holds) for every margin that the instrument must show."""
    dense = table[table.method == "dense"].iloc[0]
    chance = sum(map(_chance, dense.tasks)) / len(dense.tasks)
    s = dense.accuracy_stderr
    yield (
        "dense mean at least 30 above chance",
        f"{dense.accuracy:.1f} - {chance:.1f}",
        dense.accuracy - chance >= 30,
    )
    for task, value in dense.tasks.items():
        margin = (value - _chance(task)) / dense.task_stderr[task]
        yield (
            f"{task}: 3 s above chance, at most 98",
            f"{value:.1f} ({margin:.1f} s)",
            margin >= 3 and value <= 98,
        )
    for label, least in (("0.5", 3 * s), ("2:4", 6.0), ("0.6", 6.0), ("0.7", 12.0)):
        loss = dense.accuracy - _pruned(table, "wanda", label).accuracy
        yield f"wanda {label} costs at least {least:.1f}", f"{loss:.1f}", loss >= least
    for pruner in ("wanda", "sparsegpt", "magnitude"):
        losses = [
            dense.heldout_loss,
            *(_pruned(table, pruner, label).heldout_loss for label in ("0.5", "0.6", "0.7")),
        ]
        rising = all(a < b for a, b in pairwise(losses))
        yield f"{pruner}: held-out loss rises with sparsity", " < ".join(f"{x:.3f}" for x in losses), rising
    control = _tuned(table, "none", "0")
    for label in ("0.5", "2:4"):
        pruned, tuned = _pruned(table, "wanda", label).accuracy, _tuned(table, "wanda", label)
        shares = {
            "of the gap": 1 - (control - tuned) / (dense.accuracy - pruned),
            "of the way to the control": (tuned - pruned) / (control - pruned),
        }
        for of, share in shares.items():
            spread = f" +- {share.std():.2f}" if len(share) > 1 else ""
            shown = f"{share.mean():.2f}{spread} (n {len(share)}, least {share.min():.2f})"
            yield f"LoRS wins back a third {of} at {label}, mean over seeds", shown, bool(share.mean() >= 1 / 3)


def table_of(table: pd.DataFrame) -> str:
    """Markdown: one row for the dense model, each pruned one and each fine-tuned one (mean +- std over seeds)."""
    groups = table.groupby(["pruner", "label", "method"], sort=True, dropna=False)
    tasks = list(table.iloc[0].tasks)
    names = [task.removeprefix("microworld_") for task in tasks]
    lines = [f"| pruner | sparsity | method | n | {' | '.join(names)} | mean acc | held-out loss |"]
    lines.append("|---" * (len(tasks) + 6) + "|")
    for (pruner, label, method), rows in groups:
        if not rows.tasks.iloc[0]:
            continue
        cells = [f"{rows.tasks.map(lambda scores, task=task: scores[task]).mean():.1f}" for task in tasks]
        spread = rows.accuracy.std() if len(rows) > 1 else math.nan
        mean = f"{rows.accuracy.mean():.2f}" + (f" +- {spread:.2f}" if spread == spread else "")
        loss = f"{rows.heldout_loss.mean():.3f}"
        lines.append(f"| {pruner} | {label} | {method} | {len(rows)} | {' | '.join(cells)} | {mean} | {loss} |")
    return "\n".join(lines) + "\n"


def plot(table: pd.DataFrame, path: Path) -> None:
    """Accuracy against sparsity for each pruner, and what LoRS wins back."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    dense = table[table.method == "dense"].iloc[0]
    styles = {"wanda": ("#0072B2", "o"), "sparsegpt": ("#009E73", "s"), "magnitude": ("#E69F00", "^")}
    for pruner, (colour, marker) in styles.items():
        rows = table[(table.method == "pruned") & (table.pruner == pruner) & (table.pattern == "unstructured")]
        rows = rows.sort_values("sparsity")
        x, y = [0.0, *rows.sparsity], [dense.accuracy, *rows.accuracy]
        axes.errorbar(
            x,
            y,
            yerr=dense.accuracy_stderr,
            color=colour,
            marker=marker,
            capsize=2,
            label=f"{pruner}, pruned",
        )
    tuned = table[(table.method == "lors") & (table.pattern == "unstructured")].groupby("sparsity").accuracy
    axes.errorbar(
        tuned.mean().index, tuned.mean(), yerr=tuned.std(), color="#D55E00", marker="D", capsize=3, linestyle="--",
        label="wanda, fine-tuned with LoRS",
    )  # fmt: skip
    axes.set(xlabel="sparsity", ylabel="mean accuracy of seven tasks (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=160)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders of runs and of output."""
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table and the verdicts, write `margins.md` and `margins.png`; returns 0 only if all margins hold."""
    table = load(options.runs)
    table = table[table.status == "ok"]
    output = output_folder(options)
    rows = list(checks(table))
    verdicts = "| margin | measured | holds |\n|---|---|---|\n"
    verdicts += "".join(f"| {what} | {measured} | {'yes' if holds else 'NO'} |\n" for what, measured, holds in rows)
    text = f"{table_of(table)}\n{verdicts}"
    print(text)
    (output / "margins.md").write_text(text)
    plot(table, output / "margins.png")
    return 0 if all(holds for *_, holds in rows) else 1
