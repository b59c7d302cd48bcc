"""Where the mask in the gradients of LoRS pays: exact against straight-through, setting by setting.

A row for each pair of lines that differ in the gradient alone: what exact gains in accuracy and in the loss of plain
text and of answers (fewer nats count as a gain), paired over the seeds that both have and over items, with standard
error; p of the first of them that is there, corrected for all rows by Holm. Beside it, if ``angles.csv`` (``python -m
harness.gradient_angles``) is given, the means over the seeds of what can be known without the second run: the cosine
of the two gradients at the start, and at the end of the straight-through run the same cosine and the share of the
update that lies on pruned weights.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import Label, curve, finish, label_at_the_right, new_figure, plot_style, save
from analysis.groups import configs, text_of, varying
from analysis.lines import short_name
from analysis.measures import ACCURACY, ANSWERS_LOSS, HELDOUT_LOSS
from analysis.results import add_run_arguments, load, output_folder, publish
from analysis.statistics import Difference, Sample, difference, holm, paired_item_error
from analysis.style import style_of
from analysis.table_writer import TextTable, markdown

__all__ = ["Gap", "add_arguments", "figure_of", "gaps", "run", "table_of"]

GRADIENT, UNTIL, OLDER = (f"method.peft.{name}" for name in ("gradient", "gradient_until", "exact_gradient"))
EXACT, STRAIGHT = "exact", "straight_through"
# Columns: how it is measured, the sign with which more is better, decimals.
GAINS = {
    "accuracy (points)": (ACCURACY, 1, 2),
    "text (nats)": (HELDOUT_LOSS, -1, 4),
    "answers (nats)": (ANSWERS_LOSS, -1, 4),
}
# Columns of angles: place, and name in the file.
ANGLES = {
    "cosine, start": ("start", "cosine"),
    "cosine, end": ("end", "cosine"),
    "off the support (%)": ("end", "off_support"),
}
ACCURACY_GAIN = "accuracy (points)"
DRAWN = "cosine, start"  # what is known before any training
OWN_NAMES = ("model", "pruned")  # whose values say what they are
NOTE = """What the exact gradient gains over the straight-through one, ± its standard error over seeds and items (of one
seed, over items); n seeds that both have. Holm: p of the first gain, corrected for all rows."""
NOTE_ON_ANGLES = """
Cosine: of the angle between the two gradients, on the first batches of the data, at the start and at the end of the
straight-through runs. Off the support: the share of |BA|² at that end that the mask takes away."""


@dataclass(frozen=True)
class Gap:
    """Exact against straight-through in one setting.

    Attributes:
        setting: Text by column: the model, how it was pruned, and in what else settings differ.
        gains: By column of `GAINS` exact minus straight-through; None without a seed that has both. With one seed the
            error is that over the items, and p is NaN.
        angles: By column of `ANGLES` the mean over the seeds; NaN where it was not measured.
    """

    setting: dict[str, str]
    gains: dict[str, Difference | None]
    angles: dict[str, float]


def gaps(table: pd.DataFrame, angles: pd.DataFrame | None = None) -> list[Gap]:
    """Every pair that there is.

    Args:
        table: What `results.load` returns.
        angles: The content of ``angles.csv``.

    Raises:
        ValueError: There is none, or a setting has several runs of one seed and gradient.
    """
    rows = table[(table.method == "lors") & (table.status == "ok") & (table["mode"] == "run") & (table.sparsity > 0)]
    values = [of | {GRADIENT: EXACT if of.get(OLDER) else of.get(GRADIENT, STRAIGHT)} for of in configs(rows)]
    taken = [of[GRADIENT] in (EXACT, STRAIGHT) and of.get(UNTIL, 1.0) == 1 for of in values]
    rows, values = rows[taken], [of for of, is_taken in zip(values, taken, strict=True) if is_taken]
    keys = [key for key in varying(values) if key not in (GRADIENT, UNTIL, OLDER)]
    rows = rows.assign(
        gradient=[of[GRADIENT] for of in values],
        setting=[text_of([of.get(key) for key in keys]) for of in values],
        shown=[{short_name(key): f"{of[key]}" for key in keys if key in of} for of in values],
    )
    if (twice := rows[rows.duplicated(["model", "pruner", "label", "setting", "gradient", "seed"])]).size:
        row = twice.iloc[0]
        raise ValueError(f"runs: several of {row.model}, {row.pruner} {row.label}, {row.gradient}, seed {row.seed:g}")
    found = []
    for (model, pruner, label, _), same in rows.groupby(["model", "pruner", "label", "setting"]):
        pair = {gradient: of_one for gradient, of_one in same.groupby("gradient")}
        if len(pair) == 2:
            setting = {"model": model, "pruned": f"{pruner} {label}"} | same.shown.iloc[0]
            found.append(_gap(setting, pair[EXACT], pair[STRAIGHT], angles))
    if not found:
        raise ValueError(f"runs: no two of LoRS that differ in {GRADIENT}={EXACT} and {STRAIGHT} alone")
    return found


def _gap(setting: dict[str, str], exact: pd.DataFrame, straight: pd.DataFrame, angles: pd.DataFrame | None) -> Gap:
    samples = {name: (measure.sample(exact), measure.sample(straight)) for name, (measure, *_) in GAINS.items()}
    known = {}
    for name, (place, column) in ANGLES.items() if angles is not None else ():
        taken = angles[angles.key.isin(straight.key) & (angles.place == place)]
        known[name] = float(taken[column].mean())
    return Gap(setting, {name: _difference(*pair) for name, pair in samples.items()}, known)


def _difference(a: Sample, b: Sample) -> Difference | None:
    seeds = a.values.keys() & b.values.keys()
    if len(seeds) != 1:
        return difference(a, b)
    (seed,) = seeds
    return Difference(a.values[seed] - b.values[seed], paired_item_error(a, b), 1, math.nan, 0)


def table_of(found: list[Gap]) -> TextTable:
    """The table of the module's text."""
    settings = list(dict.fromkeys(name for gap in found for name in gap.setting))
    gains = [name for name in GAINS if any(gap.gains[name] for gap in found)]
    known = list(found[0].angles)
    first = [gap.gains[gains[0]] for gap in found]  # the accuracy, where there is one
    corrected = iter(holm([one.p for one in first if one and one.n > 1]))
    rows = []
    for gap, one in zip(found, first, strict=True):
        cells = [gap.setting.get(name, "-") for name in settings] + [f"{one.n}" if one else "-"]
        for name in gains:
            sign, decimals = GAINS[name][1:]
            gain = gap.gains[name]
            cells.append(f"{sign * gain.mean:+.{decimals}f} ± {gain.error:.{decimals}f}" if gain else "-")
        cells.append(f"{next(corrected):.2g}" if one and one.n > 1 else "-")
        rows.append([*cells, *(f"{_in_unit(name, gap.angles[name]):.3g}" for name in known)])
    return TextTable([*settings, "n", *gains, "Holm", *known], rows)


