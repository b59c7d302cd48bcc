"""Weights, gradients and optimizer state spread over the processes of a run: PyTorch's FSDP2.

Each decoder block is a unit, the rest of the model another (`torch.distributed.fsdp.fully_shard`): a process keeps its
part of every weight and has those of one block whole at a time. Accelerate's own FSDP2 does the same on GPUs; on a CPU
it trains replicas without a word.

The whole model lies in the memory of the host meanwhile. A weight that nobody has changed takes none of it: it is in
pages of its file, which the system may drop, and which all processes of a machine share. What is made of the trained
model (a merge, the check of the zeros) is made there by the first process; the others read what it writes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from harness.environment import default_device
from harness.method import Method
from harness.processes import is_first
from lors.blocks import decoder_blocks
from lors.placement import full
from lors.storage import places_as_parameters

__all__ = ["after_backward", "can_shard", "collect", "home", "is_sharded", "optimizer_state", "placed"]
__all__ += ["sharded", "spread"]


def can_shard(method: Method) -> bool:
    """Whether the steps of a method are plain ones, if it makes any: nothing but autograd and AdamW touches a
    parameter."""
    own = ("optimizer", "callbacks", "penalty", "objective", "largest_step")
    return all(getattr(type(method), name) is getattr(Method, name) for name in own)


def home(cfg: Any) -> torch.device:
    """Where a whole model lies: on the device of the run, or on the host if its weights are shared out."""
    return torch.device("cpu") if cfg.launch.shard else default_device()


def placed(model: nn.Module, cfg: Any) -> nn.Module:
    """A whole model as the run computes with it: itself, or sharded."""
    return sharded(model) if cfg.launch.shard else model


def sharded(whole: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are spread over all processes, on their devices; the model stays as it is.

    Accelerate takes it as it is then; without the mark it would refuse to make replicas of it.
    """
    from torch.distributed.fsdp import fully_shard

    # Parameters of the same memory, because FSDP2 puts others in their place.
    twins = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in whole.parameters()
    }
    model = copy.deepcopy(whole, twins)
    places_as_parameters(model)
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
    shards = dict(model.named_parameters())
    hooks = ((shards[name], p._post_accumulate_grad_hooks or {}) for name, p in whole.named_parameters())
    model._gradient_hooks = [(shard, hook) for shard, of_whole in hooks for hook in of_whole.values()]
    return model


@torch.no_grad()
def collect(model: nn.Module, whole: nn.Module) -> None:
    """Bring what was trained back from shards.

    Args:
        model: What `sharded` made of ``whole``; all processes call this.
        whole: Gets the values, in every process those of an adapter, in the first one alone those of a bare model.
    """
    there = is_first() or isinstance(whole, PeftModel)
    shards, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, parameter in whole.named_parameters():
        if shards[name].requires_grad:
            value = full(shards[name].detach())
            parameter.copy_(value) if there else None
    for name, buffer in whole.named_buffers():
        if name in buffers:  # not the places of compressed values
            buffer.copy_(buffers[name])


def after_backward(model: nn.Module) -> None:
    """Call the hooks that wait for the gradient of a parameter, which of a sharded one is there only now."""
    for parameter, hook in getattr(model, "_gradient_hooks", ()):
        if parameter.grad is not None:
            hook(parameter)


def is_sharded(model: nn.Module) -> bool:
    """Whether `sharded` has made it."""
    return hasattr(model, "_gradient_hooks")  # the other mark is on all that Accelerate has prepared


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
