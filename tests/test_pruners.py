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


def lowest_by_hand(W: Tensor, score: Tensor, groups: list[list[tuple[int, int]]], count: int) -> Tensor:
    """Prune `count` entries per group in plain Python: zeros first, then by score, then in storage order."""
    W = W.clone()
    for group in groups:
        for i, j in sorted(group, key=lambda ij: (W[ij] != 0, float(score[ij]), ij))[:count]:
            W[i, j] = 0.0
    return W


def groups_by_hand(W: Tensor, pattern: str, sparsity: float | None, by_row: bool) -> tuple[list, int]:
    """Comparison groups, and how many entries each of them loses."""
    rows, width = W.shape
    row = [[(i, j) for j in range(width)] for i in range(rows)]
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        return [r[j : j + m] for r in row for j in range(0, width, m)], m - n
    if by_row:
        return row, int(width * sparsity)
    return [[ij for r in row for ij in r]], int(rows * width * sparsity)


def assert_pruned_like(pruned: Tensor, expected: Tensor, W: Tensor, groups: list, count: int):
    assert torch.equal(pruned, expected)
    assert not torch.signbit(pruned[pruned == 0]).any()  # no -0.0
    for group in groups:  # exact: no more and no fewer than asked, unless there were more zeros to begin with
        zeros = sum(float(pruned[ij]) == 0 for ij in group)
        assert zeros == max(count, sum(float(W[ij]) == 0 for ij in group))


# ---- magnitude and Wanda


@REPEATABLE
@given(coarse_problems(), st.sampled_from(["layer", "row"]))
def test_magnitude_is_its_definition(problem, group):
    W, _, pattern, sparsity = problem
    groups, count = groups_by_hand(W, pattern, sparsity, by_row=group == "row")
    pruned = prune_magnitude(W, sparsity=sparsity, pattern=pattern, group=group)
    assert_pruned_like(pruned, lowest_by_hand(W, W.abs(), groups, count), W, groups, count)


@REPEATABLE
@given(coarse_problems())
def test_wanda_is_its_definition(problem):
    W, X, pattern, sparsity = problem
    groups, count = groups_by_hand(W, pattern, sparsity, by_row=True)
    pruned = prune_wanda(W, squared_norms(X), sparsity=sparsity, pattern=pattern)
    expected = lowest_by_hand(W, W.abs() * X.norm(dim=0), groups, count)
    assert_pruned_like(pruned, expected, W, groups, count)


def test_the_published_off_by_one_is_not_inherited():
    W = torch.arange(1.0, 49.0).view(6, 8)
    assert int((prune_magnitude(W, sparsity=0.5, pattern="unstructured") == 0).sum()) == 24  # theirs: 25
    W = torch.ones(6, 8)  # all tied; theirs: everything goes
    pruned = prune_magnitude(W, sparsity=0.5, pattern="unstructured")
    assert torch.equal(pruned, torch.cat([torch.zeros(3, 8), torch.ones(3, 8)]))


def test_wanda_ties_go_to_the_lower_column_and_dead_inputs_first():
    norms = torch.tensor([1.0, 1.0, 0.0, 1.0])
    W = torch.tensor([[1.0, 1.0, 9.0, 1.0], [0.0, 2.0, 9.0, 1.0]])
    pruned = prune_wanda(W, norms, sparsity=0.5, pattern="unstructured")
    assert pruned.tolist() == [[0.0, 1.0, 0.0, 1.0], [0.0, 2.0, 0.0, 1.0]]
    # All inputs dead: still exactly half, and a zero of W ahead of its neighbours.
    pruned = prune_wanda(W, torch.zeros(4), sparsity=0.5, pattern="2:4")
    assert pruned.tolist() == [[0.0, 0.0, 9.0, 1.0], [0.0, 0.0, 9.0, 1.0]]


# ---- all three


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("2:4", None), ("unstructured", 0.7)])
def test_output_errors_are_in_the_published_order(pattern, sparsity):
    W, X = correlated(rows=64, width=64, tokens=512)
    target = {"sparsity": sparsity, "pattern": pattern}
    weights = {
        "sparsegpt": prune_sparsegpt(W, gram_matrix(X), **target),
        "wanda": prune_wanda(W, squared_norms(X), **target),
        "magnitude": prune_magnitude(W, **target),
    }
    error = {name: float((X @ (pruned - W).T).square().sum()) for name, pruned in weights.items()}
    assert error["sparsegpt"] < 0.8 * error["wanda"]
    assert error["wanda"] < 0.8 * error["magnitude"]


def test_scaling_the_inputs_changes_nothing():
    W, X = correlated(rows=8, width=32, tokens=20)
    X[:, 3] = 0.0  # the damping of a dead input must scale as well
    target = {"sparsity": 0.5, "pattern": "unstructured"}
    pruned = prune_sparsegpt(W, gram_matrix(X), **target)
    torch.testing.assert_close(prune_sparsegpt(W, gram_matrix(64 * X), **target), pruned, rtol=1e-5, atol=1e-6)
    wanda = prune_wanda(W, squared_norms(X), **target)
    assert torch.equal(prune_wanda(W, squared_norms(64 * X), **target), wanda)


