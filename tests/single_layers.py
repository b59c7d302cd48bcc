"""Single pruned layers with an adapter, to be held against the formula of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from callback_loop import pruned_layers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from lors.sparse_layer import SparseLinear


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64, that of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(config: PeftConfig, *shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> PeftModel:
    """Layers of the shapes (out, in), half of each W zero, with an adapter at its start; in training mode."""
    torch.manual_seed(0)
    config.target_modules = {"proj"}
    return get_peft_model(pruned_layers(*shapes, dtype=dtype), config, autocast_adapter_dtype=False).train()


def layers(model: nn.Module) -> list[SparseLinear]:
    return [part for part in model.modules() if isinstance(part, SparseLinear)]


def support(layer: SparseLinear) -> Tensor:
    """M = (W != 0), or ones for an adapter that does not keep the zeros."""
    return (layer.weight != 0) | (not layer.options["default"].keep_zeros)


def assert_same(y: Tensor, expected: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Assert that two results and the gradients of their inputs agree; the gradients, of the upstream of seed 9."""
    torch.testing.assert_close(y, expected)
    upstream = draw(*y.shape, seed=9)
    gradients, wanted = (torch.autograd.grad(result, inputs, upstream) for result in (y, expected))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference)
    return list(gradients)


def assert_same_dropout(layers: Sequence[SparseLinear], merged: Callable[[SparseLinear], Tensor]) -> None:
    """Assert that layers agree under one draw, whether the backward pass keeps it or makes it again, and that the base
    path has none; ``merged`` is the weight without dropout."""
    x, results = draw(5, layers[0].in_features).requires_grad_(), []
    for layer in layers:
        factors = [getattr(layer, part)["default"] for part in layer.adapter_layer_names]
        torch.manual_seed(0)
        y = layer.train()(x)
        torch.rand(7)  # the generator moves on before the backward pass draws again
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *factors])])
        assert not torch.equal(layer(x), y)
        torch.testing.assert_close(layer.eval()(x), linear(x, merged(layer), layer.bias))
        factors[-1].data.zero_()
        assert torch.equal(layer.train()(x), layer.base_layer(x))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
