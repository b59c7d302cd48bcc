"""The contract of our own tuners at the edges: hooks, mixed batches, sums of adapters, and all or nothing."""

from __future__ import annotations

import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from contract import FORMS, OWN, batch, logits, method_of, pruned, ready, trainable
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from harness.method import adapt
from lors.sparse_layer import SparseLinear


def layers(model: nn.Module) -> list[SparseLinear]:
    return [part for part in model.modules() if isinstance(part, SparseLinear)]


def second(model: PeftModel, name: str) -> PeftModel:
    """Add an adapter "second" with other values, whose update is not zero."""
    model.add_adapter("second", copy.deepcopy(method_of(name).peft))
    generator = torch.Generator().manual_seed(7)
    for layer in layers(model):
        for part in layer.adapter_layer_names:
            factor = getattr(layer, part)["second"]
            factor.data = 0.1 * torch.randn(factor.shape, generator=generator).to(factor)
    return model


# ---- hooks


@pytest.mark.parametrize("name", FORMS)
def test_hooks_see_the_input_and_the_adapted_output_as_after_a_merge(name):
    model = ready(name)
    without = logits(model)
    for layer in layers(model):
        layer.base_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.1,))
        layer.base_layer.register_forward_hook(
            lambda _, inputs, output: output + 0.01 * inputs[0].sum(-1, keepdim=True)
        )
    hooked = logits(model)
    assert (hooked - without).abs().max() > 1e-2
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), hooked, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), hooked)
    names = ["default"] * 2 + ["__base__"] * 2
    torch.testing.assert_close(model(input_ids=batch()["input_ids"], adapter_names=names).logits[2:], base[2:])


