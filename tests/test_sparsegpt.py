"""SparseGPT on tensors, against a literal optimal brain surgeon."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_problems import REPEATABLE, coarse_problems, correlated
from torch import Tensor

from lors.pruning import gram_matrix, prune_magnitude, prune_sparsegpt
from lors.sparsity import follows_pattern


def sparsegpt_by_hand(W: Tensor, X: Tensor, pattern: str, sparsity: float | None, block: int) -> Tensor:
    """Optimal brain surgeon in float64: a fresh inverse of what is left of H per column, eager updates."""
    W, H = W.double().clone(), X.double().T @ X.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    rows, width = W.shape
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(width)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    n, m = map(int, pattern.split(":")) if pattern != "unstructured" else (0, block)
    old = W == 0
    pruned = old.clone()
    for j in range(width):
        if j % m == 0:
            stop = min(j + m, width)
            here = pruned[:, j:stop]
            saliency = (W[:, j:stop].square() / cost[j:stop]).masked_fill(here, -1.0)
            if pattern == "unstructured":
                due = due_by_hand(old, sparsity, stop) - due_by_hand(old, sparsity, j)
                here |= saliency.flatten().argsort().argsort().view_as(saliency) < due
            else:
                here |= saliency.argsort(1).argsort(1) < m - n
        for i in range(rows):
            if pruned[i, j]:
                W[i, j:] -= W[i, j].clone() / cost[j] * inverses[j][0]
                W[i, j] = 0.0
    return W


def due_by_hand(old: Tensor, sparsity: float, stop: int) -> int:
    """Zeros in the columns before ``stop``: the old ones, and of the free entries the part that is missing."""
    missing = max(0, old.numel() * sparsity - int(old.sum()))
    before = int(old[:, :stop].sum())
    return before + int(missing / int((~old).sum()) * (len(old) * stop - before) + 1e-9)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.6])
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
def test_sparsegpt_is_optimal_brain_surgeon(pattern, sparsity, block, zeros):
    """Also of a weight that has been pruned before: its zeros are removed, once more, like any other entry."""
    W, X = correlated(rows=6, width=24, tokens=40)
    W = prune_magnitude(W, sparsity=zeros, pattern="unstructured")
    expected = sparsegpt_by_hand(W, X, pattern, sparsity, block)
    target = {"sparsity": sparsity, "pattern": pattern, "block_size": block}
    exact = prune_sparsegpt(W.double(), X.double().T @ X.double(), **target)
    assert torch.equal(exact == 0, expected == 0)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)
    single = prune_sparsegpt(W, gram_matrix(X), **target)
    assert torch.equal(single == 0, expected == 0)
    torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-4)


def test_what_is_missing_goes_evenly_over_what_is_left():
    W, X = correlated(rows=20, width=40, tokens=60)
    W[:, :10] = 0.0
    W[:10, 10:20] = 0.0
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=0.6, pattern="unstructured", block_size=10)
    # 300 of 800 are zero and 180 are missing: 36 of every 100 of the 500 that are left.
    assert [int((block == 0).sum()) for block in pruned.split(10, dim=1)] == [200, 136, 72, 72]


@REPEATABLE
@given(coarse_problems(), st.integers(1, 40))
def test_sparsegpt_survives_ties_zeros_and_dead_inputs(problem, block):
    W, X, pattern, sparsity = problem
    pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=sparsity, pattern=pattern, block_size=block)
    assert pruned.isfinite().all()
    assert follows_pattern(pruned, pattern)
    assert not torch.signbit(pruned[pruned == 0]).any()
    assert not pruned[W == 0].any()
    if sparsity is not None:  # exact
        assert int((pruned == 0).sum()) == max(int((W == 0).sum()), int(W.numel() * sparsity))


def test_sparsegpt_nm_does_not_depend_on_the_block_size():
    W, X = correlated(rows=16, width=48, tokens=64)
    for pattern in ("2:4", "2:6", "1:8"):
        whole = prune_sparsegpt(W, gram_matrix(X), sparsity=None, pattern=pattern, block_size=48)
        for block in (1, 5, 16, 128):
            pruned = prune_sparsegpt(W, gram_matrix(X), sparsity=None, pattern=pattern, block_size=block)
            assert torch.equal(pruned == 0, whole == 0)
            torch.testing.assert_close(pruned, whole, rtol=1e-5, atol=1e-5)


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
