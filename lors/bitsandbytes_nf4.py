"""Layers that bitsandbytes holds in NF4 (QLoRA, arXiv 2305.14314), taken over as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lors.kernels import PackedWeight, nf4_layout
from lors.storage import hold

__all__ = ["take_nf4"]

LAYER = "Linear4bit"


def take_nf4(model: nn.Module) -> nn.Module:
    """Turn all ``Linear4bit`` layers of a model into layers of this library, which LoRS, SQFT and LoRA adapt.

    To be called on a model that was loaded with a ``BitsAndBytesConfig`` of ``nf4``, before it is run and before an
    adapter is put on it. Codes are kept and their bytes reordered; the weight of a layer is the same number for number
    (double quantisation: up to the rounding of a scale to the type of the weight). The adapter stays beside it: a
    merged weight is no longer on the sixteen numbers of a block.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: No such layer, one of another kind than ``nf4``, or with a width that its blocks do not divide.
    """
    layers = {name: part for name, part in model.named_modules() if type(part).__name__ == LAYER}
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layer of type {LAYER}")
    packed = {name: _packed(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__class__ = nn.Linear
        hold(layer, packed[name])
    # It is a plain model now, as far as transformers, accelerate and the Trainer can tell.
    for part in model.modules():
        for attribute in ("is_loaded_in_4bit", "is_quantized"):
            if getattr(part, attribute, False):
                setattr(part, attribute, False)
        if hasattr(part, "hf_quantizer"):
            del part.hf_quantizer, part.quantization_method
        if hasattr(getattr(part, "config", None), "quantization_config"):
            del part.config.quantization_config
    return model


def _packed(name: str, layer: nn.Linear) -> PackedWeight:
    state, shape = layer.weight.quant_state, (layer.out_features, layer.in_features)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise ValueError(f"{name}: must be on its device, and not have been run on a CPU")
    if state.quant_type != "nf4" or shape[1] % state.blocksize:
        raise ValueError(f"{name}: {state.quant_type}, blocks of {state.blocksize}: must be nf4, and divide {shape[1]}")
    first_in_high_bits = layer.weight.data.reshape(shape[0], shape[1] // 2)
    codes = (first_in_high_bits >> 4) | (first_in_high_bits << 4)
    scales = _scales(state).reshape(shape[0], -1).to(state.dtype)
    scales.masked_fill_(scales == 0, 1.0)
    return PackedWeight(nf4_layout(state.blocksize), (scales, codes), shape)


def _scales(state: object) -> Tensor:
    """The largest absolute weight of each block, in float32."""
    if not state.nested:
        return state.absmax
    second = state.state2  # the scales are quantised themselves, to 8 bits
    numbers = second.code.to(torch.float32)[state.absmax.int()].view(-1)
    blocks = second.absmax.repeat_interleave(second.blocksize)[: len(numbers)]
    return numbers * blocks + state.offset