def _in_unit(name: str, value: float) -> float:
    return 100 * value if name.endswith("(%)") else value


def figure_of(found: list[Gap]) -> Figure:
    """The gain in accuracy against the cosine of the two gradients before the training, a point for each setting.

    Settings in which either is not known are left out.

    Raises:
        ValueError: None has it.
    """
    drawn = [gap for gap in found if gap.gains[ACCURACY_GAIN] and not math.isnan(gap.angles[DRAWN])]
    if not drawn:
        raise ValueError(f"--angles: has {DRAWN!r} of no run with an accuracy")
    figure, (axes,) = new_figure(height=2.6)
    varied = [name for name in found[0].setting if len({gap.setting.get(name) for gap in drawn}) > 1]
    labels = []
    for gap in drawn:
        gain, x = gap.gains[ACCURACY_GAIN], gap.angles[DRAWN]
        curve(axes, style_of("lors"), [x], [gain.mean], [gain.error])
        text = ", ".join(gap.setting[name] if name in OWN_NAMES else f"{name} {gap.setting[name]}" for name in varied)
        labels.append(Label(text, x, gain.mean, style_of("lors").colour))
    axes.axhline(0, color="black", linewidth=0.6, zorder=1)
    axes.set_xlabel("cosine of the two gradients at the start")
    axes.set_ylabel("gain of exact (points)")
    label_at_the_right(axes, labels, letters=30)
    seeds = sorted({gap.gains[ACCURACY_GAIN].n for gap in drawn})
    note = f"Average accuracy, mean of {' to '.join(map(str, seeds))} seeds. Bar: standard error over seeds and items."
    return finish(figure, f"What the exact gradient gains: {drawn[0].setting['model']}", note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every command that reads runs, and the angles."""
    add_run_arguments(parser)
    parser.add_argument("--angles", type=Path, help="angles.csv of these runs")


def run(options: argparse.Namespace) -> int:
    """Print the table, write `gap.md`, and the plot if there are angles."""
    angles = None if options.angles is None else pd.read_csv(options.angles, dtype={"key": str})
    found = gaps(load(options.runs), angles)
    note = NOTE if angles is None else NOTE + NOTE_ON_ANGLES
    publish(f"{markdown(table_of(found))}\n\n{note}\n", options, "gap.md")
    if angles is not None:
        with plot_style():
            save(figure_of(found), output_folder(options) / "gap_by_cosine")
    return 0
