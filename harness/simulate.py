"""Peak memory and FLOPs of one training step without a byte of it: ``mode=simulate``.

Model, adapters, gradients and optimizer are fake tensors: shapes, types and storages without memory. The step is that
of a training, line for line (`live_memory.training_step`), under the same ledger that measures real steps on a CPU, so
every method, precision, rank, accumulation and checkpointing is simulated by running it.

What is assumed:

Values. Whatever the step reads out of a tensor (the step counter of AdamW, a check for infinities) reads as one; a
whole number is refused, because a size may depend on it. Rows fill the batch, so attention is causal and needs no
mask, as in mode=profile. A ``prepare`` that only chooses initial values or ranks by values is skipped, so that GeLoRA
has the ranks of its config; every other one runs, and reads ones off the model.
A mixture of experts gives every expert as many tokens as any other, rounded up; an uneven choice moves activations from
one expert to another, and measured steps of small mixtures agree within 3 %.
Memory is that of the step of the method that needs most (``Method.largest_step``), FLOPs are those of an ordinary one.
The optimizer has its state; what a layer keeps for itself from its first step on counts as an activation.

Kernels. Fake tensors live on the CPU. For ``simulate.device=cuda`` the optimizer works on lists of tensors at once, as
PyTorch does there (its temporaries are as large as what is trained), and sizes are rounded up to the allocator's blocks
of 512 bytes. Fused attention keeps the same tensors on both: its output and one float32 a row and head. Not in the
number: scratch memory inside of kernels (library workspaces, the float32 query gradient of flash attention), the CUDA
context, and what the allocator reserves beyond what it hands out.

Several devices (``simulate.shards``), after FSDP2 as `shards.shard` and Accelerate use it. Parameters, gradients and
optimizer state are divided evenly; buffers, activations and the batch (``train.batch_size`` rows for each device) are
not. A decoder block is gathered as a whole beside its own shard, and once more in the buffer that it arrives in, which
is as large as the next block if that is fetched ahead; it is whole from the first of its operations to the last, with
the gradients of what it trains in the backward pass, and is sharded again after its forward pass too. The head stays
whole through the loss, one that is tied to the embedding all the time. The numbers are those of one device; measured
steps of two processes agree within 3 % (``tests/test_processes.py``). The ledger of one step has the peak for any
number of devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from harness.cards import MOST_CARDS
from harness.deferred_head import deferred_by
from harness.fake_tensors import ReadsAsOne, count_experts, faked, on_meta
from harness.flops import CountFlops
from harness.live_memory import LiveTensors, Peak, step_counted, training_step
from harness.method import Method, prepare, wrap
from harness.module_trace import ModuleTrace, module_names, without_index
from harness.quantized import hold_empty, quantized_layout
from harness.recipe import enable_activation_checkpointing
from harness.result import count_parameters
from harness.shards import can_shard
from harness.weights import base_format
from lors import compress
from lors.blocks import decoder_blocks
from lors.storage import places_as_parameters

__all__ = ["simulate"]

# Bytes that the allocator of a device rounds up to.
BLOCK = {"cpu": 1, "cuda": 512}


def simulate(cfg: DictConfig, method: Method, shape: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """One training step on fake tensors.

    Args:
        cfg: A resolved config: ``train``, ``simulate``, and ``sparsity`` and ``pattern`` for a compressed weight.
        method: The method.
        shape: The config of the model.

    Returns:
        ``parameters`` as `result.count_parameters`; ``flops`` {``per_step``} of one device; ``memory`` of one device:
        ``kind`` (simulated), ``device``, ``shards``, ``train_peak`` (bytes), at that peak ``breakdown`` (bytes by
        category), ``modules`` (by layer and category; a ``*`` stands for every decoder block), ``peak_phase`` and
        ``peak_module``, and ``saved_for_backward`` (bytes); and ``train_peak_by_devices``, bytes of one of so many
        devices, by their number from "1" to `MOST_CARDS`, or of "1" alone if the method cannot be sharded.
    """
    train, device, shards = cfg.train, cfg.simulate.device, cfg.simulate.shards
    trace = ModuleTrace()
    live = LiveTensors(block=BLOCK[device], running=trace)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _model(cfg, method, shape, mode)
    names = module_names(model)
    with mode, ReadsAsOne(experts=count_experts(model)), deferred_by(model, train):
        optimizer = _with_state(method.optimizer(model, train), on_lists=device == "cuda")
        # Without padding: three int64 tensors of B x T.
        batch = {
            name: torch.ones(train.batch_size, train.sequence_length, dtype=torch.int64)
            for name in ("input_ids", "attention_mask", "labels")
        }
        step = partial(training_step, model, batch, optimizer, method, train)
        counted, largest = CountFlops(), method.largest_step(model)
        if largest is not None:
            step(LiveTensors(), counted)  # a ledger that is not entered counts nothing
        with largest or nullcontext(), trace.of(names), step_counted(live, model, batch, optimizer, names):
            saved = step(live, counted if largest is None else None)
    whole = _gathered(model, names)
    peak = live.at_peak(shards, whole)
    numbers = range(1, 1 + (MOST_CARDS if can_shard(method) else 1))
    memory = {
        "kind": "simulated",
        "device": device,
        "shards": shards,
        "train_peak": peak.bytes,
        "train_peak_by_devices": {str(number): live.at_peak(number, whole).bytes for number in numbers},
        "breakdown": peak.by_category(),
        "modules": _by_layer(peak),
        "peak_phase": peak.phase,
        "peak_module": peak.module or _outside(peak.phase),
        "saved_for_backward": saved,
    }
    return {"memory": memory, "flops": {"per_step": counted.flops}, "parameters": count_parameters(model)}


def _model(cfg: DictConfig, method: Method, shape: PretrainedConfig, mode: FakeTensorMode) -> nn.Module:
    """The model on fake tensors, set up by the method, as a training begins with it."""
    model = on_meta(shape, base_format(cfg))
    with torch.device("meta"):
        if quantized_layout(cfg):
            hold_empty(model, quantized_layout(cfg))
        model = wrap(method, model, precision=cfg.train.precision)
        storage = getattr(method.peft, "storage", "dense")
        if storage != "dense":
            compress(model, storage, sparsity=cfg.sparsity, pattern=cfg.pattern)
    places_as_parameters(model)
    model = faked(model, mode)
    # Outside of the mode what it draws has values, a choice of layers for example; the model stays as it is.
    with ReadsAsOne(whole_numbers=True):
        model = prepare(method, model, precision=cfg.train.precision)
    if cfg.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model.train()


def _with_state(optimizer: torch.optim.Optimizer, *, on_lists: bool) -> torch.optim.Optimizer:
    """The optimizer as it is from the second step on; ``on_lists`` as by default on a GPU, if it can."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        if on_lists and group.get("foreach", False) is None:
            group["foreach"] = True
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in trained:
        parameter.grad = None
    return optimizer


