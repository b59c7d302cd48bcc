"""Fused experts: pruned, adapted, initialised and merged one by one, whatever the layout in which they are stored."""

from __future__ import annotations

import copy
import logging
import re
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, expert_matrices
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

import lors
from baselines.spp import SppConfig
from baselines.sqft import SqftConfig
from lors.experts import ExpertLinears, experts_as_linears, fuse_experts
from lors.pruning import prune_model
from lors.sparsity import follows_pattern, sparsity_of, supports

FUSED = pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
BY_NAME = {"target_modules": ["gate_up_proj", "down_proj"]}
NO_TOKEN = 3  # the expert without one in `with_an_idle_expert`


def pruned(name: str, pattern: str = "unstructured", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = ARCHITECTURES[name].build()
    prune_model(model, "magnitude", sparsity=0.5, pattern=pattern, calibration=None)
    return model.to(dtype)


def adapted(model: PreTrainedModel, config: lors.LorsConfig | None = None) -> PeftModel:
    """With an adapter that changes the model."""
    torch.manual_seed(1)
    model = get_peft_model(model, config or lors.LorsConfig(r=3))
    for layer in layers_of(model).values():
        for factors in (layer.lors_A, layer.lors_B):
            nn.init.normal_(factors["default"], std=0.2)
    return model


def layers_of(model: PeftModel) -> dict[str, lors.LorsLinear]:
    return model.base_model.adapted_layers("default")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def with_an_idle_expert() -> PreTrainedModel:
    """The router of gpt-oss has a bias; that of the second block never chooses one expert."""
    model = ARCHITECTURES["gpt_oss"].build()
    model.model.layers[1].mlp.router.bias.data[NO_TOKEN] = -1e4
    return model


def merged_as_autograd_sees_it(W: Tensor, layer: lors.LorsLinear, exact: bool) -> Tensor:
    """T = W + s M (.) (B A), out x in. The estimate of the paper has the derivative of s B A without the mask."""
    update = layer.scaling["default"] * (layer.lors_B["default"] @ layer.lors_A["default"])
    T = W + (W != 0) * update
    return T if exact else (T - update).detach() + update


@FUSED
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_are_those_of_the_dense_formula(name: str, exact: bool) -> None:
    """In float64, through the forward function of transformers on all experts at once."""
    base = pruned(name, dtype=torch.float64)
    base.set_experts_implementation("batched_mm")  # the other one has no float64
    model = adapted(copy.deepcopy(base), lors.LorsConfig(r=3, exact_gradient=exact, **BY_NAME)).eval()
    layers = layers_of(model)
    found = model(input_ids=IDS, labels=IDS).loss
    found.backward()
    factors = {(key, part): getattr(layer, part)["default"] for key, layer in layers.items() for part in PARTS}

    matrices = expert_matrices(base)
    assert layers.keys() == matrices.keys()
    stacks: dict[str, list[Tensor]] = {}
    for key, W in matrices.items():
        stored, _ = key.rsplit(".", 1)
        T = merged_as_autograd_sees_it(W, layers[key], exact)
        stacks.setdefault(stored, []).append(T.t() if name == "gpt_oss" else T)
    weights = {key: torch.stack(stack) for key, stack in stacks.items()}
    expected = functional_call(base, weights, kwargs={"input_ids": IDS, "labels": IDS}).loss
    gradients = torch.autograd.grad(expected, list(factors.values()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for (key, part), gradient in zip(factors, gradients, strict=True):
        torch.testing.assert_close(factors[key, part].grad, gradient, rtol=1e-9, atol=1e-12, msg=f"{key} {part}")


PARTS = ("lors_A", "lors_B")


@FUSED
@pytest.mark.parametrize("storage", ["dense", "n:m"])
def test_a_merge_keeps_the_zeros_and_gives_the_model_of_before(name: str, storage: str) -> None:
    base = pruned(name, "2:4")
    state, M = {key: value.clone() for key, value in base.state_dict().items()}, supports(base)
    model = adapted(base, lors.LorsConfig(r=3, storage=storage)).eval()
    assert {re.sub(r"\d+$", "", key) for key in layers_of(model)} >= {"model.layers.0.mlp.experts.down_proj."}
    before = {key: layer.original_weight().clone() for key, layer in layers_of(model).items()}
    expected = logits(model)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(layer.original_weight(), before[key]) for key, layer in layers_of(model).items())

    plain = model.merge_and_unload()
    assert not any(isinstance(part, ExpertLinears) for part in plain.modules())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    after = plain.state_dict()
    assert after.keys() == state.keys()
    assert all(after[key].shape == state[key].shape for key in state)
    for key, W in expert_matrices(plain).items():
        assert not W[~M[key]].any() and W[M[key]].all(), key
        assert follows_pattern(W, "2:4"), key
        assert not torch.equal(W, before[key]), key


@FUSED
def test_an_adapter_is_saved_and_loaded(name: str, tmp_path) -> None:
    model = adapted(pruned(name)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of other zeros, of what has no adapter
        loaded = PeftModel.from_pretrained(pruned(name), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(pruned(name)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_adapter_takes_part_in_every_implementation(implementation: str) -> None:
    """Asked for before or after."""
    expected = logits(adapted(pruned("mixtral")).eval())
    base = pruned("mixtral")
    base.set_experts_implementation(implementation)
    model = adapted(base).eval()
    assert torch.equal(logits(model), expected)
    model.get_base_model().set_experts_implementation("batched_mm")
    assert torch.equal(logits(model), expected)
    plain = model.merge_and_unload()
    assert plain.model.layers[0].mlp.experts.config is plain.config


def test_a_step_in_bfloat16_with_checkpointing_has_the_gradients_of_one_without() -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(pruned("gpt_oss", dtype=torch.bfloat16), lors.LorsConfig(r=3, **BY_NAME)).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({key: layer.lors_B["default"].grad for key, layer in layers_of(model).items()})
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())
    assert sum(gradient is not None and bool(gradient.any()) for gradient in found[0].values()) > 8


@pytest.mark.parametrize("config", [SppConfig(r=4), SqftConfig(r=4)])
def test_the_other_methods_that_keep_zeros_adapt_experts_too(config: SppConfig | SqftConfig) -> None:
    base = pruned("qwen3_moe")
    M = supports(base)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    expected = logits(model.eval())
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert all(not W[~M[key]].any() for key, W in expert_matrices(plain).items())


@FUSED
def test_a_lora_of_peft_is_made_loaded_and_merged(name: str, tmp_path) -> None:
    model = pruned(name)
    names = set(supports(model))
    with experts_as_linears(model):
        model = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = pruned(name)
    with experts_as_linears(base):
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    plain = fuse_experts(loaded.merge_and_unload())
    assert plain.state_dict().keys() == pruned(name).state_dict().keys()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


# ---- what is left alone


def test_experts_that_no_target_names_stay_fused_and_are_said() -> None:
    model = pruned("mixtral")
    with pytest.warns(UserWarning, match=r"20 pruned linear layers have no adapter.*experts\.down_proj"):
        model = get_peft_model(model, lors.LorsConfig(r=2, target_modules=["q_proj", "k_proj"]))
    assert not any(isinstance(part, ExpertLinears) for part in model.modules())


def test_a_refused_adapter_leaves_the_experts_fused() -> None:
    model = pruned("mixtral")
    before = {key: id(parameter) for key, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"r=40: larger than a side"):
        get_peft_model(model, lors.LorsConfig(r=40))
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == before
    assert not any(isinstance(part, ExpertLinears) for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_may_get_its_weights_while_its_experts_are_linear_layers() -> None:
    model = ARCHITECTURES["gpt_oss"].build().to("meta")
    with experts_as_linears(model):
        model.to_empty(device="cpu")
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 48, 32)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_an_adapter_for_each_row_is_refused() -> None:
    model = adapted(pruned("mixtral")).eval()
    with pytest.raises(ValueError, match="take tokens of several rows together"):
        model(input_ids=IDS, adapter_names=["default"] * len(IDS))


def test_another_use_of_the_weight_of_an_expert_is_an_error() -> None:
    model = pruned("mixtral")
    with experts_as_linears(model):
        experts = model.model.layers[0].mlp.experts
        with pytest.raises(TypeError, match="can be multiplied with its input, not used in"):
            torch.add(torch.ones(1), experts.down_proj[0])
    assert fuse_experts(model) is model


# ---- pruning


@FUSED
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_compares_the_weights_of_a_row_by_the_tokens_of_its_expert(name: str, pattern: str) -> None:
    model = ARCHITECTURES[name].build()
    experts, dense = model.model.layers[0].mlp.experts, copy.deepcopy(model)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone())))
    logits(model)
    hook.remove()
    (states, chosen) = seen[0]  # tokens x hidden, tokens x experts for each

    prune_model(model, "wanda", sparsity=0.5, pattern=pattern, calibration=IDS)
    found = expert_matrices(model)
    assert sparsity_of(model) == pytest.approx(0.5)
    for key, W in expert_matrices(dense).items():
        if "layers.0" not in key or "gate_up" not in key:
            assert ((found[key] == 0).sum(1) == W.shape[1] // 2).all(), key
            continue
        X = states[(chosen == int(key.rsplit(".", 1)[1])).any(1)]
        score = W.abs() * X.norm(dim=0)
        groups = score.unflatten(1, (-1, 4)) if pattern == "2:4" else score.unsqueeze(1)
        kept = torch.zeros_like(groups).scatter_(2, groups.topk(groups.shape[2] // 2).indices, 1.0).flatten(1)
        assert torch.equal(found[key], W * kept), key


def test_sparsegpt_prunes_experts() -> None:
    model = ARCHITECTURES["gpt_oss"].build()
    prune_model(model, "sparsegpt", sparsity=None, pattern="2:4", calibration=IDS)
    assert all(((W != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for W in expert_matrices(model).values())


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_an_expert_without_a_token_is_pruned_by_magnitude_and_said_once(pruner: str, caplog) -> None:
    model = with_an_idle_expert()
    dense = {key: W.clone() for key, W in expert_matrices(model).items()}
    with caplog.at_level(logging.WARNING, logger="lors"):
        prune_model(model, pruner, sparsity=0.5, pattern="unstructured", calibration=IDS.repeat(4, 1))
    names = [f"model.layers.1.mlp.experts.{part}.{NO_TOKEN}" for part in ("gate_up_proj", "down_proj")]
    lines = [record.getMessage() for record in caplog.records if "no calibration token" in record.getMessage()]
    assert lines == [
        f"no calibration token reached 2 matrices of experts, which were pruned by magnitude: {names[0]}, {names[1]}"
    ]
    for name in names:
        W, found = dense[name], expert_matrices(model)[name]
        smallest = W.abs().argsort(1)[:, : W.shape[1] // 2]
        assert torch.equal(found, W.scatter(1, smallest, 0.0)), name


# ---- the gradient start


def test_each_expert_starts_from_its_own_gradient_and_an_idle_one_keeps_its_start() -> None:
    base = with_an_idle_expert().double()
    base.set_experts_implementation("batched_mm")
    experts = base.model.layers[1].mlp.experts
    gradient = torch.autograd.grad(base(input_ids=IDS, labels=IDS).loss, experts.gate_up_proj)[0]  # E x in x out
    with pytest.warns(UserWarning, match="no zero to keep"):
        model = get_peft_model(base, lors.LorsConfig(r=3))
    layers = [layers_of(model)[f"model.layers.1.mlp.experts.gate_up_proj.{e}"] for e in range(len(gradient))]
    before = layers[NO_TOKEN].lors_A["default"].clone()
    with pytest.warns(UserWarning, match=r"2 of \d+ layers had no gradient and keep their A"):
        lors.initialize(model, [{"input_ids": IDS, "labels": IDS}])
    assert torch.equal(layers[NO_TOKEN].lors_A["default"], before)
    for e, layer in enumerate(layers):
        if e != NO_TOKEN:
            V = torch.linalg.svd(gradient[e].t()).Vh[:3]
            A = layer.lors_A["default"].double()
            torch.testing.assert_close(A.t() @ A, V.t() @ V, rtol=1e-3, atol=1e-3)


def test_an_idle_expert_is_no_adapter_that_the_backward_pass_has_missed() -> None:
    model = adapted(with_an_idle_expert())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert layers_of(model)[f"model.layers.1.mlp.experts.down_proj.{NO_TOKEN}"].lors_B["default"].grad is None
