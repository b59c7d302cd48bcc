"""The seven zero-shot tasks of the papers, lm-eval's own: what their items hold, and items in a local file."""

from __future__ import annotations

import os
import reprlib
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationInfo

from harness.corpora import read_rows
from harness.errors import BadInput

__all__ = ["ZERO_SHOT", "local_files", "local_items"]


class StockTask(NamedTuple):
    """The split of a task that lm-eval scores, its folder in lm-eval, and the columns that prompt and answer read."""

    split: str
    folder: str
    item: type[BaseModel]


class Choices(BaseModel, extra="forbid"):
    """Answers and their labels."""

    text: Answers
    label: Answers

    @pydantic.model_validator(mode="after")
    def _check(self) -> Choices:
        if not len(self.text) == len(self.label) == len(set(self.label)):
            raise ValueError("must have a label for each text, all different")
        return self


def _is_label(key: str, info: ValidationInfo) -> str:
    if "choices" in info.data and key not in info.data["choices"].label:
        raise ValueError("must be one of choices.label")
    return key


def _is_ending(label: Any, info: ValidationInfo) -> str:
    if "endings" in info.data and str(label) not in map(str, range(len(info.data["endings"]))):
        raise ValueError("must be the number of an ending, from 0")
    return str(label)


def _task(split: str, folder: str, **columns: Any) -> StockTask:
    return StockTask(split, folder, pydantic.create_model("Item", **columns))


Answer = Annotated[str, Field(pattern=r"\S")]
Answers = Annotated[list[Answer], Field(min_length=2)]
Gapped = Annotated[str, Field(pattern="_")]
Ending = Annotated[Any, AfterValidator(_is_ending)]
Label = Annotated[str, AfterValidator(_is_label)]
PaddedLabel = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_is_label)]  # as the Hub has them
ZERO_SHOT = {
    "boolq": _task("validation", "super_glue/boolq", question=str, passage=str, label=Literal[0, 1]),
    "rte": _task("validation", "glue/rte", sentence1=str, sentence2=str, label=Literal[0, 1]),
    "hellaswag": _task(
        "validation", "hellaswag", activity_label=str, ctx_a=str, ctx_b=str, endings=Answers, label=Ending
    ),
    "winogrande": _task(
        "validation", "winogrande", sentence=Gapped, option1=Answer, option2=Answer, answer=Literal["1", "2"]
    ),
    "arc_easy": _task("test", "arc", question=str, choices=Choices, answerKey=Label),
    "arc_challenge": _task("test", "arc", question=str, choices=Choices, answerKey=Label),
    "openbookqa": _task("test", "openbookqa", question_stem=str, choices=Choices, answerKey=PaddedLabel),
}


def local_files(eval_cfg: Any) -> list[str]:
    """What is read below ``eval.data_root``: a file for each stock task, and WikiText-2 where its perplexity counts."""
    splits = {task: ZERO_SHOT[task].split for task in eval_cfg["tasks"] if task in ZERO_SHOT}
    if eval_cfg["perplexity"] is not None and eval_cfg["perplexity"]["text"] == "wikitext":
        splits["wikitext"] = "test"
    return [f"{task}/{split}.jsonl" for task, split in splits.items()]


def local_items(root: str, task: str) -> list[dict[str, Any]]:
    """The items of a stock task in a folder, with the columns that it reads.

    Raises:
        BadInput: No such file, a malformed line, a missing column, or one that holds something else.
    """
    split, _, item = ZERO_SHOT[task]
    file = os.path.join(root, task, f"{split}.jsonl")
    items = []
    for number, row in enumerate(read_rows(file, key="eval.data_root"), start=1):
        try:
            items.append(item.model_validate(row).model_dump())
        except pydantic.ValidationError as invalid:
            error = invalid.errors()[0]
            column, reason = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
            place = f"eval.data_root: column {column} of row {number} of {file}"
            raise BadInput(f"{place}: {reason} (found {reprlib.repr(error['input'])})") from None
    if not items:
        raise BadInput(f"eval.data_root: {file} is empty")
    return items
