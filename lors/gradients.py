"""Gradients of the factors of a masked low-rank update: straight-through, exact, or sampled in between.

With G = dL/dY (n x out), X (n x in), P = G^t X and M = (W != 0), the exact gradients of A (r x in) and B (out x r) are

    dA = s B^t (P (.) M)        dB = s (P (.) M) A^t

Straight-through (LoRS, arXiv 2501.08582, section 3.2) leaves M out, so that the products can be thin: (G B)^t X and
G^t (X A^t). Exact costs the full product P more.

Sampled. P is a sum over tokens, and a mask is linear. Of the n tokens m are taken: the m / 2 with the largest
w_i = |g_i| |x_i|, and m / 2 draws of the others with probabilities p_i proportional to w_i, but for a floor
(``LARGEST``), as in WTA-CRS (arXiv 2305.15265). A taken token has the weight c_i = 1, a drawn one 1 / (p_i m / 2) for
each draw, so E[c_i] = 1 and

    D = sum of c_i g_i^t x_i                                                                  m tokens, one full product
    P (.) M  ~  D (.) M + R (.) (P - D),      R = the density of the row of M                 unbiased

R (.) (P - D) is the straight-through gradient as a control variate. Its weights are 1 - c_i, so it is one pass of thin
products over all tokens. An entry of D then counts with M - R in place of M, whose mean square is R (1 - R) in place of
R. At m = n all c_i are 1, and the gradient is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lors.kernels import PackedWeight, mask_

__all__ = ["factor_gradients", "sample_tokens"]

LARGEST = 100.0  # weight of a draw

Gradients = tuple[Tensor | None, Tensor | None]


def factor_gradients(
    G: Tensor,
    X: Tensor,
    weight: PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    share: float,
    needs_A: bool = True,
    needs_B: bool = True,
) -> Gradients:
    """dA (r x in) and dB (out x r), in the types of A and B, or None where it is not needed.

    Args:
        G: dL/dY, ``[n, out]``.
        X: ``[n, in]``, in the type of G.
        weight: W, out x in.
        A, B, scaling: The factors and their scale s.
        share: Of the tokens that go into the full product: 0 straight-through, 1 exact.
    """
    (height, r), width, n = B.shape, A.shape[1], G.shape[0]
    A_, B_ = A.to(G.dtype), B.to(G.dtype)
    wanted = needs_A + needs_B
    if share == 0:
        # The thin order is the dearer one from a rank of about in out / (2 (in + out)) on.
        if n * height * width + wanted * r * height * width < wanted * n * r * (height + width):
            found = _full(G.t() @ X, A_, B_, needs_A, needs_B)
        else:
            found = (G @ B_).t() @ X if needs_A else None, G.t() @ (X @ A_.t()) if needs_B else None
    else:
        if share == 1 or n < 2:
            mask_(P := G.t() @ X, weight)
            found = _full(P, A_, B_, needs_A, needs_B)
        else:
            found = _sampled(G, X, weight, A_, B_, share, needs_A, needs_B)
    return _scaled(found[0], A.dtype, scaling), _scaled(found[1], B.dtype, scaling)


def sample_tokens(G: Tensor, X: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which tokens go into the full product, and with what weight; drawn from the global generator of the device.

    One number is drawn: the draws lie at equal distances on the sum of the w_i (systematic sampling). Nothing waits for
    the device.

    Args:
        G: ``[n, out]``, n >= 2.
        X: ``[n, in]``.
        share: Of the tokens, in (0, 1].

    Returns:
        Indices and weights c (float32, float64 if G is), ``[m]`` with m = share n, rounded, at least 2. The weight of a
        token is the sum of those at its index; one whose g or x is zero counts nothing.
    """
    n = len(G)
    m = min(n, max(2, round(share * n)))
    # Of bfloat16 too: it has the range, a draw may go by rounded numbers, and this is thirty times as fast on a CPU.
    dtype = torch.float32 if G.dtype == torch.float16 else None
    norms = (torch.linalg.vector_norm(tensor, dim=1, dtype=dtype) for tensor in (G, X))
    w = math.prod(norm.to(torch.promote_types(G.dtype, torch.float32)) for norm in norms)
    if m == n:
        return torch.arange(n, device=w.device), torch.ones_like(w)
    taken = w.topk(m // 2).indices
    others, draws = w.index_fill(0, taken, 0.0), m - m // 2
    # A floor bounds the weights, so that they fit into float16.
    others = torch.where(others > 0, others.clamp(min=others.sum() / (draws * LARGEST)), 0.0)
    sums = others.cumsum(0)
    places = (torch.arange(draws, device=w.device) + torch.rand((), dtype=w.dtype, device=w.device)) * (
        sums[-1] / draws
    )
    drawn = torch.searchsorted(sums, places, right=True).clamp_(max=n - 1)
    chosen = others[drawn]
    weights = torch.where(chosen > 0, sums[-1] / (draws * chosen), 0.0)
    return torch.cat([taken, drawn]), torch.cat([torch.ones_like(w[: len(taken)]), weights])


def _sampled(
    G: Tensor, X: Tensor, weight: PackedWeight, A: Tensor, B: Tensor, share: float, needs_A: bool, needs_B: bool
) -> Gradients:
    index, c = sample_tokens(G, X, share)
    drawn_G, drawn_X = G[index], X[index]
    root = c.sqrt().to(G.dtype).unsqueeze(1)  # on both sides: one alone may overflow in float16
    D = drawn_G.mul_(root).t() @ drawn_X.mul_(root)
    density = (mask_(D, weight) / weight.shape[1]).unsqueeze(1).to(G.dtype)
    dA, dB = _full(D, A, B, needs_A, needs_B)
    # 1 - c of each token, with the c that was multiplied with.
    rest = torch.ones_like(G[:, :1]).index_add_(0, index, root.square(), alpha=-1)
    if needs_A:
        dA += (G @ (B * density)).mul_(rest).t() @ X
    if needs_B:
        dB += (G.t() @ (X @ A.t()).mul_(rest)).mul_(density)
    return dA, dB


def _full(D: Tensor, A: Tensor, B: Tensor, needs_A: bool, needs_B: bool) -> Gradients:
    """B^t D and D A^t."""
    return B.t() @ D if needs_A else None, D @ A.t() if needs_B else None


def _scaled(gradient: Tensor | None, dtype: torch.dtype, scaling: float) -> Tensor | None:
    """Cast first and scale after, so that float32 factors of a half-precision layer lose no further digit."""
    return None if gradient is None else gradient.to(dtype).mul_(scaling)
