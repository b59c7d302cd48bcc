"""What an implementation has to show before it is taken by itself: the numbers of ``eager.py``, in no more time.

A kernel that has passed on one machine may be miscompiled on the next, fail to compile there, or lose to the library
calls that it replaces. So the merge in C is compared with the eager one when it has been built, and the Triton kernels
on every device and for all types that occur, at the first use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from types import ModuleType

import torch
from torch import Tensor

from lors.kernels import eager, usage
from lors.kernels.layout import BITMAP, DENSE, PackedWeight, pack
from lors.sparsity import lowest_per_group

__all__ = ["capturing", "milliseconds", "no_slower", "same_numbers", "triton_passes"]

LAYOUTS = (DENSE, BITMAP, "2:4")
# out, in, r. Of numbers: several tiles of native.c and gpu.py in each direction, the last ones not full. Of time: a
# projection of a 7B model; of a much smaller one a fast GPU only waits for the host to launch it.
SMALL, REALISTIC = (37, 1072, 17), (4096, 4096, 16)
WARM_UP, SAMPLES = 3, 10

Types = tuple[torch.dtype, ...]  # of the weight; for a merge also of A, B and T
_lock = threading.Lock()
_passed: set[tuple[torch.device, Types]] = set()
_refused: set[torch.device] = set()


def triton_passes(device: torch.device, *types: torch.dtype) -> bool:
    """Whether the Triton kernels may run on a device: looked at once for every combination of types.

    The first failure, an exception included, is the last: a notice names it, and the device is left to the eager merge
    from then on. While a CUDA graph is captured nothing can be measured: the answer is no then, and not kept.

    Args:
        device: Where.
        types: Of the weight; for a merge also of A, B and T.
    """
    with _lock:
        if device in _refused:
            return False
        if (device, types) in _passed:
            return True
        if capturing(device):
            return False
        try:
            from lors.kernels import gpu  # imports Triton

            same_numbers(gpu, device, *types)
            no_slower(gpu, device, *types)
        except Exception as error:  # what a compiler or a driver raises has no common type
            _refused.add(device)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            usage.notice(f"no Triton on {_name(device)}, the eager merge is taken ({reason})")
            return False
        _passed.add((device, types))
        return True


def same_numbers(candidate: ModuleType, device: torch.device, *types: torch.dtype) -> None:
    """Compare a small merge of every layout with the eager one; of two types (W, D) a masking, of one a decoding.

    The factors are whole numbers of up to 11 bits, exact in TF32 too; their sums are exact in float32 alone. So nothing
    but the last rounding of T may differ, by one unit, whatever the user lets torch multiply in. W has zeros of either
    sign, T none but +0.0.

    Raises:
        RuntimeError: Something else comes out.
    """
    for layout, job in _jobs(SMALL, device, types):
        result, expected = job(candidate), job(eager)
        unit = torch.finfo(expected.dtype).eps if len(types) == 4 else 0.0
        near = (result.double() - expected.double()).abs() <= unit * expected.double().abs()
        if not (near.all() and torch.equal(result.signbit(), expected.signbit())):
            names = ", ".join(str(each).removeprefix("torch.") for each in types)
            raise RuntimeError(f"{candidate.__name__} computes something else here: {layout}, {names}")


def no_slower(candidate: ModuleType, device: torch.device, *types: torch.dtype) -> None:
    """Compare the time of a merge (a decoding if there is but one type) of every layout with that of the eager one.

    Raises:
        RuntimeError: The candidate takes longer.
    """
    for layout, job in _jobs(REALISTIC, device, types):
        new, old = milliseconds(device, partial(job, candidate), partial(job, eager))
        if new > old:
            size = " x ".join(str(side) for side in REALISTIC[:2])
            raise RuntimeError(f"it takes {new:.3g} ms instead of {old:.3g} ms for {size}, {layout}")


def milliseconds(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    """Median time of each call, up to the end of its work on the device.

    They take turns, so that the clock of a GPU, which rises in the first milliseconds of work, favours none.
    """
    with torch.cuda.device(-1 if device.index is None else device.index):  # -1: leave it as it is
        for call in calls * WARM_UP:
            call()
        rounds = [[_once(call, device) for call in calls] for _ in range(SAMPLES)]
    return [sorted(times)[SAMPLES // 2] for times in zip(*rounds, strict=True)]


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _jobs(
    size: tuple[int, int, int], device: torch.device, types: Types
) -> Iterator[tuple[str, Callable[[ModuleType], Tensor]]]:
    """Names of layouts, and what a module is to do with a weight in them; packed on the device, which on a CPU takes
    seconds."""
    height, width, r = size
    generator = torch.Generator().manual_seed(0)

    def draw(largest: int, *shape: int) -> Tensor:
        numbers = torch.randint(-largest, largest + 1, shape, generator=generator, device="cpu", dtype=torch.int16)
        return numbers.to(device, torch.float32)

    W, A, B = draw(3, height, width), draw(2047, r, width), draw(3, height, r)
    W *= ~lowest_per_group(draw(99, height, width), "2:4")  # a product: half of these zeros are -0.0
    for layout in LAYOUTS:
        packed = pack(W.to(types[0]), layout)
        if len(types) == 4:
            _, type_of_A, type_of_B, dtype = types
            factors = A.to(type_of_A), B.to(type_of_B)
            # The scale keeps T in the range of float16, and is exact.
            yield layout, methodcaller("merge", packed, *factors, 2.0**-8, dtype)
        elif len(types) == 2:
            yield layout, partial(_masked, D=A[:1].to(types[1]).expand(height, -1), weight=packed)
        elif layout != DENSE:
            yield layout, methodcaller("decode", packed)


def _masked(module: ModuleType, D: Tensor, weight: PackedWeight) -> Tensor:
    """Masked D, and the number of weights that are not zero as one more column."""
    D = D.contiguous()
    return torch.cat([D, module.mask_(D, weight).to(D.dtype).unsqueeze(1)], dim=1)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device, so that nothing may wait for it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
