"""The merge in eager PyTorch, on any device: block of rows after block of rows, each worked on in the cache.

The reference of the other implementations, and what a machine without a compiler runs. W is read once and T
written once; what lies between, a few blocks of ``layout.BLOCK`` elements, stays in the cache of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lors.kernels.integers import grid_of, on_grid, parse_integers
from lors.kernels.layout import PackedWeight, masked_, row_blocks, rows

__all__ = ["decode", "mask_", "merge", "merge_on_grid"]


def merge_block(W: Tensor, scaled_B: Tensor, A: Tensor, scratch: Tensor, T: Tensor) -> None:
    """Write T = W + M (.) (scaled_B A) for a few rows; ``scratch`` has the type that is summed in."""
    scratch.copy_(W).addmm_(scaled_B, A)
    T.copy_(masked_(scratch, W.bool()))


def merge(
    weight: PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    block: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = merge_block,
) -> Tensor:
    """T = W + M (.) (scaling B A), M = (W != 0): summed in float32 (float64 if W or T is), rounded once.

    Args:
        weight: W, out x in.
        A: r x in.
        B: out x r.
        scaling: The scale s.
        dtype: Type of T.
        block: What ``merge_block`` does, done in another way.

    Returns:
        T, out x in, in ``dtype``.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
    scaled_B, A = B.to(exact) * scaling, A.to(exact)
    T = torch.empty(weight.shape, dtype=dtype, device=A.device)
    scratch = T.new_empty(0, dtype=exact)
    for start, stop in row_blocks(weight.shape, A.device):
        scratch.resize_(stop - start, weight.shape[1])  # allocates for the first block only
        block(rows(weight, start, stop), scaled_B[start:stop], A, scratch, T[start:stop])
    return T


def decode(weight: PackedWeight) -> Tensor:
    """W, out x in, dense, in its own type."""
    device = weight.parts[0].device
    W = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    for start, stop in row_blocks(weight.shape, device):
        W[start:stop].copy_(rows(weight, start, stop))
    return W


def mask_(D: Tensor, weight: PackedWeight) -> Tensor:
    """Set D, out x in, to +0.0 where W is zero, in place.

    Returns:
        How many weights of each row are not zero, ``[out]`` in float32.
    """
    counts = torch.zeros(len(D), dtype=torch.float32, device=D.device)
    for start, stop in row_blocks(weight.shape, D.device):
        M = rows(weight, start, stop).bool()
        masked_(D[start:stop], M)
        counts[start:stop] = M.sum(1, dtype=torch.float32)
    return counts


def merge_on_grid(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, grid: str, dtype: torch.dtype) -> Tensor:
    """The points nearest to W + M (.) (scaling B A) on the grid of W, an integer layout: its own, or one made for it.

    Arguments as for ``merge``. The sum is made as there, in float32 (float64 if W or T is), whatever T is.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
    if parse_integers(weight.layout):  # W is its point of the grid, not that rounded to the type of the model
        weight = weight._replace(parts=(weight.parts[0].to(exact), *weight.parts[1:]))
    scaled_B, A = B.to(exact) * scaling, A.to(exact)
    T = torch.empty(weight.shape, dtype=dtype, device=A.device)
    scratch = T.new_empty(0, dtype=exact)
    for start, stop in row_blocks(weight.shape, A.device):
        W = rows(weight, start, stop)
        scratch.resize_(stop - start, weight.shape[1])
        merge_block(W, scaled_B[start:stop], A, scratch, scratch)
        if parse_integers(weight.layout):
            scales, zeros = (weight.parts[i][start:stop] for i in (0, 2))
        else:
            scales, zeros = grid_of(W, grid)
        T[start:stop].copy_(on_grid(scratch, scales, zeros, grid))
    return T
