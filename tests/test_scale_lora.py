"""ScaleLoRA against its formula in float64, and what its start is for: components that learn apart."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from single_layers import adapted, assert_same, draw, layers
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.scale_lora import ScaleLoraConfig, ScaleLoraLinear

IN, OUT, R = 10, 12, 4


def layer_away_from_its_start() -> ScaleLoraLinear:
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    base.bias.copy_(draw(OUT, seed=3))
    layer = ScaleLoraLinear(base, "default", ScaleLoraConfig(r=R), R, 1.0)
    layer.scale_lora_A["default"].data.copy_(draw(R, IN, seed=4))
    layer.scale_lora_B["default"].data.copy_(draw(OUT, R, seed=5))
    return layer


def scaled(layer: ScaleLoraLinear, name: str = "default") -> Tensor:
    """W_ij sum_k B_ik A_kj, entry by entry."""
    A, B = layer.scale_lora_A[name], layer.scale_lora_B[name]
    return torch.stack([layer.weight[i] * sum(B[i, k] * A[k] for k in range(len(A))) for i in range(OUT)])


def test_output_gradients_and_merge_are_those_of_the_formula():
    layer, x = layer_away_from_its_start(), draw(2, 3, IN).requires_grad_()
    W, M = scaled(layer), layer.weight != 0
    assert_same(layer(x), linear(x, W, layer.bias), x, layer.scale_lora_A["default"], layer.scale_lora_B["default"])
    layer.merge()
    torch.testing.assert_close(layer.weight.data, W.detach())
    assert torch.equal(layer.weight != 0, M)


def test_adapters_add_up_what_they_change():
    layer, x = layer_away_from_its_start(), draw(5, IN)
    layer.update_layer("second", ScaleLoraConfig(r=2), 2, 1.0)
    layer.scale_lora_A["second"].data = draw(2, IN, seed=6)
    layer.scale_lora_B["second"].data = draw(OUT, 2, seed=7)
    W, expected = layer.weight.detach().clone(), scaled(layer) + scaled(layer, "second") - layer.weight
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), linear(x, expected, layer.bias))
    layer.merge()
    torch.testing.assert_close(layer.weight.data, expected.detach())
    assert not layer.weight[W == 0].any()


@pytest.mark.parametrize("r", [1, R])
def test_the_product_is_one_at_the_start_and_its_components_then_learn_apart(r):
    model = adapted(ScaleLoraConfig(r=r), (OUT, IN))
    (layer,) = layers(model)
    A, B = layer.scale_lora_A["default"], layer.scale_lora_B["default"]
    assert torch.equal(B @ A, torch.ones(OUT, IN, dtype=A.dtype))
    optimizer = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.0)
    x, target = draw(64, IN), draw(64, OUT, seed=8)
    for _ in range(3):
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.linalg.matrix_rank(B @ A) == r


def test_a_bfloat16_weight_is_scaled_in_float32_and_rounded_once():
    """Above one a bfloat16 has steps of 1/128: with a product of that type this step of the factors would be lost."""
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    base.weight.data.copy_(draw(OUT, IN))
    model = get_peft_model(nn.ModuleDict({"proj": base}), ScaleLoraConfig(r=R, target_modules=["proj"]))
    (layer,), x = layers(model), draw(64, IN).bfloat16()
    layer.scale_lora_B["default"].data[:, 0] = 1.003
    once = (base.weight.float() * torch.tensor(1.003)).bfloat16()
    assert torch.equal(layer(x), linear(x, once, base.bias))
    assert not torch.equal(once, base.weight)
    layer.merge()
    assert torch.equal(base.weight, once)
