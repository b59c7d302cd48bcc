"""Plots of scores against sparsity, of the share of the pruning loss that is won back, and of the training loss."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Union

import numpy as np
import pandas as pd

from analysis.figures import curve, finish, mark, new_figure, plain_ticks, split
from analysis.groups import Group, check_one_machine
from analysis.lines import Line, contenders, lines_of
from analysis.measures import ACCURACY, number
from analysis.notes import slug, slug_of
from analysis.results import CONTROLS
from analysis.statistics import ALPHA, Sample, difference
from analysis.steps import losses_of
from analysis.style import DOTTED, Style, name_of, order_of, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawn", "accuracy_by_sparsity", "loss_curves", "perplexity_by_sparsity", "recovery", "styles_of"]

# The name of a plot, and the figure or the reason why there is none.
Drawn = tuple[str, Union["Figure", str]]
TUNED_DENSE = replace(style_of("dense"), name="dense, same fine-tuning", marker="d", filled=False)
# Width of the running mean over a loss curve, as a share of the steps.
SMOOTHED = 0.05
# Marks on a loss curve.
MARKS = 6
# Of a plot that has a line of text for each method: its height in inches, and the letters that fit beside the axis.
ROW_HEIGHT, NAME_LETTERS = 0.17, 20


def accuracy_by_sparsity(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Mean accuracy of the tasks against unstructured sparsity, one figure for each model and pruner.

    Horizontal lines are the dense model, as it is and with the same fine-tuning.
    """
    return _by_sparsity("accuracy", "mean accuracy (%)", groups, mix)


