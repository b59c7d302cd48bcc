"""Weights, gradients and optimizer state spread over the processes of a run while it trains: PyTorch's FSDP2.

Each decoder block is a unit, the rest of the model another (`torch.distributed.fsdp.fully_shard`): a process keeps its
part of every weight and has those of one block whole at a time. Accelerate's own FSDP2 does the same on GPUs; on a CPU
it trains replicas without a word.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from harness.method import Method
from lors.blocks import decoder_blocks
from lors.placement import full

__all__ = ["after_backward", "can_shard", "is_sharded", "optimizer_state", "shard", "skeleton", "spread", "whole_again"]


def can_shard(method: Method) -> bool:
    """Whether the steps of a method are plain ones: nothing but autograd and AdamW touches a parameter."""
    own = ("optimizer", "callbacks", "penalty", "largest_step")
    return method.trains and all(getattr(type(method), name) is getattr(Method, name) for name in own)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have no values."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def shard(model: nn.Module) -> None:
    """Spread the parameters of a model over all processes, in place.

    Accelerate takes it as it is then; without the mark it would refuse to make replicas of it.
    """
    from torch.distributed.fsdp import fully_shard

    # FSDP2 puts other parameters in place of these, and their hooks would be lost (`after_backward`).
    hooks = {name: [*(p._post_accumulate_grad_hooks or {}).values()] for name, p in model.named_parameters()}
    name, blocks = decoder_blocks(model)
    for block in blocks:
        fully_shard(block)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        fully_shard(embedding)
        beside = model.get_submodule(name.rpartition(".")[0]).named_children()
        norms = [part for key, part in beside if "norm" in key]
        # Used at the end of the forward and the beginning of the backward pass: whole in between.
        fully_shard([*norms, head], reshard_after_forward=False)
    fully_shard(model)
    model._is_accelerate_prepared = True
    model._gradient_hooks = [(p, hook) for name, p in model.named_parameters() for hook in hooks[name]]


def after_backward(model: nn.Module) -> None:
    """Call the hooks that wait for the gradient of a parameter, which of a sharded one is there only now."""
    for parameter, hook in getattr(model, "_gradient_hooks", ()):
        if parameter.grad is not None:
            hook(parameter)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return hasattr(model, "_gradient_hooks")  # the other mark is on all that Accelerate has prepared


def whole_again(model: nn.Module, blank: nn.Module) -> nn.Module:
    """The plain model that a sharded one was.

    Args:
        model: The sharded model.
        blank: Its `skeleton` from before, which gets the values.
    """
    values = {name: full(parameter.detach()) for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    for name, parameter in list(blank.named_parameters()):
        _set(blank, name, nn.Parameter(values[name], parameter.requires_grad))
    for name, _ in list(blank.named_buffers()):
        _set(blank, name, buffers[name])
    return blank


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of one, under all names of it: tied weights stay one."""
    module, _, last = name.rpartition(".")
    old = getattr(model.get_submodule(module), last)
    for part in model.modules():
        for held in (part._parameters, part._buffers):
            held.update({key: tensor for key, value in held.items() if value is old})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The ``state_dict`` as one process would have it; all processes call this."""

    def gathered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: gathered(item) for key, item in value.items()}
        if isinstance(value, list):
            return [gathered(item) for item in value]
        return full(value) if isinstance(value, Tensor) else value

    return gathered(optimizer.state_dict())


def spread(optimizer: torch.optim.Optimizer) -> None:
    """Shard the state of an optimizer as its parameters are; it was loaded from `optimizer_state`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                state[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
