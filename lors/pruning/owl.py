"""OWL: less sparsity for blocks with more outliers (Yin et al., arXiv 2310.05175, section 3).

For one decoder block, W (out x in) goes over all its prunable linears, X (tokens x in) are the inputs of each in the
dense model, and A_ij = |W_ij| * ||X_j||_2 is the score of Wanda. The share of outliers of block l, its entry of the
Layerwise Outlier Distribution, and its sparsity are

    D_l = share of the entries of A in the block that exceed M * (mean of A in the block)
    S_l = S - lambda * (D_l - mean D) / max_k |D_k - mean D|

with the mean of D weighted by the number of weights of each block. So the sparsities have the mean S, weighted in the
same way, all lie in [S - lambda, S + lambda], the farthest at an end of it, and equal D give S everywhere. The paper
asks for this interval and this mean. Its code spreads D over 2 * lambda whatever its mean, which leaves the interval if
D lies unevenly about it, and weights all blocks alike. Scaling X changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def outlier_share(linears: Iterable[tuple[Tensor, Tensor]], threshold: float) -> float:
    """D_l, the share of the entries of A that exceed ``threshold`` times their mean.

    Args:
        linears: W ``[out, in]`` and the squared column norms of its inputs ``[in]`` of every linear of a block.
        threshold: M.
    """
    scores = list(linears)
    size = sum(W.numel() for W, _ in scores)
    mean = sum(float(_score(*pair).sum(dtype=torch.float64)) for pair in scores) / size
    return sum(int((_score(*pair) > threshold * mean).count_nonzero()) for pair in scores) / size


def owl_sparsities(
    shares: Sequence[float], sizes: Sequence[int], *, sparsity: float, sparsity_range: float
) -> list[float]:
    """S_l of every block.

    Args:
        shares: D_l.
        sizes: Weights of each block.
        sparsity: S, the mean of S_l weighted by the sizes.
        sparsity_range: lambda; S_l lies in [S - lambda, S + lambda].
    """
    if min(shares) == max(shares):
        return [sparsity] * len(shares)
    mean = math.fsum(D * n for D, n in zip(shares, sizes, strict=True)) / sum(sizes)
    farthest = max(abs(D - mean) for D in shares)
    return [sparsity - sparsity_range * ((D - mean) / farthest) for D in shares]


def _score(W: Tensor, norms: Tensor) -> Tensor:
    """A of one linear, ``[out, in]``."""
    exact = torch.promote_types(W.dtype, torch.float32)
    return W.to(exact).abs() * norms.to(exact).sqrt()
