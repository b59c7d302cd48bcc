"""Sparsity patterns, supports and the merge that keeps them.

A linear's weight W is out x in and its support is M = (W != 0), with the same shape, taken from the pruned
weight. Two patterns exist. ``unstructured``: zeros lie anywhere. ``n:m``: in every aligned group of m weights
along the input dimension at most n are non-zero, NVIDIA's reading (Mishra et al., arXiv 2104.08378): ``2:4``
is half, ``1:4`` is 75 % sparse. Wanda's and SparseGPT's own code counts the pruned weights instead, so
``1:4`` there is ``3:4`` here.

Only the linears inside the decoder blocks count (see ``lors.blocks``): embeddings, norms and head stay dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lors.blocks import decoder_linears
from lors.support import PackedSupports, Support, support_of

UNSTRUCTURED = "unstructured"
# `sparsity=0.333 pattern=2:3` is a third written with three digits, not a contradiction.
ROUNDED_BY_HAND = 5e-4


def parse_pattern(text: str) -> tuple[int, int] | None:
    """Read a pattern: None for ``unstructured``, (n, m) for ``n:m``, n weights kept of every m.

    Raises:
        ValueError: Anything else, n = 0 and n >= m included.
    """
    if text == UNSTRUCTURED:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text) if isinstance(text, str) else None
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(  # the quotes: YAML 1.1 reads a bare 2:4 as the sexagesimal number 124
            f"pattern={text!r}: allowed are {UNSTRUCTURED} and 'n:m' (quoted in YAML) with 1 <= n < m: "
            "n weights kept of every m"
        )
    return int(match[1]), int(match[2])


def resolve_sparsity(sparsity: float | None, pattern: str) -> float:
    """Fraction of weights to prune.

    Args:
        sparsity: 0 <= sparsity < 1, or None for what the pattern implies (1 - n/m; 0.5 if unstructured).
        pattern: ``unstructured`` or ``n:m``.

    Raises:
        ValueError: A sparsity out of range, or one that contradicts the pattern.
    """
    kept = parse_pattern(pattern)
    if sparsity is not None and (
        isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1
    ):
        raise ValueError(f"sparsity={sparsity!r}: allowed is a number with 0 <= sparsity < 1")
    if kept is None:
        return 0.5 if sparsity is None else float(sparsity)
    n, m = kept
    implied = 1 - n / m
    if sparsity is not None and abs(sparsity - implied) > ROUNDED_BY_HAND:
        raise ValueError(
            f"sparsity={sparsity!r} contradicts pattern={pattern!r}: {n} weights kept of {m} is a sparsity "
            f"of {implied:g}; leave sparsity out or choose pattern={UNSTRUCTURED}"
        )
    return implied


def check_width(pattern: str, width: int) -> None:
    """Raise ValueError unless the groups of an n:m pattern divide an input width."""
    kept = parse_pattern(pattern)
    if kept is not None and width % kept[1]:
        raise ValueError(f"pattern={pattern!r}: groups of {kept[1]} do not divide the input width {width}")


def lowest(score: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` lowest scores along the last dimension; equal scores go to the lower index.

    A selection and one pass over the ties: linear in d, where a stable sort of a whole 4096 x 11008 matrix
    takes ten times as long.

    Args:
        score: ``[..., d]``, without NaN.
        count: 0 <= count <= d.

    Returns:
        Boolean ``[..., d]``.
    """
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values  # (..., 1)
    below = score < threshold
    tied = score == threshold
    wanted = count - below.sum(-1, keepdim=True)  # how many of the ties still fit, at least one
    return below | (tied & (tied.cumsum(-1, dtype=torch.int32) <= wanted))


def lowest_per_group(score: Tensor, pattern: str) -> Tensor:
    """Mark the m - n lowest scores of every aligned group of m, for an n:m pattern; ties as in ``lowest``.

    Args:
        score: ``[rows, d]``, without NaN; m divides d.
        pattern: ``n:m``.

    Returns:
        Boolean ``[rows, d]``.
    """
    n, m = parse_pattern(pattern)
    check_width(pattern, score.shape[-1])
    return lowest(score.unflatten(-1, (-1, m)), m - n).flatten(-2)


