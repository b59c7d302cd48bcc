"""Magnitude, Wanda and SparseGPT on tensors, against slow and literal versions of their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lors.prune import gram_matrix, prune_magnitude, prune_sparsegpt, prune_wanda, squared_norms
from lors.sparsity import follows_pattern

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)


def correlated(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows x width) and inputs (tokens x width) whose columns are correlated, of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    decay = 1 / torch.arange(1.0, width + 1)  # a few directions carry most of the variance, as in real activations
    mix = decay[:, None] * torch.randn(width, width, generator=generator)
    scale = torch.exp(torch.randn(width, generator=generator))
    X = torch.randn(tokens, width, generator=generator) @ mix * scale
    return torch.randn(rows, width, generator=generator), X


@st.composite
def coarse_problems(draw) -> tuple[Tensor, Tensor, str, float | None]:
    """Weights and inputs on a coarse grid: ties, zeros, -0.0, dead inputs, empty rows. And a target."""
    n, m = draw(st.tuples(st.integers(1, 7), st.integers(2, 8)).filter(lambda p: p[0] < p[1]))
    structured = draw(st.booleans())
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 4)) * (m if structured else 5)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    W = torch.randint(-2, 3, (rows, width), generator=generator) / 4
    W = torch.where(torch.rand(W.shape, generator=generator) < 0.1, -0.0, W)
    X = torch.randint(-1, 2, (draw(st.integers(1, 4)), width), generator=generator).float()
    if structured:
        return W, X, f"{n}:{m}", None
    return W, X, "unstructured", draw(st.floats(0, 1, exclude_max=True))


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


# ---- SparseGPT


def sparsegpt_by_hand(W: Tensor, X: Tensor, pattern: str, sparsity: float | None, block: int) -> Tensor:
    """Optimal brain surgeon in float64: a fresh inverse of what is left of H per column, eager updates."""
    W, H = W.double().clone(), X.double().T @ X.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    rows, width = W.shape
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(width)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    n, m = map(int, pattern.split(":")) if pattern != "unstructured" else (0, block)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for j in range(width):
        if j % m == 0:
            saliency = W[:, j : j + m].square() / cost[j : j + m]
            if pattern == "unstructured":
                stop = min(j + m, width)
                count = int(rows * stop * sparsity) - int(rows * j * sparsity)
                rank = saliency.flatten().argsort().argsort().view_as(saliency)
                pruned[:, j:stop] = rank < count
            else:
                pruned[:, j : j + m].scatter_(1, saliency.argsort(1)[:, : m - n], True)
        for i in range(rows):
            if pruned[i, j]:
                W[i, j:] -= W[i, j].clone() / cost[j] * inverses[j][0]
                W[i, j] = 0.0
    return W


@pytest.mark.parametrize(
    ("pattern", "sparsity", "block"),
    [
        ("unstructured", 0.5, 24),
        ("unstructured", 0.5, 7),
        ("unstructured", 0.83, 10),
        ("2:4", None, 8),
        ("1:4", None, 8),
        ("2:3", None, 8),
        ("5:8", None, 8),
    ],
)
def test_sparsegpt_is_optimal_brain_surgeon(pattern, sparsity, block):
    W, X = correlated(rows=6, width=24, tokens=40)
    expected = sparsegpt_by_hand(W, X, pattern, sparsity, block)
    target = {"sparsity": sparsity, "pattern": pattern, "block_size": block}
    exact = prune_sparsegpt(W.double(), X.double().T @ X.double(), **target)
    assert torch.equal(exact == 0, expected == 0)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)
    single = prune_sparsegpt(W, gram_matrix(X), **target)
    assert torch.equal(single == 0, expected == 0)
    torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-4)


@REPEATABLE
@given(
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(1, 40),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_sparsegpt_unstructured_count_is_exact(rows, width, block, sparsity, tokens, seed):
    W, X = correlated(rows, width, tokens, seed)
    X[:, ::3] = 0.0  # dead inputs
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=sparsity, pattern="unstructured", block_size=block)
    assert int((pruned == 0).sum()) == int(W.numel() * sparsity)
    assert pruned.isfinite().all()


@REPEATABLE
@given(coarse_problems(), st.integers(1, 12))
def test_sparsegpt_survives_ties_zeros_and_dead_inputs(problem, block):
    W, X, pattern, sparsity = problem
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=sparsity, pattern=pattern, block_size=block)
    assert pruned.isfinite().all()
    assert follows_pattern(pruned, pattern)
    assert not torch.signbit(pruned[pruned == 0]).any()
    assert not pruned[(W == 0).all(1)].any()  # an empty row stays empty
    if sparsity is not None:
        assert int((pruned == 0).sum()) >= int(W.numel() * sparsity)


@pytest.mark.parametrize("pattern", ["2:4", "2:6", "1:8"])
def test_sparsegpt_nm_does_not_depend_on_the_block_size(pattern):
    W, X = correlated(rows=16, width=48, tokens=64)
    whole = prune_sparsegpt(W, gram_matrix(X), sparsity=None, pattern=pattern, block_size=48)
    for block in (1, 5, 8, 16, 128):
        pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=None, pattern=pattern, block_size=block)
        assert torch.equal(pruned == 0, whole == 0)
        torch.testing.assert_close(pruned, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", None)])
def test_sparsegpt_with_uncorrelated_inputs_is_magnitude(pattern, sparsity):
    W, _ = correlated(rows=8, width=16, tokens=1)
    pruned = prune_sparsegpt(W, torch.eye(16), sparsity=sparsity, pattern=pattern)
    assert torch.equal(pruned, prune_magnitude(W, sparsity=sparsity, pattern=pattern))


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


def test_a_dead_input_goes_first_and_leaves_the_others_alone():
    W, X = correlated(rows=8, width=16, tokens=40)
    X[:, 5] = 0.0
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=1 / 16, pattern="unstructured")
    expected = W.clone()
    expected[:, 5] = 0.0
    assert torch.equal(pruned, expected)


def test_zeros_of_the_weight_go_before_dead_inputs():
    W = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 0.0, 3.0, 4.0]])
    for pattern in ("unstructured", "2:4"):
        pruned = prune_sparsegpt(W, torch.zeros(4, 4), sparsity=0.5, pattern=pattern)
        assert int((pruned == 0).sum()) == 4
        assert not pruned[W == 0].any()
    assert pruned.tolist() == [[0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 3.0, 4.0]]


def test_dead_inputs_do_not_dilute_the_damping():
    W, X = correlated(rows=6, width=24, tokens=40)
    X[:, 8:] = 0.0
    alone = prune_sparsegpt(W[:, :8], gram_matrix(X[:, :8]), sparsity=None, pattern="2:4", damping=0.3)
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=None, pattern="2:4", damping=0.3)
    torch.testing.assert_close(pruned[:, :8], alone, rtol=1e-5, atol=1e-6)


def test_singular_inputs_need_more_damping_and_say_so(caplog):
    # 64 equal columns in float32: without damping the factorisation meets a zero pivot.
    W, X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.ones(3, 64)
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=0.5, pattern="unstructured", damping=0.0)
    assert pruned.isfinite().all()
    assert int((pruned == 0).sum()) == 128
    assert ["singular" in record.message for record in caplog.records] == [True]
    # With damping the same inputs are a proper problem: the kept columns take over the sum of the row.
    caplog.clear()
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=0.5, pattern="unstructured", damping=0.01)
    assert not caplog.records
    assert (X @ pruned.T - X @ W.T).abs().max() < 0.02 * (X @ W.T).abs().max()
    with pytest.raises(ValueError, match="cannot be factored"):
        prune_sparsegpt(W, -1000 * torch.ones(64, 64), sparsity=0.5, pattern="unstructured")


# ---- all three


def all_pruners(W: Tensor, X: Tensor, sparsity: float | None, pattern: str) -> dict[str, Tensor]:
    target = {"sparsity": sparsity, "pattern": pattern}
    return {
        "magnitude": prune_magnitude(W, **target),
        "wanda": prune_wanda(W, squared_norms(X), **target),
        "sparsegpt": prune_sparsegpt(W, gram_matrix(X), **target),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
