"""Wanda: prune by |W_ij| * ||X_j||_2, row by row, no update (Sun et al., arXiv 2306.11695, equation 1).

W is out x in, X holds the inputs of the linear as tokens x in, and X_j is its column j. Scaling X changes
nothing, so the plain sum of squares serves where the paper's code averages over samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lors.sparsity import lowest, lowest_per_group, parse_pattern, resolve_sparsity


def squared_norms(X: Tensor) -> Tensor:
    """Squared column norms (in,) of inputs X (tokens x in), in float32; summed over batches they add up."""
    return X.float().square().sum(0)


def prune_wanda(W: Tensor, norms: Tensor, *, sparsity: float | None, pattern: str) -> Tensor:
    """Set the entries of the lowest scores to zero.

    Equal scores, those of dead inputs (norm 0) among them, go to the lower column. Zeros that are there
    already go first and count.

    Args:
        W: ``[out, in]``.
        norms: Squared column norms of the inputs, ``[in]``, as ``squared_norms`` gives them.
        sparsity: Unstructured: exactly int(in * sparsity) entries of every row go.
        pattern: ``n:m``: m - n of every group of m go.

    Returns:
        A pruned copy of W.

    Raises:
        ValueError: W or the norms are not finite; as ``resolve_sparsity`` and ``check_width``.
    """
    sparsity = resolve_sparsity(sparsity, pattern)
    if not W.isfinite().all():
        raise ValueError("the weight is not finite")
    if not norms.isfinite().all():
        raise ValueError("the squared norms of the inputs are not finite")
    exact = torch.promote_types(W.dtype, torch.float32)
    score = W.to(exact).abs() * norms.to(exact).sqrt()  # (out, in)
    score.masked_fill_(W == 0, -1.0)  # ahead of the dead inputs, whose score is 0
    if parse_pattern(pattern) is not None:
        pruned = lowest_per_group(score, pattern)
    else:
        pruned = lowest(score, int(W.shape[1] * sparsity))
    return W.masked_fill(pruned | (W == 0), 0.0)  # a -0.0 that stays becomes 0.0
