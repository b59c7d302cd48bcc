"""SparsePEFT (SQFT): its forms against the formula and the closed gradients, errors, several adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.sqft import SqftConfig, SqftLinear

IN, OUT, R, ALPHA = 10, 7, 3, 4.5
FORMS = [
    pytest.param({"form": form, "checkpoint": checkpoint}, id=form + ("-checkpoint" if checkpoint else ""))
    for form in ("two_products", "fused")
    for checkpoint in (False, True)
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted(dtype: torch.dtype = torch.float64, **fields: object) -> SqftLinear:
    """A half-sparse layer with an adapter whose factors are both away from zero."""
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    base.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    base.bias.copy_(draw(OUT, seed=3))
    config = SqftConfig(r=R, lora_alpha=ALPHA, **fields)
    layer = SqftLinear(base, "default", config, R, ALPHA / R)
    layer.sqft_A["default"].data.copy_(draw(R, IN, seed=4))
    layer.sqft_B["default"].data.copy_(draw(OUT, R, seed=5))
    return layer


def effective_weight(layer: SqftLinear, name: str = "default") -> Tensor:
    """W + M (.) (s B A)."""
    M = (layer.weight != 0).to(layer.weight.dtype)
    return layer.weight + M * (layer.scaling[name] * layer.sqft_B[name] @ layer.sqft_A[name])


def gradients(output: Tensor, layer: SqftLinear, x: Tensor) -> list[Tensor]:
    inputs = [x, layer.sqft_A["default"], layer.sqft_B["default"]]
    return list(torch.autograd.grad(output, inputs, draw(*output.shape, seed=6)))


@pytest.mark.parametrize("fields", FORMS)
def test_output_and_gradients_are_those_of_the_formula(fields):
    layer, x = adapted(**fields), draw(2, 3, IN).requires_grad_()
    y, expected = layer(x), linear(x, effective_weight(layer), layer.bias)
    torch.testing.assert_close(y, expected)
    references = gradients(expected, layer, x)
    for gradient, reference in zip(gradients(y, layer, x), references, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("fields", FORMS)
def test_gradients_keep_the_mask(fields):
    """dB = s (P (.) M) A^t and dA = s B^t (P (.) M) with P = G^t X: the closed forms of the method sheet."""
    layer, x = adapted(**fields), draw(5, IN).requires_grad_()
    A, B, s = layer.sqft_A["default"], layer.sqft_B["default"], layer.scaling["default"]
    masked = (draw(5, OUT, seed=6).t() @ x) * (layer.weight != 0)
    _, dA, dB = gradients(layer(x), layer, x)
    torch.testing.assert_close(dA, s * B.t() @ masked)
    torch.testing.assert_close(dB, s * masked @ A.t())


def test_dropout_acts_on_the_update_alone_and_is_the_same_when_computed_again():
    results = []
    for checkpoint in (False, True):
        layer = adapted(dropout=0.4, checkpoint=checkpoint).train()
        x = draw(5, IN).requires_grad_()
        torch.manual_seed(0)
        y = layer(x)
        torch.rand(7)  # the generator moves on before the backward pass draws again
        results.append([y, *gradients(y, layer, x)])
        assert not torch.equal(layer(x), y)
        torch.testing.assert_close(layer.eval()(x), linear(x, effective_weight(layer), layer.bias))
        layer.train()
        layer.sqft_B["default"].data.zero_()
        assert torch.equal(layer(x), layer.base_layer(x))
    for value, reference in zip(*results, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_formula_rounded_once(dtype):
    layer = adapted(dtype)
    W = layer.weight.clone()
    product = layer.sqft_B["default"].float() @ layer.sqft_A["default"].float()
    expected = (W.float() + layer.scaling["default"] * product * (W != 0)).to(dtype)
    layer.merge()
    assert torch.equal(layer.weight, expected)
    layer.unmerge()
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_several_adapters_add_up_whatever_their_forms(first, second):
    layer, x = adapted(**first), draw(5, IN)
    W = layer.weight.clone()
    layer.update_layer("second", SqftConfig(r=2, lora_alpha=1, **second), 2, 0.5)
    layer.sqft_B["second"].data.copy_(draw(OUT, 2, seed=7))
    both = effective_weight(layer) + effective_weight(layer, "second") - W
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), linear(x, both, layer.bias))
    layer.merge(adapter_names=["second", "default"])
    torch.testing.assert_close(layer.weight.data, both)
    layer.unmerge()
    assert torch.equal(layer.weight, W)


def test_the_mask_of_a_second_merge_is_that_of_the_original_weight():
    """An entry that the first merge brings to exactly zero belongs to the support all the same."""
    layer = adapted()
    W = layer.weight.clone()
    layer.update_layer("second", SqftConfig(r=1, lora_alpha=1), 1, 1.0)
    i, j = W.nonzero()[0].tolist()
    for name, change in (("default", -W[i, j]), ("second", torch.tensor(2.0))):
        layer.sqft_A[name].data.zero_()
        layer.sqft_B[name].data.zero_()
        layer.sqft_A[name].data[0, j] = change / layer.scaling[name]
        layer.sqft_B[name].data[i, 0] = 1.0
    layer.merge(adapter_names=["default"])
    assert layer.weight[i, j].abs() < 1e-15
    layer.weight.data[i, j] = 0.0  # free of the rounding above
    layer.merge(adapter_names=["second"])
    torch.testing.assert_close(layer.weight[i, j].item(), 2.0)


def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing():
    layer = adapted()
    W = layer.weight.clone()
    layer.sqft_B["default"].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinity or a NaN; nothing was merged"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, W)
    assert not layer.merged


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "fused", "dropout": 0.1}, "dropout=0.1: must be 0 with form='fused'"),
        ({"form": "two"}, "form='two': must be one of two_products, fused"),
        ({"checkpoint": "yes"}, "checkpoint='yes': must be True or False"),
        ({"dropout": -0.1}, "dropout=-0.1: must be a probability"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        SqftConfig(**fields)
    assert "\n" not in str(error.value)
