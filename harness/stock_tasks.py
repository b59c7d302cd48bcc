"""The seven zero-shot tasks of the papers, lm-eval's own: what their items hold, and items in a local file."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.corpora import read_rows
from harness.errors import BadInput

__all__ = ["ZERO_SHOT", "Item", "local_items"]

Item = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """What a column of an item may hold: in words, and as a test of its value and of the item."""

    allowed: str
    holds: Callable[[Any, Item], bool]


@dataclass(frozen=True)
class StockTask:
    """What has to be known of one of lm-eval's own tasks.

    Attributes:
        split: The split that lm-eval scores.
        folder: Where lm-eval keeps the task; naming it spares an index of its ten thousand task files.
        columns: Columns that its prompt and its answer read; each test relies on those before it.
    """

    split: str
    folder: str
    columns: dict[str, Column]


def _are_answers(value: Any) -> bool:
    """Two or more texts that are not blank."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) and text.strip() for text in value)


def _are_choices(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"text", "label"}:
        return False
    label = value["label"]
    return _are_answers(value["text"]) and _are_answers(label) and len(value["text"]) == len(label) == len(set(label))


TEXT = Column("text", lambda value, item: isinstance(value, str))
ANSWER = Column("text that is not blank", lambda value, item: isinstance(value, str) and value.strip() != "")
GAPPED = Column("text with a _ for the answer", lambda value, item: isinstance(value, str) and "_" in value)
YES_OR_NO = Column("0 or 1", lambda value, item: type(value) is int and value in (0, 1))
ONE_OR_TWO = Column('"1" or "2"', lambda value, item: value in ("1", "2"))
ENDINGS = Column("two or more texts that are not blank", lambda value, item: _are_answers(value))
ENDING = Column(
    "the number of an ending, from 0",
    lambda value, item: type(value) in (int, str) and str(value) in map(str, range(len(item["endings"]))),
)
CHOICES = Column(
    "a mapping of text and label, each two or more texts that are not blank, all labels different",
    lambda value, item: _are_choices(value),
)
CHOICE = Column("one of choices.label", lambda value, item: value in item["choices"]["label"])
PADDED_CHOICE = Column(  # the real test set of OpenBookQA has such keys
    "one of choices.label, behind blanks at most",
    lambda value, item: isinstance(value, str) and value.lstrip() in item["choices"]["label"],
)
ARC_COLUMNS = {"question": TEXT, "choices": CHOICES, "answerKey": CHOICE}
ZERO_SHOT = {
    "boolq": StockTask("validation", "super_glue/boolq", {"question": TEXT, "passage": TEXT, "label": YES_OR_NO}),
    "rte": StockTask("validation", "glue/rte", {"sentence1": TEXT, "sentence2": TEXT, "label": YES_OR_NO}),
    "hellaswag": StockTask(
        "validation",
        "hellaswag",
        {"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": ENDINGS, "label": ENDING},
    ),
    "winogrande": StockTask(
        "validation", "winogrande", {"sentence": GAPPED, "option1": ANSWER, "option2": ANSWER, "answer": ONE_OR_TWO}
    ),
    "arc_easy": StockTask("test", "arc", ARC_COLUMNS),
    "arc_challenge": StockTask("test", "arc", ARC_COLUMNS),
    "openbookqa": StockTask(
        "test", "openbookqa", {"question_stem": TEXT, "choices": CHOICES, "answerKey": PADDED_CHOICE}
    ),
}


def local_items(root: str, task: str) -> list[Item]:
    """The items of a stock task in a folder, with the columns that it reads.

    Raises:
        BadInput: No such file, a malformed line, a missing column, or one that holds something else.
    """
    columns = ZERO_SHOT[task].columns
    file = os.path.join(root, task, f"{ZERO_SHOT[task].split}.jsonl")
    items: list[Item] = []
    for number, row in enumerate(read_rows(file, key="eval.data_root"), start=1):
        for name, column in columns.items():
            if name not in row:
                raise BadInput(f"eval.data_root: row {number} of {file} has no column {name!r}")
            allowed = None if column.holds(row[name], row) else column.allowed
            if items and type(row[name]) is not type(items[0][name]):
                allowed = allowed or "of the same type in all rows"
            if allowed:
                shown = reprlib.repr(row[name])
                raise BadInput(
                    f"eval.data_root: column {name!r} of row {number} of {file} must be {allowed}, not {shown}"
                )
        items.append({name: row[name] for name in columns})
    if not items:
        raise BadInput(f"eval.data_root: {file} is empty")
    return items
