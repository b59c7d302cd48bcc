"""Magnitude and Wanda against slow and literal versions of their definitions; what holds for all three pruners."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_problems import REPEATABLE, coarse_problems, correlated
from torch import Tensor

from lors.pruning import gram_matrix, prune_magnitude, prune_sparsegpt, prune_wanda, squared_norms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def comparison_groups(W: Tensor, pattern: str, sparsity: float | None, by_row: bool) -> tuple[Tensor, int]:
    """A view of W with a row for each group in which a pruner keeps count, and how many it prunes of each."""
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        return W.reshape(-1, m), m - n
    groups = W if by_row else W.reshape(1, -1)
    return groups, int(groups.shape[1] * sparsity)


def assert_exact(pruned: Tensor, W: Tensor, pattern: str, sparsity: float | None, by_row: bool) -> None:
    """Old zeros stay, no zero is negative, and there are as many as asked for, or as there were if that is more."""
    assert not pruned[W == 0].any()
    assert not torch.signbit(pruned[pruned == 0]).any()
    groups, count = comparison_groups(pruned, pattern, sparsity, by_row)
    old, _ = comparison_groups(W, pattern, sparsity, by_row)
    assert torch.equal((groups == 0).sum(1), (old == 0).sum(1).clamp(min=count))


def assert_lowest_are_pruned(pruned: Tensor, W: Tensor, score: Tensor, *target: object) -> None:
    """Of each group so many in plain Python: zeros first, then by score, then in storage order."""
    expected = W.clone()
    groups, count = comparison_groups(expected, *target)
    for group, scores in zip(groups, comparison_groups(score, *target)[0], strict=True):
        for k in sorted(range(len(group)), key=lambda k: (group[k] != 0, float(scores[k]), k))[:count]:
            group[k] = 0.0
    assert torch.equal(pruned, expected)
    assert_exact(pruned, W, *target)


# ---- magnitude and Wanda


@REPEATABLE
@given(coarse_problems(), st.booleans())
def test_magnitude_is_its_definition(problem, by_row):
    W, _, pattern, sparsity = problem
    pruned = prune_magnitude(W, sparsity=sparsity, pattern=pattern, group="row" if by_row else "layer")
    assert_lowest_are_pruned(pruned, W, W.abs(), pattern, sparsity, by_row)


@REPEATABLE
@given(coarse_problems())
def test_wanda_is_its_definition(problem):
    W, X, pattern, sparsity = problem
    pruned = prune_wanda(W, squared_norms(X), sparsity=sparsity, pattern=pattern)
    assert_lowest_are_pruned(pruned, W, W.abs() * X.norm(dim=0), pattern, sparsity, True)


# ---- all three


def all_pruners(W: Tensor, X: Tensor, sparsity: float | None, pattern: str) -> dict[str, Tensor]:
    target = {"sparsity": sparsity, "pattern": pattern}
    return {
        "magnitude": prune_magnitude(W, **target),
        "wanda": prune_wanda(W, squared_norms(X), **target),
        "sparsegpt": prune_sparsegpt(W, gram_matrix(X), **target),
    }


def test_the_more_a_rule_knows_of_the_inputs_the_smaller_is_the_error_of_the_outputs():
    """And the scale of the inputs does not matter, not for the damping of a dead input either."""
    W, X = correlated(rows=8, width=32, tokens=20)
    X[:, 3] = 0.0
    found = all_pruners(W, X, 0.5, "unstructured")
    errors = [float((X @ (found[name] - W).T).norm()) for name in ("magnitude", "wanda", "sparsegpt")]
    assert errors[0] > errors[1] > errors[2]
    for name, pruned in all_pruners(W, 64 * X, 0.5, "unstructured").items():
        torch.testing.assert_close(pruned, found[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_layout_and_input_are_left_alone(dtype):
    W, X = correlated(rows=12, width=8, tokens=30)
    W = W.T.contiguous().T.to(dtype)  # not contiguous
    before = W.clone()
    same = all_pruners(W.contiguous(), X, None, "2:4")
    for name, pruned in all_pruners(W, X, None, "2:4").items():
        assert pruned.dtype == dtype
        assert torch.equal(W, before)
        assert torch.equal(pruned, same[name])
        assert ((pruned.reshape(12, 2, 4) == 0).sum(-1) == 2).all()
        if name != "sparsegpt":
            assert torch.equal(pruned, torch.where(pruned != 0, W, 0))


TARGETS = [
    *((sparsity, "unstructured") for sparsity in (0.0, 0.5, 0.95)),
    *((None, pattern) for pattern in ("2:4", "1:4", "3:8")),
]


@pytest.mark.parametrize("first", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_what_is_pruned_keeps_its_zeros(first, dtype):
    """Every pruner and target after every other."""
    for seed, before in enumerate(TARGETS):
        W, X = correlated(rows=5, width=16, tokens=12, seed=seed)
        X[:, seed % 16] = 0.0
        W = all_pruners(W.to(dtype), X, *before)[first]
        for after in TARGETS:
            for name, pruned in all_pruners(W, X, *after).items():
                assert_exact(pruned, W, after[1], after[0], name == "wanda")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.3, "unstructured"), (None, "2:4")])
def test_no_zero_is_negative(dtype, sparsity, pattern):
    """Of weights so small that a part of what the adjustment makes of them underflows, and of zeros of either sign."""
    W, X = correlated(rows=24, width=32, tokens=40)
    W = (W.double() * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).to(dtype)
    W[0] = -0.0
    assert torch.signbit(W[W == 0]).any()
    for name, pruned in all_pruners(W, X, sparsity, pattern).items():
        assert (pruned != 0).any(), name
        assert not torch.signbit(pruned[pruned == 0]).any(), name


def test_statistics_add_up_over_batches_in_any_order():
    _, X = correlated(rows=1, width=12, tokens=60)
    parts = list(X.split(17))
    for statistic, expected in (
        (squared_norms, X.double().square().sum(0)),
        (gram_matrix, X.double().T @ X.double()),
    ):
        for order in (parts, parts[::-1]):
            total = sum(statistic(part) for part in order)
            assert total.dtype == torch.float32
            torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
        assert statistic(X.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    W, X = correlated(rows=4, width=8, tokens=10)
    broken, norms, gram = W.clone(), squared_norms(X), gram_matrix(X)
    broken[1, 2] = norms[3] = gram[2, 2] = bad
    for rule, statistic, message in (
        (prune_magnitude, (broken,), "the weight is not finite"),
        (prune_wanda, (broken, squared_norms(X)), "the weight is not finite"),
        (prune_sparsegpt, (broken, gram_matrix(X)), "the weight is not finite"),
        (prune_wanda, (W, norms), "norms of the inputs are not finite"),
        (prune_sparsegpt, (W, gram), "gram matrix of the inputs is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            rule(*statistic, sparsity=0.5, pattern="unstructured")


def test_an_adjusted_weight_that_overflows_is_refused():
    # Two nearly equal inputs: removing the first moves its 50000 to the second, past float16's 65504.
    W = torch.tensor([[50000.0, 60000.0]], dtype=torch.float16)
    X = torch.tensor([[1.0, 1.0], [0.0, 0.01]])
    with pytest.raises(ValueError, match=r"does not fit in torch\.float16"):
        prune_sparsegpt(W, gram_matrix(X), sparsity=0.5, pattern="unstructured")


@pytest.mark.parametrize(
    ("rule", "statistic", "option", "message"),
    [
        (prune_sparsegpt, (torch.eye(6),), {"block_size": 0}, "block_size=0"),
        (prune_sparsegpt, (torch.eye(6),), {"block_size": 1.5}, "block_size=1.5"),
        (prune_sparsegpt, (torch.eye(6),), {"damping": -0.1}, "damping=-0.1"),
        (prune_sparsegpt, (torch.eye(6),), {"damping": math.nan}, "damping=nan"),
        (prune_sparsegpt, (torch.eye(6),), {"sparsity": 1.0}, "sparsity=1.0"),
        (prune_sparsegpt, (torch.eye(6),), {"pattern": "2:4"}, "do not divide the input width 6"),
        (prune_wanda, (torch.ones(6),), {"pattern": "2:4"}, "do not divide the input width 6"),
        (prune_magnitude, (), {"pattern": "2:4"}, "do not divide the input width 6"),
        (prune_magnitude, (), {"group": "column"}, "group='column': allowed are layer and row"),
    ],
)
def test_bad_options_are_named(rule, statistic, option, message):
    with pytest.raises(ValueError, match=message):
        rule(torch.ones(2, 6), *statistic, **({"sparsity": None, "pattern": "unstructured"} | option))