def random_support(shape: tuple[int, int], sparsity: float, pattern: str, generator: torch.Generator) -> Tensor:
    """Draw a support M (True = kept), uniformly among those of exactly the sparsity asked for.

    Args:
        shape: (out, in).
        sparsity: Unstructured: exactly int(out * in * sparsity) entries of M are False.
        pattern: ``n:m``: exactly n entries of every group of m are True.
        generator: M lies on its device.

    Raises:
        ValueError: As ``resolve_sparsity`` and ``check_width``.
    """
    sparsity = resolve_sparsity(sparsity, pattern)
    check_width(pattern, shape[1])
    kept = parse_pattern(pattern)
    if kept is None:
        size = shape[0] * shape[1]
        return _random_subset(size, size - int(size * sparsity), generator).view(shape)
    return _random_groups(shape[0] * shape[1] // kept[1], *kept, generator).view(shape)


def _random_subset(size: int, kept: int, generator: torch.Generator) -> Tensor:
    """A boolean ``[size]`` with exactly ``kept`` True, all such subsets equally likely.

    Independent coins come close, and random entries of the side that has too many are turned over. All entries
    are treated alike, hence the uniformity; and no sort: a 7B model has 6.5e9 of them.
    """
    device = generator.device
    chosen = torch.rand(size, generator=generator, device=device) < kept / size
    excess = int(chosen.count_nonzero()) - kept
    surplus = (chosen if excess > 0 else ~chosen).nonzero().flatten() if excess else None
    while excess:  # a place drawn twice is turned over once, so this never overshoots
        drawn = torch.randint(len(surplus), (abs(excess),), generator=generator, device=device)
        chosen[surplus[drawn]] = excess < 0
        excess = int(chosen.count_nonzero()) - kept
    return chosen


def _random_groups(groups: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """A boolean ``[groups, m]`` with exactly n True in every row, all such rows equally likely.

    Selection sampling (Knuth, The Art of Computer Programming, volume 2, algorithm 3.4.2 S): of the m - j
    places that are left, each is as likely as the others to hold one of the n - taken that are missing.
    """
    device = generator.device
    chosen = torch.empty(groups, m, dtype=torch.bool, device=device)
    taken = torch.zeros(groups, device=device)
    for j in range(m):
        chosen[:, j] = torch.rand(groups, generator=generator, device=device) * (m - j) < n - taken
        taken += chosen[:, j]
    return chosen


def follows_pattern(weight: Tensor, pattern: str) -> bool:
    """Whether a weight (out x in) has at most n non-zeros in every group of m; true for unstructured."""
    kept = parse_pattern(pattern)
    if kept is None:
        return True
    n, m = kept
    if weight.shape[-1] % m:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, m)).sum(-1) <= n).all())


def supports(model: nn.Module) -> PackedSupports:
    """Support M = (W != 0) of every decoder linear, by name; of the base weights if adapters are attached."""
    return PackedSupports((name, linear.weight.detach()) for name, linear in decoder_linears(model).items())


def sparsity_of(model: nn.Module) -> float:
    """Fraction of exact zeros among the weights of the decoder linears."""
    return _zero_fraction(linear.weight.detach() for linear in decoder_linears(model).values())


class Check(Support):
    """What ``check`` finds: the zeros of all layers together, and of each its sparsity, by its name."""

    layers: dict[str, float]


def check(model: nn.Module) -> Check:
    """The zeros of a model: sparsity, pattern and fingerprint of the linear layers of its decoder blocks.

    Of the base weights if adapters are attached; of a merged model those of the merged weights. Two models with the
    same ``sha256`` have zeros in the same places.

    Args:
        model: A decoder-only model of transformers, with or without adapters, its weights compressed or not.

    Raises:
        ValueError: ``lors.blocks`` cannot read it.
    """
    linears = decoder_linears(model)
    support = support_of({name: lambda linear=linear: linear.weight.detach() for name, linear in linears.items()})
    return Check(**support, layers={name: _zero_fraction([linear.weight]) for name, linear in linears.items()})


def zero_report(before: Mapping[str, Tensor], model: nn.Module, pattern: str) -> dict[str, float | int | bool]:
    """Compare the zeros of a merged model with those of the pruned model that it came from.

    Args:
        before: ``supports`` of the pruned model.
        model: The merged model.
        pattern: The one that the weights were pruned to.

    Returns:
        after_prune, after_merge: Fractions of zeros among the weights of all decoder linears.
        lost, gained: Weights that were zero and are no longer, and the reverse.
        pattern_valid: Whether every weight follows the pattern.

    Raises:
        ValueError: Names or shapes of the layers differ.
    """
    weights = {name: linear.weight.detach() for name, linear in decoder_linears(model).items()}
    shapes = {name: tuple(W.shape) for name, W in weights.items()}
    if shapes != {name: tuple(M.shape) for name, M in before.items()}:
        raise ValueError("before: the supports belong to another model; names and shapes of the layers differ")
    lost = gained = 0
    for name, W in weights.items():
        was, now = before[name].to(W.device), W != 0
        lost += int((now & ~was).sum())
        gained += int((was & ~now).sum())
    return {
        "after_prune": _zero_fraction(before.values()),
        "after_merge": _zero_fraction(weights.values()),
        "lost": lost,
        "gained": gained,
        "pattern_valid": all(follows_pattern(W, pattern) for W in weights.values()),
    }


def masked_merge(weight: Tensor, delta: Tensor) -> Tensor:
    """Merged weight W + M * delta with M = (W != 0): added in float32, rounded once to the type of W.

    Args:
        weight: W, ``[out, in]``. A float64 weight is merged in float64.
        delta: ``[out, in]``, scaled. What it holds where W is zero does not matter, NaN included.

    Raises:
        ValueError: The shapes differ.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"delta has shape {tuple(delta.shape)}, the weight {tuple(weight.shape)}: allowed is the same")
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = (weight.to(exact) + delta.to(exact)).to(weight.dtype)
    return torch.where(weight != 0, merged, weight)


def _zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Fraction of zeros (or of False) over several tensors."""
    zeros = total = 0
    for tensor in tensors:
        zeros += tensor.numel() - int(tensor.count_nonzero())
        total += tensor.numel()
    return zeros / total
