"""Tables of quality and of cost: a row for each method and end state, as Markdown, LaTeX and CSV.

One table for each model, pruner, pattern and protocol (`groups`), before them their averages side by side. Cells are
mean ± standard deviation over the seeds. The best is bold only where it is no accident (`statistics`): scores by a
paired test over seeds and items, step times and byte counts by ranges that do not overlap. Controls are in every table
and out of the contest; so are, for scores, models that lost zeros: they have solved an easier task.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from analysis import render
from analysis.averages import side_by_side
from analysis.columns import Column, cost_columns, margin_columns, quality_columns
from analysis.groups import Group, groups_of
from analysis.lines import Line, choice_headers, lines_of, reference_of, told_apart
from analysis.notes import cautions_of, failures_of, notes_of, title_of
from analysis.results import add_run_arguments, load, output_folder, publish
from analysis.statistics import CONDITION, Sample, best, best_range, between, differences
from analysis.style import name_of
from analysis.table_cells import Cell, Row, Table
from analysis.table_writer import TextTable

__all__ = ["add_arguments", "build", "run"]


def build(results: pd.DataFrame, *, mix: bool = False) -> list[Table]:
    """Tables of everything that `results.load` has read.

    Raises:
        ValueError: A table would mix devices or library versions, and `mix` is false.
    """
    return [_table(group) for group in groups_of(results, mix=mix)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Places of runs, and whether machines may be mixed; for plots and the report too."""
    add_run_arguments(parser)
    parser.add_argument(
        "--mix", action="store_true", help="allow several devices or library versions in one table or plot"
    )


