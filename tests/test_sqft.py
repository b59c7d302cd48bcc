"""SparsePEFT (SQFT): its forms against the formula, their dropout, several adapters."""

from __future__ import annotations

import pytest
import torch
from single_layers import assert_same, assert_same_dropout, draw
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.sqft import SqftConfig, SqftLinear

IN, OUT, R, ALPHA = 10, 7, 3, 4.5
FORMS = [
    pytest.param({"form": form, "checkpoint": checkpoint}, id=form + ("-checkpoint" if checkpoint else ""))
    for form in ("two_products", "fused")
    for checkpoint in (False, True)
]


def adapted(**fields: object) -> SqftLinear:
    """A half-sparse layer with an adapter whose factors are both away from zero."""
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    base.bias.copy_(draw(OUT, seed=3))
    layer = SqftLinear(base, "default", SqftConfig(r=R, lora_alpha=ALPHA, **fields), R, ALPHA / R)
    layer.sqft_A["default"].data.copy_(draw(R, IN, seed=4))
    layer.sqft_B["default"].data.copy_(draw(OUT, R, seed=5))
    return layer


def effective_weight(layer: SqftLinear, name: str = "default") -> Tensor:
    """W + M (.) (s B A)."""
    M = (layer.weight != 0).to(layer.weight.dtype)
    return layer.weight + M * (layer.scaling[name] * layer.sqft_B[name] @ layer.sqft_A[name])


def factors(layer: SqftLinear) -> tuple[Tensor, Tensor]:
    return layer.sqft_A["default"], layer.sqft_B["default"]


@pytest.mark.parametrize("fields", FORMS)
def test_output_and_gradients_are_those_of_the_formula(fields):
    layer, x = adapted(**fields), draw(5, IN).requires_grad_()
    assert_same(layer(x), linear(x, effective_weight(layer), layer.bias), x, *factors(layer))


def test_dropout_acts_on_the_update_alone_and_is_the_same_when_computed_again():
    assert_same_dropout([adapted(dropout=0.4, checkpoint=again) for again in (False, True)], effective_weight)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_several_adapters_add_up_whatever_their_forms(first, second):
    layer, x = adapted(**first), draw(5, IN)
    layer.update_layer("second", SqftConfig(r=2, lora_alpha=1, **second), 2, 0.5)
    layer.sqft_B["second"].data.copy_(draw(OUT, 2, seed=7))
    both = effective_weight(layer) + effective_weight(layer, "second") - layer.weight
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), linear(x, both, layer.bias))
    layer.merge(adapter_names=["second"])
    layer.merge(adapter_names=["default"])  # starts from the original weight
    torch.testing.assert_close(layer.weight.data, both)
