"""Every decoder-only architecture in ``architectures.py``: pruned, adapted, trained, merged; or refused untouched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import lors
from lors.blocks import decoder_blocks, decoder_linears
from lors.pruning import prune_magnitude, prune_model
from lors.sparsity import follows_pattern

IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
RULES = {
    "wanda": {"sparsity": 0.5, "pattern": "unstructured", "calibration": IDS},
    "magnitude": {"sparsity": None, "pattern": "2:4", "calibration": None},
}


# Of the others there are close relatives among these.
SOON = set(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3 phi phi3 opt opt_350m gpt_neox falcon_7b falcon_rw olmo2 "
    "stablelm cohere granite bloom mpt gptj gpt_bigcode starcoder2 glm4 smollm3 mixtral qwen2_moe qwen3_moe "
    "gpt_oss deepseek_v3 dbrx jetmoe llama4 gpt2 mamba mamba2 jamba bamba zamba2 rwkv gemma3n recurrent_gemma".split()
)


def those(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in names]
    )


@pytest.mark.parametrize("pruner", RULES)
@those(name for name, architecture in ARCHITECTURES.items() if not architecture.pruner_refuses)
def test_every_linear_of_the_blocks_is_pruned_and_nothing_else(name: str, pruner: str) -> None:
    model = ARCHITECTURES[name].build()
    dense = weights_of(model)
    prune_model(model, pruner, **RULES[pruner])
    linears = decoder_linears(model)
    assert linears.keys() == linears_of_blocks(model).keys()
    for key, linear in linears.items():
        zeros = linear.weight == 0
        if pruner == "wanda":
            assert (zeros.sum(1) == linear.in_features // 2).all(), key
        else:
            assert follows_pattern(linear.weight, "2:4"), key
        assert torch.equal(linear.weight, dense[f"{key}.weight"].masked_fill(zeros, 0)), key
    pruned = weights_of(model)
    assert all(torch.equal(pruned[key], dense[key]) for key in dense if key.removesuffix(".weight") not in linears)
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("pruner", RULES)
@those(name for name, architecture in ARCHITECTURES.items() if architecture.pruner_refuses)
def test_what_the_pruner_cannot_prune_is_refused_by_name(name: str, pruner: str) -> None:
    model = ARCHITECTURES[name].build()
    before = state_of(model)
    with pytest.raises(ValueError, match=ARCHITECTURES[name].pruner_refuses):
        prune_model(model, pruner, **RULES[pruner])
    assert_same_state(before, state_of(model))


@those(name for name, architecture in ARCHITECTURES.items() if not architecture.pruner_refuses)
def test_blocks_are_calibrated_on_what_the_model_gives_them(name: str) -> None:
    """With nothing pruned the walk hands the last block what the model itself does."""
    model = ARCHITECTURES[name].build()
    last = decoder_blocks(model)[1][-1]
    inputs: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    prune_model(model, "wanda", **RULES["wanda"] | {"sparsity": 0.0})
    own, walked = inputs[: len(IDS)], inputs[len(IDS) : 2 * len(IDS)]
    for expected, actual in zip(own, walked, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("rwkv" not in ARCHITECTURES, reason="this transformers has no RWKV")
def test_a_model_that_computes_between_its_blocks_is_not_pruned_by_their_inputs() -> None:
    """RWKV halves the hidden states behind every sixth block, here behind each, and only in evaluation."""
    model = Architecture("Rwkv", {"rescale_every": 1}).build()
    with pytest.raises(ValueError, match=r"blocks?[. ]\d"):
        prune_model(model, "wanda", **RULES["wanda"])
    assert all(bool((linear.weight != 0).all()) for linear in linears_of_blocks(model).values())


@those(name for name, architecture in ARCHITECTURES.items() if architecture.tuner_refuses)
def test_what_the_tuner_cannot_adapt_is_refused_by_name(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    before = state_of(model)
    with pytest.raises(ValueError, match=architecture.tuner_refuses):
        adapt(model)
    assert_same_state(before, state_of(model))


@those(name for name, a in ARCHITECTURES.items() if a.exclude or not a.tuner_refuses)
def test_adapters_on_every_linear_train_and_merge(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    prune(model, architecture)
    base = weights_of(model)
    expected = {key for key in linears_of_blocks(model) if not re.fullmatch(architecture.exclude or "", key)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapt(model, architecture.exclude)
    assert_warned(architecture, [str(warning.message) for warning in caught])
    layers = lors_layers(model)
    assert {key for key in layers if in_blocks(key, model)} == expected

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert [key for key, layer in layers.items() if not has_gradient(layer.lors_B)] == [], "B has no gradient"
        if step == 1:  # in the first step B is zero, and so is the gradient of A
            assert [key for key, layer in layers.items() if not has_gradient(layer.lors_A)] == [], "A has no gradient"
        optimizer.step()

    model.eval()
    unmerged = logits(model)
    model = model.merge_and_unload()
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-5, atol=1e-5)
    merged = weights_of(model)
    assert merged.keys() == base.keys()
    changed = {key for key in base if not torch.equal(merged[key], base[key])}
    assert changed == {f"{key}.weight" for key in layers}
    for key in layers:
        zeros = base[f"{key}.weight"] == 0
        assert (merged[f"{key}.weight"][zeros] == 0).all(), key
        assert not in_blocks(key, model) or zeros.any(), f"{key} had no zeros to keep"


def adapt(model: PreTrainedModel, exclude: str | None = None) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, lors.LorsConfig(r=4, task_type="CAUSAL_LM", exclude_modules=exclude))


def prune(model: PreTrainedModel, architecture: Architecture) -> None:
    """By Wanda; where the pruner refuses the model, only the linears that there are, by magnitude."""
    if not architecture.pruner_refuses:
        prune_model(model, "wanda", **RULES["wanda"])
        return
    with torch.no_grad():
        for linear in linears_of_blocks(model).values():
            linear.weight.copy_(prune_magnitude(linear.weight, sparsity=0.5, pattern="unstructured"))


def assert_warned(architecture: Architecture, messages: list[str]) -> None:
    """Of weights in the blocks that get no adapter, by name: those that are no linear layers, and those left out."""
    incomplete = bool(architecture.pruner_refuses or architecture.exclude)
    assert any(re.search(r"(layers|blocks|h)\.\d+\.", message) for message in messages) == incomplete, messages


def linears_of_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` in the blocks, found without the library's own rule of what is one."""
    name, blocks = decoder_blocks(model)
    return {f"{name}.{key}": part for key, part in blocks.named_modules() if isinstance(part, nn.Linear)}


def in_blocks(key: str, model: nn.Module) -> bool:
    return key.startswith(f"{decoder_blocks(model)[0]}.")


def lors_layers(model: PeftModel) -> dict[str, lors.LorsLinear]:
    modules = model.get_base_model().named_modules()
    return {key: part for key, part in modules if isinstance(part, lors.LorsLinear)}


def has_gradient(factor: nn.ParameterDict) -> bool:
    return all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in factor.values())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters(remove_duplicate=False)}


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, bool], list[tuple[str, nn.Module]]]:
    """Copies of parameters and buffers, what of it is trained, and the modules themselves."""
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    return {k: v.clone() for k, v in model.state_dict().items()}, trained, list(model.named_modules())


def assert_same_state(before: tuple, after: tuple) -> None:
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1] == after[1]
    assert all(x[0] == y[0] and x[1] is y[1] for x, y in zip(before[2], after[2], strict=True))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits
