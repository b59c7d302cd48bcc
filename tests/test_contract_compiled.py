"""The contract of our own tuners under torch.compile: compiled they compute what they compute eagerly.

On a CPU torch 2.13 forgets alpha in ``torch.add(linear, linear, alpha=s)`` of matrices, not of batches of them: an
update was off by its whole scale.
"""

from __future__ import annotations

import copy

import pytest
import torch
from contract import OWN, batch, composed, method_of, pruned, trainable, trained
from peft import get_peft_model
from torch import Tensor, nn

FORMS = [*OWN, *(f"{name} keep_zeros=false" for name in OWN if "keep_zeros" in composed(name).method.peft)]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).tanh()


def values(model: nn.Module, call: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad]
    return [*found, *(parameter.grad for parameter in trainable(model).values() if parameter.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "hooked"),
    [((10, 32), False), ((2, 5, 32), False), ((10, 32), True)],
    ids=["rows", "batch of rows", "with a hook"],
)
@pytest.mark.parametrize("name", FORMS)
def test_compiled_equals_eager(name, shape, hooked):
    torch.manual_seed(0)
    stack = Stack()
    order = torch.rand(32, 8, 4).argsort(-1).argsort(-1)
    stack.q_proj.weight.data.mul_((order < 2).flatten(1))
    config = copy.deepcopy(method_of(name, "adapter.targets=[q_proj]", "adapter.alpha=24").peft)
    config.task_type = None
    model = get_peft_model(stack, config)
    for parameter in trainable(model).values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    x = torch.randn(shape)
    torch._dynamo.reset()
    if hooked:
        model.base_model.model.q_proj.base_layer.register_forward_hook(lambda _, x, y: y + x[0])
    eager = values(model, model, x)
    compiled = values(model, torch.compile(model), x)
    with model.disable_adapter():
        assert (model(x) - eager[0]).abs().max() > 0.05, "the update must be seen"
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
