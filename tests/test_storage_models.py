"""Models whose frozen weights are kept compressed: they compute, train, save and merge as the dense ones do."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from pruned_models import IDS, KINDS, adapted_model, logits, lors_layers, pruned_model, weights
from torch import nn
from transformers import AutoModelForCausalLM

import lors
from harness.live_tensors import LiveTensors
from lors.blocks import decoder_linears
from lors.sparsity import sparsity_of
from lors.storage import CompressedLinear, count_weights


def test_storage_must_be_known() -> None:
    with pytest.raises(ValueError, match="storage='zip': must be one of dense, bitmap, n:m, auto"):
        lors.LorsConfig(storage="zip")
    with pytest.raises(ValueError, match="storage='zip': must be one of"):
        lors.compress(adapted_model(), "zip")


def test_a_model_that_cannot_be_compressed_is_refused() -> None:
    with pytest.raises(ValueError, match="has no LoRS layer"):
        lors.compress(pruned_model())
    model = adapted_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="q_proj: has a merged adapter"):
        lors.compress(model)
    with torch.device("meta"):
        empty = get_peft_model(pruned_model(), lors.LorsConfig(r=4, storage="bitmap"))
    with pytest.raises(ValueError, match="sparsity=None: needed for a weight on the meta device"):
        lors.compress(empty)
    lors.compress(empty, "bitmap", sparsity=0.5)
    assert all(isinstance(layer.base_layer, CompressedLinear) for layer in lors_layers(empty).values())


def test_a_pattern_that_one_layer_breaks_is_refused_before_anything_changes() -> None:
    model = pruned_model(pattern="2:4")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: storage='n:m': the weight"):
        get_peft_model(model, lors.LorsConfig(r=4, target_modules=["q_proj", "up_proj"], storage="n:m"))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", KINDS)
def test_outputs_and_gradients_are_those_of_dense_weights(storage: str, dtype: torch.dtype) -> None:
    """Bit for bit, adapters on or off, whether compressed at once or later."""
    dense = adapted_model(pruned_model(dtype, KINDS[storage]))
    at_once = adapted_model(pruned_model(dtype, KINDS[storage]), storage=storage)
    later = lors.compress(adapted_model(pruned_model(dtype, KINDS[storage])), storage)
    for model in (at_once, later):
        assert len([part for part in model.modules() if isinstance(part, CompressedLinear)]) == 14
        assert torch.equal(logits(model), logits(dense))
        with model.disable_adapter(), dense.disable_adapter():
            assert torch.equal(logits(model), logits(dense))
    for model in (dense, later):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for one, two in zip(lors_layers(dense).values(), lors_layers(later).values(), strict=True):
        assert torch.equal(one.lors_A["default"].grad, two.lors_A["default"].grad)
        assert torch.equal(one.lors_B["default"].grad, two.lors_B["default"].grad)


def test_the_weights_of_a_model_take_the_bytes_of_their_layout() -> None:
    """As the harness counts them: 9/16 of dense for 2:4 in bfloat16; the number of weights stays what it was."""
    dense, packed = (
        pruned_model(torch.bfloat16, "2:4"),
        adapted_model(pruned_model(torch.bfloat16, "2:4"), storage="n:m"),
    )
    total = count_weights(get_peft_model(pruned_model(), lors.LorsConfig(r=4)))
    assert count_weights(packed) == total
    bases = [layer.base_layer for layer in lors_layers(packed).values()]
    live = LiveTensors()
    live.count((part for base in bases for part in (*base.parameters(), *base.buffers())), "weights")
    assert live.now == sum(W.nbytes for W in weights(dense).values()) * 9 / 16


@pytest.mark.parametrize("storage", KINDS)
def test_merge_unmerge_and_unload(storage: str, tmp_path: Path) -> None:
    """A merge keeps the layer compressed; what is unloaded is a plain model that transformers can load."""
    dense = adapted_model(pruned_model(torch.bfloat16, KINDS[storage]))
    model = adapted_model(pruned_model(torch.bfloat16, KINDS[storage]), storage=storage)
    adapted = logits(model)
    model.merge_adapter()
    dense.merge_adapter()
    assert all(isinstance(layer.base_layer, CompressedLinear) for layer in lors_layers(model).values())
    assert torch.equal(logits(model), logits(dense))
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    merged, expected = model.merge_and_unload(), dense.merge_and_unload()
    assert list(merged.state_dict()) == list(expected.state_dict())
    assert {type(layer) for layer in decoder_linears(merged).values()} == {nn.Linear}
    assert all(torch.equal(W, weights(expected)[name]) for name, W in weights(merged).items())
    merged.save_pretrained(tmp_path)
    loaded = weights(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(W, weights(expected)[name]) for name, W in loaded.items())


def test_unloading_without_a_merge_gives_the_pruned_model_back() -> None:
    before = pruned_model()
    after = adapted_model(storage="bitmap").unload()
    assert {type(layer) for layer in decoder_linears(after).values()} == {nn.Linear}
    assert all(torch.equal(W, weights(before)[name]) for name, W in weights(after).items())


def test_saved_adapters_load_with_their_storage(tmp_path: Path) -> None:
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    pruned_model().save_pretrained(base)
    model = adapted_model(AutoModelForCausalLM.from_pretrained(base), storage="bitmap", modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    model.save_pretrained(adapter)
    loads = (
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True),
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
    )
    for load in loads:
        loaded = load().eval()
        assert len([part for part in loaded.modules() if isinstance(part, CompressedLinear)]) == 14
        assert torch.equal(logits(loaded), logits(model))


def test_two_adapters_share_the_compressed_weight() -> None:
    """The second one's own storage changes nothing, and both are right."""
    dense = adapted_model()
    model = adapted_model(storage="bitmap")
    for each in (dense, model):
        other = lors.LorsConfig(r=3, lora_alpha=8, target_modules=["up_proj", "down_proj"], init="kaiming")
        torch.manual_seed(3)
        each.add_adapter("other", other)
        for layer in lors_layers(each).values():
            if "other" in layer.lors_B:
                layer.lors_B["other"].data.normal_(generator=torch.Generator().manual_seed(4))
        each.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), logits(dense))
    assert len([part for part in model.modules() if isinstance(part, CompressedLinear)]) == 14
    one, two = (each.merge_and_unload(adapter_names=["default", "other"]) for each in (model, dense))
    assert all(torch.equal(W, weights(two)[name]) for name, W in weights(one).items())


