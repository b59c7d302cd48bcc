"""What all low-rank layers share: several active adapters that ask for different things."""

from __future__ import annotations

import pytest
import torch
from callback_loop import pruned_layers
from peft import get_peft_model
from torch import Tensor

import lors
from baselines.flat_lora import FlatLoraConfig, draw_noise
from baselines.gelora import GeLoraConfig
from baselines.masked_lora import MaskedLoraConfig
from baselines.rm_lora import RmLoraConfig
from baselines.xgblora import XgbLoraConfig, XgbLoraLinear
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.sparse_config import SparseTunerConfig

CONFIGS = [MaskedLoraConfig, lors.LorsConfig, GeLoraConfig, RmLoraConfig, XgbLoraConfig, FlatLoraConfig]


def layer_with_two(
    config: type[SparseTunerConfig], *, exact: tuple[bool, bool], keep_zeros: tuple[bool, bool]
) -> LowRankLinear:
    """A layer with two active adapters of different scales in float64, none of whose factors is zero."""
    torch.manual_seed(0)
    fields = [{"exact_gradient": each, "lora_alpha": 3 + index} for index, each in enumerate(exact)]
    if issubclass(config, LowRankConfig):  # LoRS always keeps the zeros
        fields = [{**these, "keep_zeros": each} for these, each in zip(fields, keep_zeros, strict=True)]
    first, second = (config(r=2, target_modules=["proj"], **these) for these in fields)
    model = get_peft_model(pruned_layers((7, 9)), first, adapter_name="first", autocast_adapter_dtype=False)
    model.add_adapter("second", second, autocast_adapter_dtype=False)
    model = model.double()  # the slots of XGBLoRA too
    model.base_model.set_adapter(["first", "second"])
    layer = next(part for part in model.modules() if isinstance(part, LowRankLinear))
    for name in ("first", "second"):
        for factor in layer.factors(name):
            factor.data.normal_()
        if config is XgbLoraConfig:
            layer.merge_booster(name, 0)
            for factor in layer.factors(name):
                factor.data.normal_()
    if config is FlatLoraConfig:  # a path of its own while there is noise
        draw_noise(model.train(), step=5, steps=9, seed=0)
        assert layer.noise is not None
    return layer


def gradients(layer: LowRankLinear, output: Tensor, weights: Tensor) -> list[Tensor]:
    factors = [factor for name in ("first", "second") for factor in layer.factors(name)]
    return list(torch.autograd.grad((output * weights).sum(), factors))


def formula(layer: LowRankLinear, x: Tensor, *, masked: tuple[bool, bool]) -> Tensor:
    """X (W + E + s1 M1 (.) (B1 A1) + s2 M2 (.) (B2 A2))^t in plain operations; M1 = M, or 1 if it is not masked.

    B1 A1 is the sum of all boosters in XGBLoRA.
    """
    W = layer.weight
    T = W + (layer.noise.sample(W) if getattr(layer, "noise", None) else 0)
    for name, keeps in zip(("first", "second"), masked, strict=True):
        A, B = layer.factors(name)
        product = B @ A
        if isinstance(layer, XgbLoraLinear):
            product = product + layer.xgblora_merged_B[name] @ layer.xgblora_merged_A[name]
        T = T + layer.scaling[name] * ((W != 0) if keeps else 1) * product
    return x @ T.t()


MIXED = [(True, False), (False, True), (True, True), (False, False)]


@pytest.mark.parametrize(
    ("config", "exact", "keep_zeros"),
    [
        *((config, exact, (True, True)) for config in CONFIGS for exact in MIXED),
        *((c, (True, True), keeps) for c in CONFIGS if issubclass(c, LowRankConfig) for keeps in MIXED[:2]),
    ],
)
def test_two_active_adapters_that_ask_for_different_things(config, exact, keep_zeros):
    """They share one product, so both have exact gradients if one wants them: nobody gets less than was asked for.

    If none does, they get the gradients without the mask.
    """
    layer = layer_with_two(config, exact=exact, keep_zeros=keep_zeros)
    x, weights = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    output, expected = layer(x), formula(layer, x, masked=keep_zeros)
    torch.testing.assert_close(output, expected)
    masked = keep_zeros if any(exact) else (False, False)
    wanted = gradients(layer, formula(layer, x, masked=masked), weights)
    for found, each in zip(gradients(layer, output, weights), wanted, strict=True):
        torch.testing.assert_close(found, each)
    beside = layer.eval()(x)  # without noise
    layer.merge()
    torch.testing.assert_close(layer(x), beside)
