"""Magnitude pruning: the smallest |W| go (Han et al., arXiv 1506.02626). Uses no data.

W is out x in. The comparison group is the whole matrix, one output row, or the m weights of an n:m group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lors.sparsity import lowest, lowest_per_group, parse_pattern, resolve_sparsity


def prune_magnitude(W: Tensor, *, sparsity: float | None, pattern: str, group: str = "layer") -> Tensor:
    """Set the smallest entries of W to zero.

    Equal magnitudes go in storage order. Zeros that are there already go first and count.

    Args:
        W: ``[out, in]``.
        sparsity: Unstructured: exactly int(size * sparsity) entries of every comparison group go.
        pattern: ``n:m``: m - n of every group of m go, whatever ``group`` says.
        group: ``layer`` (the whole matrix) or ``row``.

    Returns:
        A pruned copy of W.

    Raises:
        ValueError: W is not finite, ``group`` is unknown; as ``resolve_sparsity`` and ``check_width``.
    """
    sparsity = resolve_sparsity(sparsity, pattern)
    if group not in ("layer", "row"):
        raise ValueError(f"group={group!r}: allowed are layer and row")
    if not W.isfinite().all():
        raise ValueError("the weight is not finite")
    score = W.to(torch.promote_types(W.dtype, torch.float32)).abs()
    if parse_pattern(pattern) is not None:
        pruned = lowest_per_group(score, pattern)
    elif group == "row":
        pruned = lowest(score, int(W.shape[1] * sparsity))
    else:
        pruned = lowest(score.flatten(), int(W.numel() * sparsity)).view_as(W)
    return W.masked_fill(pruned | (W == 0), 0.0)  # a -0.0 that stays becomes 0.0
