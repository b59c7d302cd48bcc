"""Plots of cost: against sequence length and rank, and of accuracy against cost: the methods that no other one beats,
and each method with more compute, data or memory."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.columns import memory_unit
from analysis.figures import Label, curve, finish, label_at_the_right, new_figure, plain_ticks
from analysis.groups import CHOICES, Group, check_one_machine, text_of, within
from analysis.lines import Line, lines_of, told_apart
from analysis.measures import ACCURACY, Measure, number
from analysis.notes import settings as words_of
from analysis.notes import slug, title_of
from analysis.quality_plots import Drawn, about_accuracy, about_seeds, of_runs, styles_of, with_every_end_of_lora
from analysis.statistics import pareto_front
from analysis.style import name_of, order_of

__all__ = ["LENGTH", "RANK", "budget", "cost_against", "pareto"]

LENGTH, RANK = "train.sequence_length", "adapter.r"
HEADERS = {LENGTH: "sequence length (tokens)", RANK: "rank"}
FRONT = "#BBBBBB"
# What is varied for more of it, how much of it a run took, and what the axis says.
BUDGETS = {
    "compute": (
        "train.steps",
        Measure(lambda row: row.flops * row.config["train"]["steps"] / 1e12),
        "training (TFLOP)",
    ),
    "data": ("data.limit", Measure(lambda row: row.config["data"]["limit"] or np.nan), "rows of training data"),
    "memory": (RANK, Measure(lambda row: row.train_peak / 2**20), "memory (MiB)"),
}


def _cost(name: str, rows: pd.DataFrame) -> tuple[Measure, str]:
    """A cost in the unit of its axis, and what the axis says."""
    if name == "memory":
        unit, size = memory_unit(rows.train_peak.max())
        return Measure(lambda row: row.train_peak / size), f"memory ({unit})"
    return number("step_ms"), "step time (ms)"


def cost_against(key: str, other: str, groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Memory and step time of training against one of LENGTH and RANK, one figure for each value of the other."""
    kind = f"cost_by_{key.split('.')[-1]}"
    figures: dict[str, list[tuple[float, Line]]] = defaultdict(list)
    for group in groups:
        for line in lines_of(group, controls=False):
            settings = {**group.protocol, **line.choices}
            if line.headline and key in settings:
                figures[_shared(group, settings, key, other)].append((settings[key], _without(line, key, other)))
    if not figures:
        yield kind, f"needs runs with two or more values of {key}"
    for shared, points in sorted(figures.items()):
        name = f"{kind}_{slug(shared)}"
        rows = pd.concat([line.rows for _, line in points])
        if not mix and not rows.empty:
            check_one_machine(rows)
        if len({x for x, _ in points}) < 2:
            yield name, f"needs runs with two or more values of {key}"
        elif rows.train_peak.isna().all():
            yield name, "no run was measured"
        else:
            figure, note = _cost_figure(points, rows, HEADERS[key])
            yield name, finish(figure, f"Cost by {HEADERS[key].partition(' (')[0]}: {shared}", note)


def _shared(group: Group, settings: dict[str, Any], key: str, other: str) -> str:
    """What all points of a figure have in common."""
    protocol = {name: value for name, value in group.protocol.items() if name != key}
    protocol |= {other: settings[other]} if other in settings else {}
    axes = [str(group.axes[axis]) for axis in ("mode", "model", "pruner", "label")]
    return ", ".join([*axes, *words_of(protocol)])


def _without(line: Line, *keys: str) -> Line:
    """The line without the choices that are axes of the figure, and without an end state, which costs nothing."""
    choices = {key: value for key, value in line.choices.items() if key not in keys}
    return replace(line, choices=choices, end_state=None)


def _cost_figure(points: list[tuple[float, Line]], rows: pd.DataFrame, header: str) -> tuple[Figure, str]:
    """Memory above time, and the note: which runs did not fit."""
    lines = [line for _, line in points]
    series: dict[str, list[tuple[float, Line]]] = defaultdict(list)
    for x, line in sorted(points, key=lambda point: (order_of(point[1].method), point[0])):
        series[f"{name_of(line.method)}{told_apart(line, lines)}"].append((x, line))
    styles = styles_of([replace(of_one[0][1], label=label) for label, of_one in series.items()])
    ticks = sorted({x for x, _ in points})
    names = ["memory"] if rows.step_ms.isna().all() else ["memory", "time"]
    figure, axes = new_figure(len(names))
    axes[-1].set_xscale("log", base=2)
    labels: list[list[Label]] = [[] for _ in axes]
    for panel, name, of_panel in zip(axes, names, labels, strict=True):
        measure, label = _cost(name, rows)
        for style, of_one in zip(styles, series.values(), strict=True):
            measured = [(x, sample) for x, line in of_one if (sample := line.sample(measure)).n]
            if measured:
                x, samples = zip(*measured, strict=True)
                curve(panel, style, x, [s.mean for s in samples], [s.std for s in samples])
                of_panel.append(Label(style.name, x[-1], samples[-1].mean, style.colour))
        panel.set_ylabel(label)
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes[-1].set_xlabel(header)
    for panel, of_panel in zip(axes, labels, strict=True):
        label_at_the_right(panel, of_panel)
    missing = [f"{label} at {x:g}" for label, of_one in series.items() for x, line in of_one if line.out_of_memory]
    note = about_seeds(line for line in lines if line.n)
    return figure, f"{note} Out of memory: {', '.join(missing)}." if missing else note


