"""Weights that are not whole in memory: shards of FSDP2, and layers that accelerate has offloaded.

A forward pass sees whole tensors, because FSDP2 and accelerate put them in place around it. Whoever touches a weight
outside of one (a merge, a fingerprint) goes through this file. Under FSDP2 every process must do so, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["execution_device", "full", "whole", "write"]


def full(tensor: Tensor) -> Tensor:
    """A plain tensor: gathered from all processes if it is sharded, else itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Make all parameters of a module whole, plain tensors inside the context; what is written to them is lost."""
    offloaded = [part for part in module.modules() if _offload_hook(part) is not None and _is_away(part)]
    for part in offloaded:
        _offload_hook(part).pre_forward(part)
    shards = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    for held, name, parameter in shards:
        held[name] = nn.Parameter(parameter.detach().full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        for held, name, parameter in shards:
            held[name] = parameter
        for part in offloaded:
            _offload_hook(part).post_forward(part, None)


def write(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, which may be sharded or a view of something larger.

    In place: a shard, or a view of the flat parameter of FSDP1, would not notice ``parameter.data = value``.
    """
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.data.copy_(value)


def execution_device(layer: nn.Module) -> torch.device | None:
    """Where accelerate lets an offloaded layer run; None if the layer stays where it is."""
    hook = _offload_hook(layer)
    if hook is None or hook.execution_device is None:
        return None
    return torch.device(hook.execution_device)


def _offload_hook(module: nn.Module) -> object | None:
    """The hook of accelerate that brings the parameters of a module, if they are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # accelerate chains several in one
    return next((one for one in hooks if getattr(one, "offload", False)), None)


def _is_away(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))
