"""What a number of a run is read from in a row of `results.load`: value, error over the test items, and the items."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis.statistics import Items, Sample

__all__ = ["ACCURACY", "HELDOUT_LOSS", "Measure", "number", "task_accuracy"]


@dataclass(frozen=True)
class Measure:
    """A number of one run.

    Attributes:
        value: The number, NaN where it was not measured.
        item_error: Its standard error over the test items, if it is a mean over items.
        items: The scores of the items, if they are recorded, task by task.
    """

    value: Callable[[pd.Series], float]
    item_error: Callable[[pd.Series], float] | None = None
    items: Callable[[pd.Series], Items | None] = lambda row: None

    def sample(self, rows: pd.DataFrame, factor: float = 1.0) -> Sample:
        """`factor` times the number by seed, without the runs that do not have it."""
        values, errors, items = {}, [], {}
        for _, row in rows.sort_values("seed", kind="stable").iterrows():  # sums must not depend on names of folders
            value = self.value(row)
            if math.isnan(value):
                continue
            seed = None if math.isnan(row.seed) else int(row.seed)
            values[seed] = factor * value
            errors.append(factor * self.item_error(row) if self.item_error else 0.0)
            if (known := self.items(row)) is not None:
                items[seed] = [factor * task for task in known]
        errors = [error for error in errors if not math.isnan(error)]
        return Sample(values, sum(errors) / len(errors) if errors else 0.0, items)


def number(column: str) -> Measure:
    """The number in a column, which is no mean over items."""
    return Measure(lambda row: row[column])


def task_accuracy(task: str) -> Measure:
    """The accuracy of one task."""
    return Measure(
        lambda row: row.tasks.get(task, math.nan),
        lambda row: row.task_stderr.get(task, math.nan),
        lambda row: _items(row, [task]),
    )


def _items(row: pd.Series, tasks: list[str]) -> Items | None:
    known = row.task_items
    return [known[task] for task in tasks] if tasks and all(task in known for task in tasks) else None


ACCURACY = Measure(lambda row: row.accuracy, lambda row: row.accuracy_stderr, lambda row: _items(row, row.averaged))
# The windows of the text are its items.
HELDOUT_LOSS = Measure(
    lambda row: row.heldout_loss,
    lambda row: row.heldout_stderr,
    lambda row: None if row.heldout_items is None else [row.heldout_items],
)
