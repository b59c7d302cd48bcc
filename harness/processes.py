"""The processes of one run: a launcher (torchrun, Accelerate) starts them, and each takes its share of every batch.

All of them go through the same lines. What is read or written once is the business of the first one (`from_first`);
what can be shared out is (`shared_out`); everything else each does for itself, with the same draws. A process that
fails ends alone: the launcher then ends the others. Of one process nothing here is felt, and PyTorch is not imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

from harness.errors import BadInput, one_line

__all__ = ["agree", "begin", "count", "from_first", "gathered", "in_first", "is_first", "let_others_speak"]
__all__ += ["rank", "share", "shared_out", "turns"]

# How long one waits for another, which may be pruning meanwhile. Of one that has died the launcher knows at once.
PATIENCE = timedelta(days=7)
GRACE = 3  # seconds
Value, Item = TypeVar("Value"), TypeVar("Item")
_first_alone = False  # inside of what `from_first` computes, where the others wait for its outcome


def count() -> int:
    """How many processes work on the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that reads and writes for all."""
    return rank() == 0


def begin() -> None:
    """Let the processes find each other: NCCL between GPUs, gloo between CPUs."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def let_others_speak(error: Exception | None = None) -> None:
    """Wait a moment where another process has more to say, whose end will end this one.

    Of a failure that all have in common the first process tells; of one that only shows that another process has gone,
    that one, or the launcher.
    """
    if not is_first() or (count() > 1 and _is_broken_link(error)):
        time.sleep(GRACE)


def _is_broken_link(error: Exception | None) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def in_first(context: AbstractContextManager) -> AbstractContextManager:
    """The context in the first process, none in the others."""
    return context if is_first() else nullcontext()


def from_first(compute: Callable[[], Value]) -> Value:
    """What `compute` returns in the first process, which alone calls it; in all. It may call this itself.

    Raises:
        Exception: What it raises; in the other processes ``BadInput`` where that is one, else ``RuntimeError``.
    """
    global _first_alone
    if count() == 1 or _first_alone:
        return compute()
    from torch.distributed import broadcast_object_list

    outcome: list[Any] = [None, None]
    failure = None
    if is_first():
        _first_alone = True
        try:
            outcome[0] = compute()
        except Exception as error:
            failure, outcome[1] = error, (isinstance(error, BadInput), one_line(error))
        finally:
            _first_alone = False
    broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        refused, message = outcome[1]
        raise BadInput(message) if refused else RuntimeError(f"process 0 has failed: {message}")
    return outcome[0]


def gathered(value: Value) -> list[Value]:
    """The value of every process, in their order."""
    if count() == 1:
        return [value]
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * count()
    all_gather_object(values, value)
    return values


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that this process takes."""
    return items[rank() :: count()]


def turns(items: Sequence[Item]) -> list[Item]:
    """The items that this process computes in `shared_out`: as many as each, because a pass through a model whose
    weights are shared out is one of all processes. What is over is an item of another one once more."""
    return [*share(items), *items[:1]][: -(-len(items) // count())]


def shared_out(compute: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
    """The values of all items, in their order; each is computed in one of the processes (`turns`)."""
    parts = gathered([compute(item) for item in turns(items)])
    return [parts[number % count()][number // count()] for number in range(len(items))]


def agree(seen: dict[str, Any]) -> None:
    """Compare what the processes work on.

    Args:
        seen: What must be the same in all of them, by its name.

    Raises:
        BadInput: It is not; in every process.
    """
    first, *others = gathered(seen)
    for number, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise BadInput(
                    f"launch.processes={count()}: must all work on the same; process {number} has another {name} than "
                    "process 0"
                )
