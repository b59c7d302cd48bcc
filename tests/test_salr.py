"""SALR: its start against the singular value decomposition of what pruning took away, and against LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from single_layers import draw
from test_harness_run import SHORT, tiny  # noqa: F401 - a fixture
from torch import nn

from baselines.salr import SalrMethod
from harness.method import adapt
from harness.run import execute
from lors.pruning import prune_model

TOKENS = torch.arange(5, 45).view(2, 20)


def method(dense: nn.Module | None, r: int = 8, residual_rank: int | None = 5, alpha: int = 16) -> SalrMethod:
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    built = SalrMethod("salr", config, residual_rank=residual_rank)
    built.dense = dense
    return built


def models(sparsity: float = 0.5) -> tuple[nn.Module, nn.Module]:
    dense = make_tiny_llama().double()
    pruned = copy.deepcopy(dense)
    prune_model(pruned, "magnitude", sparsity=sparsity)
    return dense, pruned


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: part for name, part in model.get_base_model().named_modules() if isinstance(part, LoraLayer)}


def test_it_starts_at_the_best_approximation_of_what_was_taken_away():
    dense, pruned = models()
    model = adapt(method(dense), pruned)
    for name, layer in layers(model).items():
        W, W0 = layer.get_base_layer().weight, dense.get_submodule(name).weight
        U, S, Vh = torch.linalg.svd(W0 - W, full_matrices=False)
        assert torch.allclose(layer.get_delta_weight("default").double(), U[:, :5] * S[:5] @ Vh[:5], atol=1e-7)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.shape[0] == 8 and not B[:, :3].any() and A[:3].any(1).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), height=st.integers(2, 12), width=st.integers(2, 12), r=st.integers(1, 12))
def test_the_error_falls_by_the_factor_of_the_theorem(seed, height, width, r):
    """|E - E_e|^2 <= (1 - r_e / min(out, in)) |E|^2."""
    r = min(r, height, width)
    W0 = draw(height, width, seed=seed)
    wrapped = nn.Sequential(nn.Linear(width, height, bias=False, dtype=torch.float64))
    wrapped[0].weight.data = W0 * (W0.abs() > W0.abs().median())
    config = LoraConfig(r=1 + r, lora_alpha=1 + r, target_modules=["0"])
    model = get_peft_model(wrapped, config, autocast_adapter_dtype=False)
    built = method(None, r=1 + r, residual_rank=r)
    layer = model.base_model.model[0]
    built._start(layer, W0)
    E = W0 - layer.get_base_layer().weight
    left = (E - layer.get_delta_weight("default")).square().sum()
    assert left <= (1 - r / min(height, width)) * E.square().sum() + 1e-12


def test_both_adapters_learn_and_without_a_dense_model_it_is_lora():
    dense, pruned = models()
    model = adapt(method(dense), pruned)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer in layers(model).values():
        gradient = layer.lora_B["default"].weight.grad
        assert gradient[:, :3].any() and gradient[:, 3:].any()
    model = adapt(method(None), models()[1])
    assert not any(layer.lora_B["default"].weight.any() for layer in layers(model).values())


def test_a_run_is_scored_as_lora_is(tiny, no_network):  # noqa: F811
    result = execute(tiny("method=salr", *SHORT))
    assert result["status"] == "ok", result["error"]
    assert [result["end_state"], *result["variants"]] == ["adapter", "remasked", "dense"]
    assert result["variants"]["remasked"]["zeros"]["lost"] == 0
    lora = execute(tiny("method=lora", *SHORT))
    assert result["parameters"]["trainable"] == lora["parameters"]["trainable"]
    assert result["loss"]["first"] != lora["loss"]["first"]


def test_a_rank_that_is_none_is_refused():
    for rank in (0, 8):
        with pytest.raises(ValueError, match=f"residual_rank={rank}: must be a whole number >= 1 and < 8"):
            method(None, residual_rank=rank)
    assert method(None, residual_rank=None).residual_rank == 4
