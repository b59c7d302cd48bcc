"""LoRS as a PEFT tuner: ``LorsConfig``, ``LorsLinear``, ``LorsModel``.

A targeted linear layer with the pruned weight W (out x in) computes X (W + s * M (.) (B A))^t + bias, with M
= (W != 0), A (r x in) and B (out x r); see ``lors.functional``. No mask is stored: it is read off W, which
stays as it was until a merge. Several active adapters add up under the one mask,

    W + M (.) (s1 B1 A1 + s2 B2 A2) = W + M (.) [s1 B1, s2 B2] [A1; A2],

which is again one masked linear layer, of rank r1 + r2.

There is no dropout: W + s * M (.) (B A) is one matrix, and the input of its two parts cannot differ.

Reference: arXiv 2501.08582. Scale alpha / sqrt(r) as there (arXiv 2312.03732), or alpha / r as in LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lors.functional import masked_linear
from lors.plugin import register
from lors.sparse_tuner import SparseLinear, SparseTunerConfig, SparseTunerModel, check_choice

__all__ = ["LorsConfig", "LorsLinear", "LorsModel"]

SCALINGS = ("rank_stabilized", "alpha_over_r")
INITS = ("gradient", "kaiming")
BIASES = ("none", "all", "lors_only")


@dataclass
class LorsConfig(SparseTunerConfig):
    """Configuration of LoRS; a bad value raises ``ValueError``."""

    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the scale s of the update; see scaling."})
    scaling: str = field(
        default="rank_stabilized",
        metadata={
            "help": "'rank_stabilized': s = lora_alpha / sqrt(r), as in the paper; 'alpha_over_r': s = "
            "lora_alpha / r, as in LoRA."
        },
    )
    init: str = field(
        default="gradient",
        metadata={
            "help": "'gradient': lors.initialize(model, batches) sets A to the top right singular vectors of "
            "the gradient of the full weight; until it is called A is as for 'kaiming'. 'kaiming': A is "
            "Kaiming uniform, as in LoRA. B starts at zero in both."
        },
    )
    exact_gradient: bool = field(
        default=False,
        metadata={
            "help": "Keep the mask in the gradients of A and B. Costs a further full matrix product and a "
            "buffer of the weight's size; False is the paper's straight-through estimate."
        },
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases to train: 'none', 'all', or 'lors_only' (those of the adapted layers)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORS
        check_choice("scaling", self.scaling, SCALINGS)
        check_choice("init", self.init, INITS)
        check_choice("bias", self.bias, BIASES)
        if not isinstance(self.exact_gradient, bool):
            raise ValueError(f"exact_gradient={self.exact_gradient!r}: must be True or False")

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r and scale s of the layer called ``name``, after ``rank_pattern`` and ``alpha_pattern``."""
        r, alpha_over_r = super().layer_settings(name)
        return r, alpha_over_r * math.sqrt(r) if self.scaling == "rank_stabilized" else alpha_over_r


class LorsLinear(SparseLinear):
    """A linear layer with LoRS adapters: ``lors_A[name]`` is r x in, ``lors_B[name]`` is out x r."""

    adapter_layer_names = ("lors_A", "lors_B")

    def initial_factors(self, r: int) -> tuple[Tensor, Tensor]:
        """A Kaiming uniform, in +- 1 / sqrt(in), as in LoRA; B zero. ``lors.initialize`` replaces A."""
        A = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A, torch.zeros(self.out_features, r)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One masked linear layer for all the adapters, with exact gradients if one of them asks for them."""
        base = self.get_base_layer()
        A, B, scaling = self._factors(names)
        exact = any(self.options[name].exact_gradient for name in names)
        return masked_linear(x, base.weight, A, B, scaling, base.bias, exact_gradient=exact)

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """s M (.) (B A)."""
        A, B = (factors[name].to(weight.dtype) for factors in (self.lors_A, self.lors_B))
        return (B @ A).mul_(self.scaling[name]).mul_(weight != 0)

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """A, B and s of the sum of the adapters ``names``; several are stacked, their scales moved into B."""
        if len(names) == 1:
            return self.lors_A[names[0]], self.lors_B[names[0]], self.scaling[names[0]]
        A = torch.cat([self.lors_A[name] for name in names], dim=0)  # (r1 + r2) x in
        B = torch.cat([self.scaling[name] * self.lors_B[name] for name in names], dim=1)  # out x (r1 + r2)
        return A, B, 1.0


class LorsModel(SparseTunerModel):
    """A model with ``LorsLinear`` layers; made by ``peft.get_peft_model`` from a ``LorsConfig``."""

    prefix = "lors_"
    tuner_layer_cls = LorsLinear


LORS = register("LORS", LorsConfig, LorsModel, prefix=LorsModel.prefix)
