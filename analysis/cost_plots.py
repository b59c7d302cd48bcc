"""Plots of cost: against sequence length and rank, and against accuracy with the methods that no other one beats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.columns import memory_unit
from analysis.figures import SMALL, curve, finish, new_figure, plain_ticks
from analysis.groups import Group, check_one_machine
from analysis.lines import Line, contenders, lines_of, told_apart
from analysis.measures import ACCURACY, Measure
from analysis.notes import slug, slug_of
from analysis.quality_plots import Drawn, of_runs, styles_of
from analysis.statistics import Sample, pareto_front
from analysis.style import Style, name_of, order_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_by_rank", "cost_by_sequence_length", "pareto_memory", "pareto_time", "pareto_trainable"]

LENGTH, RANK = "train.sequence_length", "adapter.r"
HEADERS = {LENGTH: "sequence length (tokens)", RANK: "rank"}
FRONT = "#BBBBBB"
# Share of the height of the axes that a mark of a run that did not fit takes.
ROOM_FOR_MISFIT = 0.1


@dataclass(frozen=True)
class Quantity:
    """A cost: the column of `results.load`, what the axis says, and the unit of the axis in that of the column."""

    source: str
    label: str
    unit: float = 1.0

    def sample(self, line: Line) -> Sample:
        """By seed, in the unit of the axis."""
        return line.sample(Measure(lambda row: row[self.source] / self.unit))


def cost_by_sequence_length(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Memory and step time of training against the length of a row, one figure for each rank."""
    return _cost_against(LENGTH, RANK, groups, mix)


