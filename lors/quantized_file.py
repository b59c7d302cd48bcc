"""Quantised weights in a folder of transformers: ``quantization.safetensors`` beside the dense weights.

The folder has the dense weights, as any reader takes them, and in the second file the codes and scales of every
quantised layer, and its zero points but for NF4. The grid cannot be read off the dense weights: it may be wider than
they are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lors.blocks import decoder_linears
from lors.kernels import PackedWeight, decode
from lors.kernels.layout import empty, kind_of
from lors.storage import PARTS, dense_state_dict, hold, is_quantized

__all__ = ["FILE", "load_quantized", "save_quantized"]

FILE = "quantization.safetensors"
ROUNDING = 2**-6  # what casts of a scale and of a weight to another format can be apart


def save_quantized(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """``save_pretrained`` of a model without adapters, and the second file if layers of it are quantised; one that is
    there from before goes."""
    (Path(folder) / FILE).unlink(missing_ok=True)
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
        for part, tensor in zip(PARTS[kind_of(layer.layout)], layer.packed.parts, strict=True)
    }
    layouts = {name: layer.layout for name, layer in layers.items()}
    save_file(tensors, Path(folder) / FILE, {"layouts": json.dumps(layouts)})


def load_quantized(model: PreTrainedModel, folder: str | os.PathLike) -> PreTrainedModel:
    """Put the quantised weights of a folder in the place of the dense ones of a model that was loaded from it.

    To be called before an adapter that was trained on them is loaded.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: There are none, or they belong to another model.
    """
    file, linears = Path(folder) / FILE, decoder_linears(model)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; the folder has no quantised weights")
    held: dict[str, PackedWeight] = {}
    with safe_open(file, "pt") as stored:
        layouts = json.loads((stored.metadata() or {}).get("layouts", "{}"))
        for name, layout in layouts.items():
            linear = linears.get(name)
            kept = PARTS.get(kind_of(layout), ())
            names = {f"{name}.{part}" for part in kept}
            shape = None if linear is None else (linear.out_features, linear.in_features)
            like = None if shape is None else empty(layout, shape, linear.weight.dtype, 0, "meta").parts
            parts = [stored.get_tensor(f"{name}.{part}") for part in kept] if names <= set(stored.keys()) else []
            fits = like is not None and [part.shape for part in parts] == [part.shape for part in like]
            if fits:
                scales, *others = (part.to(linear.weight.device) for part in parts)
                held[name] = PackedWeight(layout, (scales.to(linear.weight.dtype), *others), shape)
                fits = torch.allclose(decode(held[name]), linear.weight, rtol=ROUNDING, atol=0)
            if not fits:
                raise ValueError(f"{file}: does not belong to the model beside it ({name})")
    for name, packed in held.items():
        hold(linears[name], packed)
    return model