@pytest.mark.parametrize("name", OWN)
def test_backward_hooks_run_and_nothing_is_said_of_layers_that_learn(name):
    model = adapt(method_of(name), pruned(), [batch()]).train()
    seen = []
    base = layers(model)[-1].base_layer
    base.register_full_backward_hook(lambda module, into, out: seen.append((module, into[0].shape, out[0].shape)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LORS|.*had no gradient|.*no zero to keep|.*no adapter")
        model(**batch()).loss.backward()
    rows = tuple(batch()["input_ids"].shape)
    assert seen == [(base, (*rows, base.in_features), (*rows, base.out_features))]


@pytest.mark.parametrize(
    ("name", "offloaded"),
    [(name, True) for name in OWN if "storage" not in name] + [(name, False) for name in ("lors", "spp", "sora")],
)
def test_the_hooks_of_accelerate_are_honoured(name, offloaded):
    """A model whose weights are away between the calls of a layer, or that only moves inputs to its device."""
    expected = ready(name)
    base = pruned()
    if offloaded:
        cpu_offload(base, execution_device="cpu")
        assert base.model.layers[0].mlp.up_proj.weight.is_meta
    else:
        for part in base.modules():
            if isinstance(part, nn.Linear):
                add_hook_to_module(part, AlignDevicesHook(execution_device="cpu"))
    config = copy.deepcopy(expected.peft_config["default"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for own, other in zip(layers(model), layers(expected), strict=True):
        for part in (*own.adapter_layer_names, *own.other_param_names):
            held = getattr(own, part)
            if part == "at_work":  # of XGBLoRA: which layers the present booster trains
                held.update(getattr(other, part))
            elif isinstance(held, nn.Module):
                assert not any(value.is_meta for value in held.state_dict().values())
                held.load_state_dict(getattr(other, part).state_dict(), assign=True)
        assert own.original_weight().is_meta == offloaded
    torch.testing.assert_close(logits(model.eval()), logits(expected))
    for each in (model, expected):
        torch.manual_seed(0)  # a gradient may be sampled
        each.train()(**batch()).loss.backward()
    for (key, own), other in zip(trainable(model).items(), trainable(expected).values(), strict=True):
        assert (own.grad is None) == (other.grad is None), key
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, msg=key)
    expected = logits(expected.eval())
    torch.testing.assert_close(logits(model.eval().merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_a_model_that_is_offloaded_later_still_has_its_adapter(name):
    model = ready(name)
    expected = logits(model)
    cpu_offload(model, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_threads_do_not_disturb_each_other():
    model = ready("lors")
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    handles = [layer.base_layer.register_forward_hook(lambda *_: None) for layer in layers(model)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: logits(model), range(40)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(value, expected) for value in found)
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(layer.base_layer) for layer in layers(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


# ---- several adapters


@pytest.mark.parametrize("name", FORMS)
def test_every_row_of_a_batch_can_have_its_own_adapter(name):
    model = second(ready(name), name)
    expected: dict[str, Tensor] = {}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        expected[adapter] = logits(model.eval())
    with model.disable_adapter():
        expected["__base__"] = logits(model)
    assert (expected["default"] - expected["second"]).abs().max() > 1e-3
    names = ["second", "__base__", "default", "second"]
    found = model(input_ids=batch()["input_ids"], adapter_names=names).logits
    for row, adapter in enumerate(names):
        torch.testing.assert_close(found[row], expected[adapter][row], rtol=1e-4, atol=1e-5)
    directly = model.base_model(input_ids=batch()["input_ids"], adapter_names=names).logits
    assert torch.equal(directly, found)


@pytest.mark.parametrize("name", OWN)
def test_a_mixed_batch_that_cannot_be_is_refused_in_one_line(name):
    model, ids = ready(name), batch()["input_ids"]
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo; there are default"):
        model(input_ids=ids, adapter_names=["typo"] * 4)
    with pytest.raises(ValueError, match="3 and 4 respectively"):
        model(input_ids=ids, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=ids, adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=ids, adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="there is no adapter 'typo'"):
        model.merge_adapter(["typo"])
    once = logits(model)
    model.unmerge_adapter()
    model.merge_adapter(["default", "default"])
    assert torch.equal(logits(model), once)


@pytest.mark.parametrize("name", [*OWN, FORMS[-1]])
def test_a_weighted_sum_of_adapters_is_exact_or_refused(name, tmp_path):
    model = second(ready(name), name)
    if not layers(model)[0].sums_by_concatenation:
        with pytest.raises(ValueError, match=r"add_weighted_adapter: the update of .* is no product s B A"):
            model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
        assert set(model.peft_config) == {"default", "second"}
        return
    wanted = {}
    for key, layer in model.base_model.adapted_layers("default").items():
        W = layer.weight.double()
        wanted[key] = 0.7 * layer.delta_weight(W, "default") - 0.4 * layer.delta_weight(W, "second")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
    model.set_adapter("sum")
    for key, layer in model.base_model.adapted_layers("sum").items():
        found = layer.delta_weight(layer.weight.double(), "sum")
        torch.testing.assert_close(found, wanted[key], rtol=1e-5, atol=1e-7)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(pruned(), tmp_path / "sum", autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded.eval()), expected)


def test_what_does_not_fit_a_sum_is_refused():
    model = second(ready("lors"), "lors")
    layers(model)[0].options["second"].exact_gradient = model.peft_config["second"].exact_gradient = True
    for adapters, weights, options, message in (
        (["default", "typo"], [1, 1], {}, "there is no adapter 'typo'"),
        (["default"], [1, 1], {}, "1 adapters, 2 weights"),
        (["default"], [1], {"combination_type": "svd"}, "'svd' is not for LORS, allowed is 'cat'"),
        (["default"], [1], {"density": 0.5}, "density is not for LORS"),
        (["default"], [1], {"adapter_name": "second"}, "adapter_name='second': there is an adapter of that name"),
        (["default", "second"], [1, 1], {}, "differ in exact_gradient"),
        (["default"] * 9, [1] * 9, {}, "larger than a side"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, weights, **({"adapter_name": "sum"} | options))
    assert set(model.peft_config) == {"default", "second"}
    assert not any("sum" in key for key in model.state_dict())


# ---- all or nothing


@pytest.mark.parametrize("name", OWN)
def test_a_safe_merge_that_fails_in_a_later_layer_leaves_every_layer_alone(name):
    model = ready(name)
    last = layers(model)[-1]
    factor = getattr(last, last.adapter_layer_names[0])["default"]
    factor.data.fill_(float("nan"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="infinity or a NaN"):
        last.merge(safe_merge=True)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.*infinity or a NaN; nothing was merged"):
            merge(safe_merge=True)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value.nan_to_num(), after[key].nan_to_num()) for key, value in before.items())
        assert not any(layer.merged for layer in layers(model))


@pytest.mark.parametrize("name", OWN)
def test_a_refused_adapter_leaves_the_model_as_it_was(name):
    """The last target is no linear layer, so that all others have been wrapped by then."""
    config = copy.deepcopy(method_of(name).peft)
    config.target_modules = {"q_proj", "k_proj", "norm"}
    base = pruned()
    before = [(key, id(part), type(part)) for key, part in base.named_modules()]
    flags = {key: parameter.requires_grad for key, parameter in base.named_parameters()}
    with pytest.raises(ValueError, match=r"target_modules: 'model\.norm' is of type LlamaRMSNorm"):
        get_peft_model(base, config)
    assert [(key, id(part), type(part)) for key, part in base.named_modules()] == before
    assert {key: parameter.requires_grad for key, parameter in base.named_parameters()} == flags
    # Likewise where there is an adapter already.
    model = ready(name)
    expected, state = logits(model), set(model.state_dict())
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'model\.norm' is of type LlamaRMSNorm"):
        model.add_adapter("second", config)
    assert torch.equal(logits(model), expected)
    assert set(model.state_dict()) == state
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert set(model.peft_config) == {"default"}
