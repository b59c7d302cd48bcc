"""The merge with its last pass compiled by ``torch.compile``: mask, sum and rounding in one loop over a block.

The thin product stays a library call, at the speed of the matrix units, into a block that the cache holds; the
compiled loop then reads W once and writes T once. Compiled once per pair of types, for any shape. Where nothing
can be compiled (no C++ compiler), a notice is given once and the eager pass is taken from then on.

Where torch keeps what it compiles is torch's own affair: by default in the temporary folder, under the name of the
user. Where others may have laid something there, ``TORCHINDUCTOR_CACHE_DIR`` names another place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lors.kernels import eager, usage
from lors.kernels.eager import decode
from lors.kernels.layout import PackedWeight

__all__ = ["decode", "merge", "unavailable"]


def last_pass(W: Tensor, update: Tensor, T: Tensor) -> None:
    """T = W + M (.) update for equally many elements; ``update`` has the type that is summed in."""
    T.copy_(torch.where(W != 0, W.to(update.dtype) + update, 0.0))


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], None]:
    # Dynamic: a new shape is no new compilation, however many shapes a model has.
    return torch.compile(last_pass, dynamic=True, fullgraph=True)


_unavailable = False


def unavailable() -> bool:
    """Whether a compilation has failed, so that the eager pass runs."""
    return _unavailable


def merge_block(W: Tensor, scaled_B: Tensor, A: Tensor, scratch: Tensor, T: Tensor) -> None:
    """As ``eager.merge_block``."""
    global _unavailable
    if not _unavailable:
        torch.mm(scaled_B, A, out=scratch)
        try:
            # Flat and without view relations, so that nothing but the types and one length is compiled for.
            _compiled()(*(block.reshape(-1).data for block in (W, scratch, T)))
            return
        except Exception as error:  # torch has no common type for what a missing or broken compiler raises
            _unavailable = True
            reason = str(error).strip().partition("\n")[0]
            usage.notice(f"the merge cannot be compiled and runs in eager mode ({reason})")
    eager.merge_block(W, scaled_B, A, scratch, T)


def merge(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """As ``eager.merge``."""
    return eager.merge(weight, A, B, scaling, dtype, block=merge_block)
