"""Full fine-tuning with kept zeros: exact under any optimizer, equal to projecting after every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import batch, pruned
from torch import nn

from baselines.full import FullMethod
from harness.method import adapt
from lors.blocks import decoder_linears
from lors.sparsity import supports

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3),
    "adam, coupled decay": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, after_step: Callable = lambda: None) -> None:
    """Three steps of two micro-batches."""
    for _ in range(3):
        for count in (2, 3):
            model(**batch(count)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_dense_training_of_the_surviving_weights(name):
    """The reference masks the gradients out of place and puts the zeros back after every step."""
    reference, masks = pruned().requires_grad_(True), supports(pruned())
    linears = decoder_linears(reference)

    def project() -> None:
        for layer_name, M in masks.items():
            linears[layer_name].weight.data.mul_(M)

    for layer_name, M in masks.items():
        linears[layer_name].weight.register_hook(lambda gradient, M=M: gradient * M)
    train(reference, OPTIMIZERS[name](reference.parameters()), after_step=project)

    model, start = adapt(FullMethod("full"), pruned()), pruned().state_dict()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key
        assert not torch.equal(value, start[key]), f"{key} was not trained"
    for layer_name, layer in decoder_linears(model).items():
        for state in [state for state in optimizer.state[layer.weight].values() if state.ndim == 2]:
            assert (state[~masks[layer_name]] == 0).all() and (state[masks[layer_name]] != 0).any()
