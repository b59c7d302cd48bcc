"""Runs of the bench on a mixture of experts: prune, adapt, train, merge, count zeros and score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, expert_matrices
from conftest import make_tokenizer
from omegaconf import DictConfig
from test_harness_run import NO_SCORES, tiny_overrides
from transformers import MixtralConfig, MixtralForCausalLM

from harness.errors import BadInput
from harness.flops import count_inference_flops
from harness.run import execute
from lors.experts import experts_as_linears
from lors.sparsity import follows_pattern, sparsity_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small mixture with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("mixture"), make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    shape |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(composed, folder, tiny_sources, tmp_path):
    """Function from overrides to the config of a run on it."""
    overrides = tiny_overrides(folder, tiny_sources, tmp_path)
    return lambda *more: composed(*overrides, "eval.tasks=[]", "train.steps=2", *more)


def merged_folder(cfg: DictConfig, result: dict) -> str:
    return f"{cfg.runs_root}/{cfg.name}/{result['key']}/merged"


def test_a_run_from_end_to_end(mixture) -> None:
    cfg = mixture("method=lors", "pattern=2:4", "save_merged=true")
    result = execute(cfg)
    assert result["status"] == "ok", result["error"]
    zeros, parameters = result["zeros"], result["parameters"]
    assert (zeros["after_prune"], zeros["lost"], zeros["gained"], zeros["pattern_valid"]) == (0.5, 0, 0, True)
    factors = 4 * (4 * (64 + 192 + 96 + 64) + 2 * (64 + 64) + 2 * (64 + 32))
    assert parameters["trainable"] == 2 * factors
    assert parameters["adapted_share"] == 1.0
    assert result["eval"]["perplexity"]["value"] != result["baselines"]["pruned"]["perplexity"]["value"]

    merged = MixtralForCausalLM.from_pretrained(merged_folder(cfg, result))
    assert parameters["total"] == merged.num_parameters() + 2 * factors
    assert sparsity_of(merged) == 0.5
    assert all(follows_pattern(W, "2:4") for W in expert_matrices(merged).values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_of_a_method_that_is_no_tuner_of_ours(mixture, method: str) -> None:
    cfg = mixture(f"method={method}", "save_merged=true", *NO_SCORES)
    result = execute(cfg)
    assert result["status"] == "ok", result["error"]
    assert result["parameters"]["adapted_share"] == (None if method == "full" else 1.0)
    rows = {result["end_state"]: result, **result["variants"]}
    kept = rows["merged" if method == "full" else "remasked"]["zeros"]
    assert (kept["after_prune"], kept["after_merge"], kept["lost"]) == (0.5, 0.5, 0)
    assert sparsity_of(MixtralForCausalLM.from_pretrained(merged_folder(cfg, result))) == 0.5


def test_products_of_fused_experts_count_as_those_of_linear_layers_do() -> None:
    model, ids = ARCHITECTURES["gpt_oss"].build(), torch.arange(3, 51).view(4, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert model.get_experts_implementation()[""] == "grouped_mm"
    found = count_inference_flops(model, batch)
    with experts_as_linears(model):
        assert found == count_inference_flops(model, batch)


def test_a_step_of_a_mixture_is_simulated_and_its_pruning_is_not(mixture) -> None:
    result = execute(mixture("mode=simulate", "method=lors"))
    assert result["status"] == "ok", result["error"]
    with pytest.raises(BadInput, match=r"must be a model without experts if its pruning is simulated"):
        execute(mixture("mode=simulate", "method=none"))
