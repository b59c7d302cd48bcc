"""LoRS adapters: saved, loaded, merged, unmerged, several at once; test_contract has what holds for every method."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from pruned_models import IDS, adapted_model, logits, lors_layers, pruned_model, shake, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lors

# Saving and loading


def assert_same(model: nn.Module, expected: Tensor) -> None:
    assert torch.equal(logits(model.eval()), expected)


@pytest.mark.parametrize("storage", ["dense", "bitmap"])
def test_save_and_load_exactly_by_every_way(storage: str, tmp_path: Path) -> None:
    base, adapter, again = str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "again")
    pruned_model().save_pretrained(base)
    model = adapted_model(AutoModelForCausalLM.from_pretrained(base), storage=storage)
    expected = logits(model)
    model.save_pretrained(adapter)
    stored = load_file(f"{adapter}/adapter_model.safetensors")
    assert {re.sub(r".*(lors_.)", r"\1", key) for key in stored} == {"lors_A", "lors_B"}
    assert len(stored) == 28

    for options, trained in (({}, 0), ({"low_cpu_mem_usage": True}, 0), ({"is_trainable": True}, 28)):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, **options)
        assert sum(parameter.requires_grad for parameter in loaded.parameters()) == trained
        assert_same(loaded, expected)
    assert_same(peft.AutoPeftModelForCausalLM.from_pretrained(adapter), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_adapter(adapter)
    assert_same(plain, expected)
    plain.save_pretrained(again)
    assert_same(AutoModelForCausalLM.from_pretrained(again), expected)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"bias": "none"}, 0),
        ({"bias": "lors_only"}, 2),
        ({"bias": "all"}, 6),
        ({"modules_to_save": ["lm_head"]}, 1),
    ],
)
def test_what_is_trained_beside_the_factors_is_saved_with_them(tmp_path: Path, options: dict, trained: int) -> None:
    """Qwen2 has biases in q, k and v."""
    model = adapted_model(pruned_model(bias=True), target_modules=["v_proj", "up_proj"], **options)
    model(input_ids=IDS, labels=IDS).loss.backward()
    others = [p for name, p in model.named_parameters() if p.requires_grad and "lors_" not in name]
    assert len(others) == trained
    for parameter in others:
        assert parameter.grad.any()
        parameter.data.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(pruned_model(bias=True), tmp_path), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected)


# Merging


def test_merge_is_float32_with_one_rounding() -> None:
    """bf16 weights and bf16 factors: the sum of a float32 product, rounded once."""
    model = get_peft_model(pruned_model(torch.bfloat16), lors.LorsConfig(r=4), autocast_adapter_dtype=False)
    shake(model, 1)
    expected = {}
    for name, layer in lors_layers(model).items():
        A, B, W = layer.lors_A["default"].float(), layer.lors_B["default"].float(), layer.weight.float()
        expected[name] = (W + layer.scaling["default"] * (B @ A) * (W != 0)).to(torch.bfloat16)
    model.merge_adapter()
    for name, layer in lors_layers(model).items():
        assert torch.equal(layer.weight, expected[name])


def test_merging_one_after_the_other_equals_merging_together() -> None:
    """The mask and the sum come from the original weight, whatever was merged before."""
    model = adapted_model()
    other = lors.LorsConfig(r=3, lora_alpha=8, scaling="alpha_over_r", target_modules=["up_proj", "down_proj"])
    model.add_adapter("other", other)
    shake(model, 2)
    model.eval().base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    one_by_one = weights(model)
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    model.merge_adapter(["default", "other"])
    assert all(torch.equal(weight, one_by_one[name]) for name, weight in weights(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(weight, weights(pruned_model())[name]) for name, weight in weights(model).items())
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 4),
    out_features=st.integers(1, 9),
    r=st.integers(1, 9),
    pattern=st.sampled_from(["unstructured", "2:4", "1:4", "negative zeros", "all zero", "dense"]),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_merge_keeps_every_zero_and_can_be_undone(
    seed: int, groups: int, out_features: int, r: int, pattern: str, size: float, dtype: torch.dtype
) -> None:
    """Old zeros are a subset of the new ones, and an n:m pattern stays one."""
    torch.manual_seed(seed)
    linear = nn.Linear(4 * groups, out_features, dtype=dtype)
    scores = torch.rand(out_features, groups, 4)
    kept = {"2:4": 2, "1:4": 1, "all zero": 0, "dense": 4}.get(pattern)
    support = (scores > 0.5 if kept is None else scores.argsort(-1).argsort(-1) < kept).flatten(1)
    zero = torch.tensor(-0.0 if pattern == "negative zeros" else 0.0, dtype=dtype)
    linear.weight.data = torch.where(support, linear.weight.data, zero)
    before = linear.weight.clone()

    layer = lors.LorsLinear(linear, "default", lors.LorsConfig(), min(r, 4 * groups, out_features), scaling=2.0)
    layer.lors_B["default"].data.normal_(std=size)
    layer.merge()
    assert not linear.weight[before == 0].any()
    if kept is not None:
        assert (linear.weight.unflatten(1, (groups, 4)) != 0).sum(-1).max() <= kept
    layer.unmerge()
    assert torch.equal(linear.weight, before)
