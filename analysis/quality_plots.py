"""Plots of scores against sparsity, and of the share of the pruning loss that is won back."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.columns import chance_level
from analysis.figures import LINE, Label, curve, finish, label_at_the_right, level, new_figure, plain_ticks, split
from analysis.groups import Group, check_one_machine
from analysis.lines import Line, contenders, lines_of, reference_of, told_apart
from analysis.measures import ACCURACY, ANSWERS_LOSS, HELDOUT_LOSS, number
from analysis.notes import slug, title_of
from analysis.results import CONTROLS
from analysis.statistics import ALPHA, Sample, between, difference, paired_item_error
from analysis.style import DOTTED, Style, name_of, order_of, style_of

__all__ = ["Drawn", "about_accuracy", "about_seeds", "against_lora", "by_sparsity", "of_runs", "recovery"]
__all__ += ["styles_of", "with_every_end_of_lora"]

# The name of a plot, and the figure or the reason why there is none.
Drawn = tuple[str, Figure | str]
TUNED_DENSE = replace(style_of("dense"), marker="d", filled=False)
CHANCE = Style("chance", "#999999", "None", DOTTED)
# Letters of a method's name that fit beside the axis.
NAME_LETTERS = 20
# What is compared with LoRA: its title, how it is measured, the sign with which more is better, and its unit.
DISTANCES = {
    "answers": ("Held-out answers", ANSWERS_LOSS, -1, "nats per token"),
    "text": ("Plain text", HELDOUT_LOSS, -1, "nats per token"),
    "accuracy": ("Average accuracy", ACCURACY, 1, "points"),
}


def recovery(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Share of the pruning loss that each method wins back: 0 is the pruned model, 100 the dense one.

    A hollow mark is the dense model with the same fine-tuning. It can be beyond 100: fine-tuning also teaches what
    pruning did not take away.
    """
    for group in of_runs(groups):
        name = f"recovery_{slug(title_of(group))}"
        lines = lines_of(group, controls=True)
        dense, pruned = (_score_of_control(lines, control) for control in CONTROLS)
        trained = [line for line in with_every_end_of_lora(lines) if line.sample(ACCURACY).n]
        lost = difference(dense, pruned) if dense.n and pruned.n else None
        if not trained or lost is None:
            yield name, "needs the scores of the dense, the pruned and a fine-tuned model"
        elif lost.p >= ALPHA or lost.mean < 0:
            yield name, f"pruning cost {lost.mean:.1f} points, no more than noise: nothing to win back"
        else:
            controls = {line.method: line.sample(ACCURACY) for line in _tuned_dense(lines)}
            figure = _recovery(trained, controls, pruned.mean, lost.mean)
            note = f"{about_seeds(trained)} 0 is the pruned model ({pruned.mean:.1f} %), 100 the dense one "
            note += f"({dense.mean:.1f} %). {about_accuracy(group.runs)}"
            note += " Hollow diamond: the dense model after the same fine-tuning." if controls else ""
            yield name, finish(figure, f"Share of the pruning loss won back: {title_of(group)}", note)


