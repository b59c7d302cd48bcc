"""The life of LoRS adapters: saved, loaded, merged, unmerged, several at once, trained by a Trainer."""

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
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import lors

# Saving and loading


def assert_same(model: nn.Module, expected: Tensor) -> None:
    assert torch.equal(logits(model.eval()), expected)


def test_save_and_load_exactly_by_every_way(tmp_path: Path) -> None:
    base, adapter, again = str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "again")
    pruned_model().save_pretrained(base)
    model = adapted_model(AutoModelForCausalLM.from_pretrained(base))
    expected = logits(model)
    model.save_pretrained(adapter)
    stored = load_file(f"{adapter}/adapter_model.safetensors")
    assert {re.sub(r".*(lors_.)", r"\1", key) for key in stored} == {"lors_A", "lors_B"}
    assert len(stored) == 28

    assert_same(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), expected)
    lazily = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)
    assert_same(lazily, expected)
    assert_same(peft.AutoPeftModelForCausalLM.from_pretrained(adapter), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_adapter(adapter)
    assert_same(plain, expected)
    plain.save_pretrained(again)
    assert_same(AutoModelForCausalLM.from_pretrained(again), expected)


def test_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    adapted_model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(pruned_model(), tmp_path, is_trainable=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28
    frozen = PeftModel.from_pretrained(pruned_model(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_modules_to_save(tmp_path: Path) -> None:
    model = adapted_model(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(pruned_model(), tmp_path), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lors_only", 2), ("all", 6)])
def test_biases(tmp_path: Path, bias: str, count: int) -> None:
    """Qwen2 has biases in q, k and v; only those that ``bias`` names are trained and saved."""
    model = adapted_model(pruned_model(bias=True), bias=bias, target_modules=["v_proj", "up_proj"])
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in biases if parameter.requires_grad]
    assert len(biases) == 6
    assert len(trained) == count
    for parameter in trained:
        assert parameter.grad.any()
        parameter.data.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(pruned_model(bias=True), tmp_path), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


# Merging


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_keeps_zeros_and_outputs(dtype: torch.dtype, pattern: str, tmp_path: Path) -> None:
    before = weights(pruned_model(dtype, pattern))
    model = adapted_model(pruned_model(dtype, pattern))
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert not any("lors" in name for name, _ in merged.named_parameters())
    for name, weight in weights(merged).items():
        assert not weight[before[name] == 0].any()
        assert not torch.equal(weight, before[name])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 2e-2}
    torch.testing.assert_close(logits(merged), adapted, **tolerance)
    merged.save_pretrained(tmp_path)
    stored = weights(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(stored[name], weight) for name, weight in weights(merged).items())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(dtype: torch.dtype) -> None:
    model = adapted_model(pruned_model(dtype))
    before, adapted = weights(model), logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert model.get_model_status().merged_adapters == ["default"]
        model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert torch.equal(logits(model), adapted)
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()


def test_merging_one_after_the_other_equals_merging_together() -> None:
    """The mask and the sum come from the original weight, whatever was merged before."""
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
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


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = adapted_model(target_modules=["q_proj"])
    layer = lors_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.lors_B["default"][0] = float("inf")
    before = weights(model)
    with pytest.raises(ValueError, match="infinity or a NaN"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    layer.lors_B["default"].data.zero_()
    assert isinstance(model.merge_and_unload(safe_merge=True), LlamaForCausalLM)


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


# Several adapters


def two_adapters() -> PeftModel:
    """ "default" (rank 4, all layers) and "other" (rank 3, another scale, MLP only)."""
    model = adapted_model()
    other = lors.LorsConfig(r=3, lora_alpha=8, scaling="alpha_over_r", target_modules=["up_proj", "down_proj"])
    model.add_adapter("other", other)
    shake(model, 2)
    return model.eval()


def test_add_switch_and_delete() -> None:
    model, alone = two_adapters(), two_adapters()
    alone.delete_adapter("other")
    first = logits(model)
    assert torch.equal(logits(alone), first)
    assert list(alone.peft_config) == ["default"]
    assert not any("other" in name for name, _ in alone.named_parameters())

    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    trainable = {name.rsplit(".", 1)[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"other"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_adapters_are_saved_apart(tmp_path: Path) -> None:
    model = two_adapters()
    model.set_adapter("other")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(pruned_model(), tmp_path)
    fresh.load_adapter(tmp_path / "other", adapter_name="second")
    fresh.set_adapter("second")
    assert_same(fresh, expected)


def test_active_adapters_add_up_under_one_mask() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    summed, expected = logits(model), pruned_model()
    with torch.no_grad():
        for name, layer in lors_layers(model).items():
            weight = expected.get_submodule(name.removeprefix("base_model.model.")).weight
            update = sum(layer.scaling[a] * layer.lors_B[a] @ layer.lors_A[a] for a in layer.lors_A)
            weight.add_(update * (weight != 0))
    torch.testing.assert_close(summed, logits(expected))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "lors_" in name)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged), summed)


# Training


def trainer(model: nn.Module, output: Path, steps: int, **options: object) -> Trainer:
    """Counting upwards is the task: token t is followed by t + 1."""
    rows = (torch.arange(32)[:, None] + torch.arange(12)) % 64
    data = [{"input_ids": row, "labels": row} for row in rows]
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    quiet = {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(str(output), max_steps=steps, **(defaults | quiet | options))
    return Trainer(model=model, args=arguments, train_dataset=data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_with_bf16_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    """Frozen base in either type, float32 adapters, bf16 autocast: the loss falls, the base stays."""
    model = get_peft_model(pruned_model(dtype), lors.LorsConfig(r=4, init="kaiming"))
    before = weights(model)
    run = trainer(model, tmp_path, 48, bf16=True)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert all(layer.lors_B["default"].any() for layer in lors_layers(model).values())
    for name, weight in weights(model.merge_and_unload()).items():
        assert not weight[before[name] == 0].any()


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = get_peft_model(pruned_model(), lors.LorsConfig(r=4, init="kaiming"))
        run = trainer(model, tmp_path / folder, steps, save_strategy="steps", save_steps=3)
        run.train(resume_from_checkpoint=resume)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    whole = run("whole", 6)
    run("parts", 3)
    resumed = run("parts", 6, resume=True)
    assert all(torch.equal(resumed[name], parameter) for name, parameter in whole.items())
