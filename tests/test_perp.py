"""PERP: what it trains in every architecture, that the rest stays bit for bit, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from contract import pruned
from test_full import train
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from baselines.perp import PARTS, PerpMethod, biases, norms
from harness.config import resolve
from harness.errors import BadInput
from harness.feasible import check_fit
from harness.method import adapt
from harness.method_from_config import build_method


def opt() -> PreTrainedModel:
    """A small model with a bias in every layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**shape, vocab_size=64, word_embed_proj_dim=32))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norms_are_the_modules_that_are_called_so(name):
    model = ARCHITECTURES[name].build()
    called_so = [part for part in model.modules() if "norm" in type(part).__name__.lower()]
    expected = {parameter for part in called_so for parameter in part.parameters(recurse=False)}
    assert set(norms(model)) == expected


@pytest.mark.parametrize("parts", [["biases"], ["norms"], ["biases", "norms"]], ids="+".join)
def test_it_is_training_of_these_parts_and_of_nothing_else(parts):
    start, reference, model = opt(), opt().requires_grad_(True), adapt(PerpMethod("perp", parts=parts), opt())
    wanted = {
        name: parameter
        for name, parameter in reference.named_parameters()
        if ("biases" in parts and name.endswith("bias")) or ("norms" in parts and "norm" in name)
    }
    train(reference, torch.optim.AdamW(wanted.values(), lr=1e-2, weight_decay=0.3))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == len(wanted)
    train(model, torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.3))
    for name, value in model.state_dict().items():
        # The whole graph is summed in another order where weights have gradients too.
        torch.testing.assert_close(value, reference.state_dict()[name])
        assert torch.equal(value, start.state_dict()[name]) != (name in wanted), name


def test_biases_of_norms_belong_to_both_parts():
    model = opt()
    shared = set(biases(model)) & set(norms(model))
    assert shared == {part.bias for part in model.modules() if isinstance(part, nn.LayerNorm)}
    assert shared < set(biases(model)) and shared < set(norms(model))


def test_a_model_without_the_parts_is_refused_in_one_line_before_it_is_loaded(composed):
    with pytest.raises(ValueError, match=r"^parts=\[biases\]: LlamaForCausalLM has none of them to train$"):
        adapt(PerpMethod("perp", parts=["biases"]), pruned())
    cfg = resolve(composed("method=perp", "method.parts=[biases]", "mode=profile", "model=llama2_7b"))
    with pytest.raises(BadInput, match=r"^method.parts=\[biases\]: LlamaForCausalLM has none of them to train"):
        check_fit(cfg, build_method(cfg), pruned().config)


@pytest.mark.parametrize("parts", [[], ["biases", "weights"]], ids=str)
def test_other_parts_are_refused(parts):
    with pytest.raises(ValueError, match=rf"^parts=.*: must be one (or more )?of {', '.join(PARTS)}$"):
        PerpMethod("perp", parts=parts)