def test_generation() -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    outputs = [model.generate(input_ids=IDS, **options) for model in (adapted_model(), adapted_model(storage="auto"))]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("storage", KINDS)
def test_gradient_initialisation(storage: str) -> None:
    """The same start as with dense weights, and nothing is left behind."""
    batches = [{"input_ids": IDS, "labels": IDS}]
    models = [
        lors.initialize(
            get_peft_model(pruned_model(pattern=KINDS[storage]), lors.LorsConfig(r=4, storage=kind)), batches
        )
        for kind in ("dense", storage)
    ]
    for one, two in zip(*(lors_layers(model).values() for model in models), strict=True):
        torch.testing.assert_close(one.lors_A["default"], two.lors_A["default"])
        assert two.base_layer._like_weight is None
        assert two.base_layer.values.grad is None


def test_sparsity_is_seen_through_the_compression() -> None:
    model = pruned_model()
    before = sparsity_of(model)
    assert sparsity_of(adapted_model(model, storage="bitmap")) == before


def test_training_needs_the_dense_weight_of_one_layer_only() -> None:
    """Peak of live bytes over a deep stack: the packed weights, and no more than a few dense ones at a time."""
    torch.manual_seed(0)
    size, depth = 64, 12
    stack = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(depth)))
    for layer in stack:
        layer.weight.data.mul_(torch.rand(size, size) < 0.5)
    names = [str(index) for index in range(depth)]
    model = get_peft_model(stack, lors.LorsConfig(r=1, target_modules=names, storage="bitmap"))
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors)
    live = LiveTensors()
    live.count(tensors, "weights")
    with live:
        model(torch.ones(1, size)).sum().backward()
    dense = 4 * size * size
    assert held < 0.65 * depth * dense
    assert live.peak - held < 2 * dense
