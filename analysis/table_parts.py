"""What a table is made of: cells in rows, the columns that say how they are shown, and the words around them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.columns import Column
from analysis.style import name_of

__all__ = ["Cell", "Row", "Table"]


@dataclass(frozen=True)
class Cell:
    """One number with its spread.

    Attributes:
        mean: Over the seeds; NaN where nothing was measured.
        std: Over the seeds; NaN for fewer than two. Of a difference: its standard error.
        n: Number of seeds.
        item_error: Standard error over the test items; NaN for what is no mean over items.
        best: Better than every other row by more than noise.
        out_of_memory: Nothing was measured because the run did not fit.
    """

    mean: float = math.nan
    std: float = math.nan
    n: int = 0
    item_error: float = math.nan
    best: bool = False
    out_of_memory: bool = False

    def text(self, column: Column) -> str:
        """What stands in the table: `76.1 ± 0.3`, a dash or OOM."""
        if math.isnan(self.mean):
            return "OOM" if self.out_of_memory else "-"
        spread = "" if math.isnan(self.std) or not column.spread else f" ± {column.show(self.std).lstrip('+')}"
        return column.show(self.mean) + spread


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        method: As on the command line; "dense" and "pruned" are models without fine-tuning.
        end_state: adapter, merged, remasked, dense, or None.
        role: control or method.
        label: The name for readers.
        choices: Text by config key, for the keys of `Table.choices`.
        headline: Whether this is the first end state of its training; the others repeat its cost.
        n: Number of seeds; 0 for a model without one.
        cells: By name of column.
        keys: Keys of the runs, `paths` their result files.
    """

    method: str
    end_state: str | None
    role: str
    label: str
    choices: Mapping[str, str]
    headline: bool
    n: int
    cells: Mapping[str, Cell]
    keys: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """All rows of one group.

    Attributes:
        title: Model, pruner, pattern and protocol for readers.
        axes: Value by axis, and by protocol key.
        choices: Header by config key, of the columns that tell rows of one method apart.
        quality: Columns of scores; empty if nothing was scored.
        cost: Columns of size, memory and time; empty if nothing was trained.
        rows: In the order in which they are shown.
        notes: What a reader must know of these numbers.
        pooling: Over what the variance over the seeds was pooled; None where nothing is tested.
        failures: One line for each run that has none.
    """

    title: str
    axes: Mapping[str, Any]
    choices: Mapping[str, str]
    quality: Sequence[Column]
    cost: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str]
    pooling: str | None
    failures: Sequence[str]

    @property
    def remarks(self) -> list[str]:
        """All that stands below the table."""
        return [*self.notes, *filter(None, [self.pooling])]

    @property
    def trainings(self) -> list[Row]:
        """The rows that have a cost: every training once, whatever became of its adapter."""
        rows = [row for row in self.rows if row.role == "method" and row.headline]
        return [replace(row, label=name_of(row.method)) for row in rows]
