"""Linear layers with a low-rank update that keeps the zeros, or does not: what all methods with delta W = s B A share.

W (out x in) is pruned and frozen, A is r x in, B is out x r, and either may be an expression of other parameters (a
gate, a product): autograd continues through it. With M = (W != 0):

    keep_zeros=True     Y = X (W + s M (.) (B A))^t + bias         one product, the mask recomputed (``masked_linear``)
    keep_zeros=False    Y = X W^t + bias + s (drop(X) A^t) B^t     the method as published; its merge fills the zeros

The masked form has one input, so the input of the update alone cannot be dropped: it has no dropout. Its
gradients are by default those of the formula, dA = s B^t (M (.) G^t X) and dB = s (M (.) G^t X) A^t with
G = dL/dY, at the price of one full product and one out x in buffer in the backward pass;
``exact_gradient=False`` is the estimate of LoRS, which leaves M out.

A method subclasses ``LowRankConfig`` and ``LowRankLinear`` and says what its parameters are and how A and B follow from
them; see ``baselines.masked_lora`` for the shortest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from lors.checks import flag, option
from lors.functional import masked_linear
from lors.kernels import DENSE, PackedWeight
from lors.sparse_config import MaskedConfig, SparseTunerConfig
from lors.sparse_layer import MaskedLinear

__all__ = ["LowRankConfig", "LowRankLinear", "frozen", "kaiming_uniform"]


@dataclass
class LowRankConfig(MaskedConfig, SparseTunerConfig):
    """Fields of every low-rank method; a bad value raises ``ValueError``."""

    exact_gradient: bool = option(
        True,
        "With keep_zeros: gradients of the masked formula; False leaves the mask out of them, as LoRS does, and saves "
        "a full product and a buffer of the weight's size.",
        flag,
    )


class LowRankLinear(MaskedLinear):
    """A linear layer with low-rank adapters.

    ``adapter_layer_names`` names A and B; a subclass with other parameters makes A and B from them in
    ``factors``. If the sum of two adapters is not the concatenation of their A and B, it says so:
    ``sums_by_concatenation = False``.
    """

    sums_by_concatenation = True

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r x in) and B (out x r) of an adapter, without the scale."""
        A, B = (getattr(self, part)[name] for part in self.adapter_layer_names)
        return A, B

    @torch.no_grad()
    def set_factors(self, name: str, A: Tensor, B: Tensor) -> None:
        """Give an adapter the update s B A, A r x in and B out x r; of methods that ``sums_by_concatenation`` alone."""
        for part, value in zip(self.adapter_layer_names, (A, B), strict=True):
            held = getattr(self, part)[name]
            held.data = value.to(held.device, value.dtype, copy=True)

    def initial_factors(self, name: str) -> tuple[Tensor, ...]:
        """A Kaiming uniform, in +- 1 / sqrt(in), as in LoRA; B zero."""
        r = self.r[name]
        return kaiming_uniform(r, self.in_features), torch.zeros(self.out_features, r)

    def masked_output(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One masked linear layer for all adapters ``names``, see ``lors.functional``."""
        return masked_linear(
            x,
            self._frozen_weight(),
            *self._stacked(names),
            self.get_base_layer().bias,
            exact_gradient=any(self.options[name].exact_gradient for name in names),
            forward_product=self._forward_product(names[0]),
        )

    def branch(self, x: Tensor, name: str) -> Tensor:
        """s (drop(X) A^t) B^t, in the type of the factors."""
        A, B = self.factors(name)
        p = self.options[name].dropout if self.training else 0.0
        # The scale on the smallest of the operands. Not torch.add(y, u, alpha=s): compiled on a CPU it forgets s.
        return linear(linear(dropout(x.to(A.dtype), p), A) * self.scaling[name], B)

    def update(self, name: str, dtype: torch.dtype) -> Tensor:
        """s B A."""
        A, B = (factor.to(dtype) for factor in self.factors(name))
        return (B @ A).mul_(self.scaling[name])

    def _frozen_weight(self) -> Tensor | PackedWeight:
        """W as ``masked_linear`` takes it."""
        return frozen(self.get_base_layer().weight)

    def _forward_product(self, name: str) -> str:
        """How the product with the merged weight is computed; the first active adapter decides."""
        return DENSE

    def _stacked(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """A, B and s of the sum of the adapters ``names``; several are stacked, their scales moved into B."""
        if len(names) == 1:
            return *self.factors(names[0]), self.scaling[names[0]]
        factors = [self.factors(name) for name in names]
        A = torch.cat([A for A, _ in factors], dim=0)  # (r1 + r2) x in
        B = torch.cat([self.scaling[name] * B for name, (_, B) in zip(names, factors, strict=True)], dim=1)
        return A, B, 1.0


def frozen(weight: Tensor) -> Tensor:
    """A weight that is no leaf, detached: a view of FSDP1's flat parameter asks for a gradient if any part does."""
    return weight if weight.is_leaf else weight.detach()


def kaiming_uniform(rows: int, columns: int) -> Tensor:
    """A rows x columns matrix, uniform in +- 1 / sqrt(columns): the start of LoRA's A."""
    A = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A
