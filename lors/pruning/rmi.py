"""RMI: more sparsity for blocks whose inputs say what those of the others say (LoSA, arXiv 2502.14816, section 3.2).

The representation mutual information of two blocks k and l is estimated by linear centred kernel alignment. With F_l
the hidden states that enter block l, one row of tokens * d numbers for each sample, and C = I - 1 1^t / samples,

    K_l = C F_l F_l^t C                                                       samples x samples
    R_kl = <K_k, K_l> / (|K_k| |K_l|)                                         in [0, 1]
    I_l = exp(-sum over k != l of R_kl / sum over all such pairs)             importance

the sparsities S_l of the blocks solve

    minimise  sum of n_l I_l S_l    over  S_l in [S - lambda, S + lambda],    sum of n_l S_l = S sum of n_l

with n_l the number of weights of a block (the paper and its code take blocks of one size). It is a linear program with
one equation, so blocks get S + lambda in the order of their importance, the least important first, until the others
can have S - lambda; at most one block lies in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["importances", "rmi_sparsities", "sample_kernel"]


def sample_kernel(hidden: Sequence[Tensor]) -> Tensor:
    """K_l in float64, samples x samples.

    Args:
        hidden: Batches of the hidden states that enter a block, ``[batch, tokens, d]`` each.
    """
    F = torch.cat([batch.flatten(1).float() for batch in hidden])  # samples x (tokens d)
    F -= F.mean(0)  # before the product: the mean may be far larger than what differs
    return (F @ F.t()).double()


def importances(kernels: Sequence[Tensor]) -> list[float]:
    """I_l of every block from its K_l; blocks whose input is the same for all samples are like no other."""
    K = torch.stack([kernel.flatten() for kernel in kernels])
    K = K / K.norm(dim=1, keepdim=True).clamp(min=torch.finfo(K.dtype).tiny)
    R = (K @ K.t()).fill_diagonal_(0)
    return torch.exp(-R.sum(1) / R.sum().clamp(min=torch.finfo(K.dtype).tiny)).tolist()


def rmi_sparsities(
    importance: Sequence[float], sizes: Sequence[int], *, sparsity: float, sparsity_range: float
) -> list[float]:
    """S_l of every block; of equally important ones the earlier has the higher.

    Args:
        importance: I_l.
        sizes: n_l.
        sparsity: S.
        sparsity_range: lambda.
    """
    left = sparsity_range * sum(sizes)  # weights above S - lambda that are still to be given to blocks
    found = [0.0] * len(sizes)
    for block in sorted(range(len(sizes)), key=importance.__getitem__):
        above = min(2 * sparsity_range, left / sizes[block])
        found[block] = sparsity - sparsity_range + above
        left -= above * sizes[block]
    return found
