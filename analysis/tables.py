"""Tables of quality and of cost: a row for each method and end state, as CSV, Markdown and LaTeX.

One table for each model, pruner, pattern and protocol (`groups`), before them their averages side by side. Cells are
mean ± standard deviation over the seeds. The best is bold only where it is no accident (`statistics`): scores by a
paired test over seeds and items, step times and byte counts by ranges that do not overlap. Controls are in every table
and out of the contest; so are, for scores, models that lost zeros: they have solved an easier task.
"""

import argparse
import math
from collections.abc import Mapping

import pandas as pd

from analysis import render
from analysis.averages import side_by_side
from analysis.columns import Column, cost_columns, quality_columns
from analysis.differences import pairwise
from analysis.groups import Group, groups_of
from analysis.lines import Line, choice_headers, lines_of, reference_of
from analysis.notes import failures_of, notes_of, pooling_of, title_of
from analysis.results import add_run_arguments, load, output_folder
from analysis.statistics import Sample, best, best_range, between
from analysis.table_parts import Cell, Row, Table

__all__ = ["build"]


def build(results: pd.DataFrame, *, mix: bool = False) -> list[Table]:
    """Tables of everything that `results.load` has read.

    Raises:
        ValueError: A table would mix devices or library versions, and `mix` is false.
    """
    return [_table(group) for group in groups_of(results, mix=mix)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, and whether machines may be mixed."""
    add_run_arguments(parser)
    parser.add_argument("--mix", action="store_true", help="allow several devices or library versions in one table")


def run(options: argparse.Namespace) -> int:
    """Write `tables.md`, `tables.csv`, `tables.tex` and `differences.csv`, and print the first."""
    groups = groups_of(load(options.runs), mix=options.mix)
    tables = [_table(group) for group in groups]
    shown = [*side_by_side(tables), *tables]
    output = output_folder(options)
    text = render.markdown(shown)
    for suffix, content in (("md", text), ("csv", render.comma_separated(tables)), ("tex", render.latex(shown))):
        (output / f"tables.{suffix}").write_text(content, encoding="utf-8")
    pairwise(groups).to_csv(output / "differences.csv", index=False, float_format="%.4g", lineterminator="\n")
    print(text)
    return 0


def _table(group: Group) -> Table:
    quality = quality_columns(pd.concat([group.controls, group.tuned_dense, group.runs]))
    cost = cost_columns(group.runs)
    lines = lines_of(group, controls=bool(quality))
    cells: list[dict[str, Cell]] = [{} for _ in lines]
    for column in [*quality, *cost]:
        compute = _relative_cells if column.relative else _cells
        for of_line, cell in zip(cells, compute(column, lines, group), strict=True):
            of_line[column.name] = cell
    return Table(
        title=title_of(group),
        axes={**group.axes, **group.protocol},
        choices=choice_headers(group),
        quality=quality,
        cost=cost,
        rows=[_row(line, of_line, group) for line, of_line in zip(lines, cells, strict=True)],
        notes=notes_of(group),
        pooling=pooling_of(lines) if quality else None,
        failures=failures_of(group),
    )


def _row(line: Line, cells: Mapping[str, Cell], group: Group) -> Row:
    return Row(
        method=line.method,
        end_state=line.end_state,
        role=line.role,
        label=line.label,
        choices={key: line.text(key) for key in group.choices},
        headline=line.headline,
        n=line.n,
        cells=cells,
        keys=tuple(line.rows.key),
        paths=tuple(map(str, line.rows.path)),
    )


def _cells(column: Column, lines: list[Line], group: Group) -> list[Cell]:
    samples = [line.sample(column.measure) for line in lines]
    winner = _winner_by_range(column, lines) if column.bounds else _winner_by_test(column, lines, group)
    return [
        Cell(
            mean=sample.mean,
            std=sample.std,
            n=sample.n,
            item_error=sample.item_error if column.measure.item_error and sample.n else math.nan,
            best=winner is not None and _same_training(line, winner, any_end=column.bounds is not None),
            out_of_memory=line.out_of_memory,
        )
        for line, sample in zip(lines, samples, strict=True)
    ]


def _relative_cells(column: Column, lines: list[Line], group: Group) -> list[Cell]:
    """Ratio of the means, or mean paired difference with its standard error."""
    samples = {index: line.sample(column.base.measure) for index, line in enumerate(lines)}
    cells = []
    for index, line in enumerate(lines):
        place = reference_of(line, lines)
        own, other = samples[index], Sample({}) if place is None else samples[place]
        if not own.n or not other.n or (place == index and column.relative == "difference"):
            cells.append(Cell())
        elif column.relative == "ratio":
            cells.append(Cell(own.mean / other.mean, n=own.n))
        else:
            paired = between(index, place, samples, _pools(lines))
            cells.append(Cell(own.mean - other.mean) if paired is None else Cell(paired.mean, paired.error, paired.n))
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
