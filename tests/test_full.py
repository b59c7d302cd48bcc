"""Full fine-tuning with kept zeros: exact under any optimizer, equal to projecting after every step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from baselines.full import train_all_weights
from harness.method import Method, adapt, finish
from lors.blocks import decoder_linears
from lors.sparsity import random_support, supports, zero_report

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3),
    "adam, coupled decay": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.fixture
def pruned(tiny_llama) -> PreTrainedModel:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    for layer in decoder_linears(model).values():
        layer.weight.data.mul_(random_support(tuple(layer.weight.shape), 0.5, "unstructured", generator))
    return model


def batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after_step: Callable = lambda: None) -> None:
    for step in range(steps):
        for micro_batch in range(2):
            model(**batch(10 * step + micro_batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_get_no_gradient_no_moment_and_no_update(pruned, name):
    before = supports(pruned)
    model = train_all_weights(pruned)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, steps=4)
    report = zero_report(before, model, "unstructured")
    assert report["lost"] == 0
    assert report["after_merge"] == report["after_prune"]  # and the others are alive
    for layer_name, layer in decoder_linears(model).items():
        for state in optimizer.state[layer.weight].values():
            if state.ndim == 2:
                assert (state[~before[layer_name]] == 0).all()
                assert (state[before[layer_name]] != 0).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_dense_training_of_the_surviving_weights(pruned, name):
    """The reference masks the gradients out of place and puts the zeros back after every step."""
    masks = supports(pruned)
    reference = copy.deepcopy(pruned).requires_grad_(True)
    linears = decoder_linears(reference)

    def project() -> None:
        for layer_name, M in masks.items():
            linears[layer_name].weight.data.mul_(M)

    for layer_name, M in masks.items():
        linears[layer_name].weight.register_hook(lambda gradient, M=M: gradient * M)
    train(reference, OPTIMIZERS[name](reference.parameters()), steps=3, after_step=project)

    model = train_all_weights(pruned)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, OPTIMIZERS[name](model.parameters()), steps=3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key
        assert not torch.equal(value, start[key]), f"{key} was not trained"


def test_clipping_sees_only_the_weights_that_can_move(pruned):
    model = train_all_weights(pruned)
    model(**batch(0)).loss.backward()
    weights = [layer.weight for layer in decoder_linears(model).values()]
    assert all((weight.grad[weight == 0] == 0).all() for weight in weights)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16"])
def test_zeros_stay_through_the_precision_policies(pruned, precision):
    """The weights change their type after the hooks are set, and go back to that of the model at the end."""
    pruned = pruned.to(torch.bfloat16)
    pruned.config.dtype = torch.bfloat16
    before = supports(pruned)
    method = Method(name="full", prepare=train_all_weights)
    model = adapt(method, pruned, precision=precision)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_mixed"):
        train(model, optimizer, steps=3)
    finished = finish(method, model, before, "merged")
    assert zero_report(before, finished, "unstructured")["lost"] == 0
    assert {parameter.dtype for parameter in finished.parameters()} == {torch.bfloat16}
