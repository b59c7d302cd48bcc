"""RMI: importances and sparsities of blocks against their definitions, and pruned models that have them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_problems import REPEATABLE
from scipy.optimize import linprog
from test_harness_run import SHORT, tiny  # noqa: F401 - a fixture
from test_owl import TOKENS, by_block, uneven
from torch import Tensor, nn

import lors
from harness.config import resolve
from harness.identity import run_key
from harness.run import execute
from lors.pruning.rmi import importances, rmi_sparsities, sample_kernel
from lors.sparsity import sparsity_of


@torch.no_grad()
def defined(model: nn.Module) -> list[float]:
    """I_l in float64, entry by entry, of one run of the whole model."""
    model, inputs = model.double(), []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.model.layers]
    model(input_ids=TOKENS)
    for hook in hooks:
        hook.remove()
    n = len(TOKENS)
    C = torch.eye(n).double() - 1 / n
    K = [C @ F.flatten(1) @ F.flatten(1).T @ C for F in inputs]
    R = [[(k * m).sum() / k.norm() / m.norm() if k is not m else torch.zeros(()) for m in K] for k in K]
    of_block = [sum(row) for row in R]
    return [torch.exp(-one / sum(of_block)).item() for one in of_block]


def test_every_block_has_the_sparsity_of_its_importance() -> None:
    model, importance = uneven(), defined(uneven())
    sizes = [sum(linear.weight.numel() for linear in linears.values()) for linears in by_block(model).values()]
    assert len(set(sizes)) == 2 and len(set(importance)) == 3
    wanted = rmi_sparsities(importance, sizes, sparsity=0.6, sparsity_range=0.1)
    lors.prune(model, sparsity=0.6, layerwise="rmi", calibration=TOKENS, sparsity_range=0.1)
    for share, linears in zip(wanted, by_block(model).values(), strict=True):
        for linear in linears.values():
            assert ((linear.weight == 0).sum(1) == int(linear.in_features * share)).all()
    assert sparsity_of(model) == pytest.approx(0.6, abs=1 / 32)


def test_a_kernel_knows_no_mean_no_rotation_and_no_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    F = torch.randn(6, 2, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator)).Q
    turned = (F.flatten(1) @ rotation).unflatten(1, (2, 5)) + 300
    torch.testing.assert_close(sample_kernel([F]), sample_kernel(turned.split(4)), rtol=1e-3, atol=1e-3)
    same, other = sample_kernel([F]), sample_kernel([torch.randn(6, 2, 5, generator=generator)])
    # Two blocks that say the same, and are told apart by nothing else, are the least important ones.
    first, second, third = importances([same, 5 * same, other])
    assert first == pytest.approx(second) and first < third
    assert importances([same, torch.zeros(6, 6)])[1] == 1  # no sample differs from another
    assert importances([same]) == [1.0]


blocks = st.lists(st.tuples(st.floats(0.3, 1), st.integers(1, 1000)), min_size=1, max_size=9)


@REPEATABLE
@given(blocks, st.floats(0.2, 0.8), st.floats(0.01, 0.2))
def test_no_sparsities_of_this_mean_and_range_lose_less(parts, S, spread) -> None:
    importance, sizes = map(np.array, zip(*parts, strict=True))
    found = np.array(rmi_sparsities(importance, sizes, sparsity=S, sparsity_range=spread))
    assert (sizes * found).sum() == pytest.approx(S * sizes.sum())
    assert (abs(found - S) <= spread + 1e-9).all()
    limits = [(S - spread, S + spread)] * len(sizes)
    best = linprog(sizes * importance, A_eq=sizes[None], b_eq=[S * sizes.sum()], bounds=limits)
    assert (sizes * importance) @ found == pytest.approx(best.fun, rel=1e-6)


def test_of_blocks_of_one_size_half_get_the_most_and_half_the_least() -> None:
    find = partial(rmi_sparsities, sparsity=0.7, sparsity_range=0.03)
    assert find([0.9, 0.8, 0.7, 0.6], [5] * 4) == pytest.approx([0.67, 0.67, 0.73, 0.73])
    assert find([0.7, 0.9, 0.8], [5] * 3) == pytest.approx([0.73, 0.67, 0.7])
    assert find([0.8], [5]) == pytest.approx([0.7])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layerwise": "cka"}, "layerwise='cka': allowed are none, owl, rmi"),
        ({"pattern": "2:4", "sparsity": None}, "layerwise='rmi': allowed is none with pattern='2:4'"),
        ({"sparsity_range": 0.5}, "sparsity_range=0.5: allowed is a number above 0 by which sparsity=0.6"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays(change: dict, said: str) -> None:
    model = uneven()
    before: list[Tensor] = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=said):
        lors.prune(model, **{"sparsity": 0.6, "layerwise": "rmi", "calibration": TOKENS} | change)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_run_has_its_sparsities_and_no_threshold_in_its_key(tiny) -> None:  # noqa: F811
    one, other, owl = (
        tiny("prune.layerwise=rmi", "prune.sparsity_range=0.1", *SHORT),
        tiny("prune.layerwise=rmi", "prune.sparsity_range=0.1", "prune.outlier_threshold=2.0", *SHORT),
        tiny("prune.layerwise=owl", "prune.sparsity_range=0.1", *SHORT),
    )
    assert run_key(resolve(one)) == run_key(resolve(other)) != run_key(resolve(owl))
    result = execute(one)
    assert result["status"] == "ok" and result["pruner"] == "wanda-rmi"
    assert len(set(result["zeros"]["blocks"])) > 1
