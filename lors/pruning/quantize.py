"""Quantise a pruned weight to few bits, its zeros exactly zero: to the nearest points of its grid, or by GPTQ.

W is out x in, the grid as in ``lors.kernels.integers``: a scale S and a zero point z for each group of a row. GPTQ
(Frantar et al., arXiv 2210.17323) goes through the columns as SparseGPT does (``sparsegpt.sweep``), with the same
factor R of the inverse Hessian: column j becomes its nearest points q(w_j), and the columns behind make up for it,

    w <- w - (w_j - q(w_j)) / [H^-1]_jj * [H^-1]_j,:

Here it is held to the support M = (W != 0): q is zero outside of it, whatever the adjustment has made of an entry on
the way, which the columns behind then make up for too. The grid of a group spans what its weights are when its first
column is reached.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lors.kernels import PackedWeight, pack
from lors.kernels.integers import codes_of, grid_of, on_grid, pack_codes, parse_integers
from lors.pruning.sparsegpt import Target, check_problem, inverse_factor, sweep

__all__ = ["quantize_gptq", "quantize_rtn"]


def quantize_rtn(W: Tensor, *, layout: str) -> PackedWeight:
    """The nearest points (round to nearest) of the grid that spans W.

    Args:
        W: ``[out, in]``.
        layout: An integer layout, such as ``int4/64``.

    Returns:
        The codes of W and their grid; zero wherever W is.

    Raises:
        ValueError: W is not finite.
    """
    if not W.isfinite().all():
        raise ValueError("the weight is not finite")
    return pack(W, layout)


def quantize_gptq(
    W: Tensor, gram: Tensor, *, layout: str, block_size: int = 128, damping: float = 0.01
) -> PackedWeight:
    """Codes and a grid for W, adjusted so that X W^T changes little.

    Args:
        W: ``[out, in]``.
        gram: X^T X, ``[in, in]``, as ``sparsegpt.gram_matrix`` gives it.
        layout: An integer layout, such as ``int4/64``.
        block_size: Columns that are updated at once, rounded up to whole groups. It changes the speed, not the result.
        damping: As for ``prune_sparsegpt``.

    Returns:
        The codes and their grid; zero wherever W is.

    Raises:
        ValueError: W or gram is not finite, gram is no gram matrix, or an option is out of range.
    """
    check_problem(W, gram, block_size, damping)
    (bits, group), (height, width) = parse_integers(layout), W.shape
    exact = torch.promote_types(torch.promote_types(W.dtype, gram.dtype), torch.float32)
    R, _dead = inverse_factor(gram.to(exact), damping)
    T, M = W.to(exact, copy=True), W != 0
    scales, zeros = (W.new_ones(height, -(-width // group), dtype=dtype) for dtype in (exact, torch.uint8))

    def entered(start: int, w: Tensor, r: Tensor) -> Target:
        def target(k: int) -> Tensor:
            number, support = (start + k) // group, M[:, start : start + w.shape[1]]
            if (start + k) % group == 0:
                left = slice(k, k + group)
                S, z = grid_of(w[:, left] * support[:, left], layout, W.dtype)
                scales[:, number], zeros[:, number] = S[:, 0], z[:, 0]
            column = w[:, k : k + 1] * support[:, k : k + 1]
            return on_grid(column, scales[:, number, None], zeros[:, number, None], layout)[:, 0]

        return target

    sweep(T, R, math.ceil(block_size / group) * group, entered)
    codes = pack_codes(codes_of(T, scales, zeros, layout), bits)
    return PackedWeight(layout, (scales.to(W.dtype), codes, zeros), (height, width))
