"""Time, FLOPs and bytes of the cases of the benchmark, and the two roofs of the machine.

Time. All cases of a level are warmed up, then they take turns: in each round every one of them is timed once, in an
order that is drawn anew. What disturbs the machine for a while disturbs all of them, and a ratio is taken within a
round. A sample is as many calls as take `SAMPLE_SECONDS`, the same number for all cases of the level, with the device
synchronised at both ends.

Bytes. What the operations of a call read and write, each tensor once per operation, as if no cache lay between them.
An operation that only makes a view reads nothing. The product over the time is no measured bandwidth: it says how far
the traffic of this formulation explains the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from harness.bench.cases import Case
from harness.flops import CountFlops

__all__ = ["Roofs", "Work", "roofs", "sample", "work_of"]

SAMPLE_SECONDS = {"cpu": 0.005, "cuda": 0.02}
# Side of the matrices and bytes of the copy that the roofs are measured with.
MATRIX = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True)
class Roofs:
    """The best that this process gets out of the machine: FLOP/s of a square product, bytes/s of a copy."""

    flops: float
    bytes: float


def sample(
    cases: Sequence[Case], device: torch.device, *, rounds: int, warmup: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of each case of one level, by variant, one number for each round; see the module's text."""
    for case in cases:
        for _ in range(max(1, warmup)):
            case.run()
    fastest = min(timed(case.run, 1) for case in cases)
    calls = max(1, round(SAMPLE_SECONDS[device.type] / fastest))
    seconds: dict[str, list[float]] = {case.variant: [] for case in cases}
    generator = random.Random(seed)
    for _ in tqdm(range(rounds), desc=cases[0].level, unit="round", leave=False):
        for case in generator.sample(cases, len(cases)):
            seconds[case.variant].append(timed(case.run, calls))
    return seconds


def timed(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call."""
    _synchronise()
    start = perf_counter()
    for _ in range(calls):
        run()
    _synchronise()
    return (perf_counter() - start) / calls


class Work(CountFlops):
    """Counts what runs while it is entered.

    Attributes:
        flops: Of matrix products and attention; a multiply-add is two.
        bytes: Read and written, see the module's text.
    """

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view:
            self.bytes += _bytes(tree_leaves((args, kwargs))) + _bytes(tree_leaves(result))
        return result


def work_of(case: Case) -> Work:
    """Count one call."""
    with Work() as work:
        case.run()
    return work


def roofs(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> Roofs:
    """Measure both roofs; the best of several rounds, because a roof is what is possible."""
    side, size = MATRIX[device.type], COPY_BYTES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    c = a @ b
    target.copy_(source)
    product = min(timed(lambda: torch.mm(a, b, out=c), 3) for _ in range(rounds))
    copy = min(timed(lambda: target.copy_(source), 1) for _ in range(rounds))
    return Roofs(2 * side**3 / product, 2 * size / copy)


def _bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the tensors among them, each once; one that repeats itself in memory counts what it occupies."""
    tensors = {id(part): part for leaf in leaves if isinstance(leaf, Tensor) for part in _parts(leaf)}
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
