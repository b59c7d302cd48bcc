"""Models whose decoder weights are quantised (``prune.quantize``), without content."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from torch import nn

from lors.blocks import decoder_linears
from lors.experts import expert_names
from lors.kernels import integer_layout, nf4_layout
from lors.kernels.layout import empty
from lors.storage import hold

__all__ = ["hold_empty", "quantized_layout"]


def quantized_layout(cfg: DictConfig) -> str:
    """The layout of the quantised weights of a run, such as ``int4/64`` or ``nf4/64``; empty if they are not."""
    quantizer = OmegaConf.select(cfg, "prune.quantize")
    if quantizer in (None, "none"):
        return ""
    group = cfg.prune.group_size
    return nf4_layout(group) if quantizer == "nf4" else integer_layout(cfg.prune.bits, group)


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
