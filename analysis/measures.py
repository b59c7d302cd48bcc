"""What a number of a run is read from in a row of `results.load`: value, error over the test items, and the items."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.statistics import Items, Sample

__all__ = ["ACCURACY", "ANSWERS_LOSS", "HELDOUT_LOSS", "Measure", "number", "task_accuracy", "task_margin"]


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
    return _of_task(task, "tasks", "task_stderr", "task_items")


def task_margin(task: str) -> Measure:
    """By how much the right answers of one task are likelier than the best wrong ones, in nats."""
    return _of_task(task, "margin", "margin_stderr", "margin_items")


def _of_task(task: str, values: str, errors: str, items: str) -> Measure:
    """A number by task, in these columns."""
    return Measure(
        lambda row: row[values].get(task, math.nan),
        lambda row: row[errors].get(task, math.nan),
        lambda row: _items(row[items], [task]),
    )


def _items(known: Mapping[str, np.ndarray], tasks: list[str]) -> Items | None:
    return [known[task] for task in tasks] if tasks and all(task in known for task in tasks) else None


def _loss(name: str) -> Measure:
    return Measure(
        lambda row: row[f"{name}_loss"],
        lambda row: row[f"{name}_stderr"],
        lambda row: None if row[f"{name}_items"] is None else [row[f"{name}_items"]],
    )


ACCURACY = Measure(
    lambda row: row.accuracy, lambda row: row.accuracy_stderr, lambda row: _items(row.task_items, row.averaged)
)
# The windows of the text, and the answers, are their items.
HELDOUT_LOSS, ANSWERS_LOSS = _loss("heldout"), _loss("answers")
