"""SparseGPT: prune column by column, and let the columns to the right make up for it (Frantar and Alistarh,
arXiv 2301.00774, algorithm 1).

W is out x in, X holds the inputs of the linear as tokens x in, H = X^T X + damping is in x in. Removing w_j
from a row costs w_j^2 / [H^-1]_jj, and the best answer of the columns that are still free is

    w <- w - w_j / [H^-1]_jj * [H^-1]_j,:          (optimal brain surgeon)

with H restricted to the columns j and after. The inverses of all those restrictions come from one factor: let
H^-1 = R^T R with R upper triangular; then row j of the j-th inverse is R_jj R_j,: and its diagonal entry is
R_jj^2. Scaling X changes nothing, because the damping is relative to the diagonal of H.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lors.sparsity import check_width, lowest, lowest_per_group, parse_pattern, resolve_sparsity

log = logging.getLogger("lors")

Target = Callable[[int], Tensor]
Entered = Callable[[int, Tensor, Tensor], Target]

# In units of the mean of the diagonal. Rounding makes eigenvalues of X^T X negative by 1e-7 times the width.
LARGEST_DAMPING = 10.0


def gram_matrix(X: Tensor) -> Tensor:
    """X^T X (in x in) of inputs X (tokens x in), in float32; summed over batches it adds up."""
    X = X.float()
    return X.T @ X


def prune_sparsegpt(
    W: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None,
    pattern: str,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """Prune W and adjust the entries that stay, so that X W^T changes little.

    Zeros of W stay zeros, and count. The adjustment may make one non-zero on the way; it is then removed when
    its column is reached, and made up for like any other entry.

    Saliencies are those of the weight adjusted so far. Equal ones go in storage order, dead inputs
    (gram_jj = 0) before live ones, zeros of W before those.

    Args:
        W: ``[out, in]``.
        gram: X^T X, ``[in, in]``, as ``gram_matrix`` gives it.
        sparsity: Unstructured: exactly int(numel * sparsity) entries go, unless W has more zeros. What is missing
            goes in equal parts of the non-zeros of every block; those of lowest saliency among all rows and the
            columns of a block.
        pattern: ``n:m``: m - n of every group of m go, chosen when its first column is reached; more if a group
            has more zeros.
        block_size: Columns that are updated at once. With n:m it changes the speed, not the result.
        damping: Added to the diagonal of X^T X, in units of its mean over live inputs. Raised, with a
            warning, if the matrix is singular.

    Returns:
        A pruned copy of W.

    Raises:
        ValueError: W or gram is not finite, gram is no gram matrix, an option is out of range, the result
            overflows the type of W; as ``resolve_sparsity`` and ``check_width``.
    """
    sparsity = resolve_sparsity(sparsity, pattern)
    check_width(pattern, W.shape[1])
    check_problem(W, gram, block_size, damping)
    exact = torch.promote_types(torch.promote_types(W.dtype, gram.dtype), torch.float32)
    R, dead = inverse_factor(gram.to(exact), damping)
    pruned = W.to(exact, copy=True)
    _prune_columns(pruned, R, dead, sparsity, pattern, block_size)
    pruned = pruned.to(W.dtype)
    if not pruned.isfinite().all():
        raise ValueError(f"the adjusted weight does not fit in {W.dtype}")
    return pruned.masked_fill_(pruned == 0, 0.0)  # last, since the cast may round to -0.0


def check_problem(W: Tensor, gram: Tensor, block_size: int, damping: float) -> None:
    """Raise ``ValueError`` for numbers that are not finite, or an option out of range."""
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size={block_size!r}: allowed is a whole number of at least 1")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping!r}: allowed is a number of at least 0")
    if not W.isfinite().all():
        raise ValueError("the weight is not finite")
    if not gram.isfinite().all():
        raise ValueError("the gram matrix of the inputs is not finite")


def sweep(W: Tensor, R: Tensor, block_size: int, entered: Entered) -> None:
    """Change the columns of W (out x in) in place from left to right, and let all behind each make up for it.

    Args:
        W: The weight.
        R: See ``inverse_factor``, in x in.
        block_size: Columns whose change reaches those behind them at once.
        entered: Called with the first column of a block, its columns of W (out x block) and its part of R; gives the
            function that says what the k-th column of the block becomes (out,), once all columns before it are done.
    """
    width = W.shape[1]
    for start in range(0, width, block_size):
        _change_block(start, min(start + block_size, width), W, R, entered)


def _change_block(
    start: int, stop: int, W: Tensor, R: Tensor, entered: Callable[[int, Tensor, Tensor], Target]
) -> None:
    """Change the columns from start to stop, and let all behind them make up for it."""
    w, r = W[:, start:stop], R[start:stop, start:stop]
    error = torch.zeros_like(w)  # column k: what it has lost, in units of R_kk
    target = entered(start, w, r)
    for k in range(stop - start):
        _change_column(k, w, r, error, target)
    W[:, stop:] -= error @ R[start:stop, stop:]


def _change_column(k: int, w: Tensor, r: Tensor, error: Tensor, target: Target) -> None:
    """Change column k of the columns of a block, w, and let those behind make up for it."""
    value = target(k)
    error[:, k] = (w[:, k] - value) / r[k, k]
    w[:, k:] -= torch.outer(error[:, k], r[k, k:])
    w[:, k] = value  # exactly: the update itself leaves rounding behind


def _prune_columns(W: Tensor, R: Tensor, dead: Tensor, sparsity: float, pattern: str, block_size: int) -> None:
    """Prune the columns of W (out x in) in place from left to right; R is in x in, dead (in,)."""
    pruned = W == 0  # and more as the sweep chooses
    kept = parse_pattern(pattern)
    due = _zeros_due(pruned, sparsity) if kept is None else None
    if kept is not None:
        block_size = math.ceil(block_size / kept[1]) * kept[1]  # a group must not straddle two blocks

    def entered(start: int, w: Tensor, r: Tensor) -> Target:
        stop = start + w.shape[1]
        idle, gone = dead[start:stop], pruned[:, start:stop]
        if due is not None:
            saliency = _saliency(w, r, idle, gone).flatten()
            gone |= lowest(saliency, due(stop) - due(start)).view_as(w)

        def target(k: int) -> Tensor:
            if kept is not None and k % kept[1] == 0:  # n:m chooses by groups
                group = slice(k, k + kept[1])
                saliency = _saliency(w[:, group], r[group, group], idle[group], gone[:, group])
                gone[:, group] |= lowest_per_group(saliency, pattern)
            # An old zero too: what the columns before have made of it goes to the columns behind.
            return w[:, k].masked_fill(gone[:, k], 0.0)

        return target

    sweep(W, R, block_size, entered)


def _zeros_due(zero: Tensor, sparsity: float) -> Callable[[int], int]:
    """Function: how many zeros the columns before a given one are to have; ``zero`` (out x in) marks the old ones."""
    rows, width = zero.shape
    before = [0, *zero.sum(0).cumsum(0).tolist()]  # old zeros, by column
    free = zero.numel() - before[width]
    missing = max(0, int(zero.numel() * sparsity) - before[width])
    # Of the entries that are free: missing / free but for rounding, and the sparsity itself if there is no old zero.
    share = max(0.0, sparsity - (1 - sparsity) * before[width] / max(1, free))

    def due(column: int) -> int:
        # Counted from the left edge, so that rounding down does not add up over the blocks.
        new = int((rows * column - before[column]) * share) if column < width else missing
        return before[column] + min(new, missing)

    return due


def _saliency(w: Tensor, r: Tensor, dead: Tensor, gone: Tensor) -> Tensor:
    """|w_ij| / R_jj, the root of the cost of removing w_ij.

    Ahead of all costs, and in this order, come an old zero, what the adjustment has made exactly zero, and a dead
    input.
    """
    cost = w.abs() / r.diagonal()
    return cost.masked_fill(dead, 0.0).masked_fill(w == 0, -1.0).masked_fill(gone, -2.0)


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """R (in x in), upper triangular with H^-1 = R^T R for the damped H, and which inputs are dead (in,).

    Factors H = U U^T with U upper triangular, which is a Cholesky factorisation of H read from its last row
    to the first; then R = U^-1. That saves forming the inverse of H, the step that loses most digits. If H is
    not positive definite in floating point, the damping grows tenfold at a time.
    """
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    asked = damping
    while True:
        damped = H.flip(0, 1)  # a copy
        # A dead input is decoupled from all others: any positive number does; the mean scales with X.
        damped.diagonal().add_((damping * mean + torch.where(dead, mean, 0.0)).flip(0))
        L, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0 and L.isfinite().all():
            break
        damping = max(10 * damping, 1e-3)
        if damping > LARGEST_DAMPING:
            raise ValueError("the gram matrix of the inputs cannot be factored: is it X^T X?")
    if damping != asked:
        log.warning("the gram matrix of the inputs is singular: damping raised from %g to %g", asked, damping)
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True), dead