def all_pruners(W: Tensor, X: Tensor, sparsity: float | None, pattern: str) -> dict[str, Tensor]:
    target = {"sparsity": sparsity, "pattern": pattern}
    return {
        "magnitude": prune_magnitude(W, **target),
        "wanda": prune_wanda(W, squared_norms(X), **target),
        "sparsegpt": prune_sparsegpt(W, gram_matrix(X), **target),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_layout_and_input_are_left_alone(dtype):
    W, X = correlated(rows=12, width=8, tokens=30)
    W = W.T.contiguous().T.to(dtype)  # not contiguous
    before = W.clone()
    for name, pruned in all_pruners(W, X, None, "2:4").items():
        assert pruned.dtype == dtype
        assert torch.equal(W, before)
        assert ((pruned.reshape(12, 2, 4) == 0).sum(-1) == 2).all()
        if name != "sparsegpt":
            assert torch.equal(pruned, torch.where(pruned != 0, W, 0))
        same = all_pruners(W.contiguous(), X, None, "2:4")[name]
        assert torch.equal(pruned, same)


TARGETS = [
    *((sparsity, "unstructured") for sparsity in (0.0, 0.3, 0.5, 0.7, 0.95)),
    *((None, pattern) for pattern in ("1:2", "2:4", "1:4", "4:8", "3:8")),
]


def comparison_groups(name: str, W: Tensor, pattern: str, sparsity: float | None) -> tuple[Tensor, int]:
    """A view of W with a row for each group in which a pruner keeps count, and how many it prunes of each."""
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        return W.reshape(-1, m), m - n
    groups = W if name == "wanda" else W.reshape(1, -1)
    return groups, int(groups.shape[1] * sparsity)


@pytest.mark.parametrize("first", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_what_is_pruned_keeps_its_zeros(first, dtype):
    """Every pruner and target after every other: the old zeros stay, and there are as many as asked for, or as there
    were if that is more."""
    for seed, before in enumerate(TARGETS):
        W, X = correlated(rows=5, width=16, tokens=12, seed=seed)
        X[:, seed % 16] = 0.0
        W = all_pruners(W.to(dtype), X, *before)[first]
        for after in TARGETS:
            for name, pruned in all_pruners(W, X, *after).items():
                assert not pruned[W == 0].any(), (before, name, after)
                assert not torch.signbit(pruned[pruned == 0]).any()
                groups, count = comparison_groups(name, pruned, after[1], after[0])
                old, _ = comparison_groups(name, W, after[1], after[0])
                assert torch.equal((groups == 0).sum(1), (old == 0).sum(1).clamp(min=count)), (before, name, after)


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


def test_no_sparsity_changes_nothing():
    W, X = correlated(rows=5, width=7, tokens=30)
    for pruned in all_pruners(W, X, 0.0, "unstructured").values():
        assert torch.equal(pruned, W)


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
    target = {"sparsity": 0.5, "pattern": "unstructured"}
    norms, gram = squared_norms(X), gram_matrix(X)
    broken = W.clone()
    broken[1, 2] = bad
    for call in (
        lambda: prune_magnitude(broken, **target),
        lambda: prune_wanda(broken, norms, **target),
        lambda: prune_sparsegpt(broken, gram, **target),
    ):
        with pytest.raises(ValueError, match="the weight is not finite"):
            call()
    norms[3] = gram[2, 2] = bad
    with pytest.raises(ValueError, match="norms of the inputs are not finite"):
        prune_wanda(W, norms, **target)
    with pytest.raises(ValueError, match="gram matrix of the inputs is not finite"):
        prune_sparsegpt(W, gram, **target)


def test_an_adjusted_weight_that_overflows_is_refused():
    # Two nearly equal inputs: removing the first moves its 50000 to the second, past float16's 65504.
    W = torch.tensor([[50000.0, 60000.0]], dtype=torch.float16)
    X = torch.tensor([[1.0, 1.0], [0.0, 0.01]])
    with pytest.raises(ValueError, match=r"does not fit in torch\.float16"):
        prune_sparsegpt(W, gram_matrix(X), sparsity=0.5, pattern="unstructured")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 1.5}, "block_size=1.5"),
        ({"damping": -0.1}, "damping=-0.1"),
        ({"damping": math.nan}, "damping=nan"),
        ({"pattern": "2:4"}, "do not divide the input width 6"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
    ],
)
def test_bad_options_are_named(option, message):
    W, X = correlated(rows=2, width=6, tokens=10)
    target = {"sparsity": None, "pattern": "unstructured"} | option
    with pytest.raises(ValueError, match=message):
        prune_sparsegpt(W, gram_matrix(X), **target)


def test_bad_group_and_width_are_named():
    with pytest.raises(ValueError, match="group='column': allowed are layer and row"):
        prune_magnitude(torch.ones(2, 6), sparsity=0.5, pattern="unstructured", group="column")
    with pytest.raises(ValueError, match="do not divide the input width 6"):
        prune_magnitude(torch.ones(2, 6), sparsity=None, pattern="2:4")
    with pytest.raises(ValueError, match="do not divide the input width 6"):
        prune_wanda(torch.ones(2, 6), torch.ones(6), sparsity=None, pattern="2:4")
