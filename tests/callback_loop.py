"""The Trainer's loop reduced to what a method's callback sees of it, for models that are single layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from harness.method import Method


def pruned_layers(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> nn.ModuleDict:
    """Linear layers layers.0.proj, layers.1.proj, ... of the shapes (out, in) without bias, half of each W zero."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for out_features, in_features in shapes:
        layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
        layer.weight.copy_(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)
        layer.weight.mul_(torch.rand(out_features, in_features, generator=generator) < 0.5)
        layers.append(nn.ModuleDict({"proj": layer}))
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def train_with(
    callback: TrainerCallback,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    steps: Iterable[int],
    of: int,
    micro_batches: int = 1,
) -> list[float]:
    """Make the steps numbered ``steps`` of a training of ``of`` steps; the losses of their first micro-batches."""
    args, losses = SimpleNamespace(seed=0, process_index=0), []
    for step in steps:
        told = {"state": SimpleNamespace(global_step=step, max_steps=of), "model": model, "optimizer": optimizer}
        callback.on_step_begin(args, control=None, **told)
        for micro_batch in range(micro_batches):
            value = loss()
            value.backward()
            if micro_batch == 0:
                losses.append(value.item())
        callback.on_pre_optimizer_step(args, control=None, **told)
        optimizer.step()
        callback.on_optimizer_step(args, control=None, **told)
        optimizer.zero_grad()
        told["state"].global_step += 1
        callback.on_step_end(args, control=None, **told)
    callback.on_train_end(args, control=None, **told)
    return losses


def with_callbacks(method: Method, *more: TrainerCallback) -> Method:
    """The method with further callbacks, called after its own; the same objects in every training."""
    held = [*method.callbacks(), *more]
    changed = copy.copy(method)
    changed.callbacks = lambda: held
    return changed