def _gathered(model: nn.Module, names: Mapping[nn.Module, str]) -> Callable[[str, str], int]:
    """Bytes beyond its own shard that a device holds while a module runs, see the module's text."""
    blocks = f"{decoder_blocks(model)[0]}."

    def group(name: str) -> str:
        return blocks + name.removeprefix(blocks).partition(".")[0] if name.startswith(blocks) else name

    rest: dict[tuple[str, str], int] = defaultdict(int)
    for module, name in names.items():
        for parameter in module.parameters(recurse=False):
            copies = 2 if name.startswith(blocks) else 1  # of a block what is gathered, and where it is gathered
            rest["forward", group(name)] += copies * parameter.nbytes
            rest["backward", group(name)] += (copies + parameter.requires_grad) * parameter.nbytes
    head = model.get_output_embeddings().weight.nbytes
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @cache
    def whole(phase: str, module: str) -> int:
        if phase not in ("forward", "backward"):
            return 0
        if tied and module != names[model.get_input_embeddings()]:
            return rest.get((phase, group(module)), 0) + head
        return head if module == "" else rest.get((phase, group(module)), 0)

    return whole


def _by_layer(peak: Peak) -> dict[str, dict[str, int]]:
    """Bytes by layer and category, the same layer of all decoder blocks together."""
    layers: dict[str, dict[str, int]] = {}
    for (category, module), size in sorted(peak.parts.items()):
        outside = category if category in ("optimizer", "other") else _outside(peak.phase)
        layer = layers.setdefault(without_index(module) or outside, {})
        layer[category] = layer.get(category, 0) + size
    return layers


def _outside(phase: str) -> str:
    """What runs when no module does."""
    return "optimizer" if phase == "optimizer" else "loss"
