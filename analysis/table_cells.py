"""What a table is made of: cells in rows, the columns that say how they are shown, and the words around them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.columns import Column
from analysis.lines import Line
from analysis.table_writer import Bold, TextTable

__all__ = ["Cell", "Row", "Section", "Table"]


@dataclass(frozen=True)
class Cell:
    """One number with its spread.

    Attributes:
        mean: Over the seeds; NaN where nothing was measured.
        std: Over the seeds; NaN for fewer than two. Of a difference: its standard error.
        best: Better than every other row by more than noise.
        out_of_memory: Nothing was measured because the run did not fit.
    """

    mean: float = math.nan
    std: float = math.nan
    best: bool = False
    out_of_memory: bool = False

    def text(self, column: Column) -> str:
        """What stands in the table: `76.1 ± 0.3`, a dash or OOM."""
        if math.isnan(self.mean):
            return "OOM" if self.out_of_memory else "-"
        spread = "" if math.isnan(self.std) or not column.spread else f" ± {column.show(self.std).lstrip('+')}"
        text = column.show(self.mean) + spread
        return Bold(text) if self.best else text


@dataclass(frozen=True)
class Row(Line):
    """A line with its cells, by name of column."""

    cells: Mapping[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """What is shown of one or several tables.

    Attributes:
        title: Model, pruner, pattern and protocol for readers.
        panels: By title what is shown at once, scores or costs.
        notes: What a reader must know of these numbers.
        cautions: Where the runs come from, and over what the variance over the seeds was pooled.
        failures: One line for each run that has no result.
    """

    title: str
    panels: Mapping[str, TextTable]
    notes: Sequence[str]
    cautions: Sequence[str]
    failures: Sequence[str] = ()


@dataclass(frozen=True)
class Table(Section):
    """All rows of one group.

    Attributes:
        axes: Value by axis, and by protocol key.
        choices: Header by config key, of the columns that tell rows of one method apart.
        quality: Columns of scores; empty if nothing was scored.
        margins: Columns of margins; empty if none is recorded.
        cost: Columns of size, memory and time; empty if nothing was trained.
        rows: In the order in which they are shown.
    """

    axes: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    quality: Sequence[Column] = ()
    margins: Sequence[Column] = ()
    cost: Sequence[Column] = ()
    rows: Sequence[Row] = ()
