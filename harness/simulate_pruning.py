"""Peak memory of pruning without a byte of it: ``mode=simulate method=none``.

The walk of `lors.pruning` runs on fake tensors as on real ones, under the ledger that measures real ones. For
``simulate.device=cuda`` the model lies on the host and one block at a time on the device, which is the meta device
here: PyTorch without CUDA makes no fake tensors of a GPU.

What is assumed:

Values. Whatever the walk reads out of a tensor reads as one or true: all is finite, no gram matrix is singular.

Length. All blocks and samples cost the same. So the walk goes over the last two blocks and two batches of samples; all
other weights, and the hidden states of all other samples, lie on the host meanwhile. SparseGPT prunes the first column
of every weight, which needs most: all columns are behind it.

Not in the number: scratch memory inside of kernels (of the factorisation of a gram matrix, above all), what reading a
checkpoint takes, the CUDA context, and what the allocator reserves beyond what it hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PretrainedConfig

from harness.config_schema import needs_calibration
from harness.fake_tensors import ReadsAsOne, faked, on_meta
from harness.live_memory import LiveTensors
from harness.models import pruner_options
from harness.simulate import BLOCK
from harness.weights import base_format
from lors.blocks import decoder_blocks
from lors.pruning import block_calls, prune_model, sparsegpt, walk

__all__ = ["simulate_pruning"]

HOST = torch.device("cpu")
# Stands for the GPU.
DEVICE = torch.device("meta")
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
# Blocks and batches that the walk goes over.
WALKED = 2


def simulate_pruning(cfg: DictConfig, shape: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """The walk of a pruner on fake tensors.

    Args:
        cfg: A resolved config: ``prune``, ``simulate``, ``sparsity`` and ``pattern``.
        shape: The config of the model; its weights have the format that it names, else that of ``train.precision``.

    Returns:
        ``memory``: ``kind`` (simulated), ``device``, ``format`` (of the weights), ``prune_peak`` (bytes on the device),
        ``host_peak`` (bytes on the host; None for ``simulate.device=cpu``, where it is the device).
    """
    on_gpu = cfg.simulate.device == "cuda"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = faked(on_meta(shape, getattr(shape, "dtype", None) or base_format(cfg)), mode)
    host, device = LiveTensors(device=HOST), LiveTensors(device=DEVICE, block=BLOCK["cuda"])
    calibration, waiting = None, []
    if needs_calibration(cfg.prune.name):
        samples, length = cfg.prune.samples, cfg.prune.sequence_length
        walked = min(samples, WALKED * max(1, block_calls.BATCH_TOKENS // length))
        states = (samples - walked, length, shape.get_text_config().hidden_size)
        with mode:
            calibration = torch.ones(samples, length, dtype=torch.int64)
            waiting = [torch.empty(states, dtype=model.dtype), calibration]
            calibration = calibration[:walked]
    host.count([*model.parameters(), *model.buffers(), *waiting], "weights")
    options = {"sparsity": cfg.sparsity, "pattern": cfg.pattern, "device": DEVICE if on_gpu else None}
    with mode, ReadsAsOne(whole_numbers=True), _short(model), host, device:
        prune_model(model, cfg.prune.name, calibration=calibration, **options, **pruner_options(cfg))
    peaks = (device.peak, host.peak) if on_gpu else (host.peak, None)
    memory = {"kind": "simulated", "device": cfg.simulate.device, "format": str(model.dtype).removeprefix("torch.")}
    return {"memory": memory | dict(zip(("prune_peak", "host_peak"), peaks, strict=True))}


@contextmanager
def _short(model: nn.Module) -> Iterator[None]:
    """The model has its last blocks only, and SparseGPT prunes the first column of a weight only."""
    name, blocks = decoder_blocks(model)
    parent, _, last = name.rpartition(".")
    walked = nn.ModuleList(blocks[-WALKED:])
    setattr(model.get_submodule(parent), last, walked)
    model.config.get_text_config().num_hidden_layers = len(walked)
    for block in walked:
        block.to = partial(_move, block)
    replaced = [patch.object(walk, "tqdm", partial(walk.tqdm, disable=True))]
    replaced += [patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention)]
    replaced += [patch.object(FakeTensor, "tolist", lambda tensor: [1] * len(tensor))]  # its own reads one by one
    for name in ("_change_block", "_change_column"):
        replaced.append(patch.object(sparsegpt, name, partial(_at_the_left_edge, getattr(sparsegpt, name))))
    with ExitStack() as stack:
        for replacement in replaced:
            stack.enter_context(replacement)
        yield


def _at_the_left_edge(change: Callable[..., None], column: int, *args: Any) -> None:
    if column == 0:
        change(column, *args)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What PyTorch chooses on a CPU or a GPU where the heads of keys and values have one width; on the meta device it
    would spell out all scores."""
    if query.shape[-1] != value.shape[-1]:
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _move(block: nn.Module, device: torch.device) -> None:
    """``block.to``, which swaps tensors in place, as fake ones cannot be."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
