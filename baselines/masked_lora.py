"""LoRA (arXiv 2106.09685) under the mask of a pruned weight: for methods that change only how LoRA is trained.

    Y = X (W + s M (.) (B A))^t + bias,        M = (W != 0), s = alpha / r, A Kaiming uniform, B zero

``keep_zeros=False`` is LoRA itself. It is no row of a table: LoRA's own row is PEFT's, and under the mask it is SQFT.
"""

from __future__ import annotations

from dataclasses import dataclass

from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register

__all__ = ["MaskedLoraConfig", "MaskedLoraLinear", "MaskedLoraModel"]


@dataclass
class MaskedLoraConfig(LowRankConfig):
    """Configuration of masked LoRA."""


class MaskedLoraLinear(LowRankLinear):
    """A linear layer with LoRA adapters: ``masked_lora_A[name]`` is r x in, ``masked_lora_B[name]`` is out x r."""

    adapter_layer_names = ("masked_lora_A", "masked_lora_B")


MaskedLoraModel = register("MASKED_LORA", MaskedLoraConfig, MaskedLoraLinear)
