"""One training step, or one forward pass, under `LiveTensors`; the model is afterwards what it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness.live_tensors import LiveTensors
from harness.loss import batch_loss
from lors.randomness import random_state_kept

__all__ = [
    "count_model",
    "count_optimizer",
    "gradients_counted",
    "live_tensor_forward",
    "live_tensor_step",
    "state_kept",
    "training_step",
]


def live_tensor_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer_factory: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    autocast: bool = False,
) -> dict[str, Any]:
    """Peak memory of one training step: forward, backward, clipping and update, as in training.

    One step is made before the one that is counted, so that the optimizer holds its state, as it does from
    the second step of a training on. Model, gradients, random number generators and mode are afterwards what
    they were.

    Args:
        model: The adapted model; a copy of what is trained exists, uncounted, for the time of the call.
        batch: One batch, see `data.Collator`.
        optimizer_factory: Makes the optimizer of the training.
        penalty: Added to the loss, as in `method.Method`.
        accumulation: Micro-batches per update; from 2 on gradients are alive during a forward pass.
        max_grad_norm: Gradients are clipped to this norm; None: not clipped.
        autocast: Forward in bfloat16 autocast.

    Returns:
        ``kind`` (live_tensors), ``train_peak`` (bytes), ``breakdown`` (bytes by category at that peak),
        ``peak_phase`` (forward, backward, optimizer) and ``saved_for_backward`` (bytes of activations alive
        between the last forward and its backward).
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with state_kept(model):
        model.train()
        optimizer = optimizer_factory(model)
        step = partial(
            training_step,
            model=model,
            batch=batch,
            optimizer=optimizer,
            penalty=penalty,
            micro_batches=min(accumulation, 2),  # a third one adds nothing
            max_grad_norm=max_grad_norm,
            autocast=autocast,
        )
        step(LiveTensors())  # uncounted: gives the optimizer its state
        live = LiveTensors()
        count_model(live, model)
        count_optimizer(live, optimizer)
        live.count(batch.values(), "other")
        with gradients_counted(live, model), live:
            saved = step(live)
    peak = live.at_peak()
    return {
        "kind": "live_tensors",
        "train_peak": peak.bytes,
        "breakdown": peak.by_category(),
        "peak_phase": peak.phase,
        "saved_for_backward": saved,
    }


def live_tensor_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Peak live bytes of one forward pass without gradients: model, batch, activations and logits."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    live = LiveTensors()
    with state_kept(model), torch.no_grad():
        model.eval()
        count_model(live, model)
        live.count(inputs.values(), "other")
        with live:
            model(**inputs, use_cache=False)
    return live.peak


def training_step(
    live: LiveTensors,
    *,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    penalty: Callable[[nn.Module], Tensor] | None,
    micro_batches: int,
    max_grad_norm: float | None,
    autocast: bool,
) -> int:
    """One step that tells `live` what it is doing; bytes of activations at the end of the last forward."""
    for _ in range(micro_batches):
        live.phase = "forward"
        loss = batch_loss(model, batch, micro_batches=micro_batches, penalty=penalty, autocast=autocast)
        saved = live.forward_ends()
        live.phase = "backward"
        loss.backward()
    live.phase, live.category = "optimizer", "other"
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return saved


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Undo, bit for bit, what a step changes: trained parameters, buffers, gradients, modes, random state."""
    changed = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    values = [(tensor.detach().clone(), tensor._version) for tensor in changed]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    gc.collect()  # so that leftovers of earlier work are not freed in the middle of a count
    try:
        with random_state_kept():
            yield
    finally:
        with torch.no_grad():
            for tensor, (value, version) in zip(changed, values, strict=True):
                if tensor._version != version:  # a write would tell a cache of something made from it to start anew
                    tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def count_model(live: LiveTensors, model: nn.Module, names: Mapping[nn.Module, str] | None = None) -> None:
    """Count what a model holds: parameters (sharded), buffers, tensors in plain attributes (on every device).

    Args:
        live: The ledger.
        model: The model.
        names: What the ledger calls its modules; by default nothing.
    """
    names = names or {}
    modules = [(module, names.get(module, "")) for module in model.modules()]
    for module, name in modules:
        live.count(_attributes(module), "other", module=name)
    for module, name in modules:
        live.count(module.parameters(recurse=False), "weights", module=name, sharded=True)
        live.count(module.buffers(recurse=False), "weights", module=name)
    if isinstance(model, PeftModel):
        for module, name in modules:
            trained = (parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad)
            live.count(trained, "adapters", module=name, sharded=True)


def count_optimizer(live: LiveTensors, optimizer: torch.optim.Optimizer) -> None:
    """Count the state of an optimizer; it is sharded like the parameters that it belongs to."""
    live.count(
        (leaf for leaf in tree_leaves(list(optimizer.state.values())) if _is_tensor(leaf)), "optimizer", sharded=True
    )


@contextmanager
def gradients_counted(live: LiveTensors, model: nn.Module) -> Iterator[None]:
    """Name what becomes the `.grad` of a parameter; the name holds from the first moment of that storage."""
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.count([p.grad], "gradients", sharded=True))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that a module holds without registering them, directly or in a dict or list (index lists,
    masks)."""
    registered = ("_parameters", "_buffers", "_modules")
    held = {name: value for name, value in vars(module).items() if name not in registered}
    return [leaf for leaf in tree_leaves(held) if _is_tensor(leaf)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
