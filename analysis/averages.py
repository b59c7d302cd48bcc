"""One score of several tables side by side, as in the papers' main tables: a column for each way of pruning."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from analysis.columns import Column
from analysis.groups import AXES
from analysis.notes import settings
from analysis.render import shared_notes
from analysis.style import order_of
from analysis.table_cells import Row, Section, Table
from analysis.table_writer import TextTable

__all__ = ["AVERAGE", "side_by_side"]

AVERAGE = "average"
# What the tables of one comparison may differ in.
PRUNING = ("pruner", "pattern", "sparsity", "label", "prune.seed")
# Costs that may be the same whatever is zero.
COSTS = ("trainable", "train_peak_bytes", "flops")


def side_by_side(tables: Sequence[Table]) -> list[Section]:
    """One table for each score that is compared with LoRA, model and protocol that was trained at several sparsities,
    after several pruners or draws of the samples that a pruner calibrates on.

    Cells are those of the single tables: mean ± standard deviation of the score, bold by the test within its column,
    and the difference from LoRA with its standard error.
    """
    families: dict[str, list[Table]] = {}
    for table in tables:
        if _compared(table) and table.cost:
            key = str({axis: value for axis, value in table.axes.items() if axis not in PRUNING})
            families.setdefault(key, []).append(table)
    joined = []
    for family in families.values():
        titles = {score: column.base.title for table in family for score, column in _compared(table).items()}
        if len(family) > 1:
            joined += [_joined(sorted(family, key=_order), score, title) for score, title in titles.items()]
    return joined


def _compared(table: Table) -> dict[str, Column]:
    """By name of the score the column that compares it with LoRA."""
    return {column.base.name: column for column in table.quality if column.relative == "difference"}


def _order(table: Table) -> tuple[str, bool]:
    """Unstructured zeros before patterns; within them the tables have the right order."""
    return table.axes["pruner"], table.axes["pattern"] != "unstructured"


def _joined(tables: list[Table], score: str, title: str) -> Section:
    axes = tables[0].axes
    protocol = settings({key: value for key, value in axes.items() if key not in (*AXES, *PRUNING)})
    by_pruner, by_seed = (len({table.axes.get(axis) for table in tables}) > 1 for axis in ("pruner", "prune.seed"))
    heads = [_head(table.axes, by_pruner, by_seed) for table in tables]
    name = "averages" if score == AVERAGE else title.partition(" (")[0]
    return Section(
        title=", ".join([axes["model"], *([] if by_pruner else [axes["pruner"]]), name, *protocol]),
        panels={"Scores": _panel(tables, heads, score)},
        notes=shared_notes(tables),
        cautions=_cautions(tables, heads),
    )


def _head(axes: dict[str, Any], by_pruner: bool, by_seed: bool) -> str:
    pruner = f"{axes['pruner']} " if by_pruner else ""
    return f"{pruner}{axes['label']}" + (f", prune seed {axes['prune.seed']}" if by_seed else "")


def _panel(tables: list[Table], heads: list[str], score: str) -> TextTable:
    choices = {key: header for table in tables for key, header in table.choices.items()}
    lines: dict[tuple[str, ...], dict[int, Row]] = {}  # by what tells them apart, then by number of table
    for number, table in enumerate(tables):
        for row in table.rows:
            same = (row.role, row.method, str(row.end_state), *(_chosen(row, key, table) for key in choices))
            while number in lines.get(same, {}):  # a control that was scored differently in some runs
                same = (*same, "again")
            lines.setdefault(same, {})[number] = row
    lines = dict(sorted(lines.items(), key=lambda item: _place(next(iter(item[1].values())))))
    columns = [_compared(table).get(score) for table in tables]
    # Costs that the zeros do not change are the same in all tables, as they are shown.
    costs = [
        replace(column, spread=False)
        for column in tables[0].cost
        if column.name in COSTS
        and all(len({column.show(row.cells[column.name].mean) for row in of.values()}) == 1 for of in lines.values())
    ]
    difference = next(filter(None, columns)).title
    header = ["method", *choices.values(), "n", *(title for head in heads for title in (head, difference))]
    texts, found = [], [list(of_tables.values()) for of_tables in lines.values()]
    for (_, _, _, *values), of_tables in lines.items():
        some, *_ = of_tables.values()
        counts = sorted({row.n for row in of_tables.values() if row.n})
        n = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "-"
        of_line = [some.label, *values[: len(choices)], n]
        for number, column in enumerate(columns):
            shown = (column.base, column) if column and number in of_tables else ()
            of_line += [of_tables[number].cells[one.name].text(one) for one in shown] or ["-", "-"]
        texts.append(of_line + [some.cells[column.name].text(column) for column in costs])
    keys = [list(dict.fromkeys(key for row in rows for key in row.rows.key)) for rows in found]
    controls = sum(rows[0].role == "control" for rows in found)
    return TextTable([*header, *(c.title for c in costs)], texts, keys, [rows[0].method for rows in found], controls)


def _chosen(row: Row, key: str, table: Table) -> str:
    """A choice for readers, also where all rows of a table have the same."""
    if key in table.choices or row.rows.empty:
        return row.text(key)
    return replace(row, choices=row.rows["values"].iloc[0]).text(key)


def _place(row: Row) -> tuple[bool, tuple[int, str]]:
    """Sorts the rows of several tables as each of them has its own."""
    if row.role == "control":
        return False, ({"dense": 0, "pruned": 2}.get(row.method, 1), "")
    return True, order_of(row.method)


def _cautions(tables: Sequence[Table], heads: Sequence[str]) -> list[str]:
    """What the tables say, with the heads of those that say it, unless all do."""
    said: dict[str, list[str]] = {}
    for table, head in zip(tables, heads, strict=True):
        for text in table.cautions:
            said.setdefault(text, []).append(head)
    return [text if len(of) == len(tables) else f"{', '.join(of)}: {text}" for text, of in said.items()]
