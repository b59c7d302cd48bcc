"""Linear layers with a low-rank update that keeps the zeros, or does not: what all methods with delta W = s B A share.

W (out x in) is pruned and frozen, A is r x in, B is out x r, and either may be an expression of other parameters (a
gate, a product): autograd continues through it. With M = (W != 0):

    keep_zeros=True     Y = X (W + s M (.) (B A))^t + bias         one product, the mask recomputed (``masked_linear``)
    keep_zeros=False    Y = X W^t + bias + s (drop(X) A^t) B^t     the method as published; its merge fills the zeros

The masked form has one input, so the input of the update alone cannot be dropped: it has no dropout. Its
gradients are by default those of the formula, dA = s B^t (M (.) G^t X) and dB = s (M (.) G^t X) A^t with
G = dL/dY, at the price of one full product and one out x in buffer in the backward pass;
``exact_gradient=False`` is the estimate of LoRS, which leaves M out.

W may be packed (``lors.storage``), in a model whose ``other_base_layers`` says so. With a ``grid``
(``QuantizedConfig``) the merged weight is rounded to it, in training and in the merge alike.

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
from lors.functional import masked_linear, merged_weight
from lors.kernels import DENSE, PackedWeight
from lors.placement import full, whole
from lors.sparse_config import MaskedConfig, SparseTunerConfig, UnscaledTunerConfig
from lors.sparse_layer import MaskedLinear
from lors.storage import CompressedLinear, decompress_linear, is_quantized

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

    @property
    def product_share(self) -> float:
        """The ``gradient_share`` of ``lors.masked_linear``."""
        return float(self.exact_gradient)


class LowRankLinear(MaskedLinear):
    """A linear layer with low-rank adapters.

    ``adapter_layer_names`` names A and B; a subclass with other parameters makes A and B from them in
    ``factors``. If the sum of two adapters is not the concatenation of their A and B, it says so:
    ``sums_by_concatenation = False``.
    """

    sums_by_concatenation = True

    @classmethod
    def check_fit(cls, name: str, layer: nn.Linear, config: UnscaledTunerConfig) -> None:
        """As for every method; the grid of a base that is quantised has to be that of the config."""
        super().check_fit(name, layer, config)
        grid = getattr(config, "grid", "")
        if grid and is_quantized(layer) and layer.layout != grid:
            raise ValueError(f"bits={config.bits}, group={config.group}: the weight of {name!r} is {layer.layout}")

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
            gradient_share=max(map(self._product_share, names)),
            forward_product=self._forward_product(names[0]),
            grid=self.grid(names),
        )

    def grid(self, names: Sequence[str]) -> str:
        """The integer layout to which the weight with the adapters ``names`` is rounded; empty: to none.

        Raises:
            ValueError: They do not agree about it.
        """
        grids = {getattr(self.options[name], "grid", "") for name in names}
        if len(grids) > 1:
            raise ValueError(f"adapters {', '.join(names)}: differ in bits or group, and one weight has one grid")
        return grids.pop()

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """As for every method; with a grid by the very computation of the forward pass."""
        grid = self.grid(names)
        if not grid:
            return super().merged_weight(names)
        with whole(self):
            before = self._stored_before_merge
            stored = self._stored().detach()
            if before is not None:
                stored = full(before).to(stored.device)
            base = self.get_base_layer()
            W = base.packed_with(stored) if isinstance(base, CompressedLinear) else stored
            return merged_weight(W, *self._stacked(names), grid=grid)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """The layer without adapters, a plain dense ``nn.Linear``, or quantised as it was; called by PEFT."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer if is_quantized(self.base_layer) else decompress_linear(self.base_layer)

    def _stored(self) -> Tensor:
        base = self.get_base_layer()
        return base.stored if isinstance(base, CompressedLinear) else base.weight

    def _dense(self, stored: Tensor) -> Tensor:
        base = self.get_base_layer()
        return base.dense(stored) if isinstance(base, CompressedLinear) else stored

    def _as_stored(self, weight: Tensor) -> Tensor:
        base = self.get_base_layer()
        return base.values_of(weight) if isinstance(base, CompressedLinear) else weight

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
        base = self.get_base_layer()
        if not isinstance(base, CompressedLinear):
            return frozen(base.weight)
        numbers, *others = base.packed.parts
        return base.packed._replace(parts=(frozen(numbers), *others))

    def _product_share(self, name: str) -> float:
        """The ``gradient_share`` of ``masked_linear`` that an adapter asks for."""
        return self.options[name].product_share

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
