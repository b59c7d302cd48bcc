"""ScaleLoRA (arXiv 2312.15230, section on LoRA variants that keep the zeros) as a PEFT tuner.

A pruned weight W (out x in, frozen) is multiplied entry by entry with a low-rank matrix, A (r x in), B (out x r):

    Y = X (W (.) (B A))^t + bias

Multiplicative, so the zeros stay without a mask. At the start B A is one everywhere, exactly: the first column of B and
the first row of A are ones, the other rows of A Kaiming uniform, the other columns of B zero. There is no scale: s B A
would not be one. Several adapters add up: W (.) (1 + (B_1 A_1 - 1) + (B_2 A_2 - 1) + ...).

B A and its product with W are float32 and rounded once to the type of the product with X, as in the merge: near one a
bfloat16 has steps of 1/128. A layer costs, with U = 2 n in out, V = 2 r in out FLOPs, n tokens, b bytes per element:
forward U + V, backward 2U + 2V, saved between them b (n in + in out), the input and the scaled weight.

Differences from the published code (ZIB-IOL/PERP): there every entry of A and B starts at 1 / sqrt(r), so that all r
components have the same gradient and stay the same under any optimizer that works entry by entry: rank 1, whatever r
says. And r (1 / sqrt(r))^2 is one up to rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from lors.functional import without_autocast
from lors.low_rank import frozen, kaiming_uniform
from lors.plugin import register
from lors.sparse_config import UnscaledTunerConfig
from lors.sparse_layer import SparseLinear

__all__ = ["ScaleLoraConfig", "ScaleLoraLinear", "ScaleLoraModel"]


@dataclass
class ScaleLoraConfig(UnscaledTunerConfig):
    """Configuration of ScaleLoRA; a bad value raises ``ValueError``."""


class ScaleLoraLinear(SparseLinear):
    """A linear layer with ScaleLoRA adapters: ``scale_lora_A[name]`` is r x in, ``scale_lora_B[name]`` is out x r."""

    adapter_layer_names = ("scale_lora_A", "scale_lora_B")

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A: a row of ones, r - 1 rows Kaiming uniform, in +- 1 / sqrt(in). B: a column of ones, r - 1 of zeros."""
        r = self.r[name]
        A = torch.cat([torch.ones(1, self.in_features), kaiming_uniform(r, self.in_features)[1:]])
        return A, torch.eye(1, r).repeat(self.out_features, 1)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """X (W (.) (B A))^t + bias, one product for all ``names``."""
        base = self.get_base_layer()
        W = frozen(base.weight)
        with without_autocast(W.device.type):
            factor = sum(self._product(name, W.dtype) for name in names)
            scaled = (W * (factor if len(names) == 1 else factor - (len(names) - 1))).to(W.dtype)
        return linear(x, scaled, base.bias)

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """W (.) (B A - 1)."""
        return self._product(name, weight.dtype).sub_(1).mul_(weight)

    def _product(self, name: str, dtype: torch.dtype) -> Tensor:
        """B A, out x in, in float32 unless ``dtype`` is wider."""
        dtype = torch.promote_types(dtype, torch.float32)
        return self.scale_lora_B[name].to(dtype) @ self.scale_lora_A[name].to(dtype)


ScaleLoraModel = register("SCALE_LORA", ScaleLoraConfig, ScaleLoraLinear)