def cost_by_rank(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Memory and step time of training against the rank, one figure for each length."""
    return _cost_against(RANK, LENGTH, groups, mix)


def pareto_memory(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Accuracy against the memory of training."""
    return _pareto("memory", groups)


def pareto_time(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Accuracy against the time of a step."""
    return _pareto("time", groups)


def pareto_trainable(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Accuracy against the number of trained parameters."""
    return _pareto("trainable", groups)


def _quantity(name: str, rows: pd.DataFrame) -> Quantity:
    if name == "memory":
        unit, size = memory_unit(rows.train_peak.max())
        return Quantity("train_peak", f"memory ({unit})", size)
    return {"time": Quantity("step_ms", "step time (ms)"),
            "trainable": Quantity("trainable", "trained parameters")}[name]  # fmt: skip


def _cost_against(key: str, other: str, groups: list[Group], mix: bool) -> Iterator[Drawn]:
    frames: dict[str, list[tuple[float, Line]]] = defaultdict(list)
    for group in groups:
        for line in lines_of(group, controls=False):
            settings = {**group.protocol, **line.choices}
            if line.headline and key in settings:
                frames[_frame(group, settings, key, other)].append((settings[key], _without(line, key, other)))
    if not frames:
        yield f"cost_by_{key.split('.')[-1]}", f"needs runs with two or more values of {key}"
    for frame, points in sorted(frames.items()):
        name = f"cost_by_{key.split('.')[-1]}_{frame}"
        rows = pd.concat([line.rows for _, line in points])
        if not mix and not rows.empty:
            check_one_machine(rows)
        if len({x for x, _ in points}) < 2:
            yield name, f"needs runs with two or more values of {key}"
        elif rows.train_peak.isna().all():
            yield name, "no run was measured"
        else:
            yield name, _cost_figure(points, rows, HEADERS[key])


def _frame(group: Group, settings: dict[str, Any], key: str, other: str) -> str:
    """Name of the figure: all that its points share."""
    protocol = {name: value for name, value in group.protocol.items() if name != key}
    protocol |= {other: settings[other]} if other in settings else {}
    shared = "_".join(f"{name.split('.')[-1]}_{value}" for name, value in protocol.items())
    return slug(f"{group.axes['mode']}_{group.axes['model']}_{group.axes['pruner']}_{group.axes['label']}_{shared}")


def _without(line: Line, *keys: str) -> Line:
    """The line without the choices that are axes of the figure, and without an end state, which costs nothing."""
    choices = {key: value for key, value in line.choices.items() if key not in keys}
    return replace(line, choices=choices, end_state=None)


def _cost_figure(points: list[tuple[float, Line]], rows: pd.DataFrame, header: str) -> Figure:
    """Memory above time; a cross at the upper edge is a run that did not fit."""
    lines = [line for _, line in points]
    series: dict[str, list[tuple[float, Line]]] = defaultdict(list)
    for x, line in sorted(points, key=lambda point: point[0]):
        series[f"{name_of(line.method)}{told_apart(line, lines)}"].append((x, line))
    series = dict(sorted(series.items(), key=lambda item: order_of(item[1][0][1].method)))
    styles = styles_of([replace(of_one[0][1], label=label) for label, of_one in series.items()])
    ticks = sorted({x for x, _ in points})
    figure, axes = new_figure(1 if rows.step_ms.isna().all() else 2)
    for panel, name in zip(axes, ("memory", "time"), strict=False):
        quantity = _quantity(name, rows)
        misfits: dict[float, int] = defaultdict(int)
        for style, of_one in zip(styles, series.values(), strict=True):
            measured = [(x, sample) for x, line in of_one if (sample := quantity.sample(line)).n]
            x, y = [x for x, _ in measured], [sample.mean for _, sample in measured]
            curve(panel, style, x, y, [sample.std for _, sample in measured])
            for missing in (x for x, line in of_one if line.out_of_memory):
                _mark_misfit(panel, style, missing, misfits[missing], side=1 if missing == ticks[0] else -1)
                misfits[missing] += 1
        panel.set_ylabel(quantity.label)
        if misfits:
            low, high = panel.get_ylim()
            panel.set_ylim(low, high + ROOM_FOR_MISFIT * max(misfits.values()) * (high - low))
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes[-1].set_xlabel(header)
    return finish(figure, axes)


def _mark_misfit(axes: Axes, style: Style, x: float, number: int, *, side: int) -> None:
    """A cross in the method's colour at the upper edge, the next one of the same x below it; the word beside it."""
    place = (x, 0.95 - ROOM_FOR_MISFIT * number)
    transform = axes.get_xaxis_transform()
    axes.plot(*place, marker="x", color=style.colour, markersize=4, transform=transform, linestyle="none")
    axes.annotate("OOM", place, xycoords=transform, xytext=(4 * side, 0), textcoords="offset points", va="center",
                  ha="left" if side > 0 else "right", fontsize=SMALL, color=style.colour)  # fmt: skip


def _pareto(name: str, groups: list[Group]) -> Iterator[Drawn]:
    for group in of_runs(groups):
        plot = f"pareto_{name}_{slug_of(group)}"
        quantity = _quantity(name, group.runs)
        lines = contenders(lines_of(group, controls=False))
        both = [(line, quantity.sample(line), line.sample(ACCURACY)) for line in lines]
        both = [(line, cost, gain) for line, cost, gain in both if cost.n and gain.n]
        if len(both) < 2:
            yield plot, f"needs accuracy and {quantity.label} of two or more methods"
            continue
        figure, (axes,) = new_figure()
        points = [(cost.mean, gain.mean) for _, cost, gain in both]
        front = pareto_front(*zip(*points, strict=True))
        axes.step(*zip(*(points[i] for i in front), strict=True), where="post", color=FRONT, zorder=1)
        for style, (_, cost, gain) in zip(styles_of([line for line, *_ in both]), both, strict=True):
            curve(axes, replace(style, line="none"), [cost.mean], [gain.mean], [gain.std], error_x=[cost.std])
        if name == "trainable":
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
        axes.set(xlabel=quantity.label, ylabel="mean accuracy (%)")
        yield plot, finish(figure, [axes])
