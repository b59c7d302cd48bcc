"""The contract of our own tuners under torch.compile: compiled they compute what they compute eagerly.

On a CPU torch 2.13 forgets alpha in ``torch.add(linear, linear, alpha=s)`` of matrices, not of batches of them: an
update was off by its whole scale.
"""

from __future__ import annotations

import pytest
import torch
from contract import FORMS, adapted_layer, batch, method_of, pruned, trainable, trained
from torch import Tensor, nn

from lors.sparsity import random_support


def values(model: nn.Module, call: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in trainable(model).values() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "hooked"),
    [((10, 32), False), ((2, 5, 32), False), ((10, 32), True)],
    ids=["rows", "batch of rows", "with a hook"],
)
@pytest.mark.parametrize("name", FORMS)
def test_compiled_equals_eager(name, shape, hooked):
    torch.manual_seed(0)
    linear = nn.Linear(32, 32)
    linear.weight.data.mul_(random_support((32, 32), None, "2:4", torch.Generator().manual_seed(0)))
    layer = adapted_layer(name, linear, "adapter.alpha=24")
    x = torch.randn(shape)
    torch._dynamo.reset()
    if hooked:
        linear.register_forward_hook(lambda _, x, y: y + x[0])
    eager = values(layer, layer, x)
    compiled = values(layer, torch.compile(layer), x)
    assert (linear(x) - eager[0]).abs().max() > 0.05, "the update must be seen"
    assert len(eager) == len(compiled) > 2
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lors", "sherl"])
def test_a_whole_compiled_model_equals_the_eager_one(name):
    """SHERL has no layer of its own that could be compiled alone."""
    model = trained(method_of(name), pruned()).train()
    torch._dynamo.reset()
    found = []
    for call in (model, torch.compile(model)):
        model.zero_grad()
        output = call(**batch())
        output.loss.backward()
        found.append([output.logits.detach(), *(parameter.grad for parameter in trainable(model).values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