def pareto(name: str, groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Accuracy against a cost: memory, or time (of a step)."""
    for group in of_runs(groups):
        plot = f"pareto_{name}_{slug(title_of(group))}"
        measure, label = _cost(name, group.runs)
        lines = with_every_end_of_lora(lines_of(group, controls=False))
        found = [(line, line.sample(measure), line.sample(ACCURACY)) for line in lines]
        found = [(line, cost, gain) for line, cost, gain in found if cost.n and gain.n]
        if len({line.method for line, *_ in found}) < 2:
            yield plot, f"needs accuracy and {label} of two or more methods"
            continue
        figure, (axes,) = new_figure(height=max(2.2, 0.14 * len(found)))
        front = [(cost.mean, gain.mean) for line, cost, gain in found if line.keeps_zeros]
        if front:
            best = pareto_front(*zip(*front, strict=True))
            axes.step(*zip(*(front[index] for index in best), strict=True), where="post", color=FRONT, zorder=1)
        labels = []
        for style, (_, cost, gain) in zip(styles_of([line for line, *_ in found]), found, strict=True):
            curve(axes, replace(style, line="none"), [cost.mean], [gain.mean], [gain.std], error_x=[cost.std])
            labels.append(Label(style.name, cost.mean, gain.mean, style.colour))
        axes.set(xlabel=label, ylabel="average accuracy (%)")
        label_at_the_right(axes, labels, letters=24)
        note = f"{about_seeds(lines)} {about_accuracy(group.runs)} Grey steps: no method that keeps the zeros is "
        note += "better at this cost or less. Hollow: masked again, or with zeros lost."
        yield plot, finish(figure, f"Accuracy against {label.partition(' (')[0]}: {title_of(group)}", note)


def budget(name: str, groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Accuracy of each method with more of one of `BUDGETS`, the recipe otherwise the same."""
    key, measure, label = BUDGETS[name]
    kind = f"accuracy_by_{name}"
    figures: dict[str, list[Line]] = defaultdict(list)
    for group in of_runs(groups):
        for line in lines_of(group, controls=False):
            settings = {**group.protocol, **line.choices}
            if settings.get(key) is not None and line.end_state != "dense" and line.sample(ACCURACY).n:
                figures[_shared(group, settings, key, "").removeprefix("run, ")].append(line)
    drawn = 0
    for shared, lines in sorted(figures.items()):
        series: dict[tuple[str, str], list[Line]] = defaultdict(list)
        for line in lines:
            chosen = within(line.rows["values"].iloc[0], CHOICES)  # those of a line are among what its table has
            series[line.label, text_of({name: chosen[name] for name in chosen if not _varied(name, key)})].append(line)
        curves = [of_one for of_one in series.values() if len(of_one) > 1]
        if curves:
            drawn += 1
            if not mix:
                check_one_machine(pd.concat([line.rows for of_one in curves for line in of_one]))
            figure = _budget_figure(curves, measure, label, key)
            note = f"{about_seeds(line for of_one in curves for line in of_one)} {about_accuracy(curves[0][0].rows)}"
            yield f"{kind}_{slug(shared)}", finish(figure, f"Accuracy by {name}: {shared}", note)
    if not drawn:
        yield kind, f"needs scored runs with two or more values of {key}"


def _budget_figure(curves: list[list[Line]], measure: Measure, label: str, key: str) -> Figure:
    figure, (axes,) = new_figure(height=2.8)
    axes.set_xscale("log")
    labels = []
    first = [of_one[0] for of_one in curves]
    first = [
        replace(line, choices={name: line.choices[name] for name in line.choices if not _varied(name, key)})
        for line in first
    ]
    first = [replace(line, label=f"{line.label}{told_apart(line, first)}") for line in first]
    for style, of_one in zip(styles_of(first), curves, strict=True):
        points = sorted(((line.sample(measure).mean, line.sample(ACCURACY)) for line in of_one), key=itemgetter(0))
        x, gains = zip(*points, strict=True)
        curve(axes, style, x, [gain.mean for gain in gains], [gain.std for gain in gains])
        labels.append(Label(style.name, x[-1], gains[-1].mean, style.colour))
    axes.set(xlabel=label, ylabel="average accuracy (%)")
    plain_ticks(axes.xaxis)
    label_at_the_right(axes, labels, letters=24)
    return figure


def _varied(name: str, key: str) -> bool:
    """Whether a choice is the one that is varied, or goes with it, as alpha does with the rank."""
    return name == key or (key == RANK and name.rpartition(".")[2] in ("r", "alpha", "lora_alpha"))
