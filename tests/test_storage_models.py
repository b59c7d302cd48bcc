"""Models whose frozen weights are kept compressed: they compute, train, save and merge as the dense ones do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    get_base_model_state_dict,
    get_peft_model,
    set_base_model_state_dict,
)
from pruned_models import IDS, KINDS, adapted_model, logits, lors_layers, pruned_model, weights
from torch import nn

import lors
from harness.live_memory import LiveTensors
from lors.blocks import decoder_linears
from lors.sparsity import sparsity_of
from lors.storage import CompressedLinear, count_weights

EITHER = pytest.mark.parametrize("storage", KINDS)


def pruned_for(storage: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return pruned_model(dtype, KINDS[storage])


def compressed_layers(model: nn.Module) -> list[CompressedLinear]:
    return [part for part in model.modules() if isinstance(part, CompressedLinear)]


def test_what_cannot_be_compressed_is_refused() -> None:
    merged = adapted_model()
    merged.merge_adapter()
    with torch.device("meta"):
        empty = get_peft_model(pruned_model(), lors.LorsConfig(r=4, storage="bitmap"))
    for call, message in (
        (lambda: lors.LorsConfig(storage="zip"), "storage='zip': must be one of dense, bitmap, n:m, auto"),
        (lambda: lors.compress(adapted_model(), "zip"), "storage='zip': must be one of"),
        (lambda: lors.compress(pruned_model()), "has no LoRS layer"),
        (lambda: lors.compress(merged), "q_proj: has a merged adapter"),
        (lambda: lors.compress(empty), "sparsity=None: needed for a weight on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    lors.compress(empty, "bitmap", sparsity=0.5)
    assert len(compressed_layers(empty)) == 14


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_dense_weights(storage: str, dtype: torch.dtype) -> None:
    """Bit for bit, adapters on or off, whether compressed at once or later."""
    dense = adapted_model(pruned_for(storage, dtype))
    at_once = adapted_model(pruned_for(storage, dtype), storage=storage)
    later = lors.compress(adapted_model(pruned_for(storage, dtype)), storage)
    for model in (at_once, later):
        assert len(compressed_layers(model)) == 14
        assert torch.equal(logits(model), logits(dense))
        with model.disable_adapter(), dense.disable_adapter():
            assert torch.equal(logits(model), logits(dense))
    found, expected = (model.generate(IDS, max_new_tokens=4, do_sample=False) for model in (later, dense))
    assert torch.equal(found, expected)
    for model in (dense, later):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for one, two in zip(lors_layers(dense).values(), lors_layers(later).values(), strict=True):
        assert torch.equal(one.lors_A["default"].grad, two.lors_A["default"].grad)
        assert torch.equal(one.lors_B["default"].grad, two.lors_B["default"].grad)


@EITHER
def test_a_merge_keeps_it_compressed_and_what_is_unloaded_is_a_plain_model(storage: str) -> None:
    dense = adapted_model(pruned_for(storage, torch.bfloat16))
    model = adapted_model(pruned_for(storage, torch.bfloat16), storage=storage)
    model.merge_adapter()
    dense.merge_adapter()
    assert len(compressed_layers(model)) == 14
    assert torch.equal(logits(model), logits(dense))
    model.unmerge_adapter()
    unloaded, merged, expected = copy.deepcopy(model).unload(), model.merge_and_unload(), dense.get_base_model()
    assert {type(layer) for each in (merged, unloaded) for layer in decoder_linears(each).values()} == {nn.Linear}
    for found, wanted in ((unloaded, pruned_for(storage, torch.bfloat16)), (merged, expected)):
        assert all(torch.equal(W, weights(wanted)[name]) for name, W in weights(found).items())


@EITHER
def test_gradient_initialisation(storage: str) -> None:
    """The same start as with dense weights, and nothing is left behind."""
    models = [get_peft_model(pruned_for(storage), lors.LorsConfig(r=4, storage=kind)) for kind in ("dense", storage)]
    for model in models:
        lors.initialize(model, [{"input_ids": IDS, "labels": IDS}])
    for one, two in zip(*(lors_layers(model).values() for model in models), strict=True):
        torch.testing.assert_close(one.lors_A["default"], two.lors_A["default"])
        assert two.base_layer._like_weight is None
        assert two.base_layer.values.grad is None


# ---- memory


def test_the_weights_of_a_model_take_the_bytes_of_their_layout() -> None:
    """As the harness counts them: 9/16 of dense for 2:4 in bfloat16; number and sparsity stay what they were."""
    dense = pruned_for("n:m", torch.bfloat16)
    packed = adapted_model(pruned_for("n:m", torch.bfloat16), storage="n:m")
    assert count_weights(packed) == count_weights(get_peft_model(pruned_model(), lors.LorsConfig(r=4)))
    assert sparsity_of(packed) == sparsity_of(dense) == 0.5
    live = LiveTensors()
    live.count(
        (part for base in compressed_layers(packed) for part in (*base.parameters(), *base.buffers())), "weights"
    )
    assert live.now == sum(W.nbytes for W in weights(dense).values()) * 9 / 16


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


# ---- beside the tools of others


@EITHER
def test_the_base_state_dict_is_that_of_the_dense_model(storage: str) -> None:
    plain, model = pruned_for(storage), adapted_model(pruned_for(storage), storage=storage)
    found, expected = get_base_model_state_dict(model), plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@EITHER
def test_another_base_can_be_loaded_into_it(storage: str) -> None:
    """With zeros in other places, and another number of them."""
    model, other = adapted_model(pruned_for(storage), storage=storage), pruned_for(storage)
    for name, parameter in other.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = -parameter.data.flip(1)
            parameter.data[0] = 0
    expected = adapted_model(copy.deepcopy(other), storage="dense")
    set_base_model_state_dict(model, other.state_dict())
    torch.testing.assert_close(logits(model), logits(expected))
    assert len(compressed_layers(model)) == 14
    with pytest.raises(RuntimeError, match="Missing key"):
        set_base_model_state_dict(model, {})
    if storage == "n:m":
        with pytest.raises((ValueError, RuntimeError), match="does not follow"):
            set_base_model_state_dict(model, pruned_model().state_dict())


@EITHER
def test_saving_the_adapter_decodes_no_weight(storage: str, monkeypatch, tmp_path) -> None:
    model = adapted_model(pruned_for(storage), storage=storage)
    monkeypatch.setattr(CompressedLinear, "weight", property(lambda self: pytest.fail("decoded")))
    model.save_pretrained(tmp_path)
    model.load_state_dict(model.state_dict())


def test_values_are_a_parameter_and_places_are_buffers_that_ddp_does_not_send() -> None:
    """FSDP1 cannot flatten whole numbers, and DDP would send all buffers before every pass."""
    model = adapted_model(pruned_model(torch.bfloat16), storage="bitmap")
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    places = {name for name, _ in model.named_buffers() if name.endswith((".bits", ".offsets"))}
    assert len(places) == 2 * 14
    assert set(model._ddp_params_and_buffers_to_ignore) == places
    copied = copy.deepcopy(model).double()
    assert compressed_layers(copied)[0].bits.dtype == torch.uint8