def perplexity_by_sparsity(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """The same for perplexity, whose axis is logarithmic."""
    return _by_sparsity("perplexity", "perplexity", groups, mix)


def recovery(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Share of the pruning loss that each method wins back: 0 is the pruned model, 100 the dense one.

    A hollow mark is the dense model with the same fine-tuning. It can be beyond 100: fine-tuning also teaches what
    pruning did not take away.
    """
    for group in of_runs(groups):
        name = f"recovery_{slug_of(group)}"
        lines = lines_of(group, controls=True)
        dense, pruned = (_score_of_control(lines, control) for control in CONTROLS)
        trained = [line for line in contenders(lines) if _score(line).n]
        lost = difference(dense, pruned) if dense.n and pruned.n else None
        if not trained or lost is None:
            yield name, "needs the scores of the dense, the pruned and a fine-tuned model"
        elif lost.p >= ALPHA or lost.mean < 0:
            yield name, f"pruning cost {lost.mean:.1f} points, no more than noise: nothing to win back"
        else:
            controls = {line.method: _score(line) for line in _tuned_dense(lines)}
            yield name, _recovery(trained, controls, pruned.mean, lost.mean)


def loss_curves(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Training loss by step, mean over the seeds, smoothed by a running mean."""
    for group in of_runs(groups):
        name = f"loss_{slug_of(group)}"
        lines = contenders(lines_of(group, controls=False), trainings=True)
        losses = {index: _losses(line) for index, line in enumerate(lines)}
        shown = [index for index in losses if len(losses[index]) > 1]
        if not shown:
            yield name, "needs the steps.jsonl of a run"
            continue
        styles = styles_of(lines)
        parts = split(shown)
        figure, axes = new_figure(len(parts), share_y=True)
        for panel, part in zip(axes, parts, strict=True):
            for place, index in enumerate(part):
                y = losses[index]
                every = max(1, len(y) // MARKS)
                curve(panel, styles[index], range(1, len(y) + 1), y, markevery=(place * every // len(part), every))
            panel.set_ylabel("training loss")
        axes[-1].set_xlabel("step")
        yield name, finish(figure, axes)


def of_runs(groups: list[Group]) -> list[Group]:
    """The tables of pruned models that were trained and scored, of mode=run."""
    return [group for group in groups if group.axes["mode"] == "run" and not group.runs.empty]


def styles_of(lines: list[Line]) -> list[Style]:
    """The style of each line's method; further lines of a method have its colour and marker, and shorter dashes."""
    seen: dict[str, int] = defaultdict(int)
    styles = []
    for line in lines:
        style = style_of(line.method, None if line.end_state == "merged" else line.end_state)
        number = seen[line.method]
        seen[line.method] += 1
        dashes = style.line if number == 0 else (0, (5 / number, 1.5))
        styles.append(Style(line.label, style.colour, style.marker, dashes, style.filled))
    return styles


def _by_sparsity(quantity: str, label: str, groups: list[Group], mix: bool) -> Iterator[Drawn]:
    for (model, pruner), family in _families(groups).items():
        name = f"{quantity}_by_sparsity_{model}_{pruner}"
        series: dict[tuple[str, str | None], dict[float, Sample]] = defaultdict(dict)
        several = set()
        for group in family:
            for line in contenders(lines_of(group, controls=False)):
                sample = line.sample(number(quantity))
                if sample.n:
                    points = series[line.method, line.end_state]
                    several |= {name_of(line.method)} if group.axes["sparsity"] in points else set()
                    points[group.axes["sparsity"]] = sample
        runs = pd.concat([group.runs for group in family])
        if not mix and not runs.empty:
            check_one_machine(runs)
        lines = {key: points for key, points in series.items() if len(points) > 1}
        if not lines:
            yield name, "needs a method at two or more sparsities"
        elif several:
            yield name, f"more than one line for {', '.join(sorted(several))}: name the folder of one sweep"
        else:
            figure, axes = _sparsity_figure(lines, family, quantity, label)
            yield name, finish(figure, axes)
            if len(lines) < len(series):
                left_out = "; ".join(name_of(*key) for key in series if key not in lines)
                yield name, f"without {left_out}: one sparsity only"


def _families(groups: list[Group]) -> dict[tuple[str, str], list[Group]]:
    """The tables that differ in nothing but the unstructured sparsity, under their model and pruner."""
    found = defaultdict(list)
    for group in groups:
        axes = group.axes
        if axes["mode"] == "run" and axes["pattern"] == "unstructured" and axes["pruner"] != "none":
            protocol = "".join(f"_{slug(value)}" for value in group.protocol.values())
            found[axes["model"], f"{axes['pruner']}{protocol}"].append(group)
    return found


def _sparsity_figure(
    series: dict[tuple[str, str | None], dict[float, Sample]], family: list[Group], quantity: str, label: str
) -> tuple[Figure, list[Axes]]:
    controls = pd.concat([group.controls for group in family])
    tuned = {line.label: line for group in family for line in _tuned_dense(lines_of(group, controls=True))}
    parts = split(sorted(series, key=lambda key: order_of(key[0])))
    figure, axes = new_figure(len(parts), share_y=True)
    scored = controls[controls[quantity].notna()]
    for panel, part in zip(axes, parts, strict=True):
        for _, row in scored[scored.method == "dense"].drop_duplicates(quantity).iterrows():
            panel.axhline(row[quantity], **_without_marker(style_of("dense")))
        for name, line in tuned.items():
            style = replace(style_of(line.method), name=name, line=DOTTED)
            panel.axhline(line.sample(number(quantity)).mean, **_without_marker(style))
        pruned = scored[scored.method == "pruned"].sort_values("sparsity")
        curve(panel, style_of("pruned"), pruned.sparsity, pruned[quantity])
        for method, end_state in part:
            points = sorted(series[method, end_state].items())
            style = style_of(method, None if end_state == "merged" else end_state)
            curve(panel, style, [x for x, _ in points], [s.mean for _, s in points], [s.std for _, s in points])
        panel.set_ylabel(label)
        if quantity == "perplexity":
            panel.set_yscale("log")
            plain_ticks(panel.yaxis)
    axes[-1].set_xticks(sorted({x for points in series.values() for x in points}))
    axes[-1].set_xlabel("sparsity")
    return figure, axes


def _recovery(lines: list[Line], controls: dict[str, Sample], pruned: float, lost: float) -> Figure:
    """One row for each method: mean and standard deviation over the seeds, and its control."""
    # A row is as high as its name, which must leave room for the axis.
    names = [textwrap.wrap(line.label, NAME_LETTERS) for line in lines]
    heights = np.array([len(name) for name in names])
    rows = heights.cumsum() - heights / 2 - 0.5
    figure, (axes,) = new_figure(height=ROW_HEIGHT * heights.sum() + 0.75)
    shares = [Sample({seed: 100 * (v - pruned) / lost for seed, v in _score(line).values.items()}) for line in lines]
    for row, line, style, share in zip(rows, lines, styles_of(lines), shares, strict=True):
        curve(axes, replace(style, name="_"), [share.mean], [row], error_x=[share.std])  # named on the axis
        if line.method in controls:
            mark(axes, TUNED_DENSE, 100 * (controls[line.method].mean - pruned) / lost, row)
    axes.axvline(0, **_without_marker(style_of("pruned")))
    axes.axvline(100, **_without_marker(style_of("dense")))
    axes.set_yticks(rows, ["\n".join(name) for name in names])
    axes.set_ylim(heights.sum() - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)  # so that the last number below the axis is whole
    axes.set_xlabel("share of the pruning loss won back (%)", loc="right")  # it may be wider than the axis
    return finish(figure, [axes])


def _tuned_dense(lines: list[Line]) -> list[Line]:
    """The controls that are the dense model with the fine-tuning of a method."""
    return [line for line in lines if line.role == "control" and line.method not in CONTROLS and not line.rows.empty]


def _losses(line: Line) -> np.ndarray:
    """Loss by step, mean over the seeds as far as all of them go, smoothed."""
    runs = [[loss for _, loss in losses] for file in line.rows.steps_file if (losses := losses_of(file))]
    steps = min(map(len, runs), default=0)
    if steps < 2:
        return np.array([])
    mean = np.mean([losses[:steps] for losses in runs], axis=0)
    return pd.Series(mean).rolling(max(1, round(SMOOTHED * steps)), min_periods=1, center=True).mean().to_numpy()


def _score(line: Line) -> Sample:
    return line.sample(ACCURACY)


def _score_of_control(lines: list[Line], control: str) -> Sample:
    found = [_score(line) for line in lines if line.method == control and not line.rows.empty]
    return found[0] if found else Sample({})


def _without_marker(style: Style) -> dict[str, object]:
    return {"color": style.colour, "linestyle": style.line, "label": style.name, "zorder": 1}
