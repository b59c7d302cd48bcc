"""The averages of several tables side by side, as in the papers' main tables: a column for each way of pruning."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from analysis.columns import Column
from analysis.groups import AXES
from analysis.notes import settings
from analysis.table_parts import Cell, Row, Table

__all__ = ["AVERAGE", "side_by_side"]

AVERAGE, DIFFERENCE = "average", "average_minus_lora"
# What the tables of one comparison may differ in.
PRUNING = ("pruner", "pattern", "sparsity", "label", "prune.seed")
# Costs that may be the same whatever is zero.
COSTS = ("trainable", "train_peak_bytes", "flops")


def side_by_side(tables: Sequence[Table]) -> list[Table]:
    """One table for each model and protocol that was trained at several sparsities, after several pruners or draws of
    the samples that a pruner calibrates on.

    Cells are those of the single tables: mean ± standard deviation of the average, bold by the test within its column,
    and the difference from LoRA with its standard error.
    """
    families: dict[str, list[Table]] = {}
    for table in tables:
        if any(column.name == AVERAGE for column in table.quality) and table.trainings:
            key = str({axis: value for axis, value in table.axes.items() if axis not in PRUNING})
            families.setdefault(key, []).append(table)
    return [_joined(sorted(family, key=_order)) for family in families.values() if len(family) > 1]


def _order(table: Table) -> tuple[str, bool]:
    """Unstructured zeros before patterns; within them the tables have the right order."""
    return table.axes["pruner"], table.axes["pattern"] != "unstructured"


def _joined(tables: list[Table]) -> Table:
    first = tables[0]
    by_pruner, by_seed = (len({table.axes.get(axis) for table in tables}) > 1 for axis in ("pruner", "prune.seed"))
    choices = {key: header for table in tables for key, header in table.choices.items()}
    heads = [_head(table.axes, by_pruner, by_seed) for table in tables]
    columns = [column for table, head in zip(tables, heads, strict=True) for column in _columns(table, head)]
    rows: dict[tuple[object, ...], dict[int, Row]] = {}
    for number, table in enumerate(tables):
        for row in table.rows:
            same = (row.role, row.method, row.end_state, *(row.choices.get(key, "-") for key in choices))
            while number in rows.get(same, {}):  # a control that was scored differently in some runs
                same = (*same, "again")
            rows.setdefault(same, {})[number] = row
    costs = [replace(column, spread=False) for column in first.cost if _is_shared(column, rows.values())]
    protocol = settings({key: value for key, value in first.axes.items() if key not in (*AXES, *PRUNING)})
    pruner = [] if by_pruner else [first.axes["pruner"]]
    return Table(
        title=", ".join([first.axes["model"], *pruner, "averages", *protocol]),
        axes={axis: value for axis, value in first.axes.items() if axis not in PRUNING},
        choices=choices,
        quality=[*columns, *costs],
        cost=(),
        rows=[_row(of_tables, heads, choices, costs) for of_tables in rows.values()],
        notes=[note for note in first.notes if all(note in table.notes for table in tables)],
        failures=(),
        pooling=_pooling(tables, heads),
    )


def _head(axes: Mapping[str, object], by_pruner: bool, by_seed: bool) -> str:
    pruner = f"{axes['pruner']} " if by_pruner else ""
    return f"{pruner}{axes['label']}" + (f", prune seed {axes['prune.seed']}" if by_seed else "")


def _pooling(tables: Sequence[Table], heads: Sequence[str]) -> str | None:
    """What the tables say, once if all say the same."""
    said = dict(zip(heads, (table.pooling for table in tables), strict=True))
    if len(set(said.values())) == 1:
        return tables[0].pooling
    return " ".join(f"{head}: {text}" for head, text in said.items() if text)


def _columns(table: Table, head: str) -> Iterator[Column]:
    for column in table.quality:
        if column.name == AVERAGE:
            yield replace(column, name=f"{AVERAGE} {head}", title=head)
        elif column.name == DIFFERENCE:
            yield replace(column, name=f"{DIFFERENCE} {head}")


def _row(
    of_tables: Mapping[int, Row], heads: Sequence[str], choices: Mapping[str, str], costs: Sequence[Column]
) -> Row:
    """One line from those of the tables that have it, by number of table."""
    some = next(iter(of_tables.values()))
    cells = {}
    for number, head in enumerate(heads):
        known = of_tables[number].cells if number in of_tables else {}
        cells |= {f"{name} {head}": known.get(name, Cell()) for name in (AVERAGE, DIFFERENCE)}
    found = of_tables.values()
    return replace(
        some,
        choices={key: some.choices.get(key, "-") for key in choices},
        n=min(row.n for row in found),  # a cell with more seeds shows its own spread
        cells=cells | {column.name: some.cells[column.name] for column in costs},
        keys=tuple(dict.fromkeys(key for row in found for key in row.keys)),
        paths=tuple(dict.fromkeys(path for row in found for path in row.paths)),
    )


def _is_shared(column: Column, rows: Iterable[Mapping[int, Row]]) -> bool:
    """Whether this is a cost that the zeros do not change: the same in all tables, as it is shown."""
    cells = [[row.cells[column.name] for row in of_tables.values()] for of_tables in rows]
    return column.name in COSTS and all(len({column.show(cell.mean) for cell in same}) == 1 for same in cells)