def against_lora(groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Distance of each method from LoRA with its adapter, paired over seeds and items; right is better."""
    for group in of_runs(groups):
        lines = with_every_end_of_lora(lines_of(group, controls=False))
        for quantity, (title, measure, sign, unit) in DISTANCES.items():
            samples = dict(enumerate(line.sample(measure) for line in lines))
            pairs = {place: reference_of(line, lines) for place, line in enumerate(lines)}
            seeds = {a: samples[a].values.keys() & samples[b].values.keys() for a, b in pairs.items() if b is not None}
            pairs = {a: b for a, b in pairs.items() if a != b and seeds.get(a)}
            name = f"{quantity}_against_lora_{slug(title_of(group))}"
            if not pairs:
                yield name, "needs the scores of LoRA and of another method with the same settings and seeds"
                continue
            drawn = [lines[place] for place in pairs]
            figure, axes, rows = _rows([line.label for line in drawn])
            for row, style, (a, b) in zip(rows, styles_of(drawn), pairs.items(), strict=True):
                found = between(a, b, samples, {place: line.pool for place, line in enumerate(lines)})
                error = found.error if found else paired_item_error(samples[a], samples[b])
                distance = np.mean([samples[a].values[seed] - samples[b].values[seed] for seed in seeds[a]])
                curve(axes, style, [sign * distance], [row], error_x=[error])
            axes.axvline(0, color=style_of("lora", "adapter").colour, zorder=1)
            axes.set_xlabel(f"better than LoRA by ({unit})")
            note = f"0 is LoRA with its adapter, not merged. Mean of {_seeds(drawn)}. Bar: standard error of the "
            note += "difference over seeds and test items; of one seed, over the items alone."
            yield name, finish(figure, f"{title} against LoRA: {title_of(group)}", note)


def of_runs(groups: list[Group]) -> list[Group]:
    """The tables of pruned models that were trained and scored, of mode=run."""
    return [group for group in groups if group.axes["mode"] == "run" and not group.runs.empty]


def with_every_end_of_lora(lines: list[Line]) -> list[Line]:
    """One line for each training, but for LoRA every end state: beside the weights, re-masked, and with zeros lost."""
    lora = [line for line in lines if (line.method, line.role) == ("lora", "method") and not line.rows.empty]
    lora = [replace(line, label=f"{line.label}{told_apart(line, lora)}") for line in lora]
    others = [line for line in contenders(lines) if line.method != "lora"]
    return sorted([*lora, *others], key=lambda line: order_of(line.method))


def styles_of(lines: list[Line]) -> list[Style]:
    """The style of each line's method; further lines of a method have its colour and marker, and shorter dashes."""
    seen: dict[tuple[str, str | None], int] = defaultdict(int)
    styles = []
    for line in lines:
        style = style_of(line.method, line.end_state)
        number = seen[line.method, line.end_state]
        seen[line.method, line.end_state] += 1
        styles.append(replace(style, name=line.label, line=(0, (5 / number, 1.5)) if number else style.line))
    return styles


def about_seeds(lines: Iterable[Line]) -> str:
    """What a mark and its bar are."""
    seeds = _seeds(lines)
    return "One seed." if seeds == "1 seed" else f"Mean and standard deviation of {seeds}."


def _seeds(lines: Iterable[Line]) -> str:
    """How many there are: ``1 seed``, ``3 seeds``, ``1 to 3 seeds``."""
    counts = sorted({line.n for line in lines})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + f" seed{'s' * (counts[-1] > 1)}"


def about_accuracy(rows: pd.DataFrame) -> str:
    """How many tasks are averaged, and what guessing reaches."""
    tasks = next((tasks for tasks in rows.averaged if tasks), [])
    return f"Accuracy: average of {len(tasks)} tasks, chance {chance_level(tasks):.1f} %." if tasks else ""


def by_sparsity(quantity: str, label: str, groups: list[Group], mix: bool) -> Iterator[Drawn]:
    """Accuracy or perplexity (logarithmic) against unstructured sparsity, one figure for each model and pruner.

    Horizontal lines are the dense model, as it is and with the same fine-tuning, and the chance level.
    """
    for (model, pruner), family in _families(groups).items():
        name = f"{quantity}_by_sparsity_{model}_{pruner}"
        found: dict[tuple[str, str | None], list[tuple[float, Line]]] = defaultdict(list)
        for group in family:
            for line in with_every_end_of_lora(lines_of(group, controls=False)):
                if line.sample(number(quantity)).n:
                    found[line.method, line.end_state].append((group.axes["sparsity"], line))
        runs = pd.concat([group.runs for group in family])
        if not mix and not runs.empty:
            check_one_machine(runs)
        series = {key: points for key, points in found.items() if len({x for x, _ in points}) > 1}
        several = {
            name_of(method) for (method, _), points in found.items() if len(points) > len({x for x, _ in points})
        }
        if not series:
            yield name, "needs a method at two or more sparsities"
        elif several:
            yield name, f"more than one line for {', '.join(sorted(several))}: name the folder of one sweep"
        else:
            figure = _sparsity_figure(series, family, quantity, label)
            note = about_seeds(line for points in series.values() for _, line in points)
            note += f" {about_accuracy(runs)}" if quantity == "accuracy" else ""
            title = f"{label.partition(' (')[0].capitalize()} by sparsity: {model}, pruned by {pruner}"
            yield name, finish(figure, title, note)
            if len(series) < len(found):
                left_out = "; ".join(name_of(*key) for key in found if key not in series)
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
    series: dict[tuple[str, str | None], list[tuple[float, Line]]], family: list[Group], quantity: str, label: str
) -> Figure:
    measure = number(quantity)
    controls = pd.concat([group.controls for group in family])
    controls = controls[controls[quantity].notna()]
    dense = controls[controls.method == "dense"].drop_duplicates(quantity)[quantity]
    pruned = controls[controls.method == "pruned"].sort_values("sparsity")
    tuned = {line.label: line for group in family for line in _tuned_dense(lines_of(group, controls=True))}
    levels = [(style_of("dense"), value) for value in dense]
    levels += [(replace(style_of(line.method), name=name, line=DOTTED), line.sample(measure).mean)
               for name, line in tuned.items()]  # fmt: skip
    tasks = next((tasks for group in family for tasks in group.runs.averaged if tasks), [])
    parts = split(sorted(series, key=lambda key: order_of(key[0])), most=10)
    figure, axes = new_figure(len(parts), height=2.6, share_y=True)
    labels: list[list[Label]] = [[] for _ in axes]
    for panel, part, of_panel in zip(axes, parts, labels, strict=True):
        of_panel += [level(panel, style, value) for style, value in levels]
        if len(pruned):
            of_panel.append(_line(panel, style_of("pruned"), pruned.sparsity, pruned[quantity]))
        for key in part:
            x, lines = zip(*sorted(series[key], key=lambda point: point[0]), strict=True)
            samples = [line.sample(measure) for line in lines]
            of_panel.append(_line(panel, style_of(*key), x, [s.mean for s in samples], [s.std for s in samples]))
        panel.set_ylabel(label)
        if quantity == "perplexity":
            panel.set_yscale("log")
            plain_ticks(panel.yaxis)
    for panel, of_panel in zip(axes, labels, strict=True):
        low, _ = panel.get_ylim()
        if quantity == "accuracy" and tasks and low < chance_level(tasks) + 5:  # elsewhere the note says it
            of_panel.append(level(panel, CHANCE, chance_level(tasks)))
        label_at_the_right(panel, of_panel)
    axes[-1].set_xticks(sorted({x for points in series.values() for x, _ in points}))
    axes[-1].set_xlabel("sparsity")
    return figure