def run(options: argparse.Namespace) -> int:
    """Write `tables.md`, `tables.tex`, `tables.csv` (all numbers) and `differences.csv` (pairs); print the first."""
    tables = build(load(options.runs), mix=options.mix)
    shown = [*side_by_side(tables), *tables]
    output = output_folder(options)
    publish(render.markdown(shown), options, "tables.md")
    (output / "tables.tex").write_text(render.latex(shown), encoding="utf-8")
    for name, numbers in (("tables", render.numbers(tables)), ("differences", _pairwise(tables))):
        numbers.to_csv(output / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    return 0


def _pairwise(tables: Sequence[Table]) -> pd.DataFrame:
    """A row for each pair of lines that have a score which is compared with LoRA, the better one first."""
    records = []
    for table in tables:
        lines = table.rows
        names = [f"{a.label}{told_apart(a, [b for b in lines if b.role == a.role])}" for a in lines]
        for score in (column.base for column in table.quality if column.relative == "difference"):
            samples = {index: line.sample(score.tested or score.measure) for index, line in enumerate(lines)}
            samples = {index: sample for index, sample in samples.items() if sample.n}
            for (a, b), found in differences(samples, _pools(lines)).items():
                a, b = (a, b) if (found.mean >= 0) == (score.better == "more") else (b, a)
                numbers = (abs(found.mean), found.error, found.holm, found.p, found.n, found.degrees, found.pooled)
                records.append((table.title, score.name, names[a], names[b], *numbers, CONDITION))
    columns = ("table", "score", "a", "b", "difference", "error", "holm", "p", "n", "degrees", "pooled", "condition")
    pairs = pd.DataFrame(records, columns=columns)
    return pairs if pairs.score.nunique() > 1 else pairs.drop(columns="score")


def _table(group: Group) -> Table:
    scored = pd.concat([group.controls, group.tuned_dense, group.runs])
    quality, margins = quality_columns(scored), margin_columns(scored)
    cost = cost_columns(group.runs)
    lines = lines_of(group, controls=bool(quality))
    cells: list[dict[str, Cell]] = [{} for _ in lines]
    for column in [*quality, *margins, *cost]:
        compute = _relative_cells if column.relative else _cells
        for of_line, cell in zip(cells, compute(column, lines, group), strict=True):
            of_line[column.name] = cell
    rows = [Row(**vars(line), cells=of_line) for line, of_line in zip(lines, cells, strict=True)]
    # Every training once, whatever became of its adapter.
    trainings = [replace(row, label=name_of(row.method)) for row in rows if row.role == "method" and row.headline]
    choices = choice_headers(group)
    shown = {"Scores": (quality, rows), "Margins of the right answer (nats)": (margins, rows)}
    shown |= {"Size, memory and time": (cost, trainings)}
    return Table(
        title=title_of(group),
        panels={title: _panel(choices, *panel) for title, panel in shown.items() if all(panel)},
        notes=notes_of(group),
        cautions=cautions_of(group, lines if quality else []),
        failures=failures_of(group),
        axes={**group.axes, **group.protocol},
        choices=choices,
        quality=quality,
        margins=margins,
        cost=cost,
        rows=rows,
    )


def _panel(choices: Mapping[str, str], columns: Sequence[Column], rows: Sequence[Row]) -> TextTable:
    header = ["method", *choices.values(), "n", *(column.title for column in columns)]
    texts = [
        [row.label, *map(row.text, choices), str(row.n or "-"), *(row.cells[c.name].text(c) for c in columns)]
        for row in rows
    ]
    controls = sum(row.role == "control" for row in rows)
    return TextTable(header, texts, [list(row.rows.key) for row in rows], [row.method for row in rows], controls)


def _cells(column: Column, lines: list[Line], group: Group) -> list[Cell]:
    samples = [line.sample(column.measure) for line in lines]
    winner = _winner_by_range(column, lines) if column.bounds else _winner_by_test(column, lines, group)
    return [
        Cell(
            mean=sample.mean,
            std=sample.std,
            best=winner is not None and _same_training(line, winner, any_end=column.bounds is not None),
            out_of_memory=line.out_of_memory,
        )
        for line, sample in zip(lines, samples, strict=True)
    ]


def _relative_cells(column: Column, lines: list[Line], group: Group) -> list[Cell]:
    """Ratio of the means, or mean paired difference with its standard error."""
    samples = {index: line.sample(column.base.tested or column.base.measure) for index, line in enumerate(lines)}
    cells = []
    for index, line in enumerate(lines):
        place = reference_of(line, lines)
        own, other = samples[index], Sample({}) if place is None else samples[place]
        if not own.n or not other.n or (place == index and column.relative == "difference"):
            cells.append(Cell())
        elif column.relative == "ratio":
            cells.append(Cell(own.mean / other.mean))
        else:
            paired = between(index, place, samples, _pools(lines))
            cells.append(Cell(own.mean - other.mean) if paired is None else Cell(paired.mean, paired.error))
    return cells


def _winner_by_test(column: Column, lines: list[Line], group: Group) -> Line | None:
    """The line whose score is better than every other one's, among those that did the whole task."""
    if column.better is None:
        return None
    samples = {
        index: line.sample(column.tested or column.measure)
        for index, line in enumerate(lines)
        if line.role == "method" and (group.axes["sparsity"] == 0 or line.keeps_zeros)
    }
    index = best(samples, higher=column.better == "more", pools=_pools(lines))
    return None if index is None else lines[index]


def _winner_by_range(column: Column, lines: list[Line]) -> Line | None:
    """The training whose cost ends before that of every other one begins."""
    sign = 1 if column.better == "less" else -1
    ranges = {}
    for index, line in enumerate(lines):
        if line.role == "method" and line.headline:
            ends = [sign * end for bound in column.bounds for end in line.sample(bound).values.values()]
            if ends:
                ranges[index] = (min(ends), max(ends))
    index = best_range(ranges)
    return None if index is None else lines[index]


def _pools(lines: list[Line]) -> dict[int, str | None]:
    return {index: line.pool for index, line in enumerate(lines)}


def _same_training(line: Line, winner: Line, *, any_end: bool) -> bool:
    """Whether a line is the winner; for a cost, or another end state of the same training."""
    same = (line.role, line.method, line.choices) == (winner.role, winner.method, winner.choices)
    return same and (any_end or line.end_state == winner.end_state)
