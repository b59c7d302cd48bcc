"""Every decoder-only architecture in ``architectures.py``: pruned, adapted, trained, merged; or refused untouched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, expert_matrices
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
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3 phi phi3 opt opt_350m gptneox falcon_7b falcon_rw olmo2 "
    "stablelm cohere granite bloom mpt gptj gpt_bigcode starcoder2 glm4 smollm3 mixtral qwen2_moe qwen3_moe "
    "gpt_oss deepseek_v3 dbrx jetmoe llama4 gpt2 mamba mamba2 jamba bamba zamba2 rwkv gemma3n recurrent_gemma".split()
)


def those(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in names]
    )


@pytest.mark.parametrize("pruner", RULES)
@those(name for name, each in ARCHITECTURES.items() if not each.not_pruned)
def test_every_linear_of_the_blocks_is_pruned_and_nothing_else(name: str, pruner: str) -> None:
    model = ARCHITECTURES[name].build()
    dense = weights_of(model)
    prune_model(model, pruner, **RULES[pruner])
    linears = decoder_linears(model)
    assert linears.keys() == matrices_of_blocks(model).keys()
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
@those(name for name, each in ARCHITECTURES.items() if each.not_pruned)
def test_what_the_pruner_cannot_prune_is_refused_by_name(name: str, pruner: str) -> None:
    model = ARCHITECTURES[name].build()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"\w\.\d\.{ARCHITECTURES[name].not_pruned}"):
        prune_model(model, pruner, **RULES[pruner])
    assert_same_state(before, state_of(model))


@those(name for name, each in ARCHITECTURES.items() if not each.not_pruned)
def test_blocks_are_calibrated_on_what_the_model_gives_them(name: str) -> None:
    """With nothing pruned the walk hands the last block what the model itself does."""
    model = ARCHITECTURES[name].build()
    last = decoder_blocks(model)[1][-1]
    inputs: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    logits(model)
    prune_model(model, "wanda", **RULES["wanda"] | {"sparsity": 0.0})
    torch.testing.assert_close(inputs[-1], inputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("rwkv" not in ARCHITECTURES, reason="this transformers has no RWKV")
def test_a_model_that_computes_between_its_blocks_is_not_pruned_by_their_inputs() -> None:
    """RWKV halves the hidden states behind every sixth block, here behind each, and only in evaluation."""
    model = Architecture("Rwkv", {"rescale_every": 1}).build()
    with pytest.raises(ValueError, match=r"blocks?[. ]\d"):
        prune_model(model, "wanda", **RULES["wanda"])
    assert all(bool((W != 0).all()) for W in matrices_of_blocks(model).values())


@those(name for name, each in ARCHITECTURES.items() if each.not_adapted)
def test_what_the_tuner_cannot_adapt_is_refused_by_name(name: str) -> None:
    model = ARCHITECTURES[name].build()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"\w\.\d\.({ARCHITECTURES[name].not_adapted})"):
        adapt(model)
    assert_same_state(before, state_of(model))


@those(name for name in ARCHITECTURES if name not in ("gpt2", "openai_gpt"))
def test_adapters_on_every_linear_train_and_merge(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    for W in matrices_of_blocks(model).values():
        W.copy_(prune_magnitude(W, sparsity=0.5, pattern="unstructured"))
    base = weights_of(model)
    expected = {key for key in matrices_of_blocks(model) if not re.fullmatch(architecture.exclude or "", key)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapt(model, architecture.exclude)
    # Of weights in the blocks that get no adapter, by name: those that are no linear layers, and those left out.
    named = any(re.search(r"(layers|blocks|h)\.\d+\.", str(warning.message)) for warning in caught)
    assert named == bool(architecture.not_pruned or architecture.exclude)
    layers = model.base_model.adapted_layers("default")
    inside = f"{decoder_blocks(model)[0]}."
    assert {key for key in layers if key.startswith(inside)} == expected

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for key, layer in layers.items():
            assert layer.lors_B["default"].grad.any(), key
            # In the first step B is zero, and so is the gradient of A.
            assert step == 0 or layer.lors_A["default"].grad.any(), key
        optimizer.step()

    model.eval()
    unmerged = logits(model)
    model = model.merge_and_unload()
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-5, atol=1e-5)
    merged = weights_of(model)
    assert merged.keys() == base.keys()
    assert {key for key in base if not torch.equal(merged[key], base[key])} == {f"{key}.weight" for key in layers}
    for key in layers:
        zeros = base[f"{key}.weight"] == 0
        assert not merged[f"{key}.weight"][zeros].any(), key
        assert not key.startswith(inside) or zeros.any(), f"{key} had no zeros to keep"


def adapt(model: PreTrainedModel, exclude: str | None = None) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, lors.LorsConfig(r=4, task_type="CAUSAL_LM", exclude_modules=exclude))


def matrices_of_blocks(model: nn.Module) -> dict[str, Tensor]:
    """Views of the weight of every ``nn.Linear`` and every expert in the blocks, found without the library's own rule
    of what is one."""
    name, blocks = decoder_blocks(model)
    linears = {key: part.weight.detach() for key, part in blocks.named_modules() if isinstance(part, nn.Linear)}
    return {f"{name}.{key}": W for key, W in [*linears.items(), *expert_matrices(blocks).items()]}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, those of fused experts one by one."""
    experts = {f"{key}.weight": matrix for key, matrix in expert_matrices(model).items()}
    fused = {key.removesuffix(".weight").rpartition(".")[0] for key in experts}
    others = {key: value for key, value in model.named_parameters(remove_duplicate=False) if key not in fused}
    return {key: value.detach().clone() for key, value in (others | experts).items()}


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, bool], list[tuple[str, int]]]:
    """Copies of parameters and buffers, what of it is trained, and the modules themselves."""
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    modules = [(key, id(part)) for key, part in model.named_modules()]
    return {key: value.clone() for key, value in model.state_dict().items()}, trained, modules


def assert_same_state(before: tuple, after: tuple) -> None:
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1:] == after[1:]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits
