"""The embedded default: a small world in plain English, its texts and tasks, and a language model trained on it.

Everything is generated from a seed, so that nothing needs a network; only the trained model is shipped.
"""

import itertools
import random
from functools import lru_cache
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
ITEMS_PER_TASK = 600
VALIDATION_ITEMS_PER_TASK = 200
TEXTS_PER_SPLIT = {"pretrain": 20_000, "calibration": 1_000, "heldout": 1_000}
INSTRUCTION_ROWS = 8_000


@lru_cache
def texts(split: str) -> list[str]:
    """Documents of `split`: "pretrain" (the beginning of an endless stream), "calibration" or "heldout"."""
    from harness.microworld.corpus import documents

    if split not in TEXTS_PER_SPLIT:
        raise ValueError(f"split={split!r} is not one of {', '.join(TEXTS_PER_SPLIT)}")
    return list(itertools.islice(documents(split), TEXTS_PER_SPLIT[split]))


@lru_cache
def instruction_rows(split: str = "train") -> list[dict[str, str]]:
    """Instruction data for fine-tuning: rows with instruction, input and output."""
    from harness.microworld.corpus import tuning_row
    from harness.microworld.world import build

    if split != "train":
        raise ValueError(f"split={split!r}: the instruction data has only the split 'train'")
    rng = random.Random("instructions")
    return [tuning_row(build(), rng) for _ in range(INSTRUCTION_ROWS)]


@lru_cache
def task_rows(task: str, split: str = "test") -> list[dict]:
    """Distinct items of `task`, with the columns of the real data set of that name.

    600 "test" items, or 200 others, drawn alike and as absent from all training data, to choose hyper-parameters by
    ("validation").
    """
    from harness.microworld.questions import distinct_items

    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    if split == "test":
        return distinct_items(task, ITEMS_PER_TASK)
    if split == "validation":
        return distinct_items(task, ITEMS_PER_TASK + VALIDATION_ITEMS_PER_TASK)[ITEMS_PER_TASK:]
    raise ValueError(f"split={split!r} is not one of test, validation")
