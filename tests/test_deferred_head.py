"""The loss of a deferred head against the plain one: value, gradients, memory, and models that it leaves alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from harness.data import IGNORED
from harness.deferred_head import DeferredHead, deferred_by, head_deferred
from harness.live_memory import LiveTensors
from harness.recipe import batch_loss

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
ROWS, LENGTH = 3, 11


def recipe(tokens: int | None = 4, precision: str = "float32") -> SimpleNamespace:
    return SimpleNamespace(logits_at_once=tokens, precision=precision)


def tiny_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=1, **options)
    return AutoModelForCausalLM.from_config(config).double()


def batch(vocabulary: int = 97) -> dict[str, torch.Tensor]:
    tokens = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :6] = labels[1] = IGNORED  # a row without targets
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def loss_and_gradients(model: nn.Module, tokens: int | None, precision: str = "float32") -> list[torch.Tensor]:
    with deferred_by(model, recipe(tokens, precision)):
        assert isinstance(model.get_output_embeddings(), DeferredHead) == (tokens is not None)
        loss = batch_loss(model, batch(), micro_batches=2, autocast=precision == "bf16_mixed")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [loss, *torch.autograd.grad(3 * loss, trained)]


@pytest.mark.parametrize("tokens", [1, 4, 33, 1000])
@pytest.mark.parametrize("trained", ["all", "blocks"])
@pytest.mark.parametrize("tied", [False, True])
def test_value_and_gradients_are_those_of_the_plain_loss(tokens: int, trained: str, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied).float()
    if trained == "blocks":
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    for got, expected in zip(loss_and_gradients(model, tokens), loss_and_gradients(model, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_bias_and_mixed_precision() -> None:
    model = tiny_model().float()
    model.lm_head = nn.Linear(32, 97)
    for precision, tolerance in (("float32", 1e-6), ("bf16_mixed", 2e-2)):
        deferred = loss_and_gradients(model, 5, precision)
        for got, expected in zip(deferred, loss_and_gradients(model, None, precision), strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    torch.testing.assert_close(deferred[0], loss_and_gradients(model, None, "bf16_mixed")[0], rtol=1e-6, atol=0)


def test_the_loss_that_the_model_itself_computes() -> None:
    model = tiny_model().float()
    expected = model(**batch()).loss
    with head_deferred(model, 4):
        assert model(**batch()).logits.shape == (ROWS, LENGTH, 32)
        torch.testing.assert_close(model(**batch()).loss, expected, rtol=1e-6, atol=0)
        with head_deferred(model, 4):  # a second time changes nothing
            torch.testing.assert_close(model(**batch()).loss, expected, rtol=1e-6, atol=0)
    assert type(model.lm_head) is nn.Linear and model(**batch()).logits.shape[-1] == 97
    torch.testing.assert_close(model(**batch()).loss, expected, rtol=0, atol=0)


def test_a_model_that_changes_its_logits_keeps_its_head() -> None:
    shape = SHAPE | {"num_key_value_heads": 1, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(Gemma2Config(**shape, final_logit_softcapping=0.1))
    with head_deferred(model, 4):
        assert type(model.get_output_embeddings()) is nn.Linear
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with head_deferred(model, 4):
        assert model(**batch()).logits.shape[-1] == 97


def test_logits_of_all_tokens_never_exist() -> None:
    model = tiny_model().float()
    model.lm_head = nn.Linear(32, 4000).requires_grad_(False)
    peaks = []
    for tokens in (None, 4):
        with deferred_by(model, recipe(tokens)), LiveTensors() as live:
            batch_loss(model, batch()).backward()
        peaks.append(live.peak)
    logits = 4 * ROWS * LENGTH * 4000
    assert peaks[0] - peaks[1] > 1.5 * logits