def _line(
    axes: Axes, style: Style, x: Sequence[float], y: Sequence[float], error: Sequence[float] | None = None
) -> Label:
    """A curve, and its label at the last point."""
    x, y = list(x), list(y)
    curve(axes, style, x, y, error)
    return Label(style.name, x[-1], y[-1], style.colour)


def _recovery(lines: list[Line], controls: dict[str, Sample], pruned: float, lost: float) -> Figure:
    """One row for each method: mean and standard deviation over the seeds, and its control."""
    figure, axes, rows = _rows([line.label for line in lines])
    for row, line, style in zip(rows, lines, styles_of(lines), strict=True):
        scores = line.sample(ACCURACY)
        share = Sample({seed: 100 * (value - pruned) / lost for seed, value in scores.values.items()})
        curve(axes, style, [share.mean], [row], error_x=[share.std])
        if line.method in controls and line.headline:
            curve(axes, replace(TUNED_DENSE, name=f"{line.method} dense"),
                  [100 * (controls[line.method].mean - pruned) / lost], [row])  # fmt: skip
    for x, control in ((0, "pruned"), (100, "dense")):
        style = style_of(control)
        axes.axvline(x, color=style.colour, linestyle=style.line, zorder=1)
        axes.annotate(control, (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
    axes.set_xlabel("share won back (%)")
    return figure


def _rows(names: list[str]) -> tuple[Figure, Axes, np.ndarray]:
    """A figure with a row for each name, its axes, and the heights of the rows."""
    wrapped = [textwrap.wrap(name, NAME_LETTERS) for name in names]
    heights = np.array([len(name) for name in wrapped])  # a row is as high as its name
    rows = heights.cumsum() - heights / 2 - 0.5
    figure, (axes,) = new_figure(height=1.5 * LINE * heights.sum() + 0.6)
    axes.set_yticks(rows, ["\n".join(name) for name in wrapped])
    axes.set_ylim(heights.sum() - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)  # so that the last number below the axis is whole
    return figure, axes, rows


def _tuned_dense(lines: list[Line]) -> list[Line]:
    """The controls that are the dense model with the fine-tuning of a method."""
    found = [line for line in lines if line.role == "control" and line.method not in CONTROLS]
    return [line for line in found if not line.rows.empty and (line.rows.sparsity == 0).all()]


def _score_of_control(lines: list[Line], control: str) -> Sample:
    found = [line.sample(ACCURACY) for line in lines if line.method == control and not line.rows.empty]
    return found[0] if found else Sample({})
