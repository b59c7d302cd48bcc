"""Models with quantised decoder weights (``prune.quantize``): in a folder, and without content.

A folder has the dense weights, as any reader takes them, and beside them ``quantization.safetensors``: codes, scales
and zero points of every layer (``lors.kernels.integers``). `weights.load_weights` puts those in the place of the dense
ones.
"""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from harness.errors import BadInput
from lors.blocks import decoder_linears
from lors.experts import expert_names
from lors.kernels import PackedWeight, integer_layout
from lors.kernels.layout import empty
from lors.storage import dense_state_dict, hold, is_quantized

__all__ = ["hold_empty", "hold_saved", "quantized_layout", "save_weights"]

FILE = "quantization.safetensors"
PARTS = ("scales", "codes", "zeros")


def quantized_layout(cfg: DictConfig) -> str:
    """The integer layout of the weights of a run, such as ``int4/64``; empty if they are not quantised."""
    if OmegaConf.select(cfg, "prune.quantize") in (None, "none"):
        return ""
    return integer_layout(cfg.prune.bits, cfg.prune.group_size)


def hold_empty(model: nn.Module, layout: str) -> None:
    """Give the decoder linears of a model without content weights without content in this layout.

    Raises:
        ValueError: The model has fused experts.
    """
    if any(expert_names(part) for part in model.modules()):
        raise ValueError(f"{type(model).__name__} has fused experts, which cannot be quantised")
    for linear in decoder_linears(model).values():
        weight = linear.weight
        hold(linear, empty(layout, tuple(weight.shape), weight.dtype, 0, weight.device))


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained``; of a quantised model the two forms of the module's text."""
    layers = {name: layer for name, layer in decoder_linears(model).items() if is_quantized(layer)}
    if not layers:
        model.save_pretrained(folder)
        return
    dense = model.state_dict()
    dense_state_dict(model, dense, "", {})
    model.save_pretrained(folder, state_dict=dense)
    tensors = {
        f"{name}.{part}": tensor.detach().contiguous()
        for name, layer in layers.items()
        for part, tensor in zip(PARTS, layer.packed.parts, strict=True)
    }
    save_file(tensors, folder / FILE, {"layouts": json.dumps({name: layer.layout for name, layer in layers.items()})})


def hold_saved(model: nn.Module, folder: Path) -> None:
    """Put the quantised weights of a folder, if it has some, in the place of the dense weights.

    Raises:
        BadInput: They belong to another model.
    """
    file = folder / FILE
    if not file.is_file():
        return
    linears = decoder_linears(model)
    with safe_open(file, "pt") as stored:
        layouts = json.loads((stored.metadata() or {}).get("layouts", "{}"))
        for name, layout in layouts.items():
            linear = linears.get(name)
            names = {f"{name}.{part}" for part in PARTS}
            shape = None if linear is None else (linear.out_features, linear.in_features)
            like = None if shape is None else empty(layout, shape, linear.weight.dtype, 0, "meta").parts
            parts = [stored.get_tensor(f"{name}.{part}") for part in PARTS] if names <= set(stored.keys()) else []
            if like is None or [part.shape for part in parts] != [part.shape for part in like]:
                raise BadInput(f"{file}: does not belong to the model beside it ({name})")
            weight = linear.weight
            scales, codes, zeros = (part.to(weight.device) for part in parts)
            hold(linear, PackedWeight(layout, (scales.to(weight.dtype), codes, zeros), shape))
