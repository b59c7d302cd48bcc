"""The contract of a method: what every file of ``conf/method`` must do, found by listing the folder.

A new method is tested by being there; what it may declare is in its ``Method`` (``keep_zeros``, ``merges``). Training
has a file of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from contract import (
    ADAPTERS,
    ALPHA,
    ELSEWHERE,
    LAYERWISE,
    NAMES,
    OWN,
    OWN_ALPHA,
    OWN_RANK,
    TRAINED,
    R,
    adapted_layer,
    batch,
    composed,
    having,
    logits,
    method_of,
    pruned,
    ready,
    trainable,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.method import Method, adapt, finish
from lors.blocks import decoder_linears
from lors.sparsity import supports, zero_report


@pytest.mark.parametrize("name", LAYERWISE)
def test_the_shared_settings_and_single_fields_reach_the_config(name):
    peft = method_of(name, "adapter.targets=[q_proj,v_proj]").peft
    assert set(peft.target_modules) == {"q_proj", "v_proj"}
    if hasattr(peft, "r"):
        assert peft.r == OWN_RANK.get(name, R)
        assert method_of(name, "method.peft.r=2").peft.r == 2
    if hasattr(peft, "lora_alpha"):
        assert peft.lora_alpha == OWN_ALPHA.get(name, ALPHA)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_the_start_is_the_pruned_model_bit_for_bit(name, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    adapted = adapt(method_of(name), pruned(dtype=dtype), [batch()], precision=precision).eval()
    assert torch.equal(logits(adapted), logits(pruned(dtype=dtype)))


def end_states(method: Method, model: nn.Module, before: dict[str, Tensor]) -> Iterator[tuple[str, PreTrainedModel]]:
    return ((variant, finish(method, model, before, variant)) for variant in method.merges)


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_unmerged_for_alpha_other_than_r(name):
    method, before = method_of(name), supports(pruned())
    model = ready(name)
    expected = logits(model)
    assert torch.equal(expected, logits(pruned())) != method.trains
    for variant, merged in end_states(method, model, before):
        if variant == "remasked":  # another function by design
            assert not torch.allclose(logits(merged), expected, atol=1e-3)
        else:
            torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected), "finish has changed the model that it was given"


@pytest.mark.parametrize(("pattern", "dtype"), [("unstructured", torch.bfloat16), ("2:4", torch.float32)])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_after_the_merge_contain_those_before(name, pattern, dtype):
    method, before = method_of(name), supports(pruned(pattern, dtype))
    for variant, merged in end_states(method, ready(name, dtype, pattern), before):
        report = zero_report(before, merged, pattern)
        filled = variant == "dense" or (variant == "merged" and not method.keep_zeros)
        assert (report["lost"] > 0) == filled, variant
        assert report["pattern_valid"] != (filled and pattern == "2:4")
        if variant != "adapter":
            assert {layer.weight.dtype for layer in decoder_linears(merged).values()} == {dtype}
            assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())


@pytest.mark.parametrize("name", having(lambda method: method.name in LAYERWISE and method.keep_zeros))
def test_zeros_survive_the_merge_of_peft_itself(name):
    """The way of a user without the harness: ``merge_and_unload`` on a model in its own precision."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        before, model = supports(pruned(dtype=dtype)), ready(name, dtype)
        expected = logits(model)
        merged = model.merge_and_unload()
        assert zero_report(before, merged, "unstructured")["lost"] == 0
        torch.testing.assert_close(logits(merged), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OWN)
def test_unmerge_restores_the_original_weights_bit_for_bit(name):
    model = ready(name, torch.bfloat16)
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pruned(dtype=torch.bfloat16)))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_save_and_load_are_exact(name, tmp_path):
    model = ready(name)
    model.save_pretrained(tmp_path)
    if isinstance(model, PeftModel):
        loaded = PeftModel.from_pretrained(pruned(), tmp_path, autocast_adapter_dtype=False)
        # Nothing of the size of a weight: no mask, no copy of the base.
        shapes = {tuple(layer.weight.shape) for layer in decoder_linears(pruned()).values()}
        saved = load_file(tmp_path / "adapter_model.safetensors").values()
        assert not shapes & {tuple(tensor.shape) for tensor in saved}
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_two_adapters_live_in_one_model_and_disabled_ones_leave_it_bit_for_bit(name):
    method = method_of(name)
    model = ready(name)
    first = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pruned())) and not torch.equal(first, logits(pruned()))
    model.add_adapter("second", copy.deepcopy(method.peft))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(pruned())) == (name not in ELSEWHERE)
    assert all("second" in key for key in trainable(model))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", [name for name in LAYERWISE if "n:m" not in name])  # no groups in an odd width
def test_odd_widths_biases_and_every_shape_and_stride_of_input(name, with_bias):
    torch.manual_seed(0)
    base = nn.Linear(15, 21, bias=with_bias)
    base.weight.data.mul_(torch.rand(21, 15) < 0.5)
    layer = adapted_layer(name, base, *(["method.peft.r=3"] if "r" in composed(name).method.peft else []))
    flat = torch.randn(6, 15)
    expected = layer(flat)
    assert not torch.allclose(expected, base(flat))
    inputs = {
        "3-D": flat.reshape(2, 3, 15),
        "transposed": flat.t().contiguous().t(),
        "strided": flat.repeat_interleave(2, dim=1)[:, ::2],
        "swapped": flat.reshape(2, 3, 15).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for kind, x in inputs.items():
        x = x.detach().requires_grad_()
        y = layer(x)
        torch.testing.assert_close(y.reshape(6, 21), expected, msg=kind)
        y.square().sum().backward()
        assert x.grad.shape == x.shape
    assert layer(flat[:0]).shape == (0, 21)
    layer.merge()
    torch.testing.assert_close(layer(flat), expected)
