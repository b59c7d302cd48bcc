"""SparsePEFT, the adapter of SQFT (arXiv 2410.03750), as a PEFT tuner.

A pruned weight W (out x in, frozen) gets a low-rank update under its own mask M = (W != 0), with A (r x in)
and B (out x r):

    two_products    Y = X W^t + bias + drop(X) (M (.) (s B A))^t,        s = alpha / r
    fused           Y = X (W + M (.) (s B A))^t + bias

The first is that of the authors: the dropout acts on the input of the update alone, so the products cannot be
one. The second is the simplified form that the LoRS paper measures; one product has one input, so it has no
dropout. A starts Kaiming uniform, B at zero. M is kept in the gradients, which is what LoRS saves: with P =
G^t drop(X), dB = s (P (.) M) A^t and dA = s B^t (P (.) M), and the product P is out x in.

``checkpoint`` computes the masked weight again in the backward pass (PyTorch's non re-entrant checkpoint,
which stops before the last product). With U = 2 n in out and V = 2 r in out FLOPs, n tokens and b bytes per
element, a layer costs

==========================  ======  =======  ============================
form                        fwd     bwd      saved for backward
==========================  ======  =======  ============================
two_products                2U + V  3U + 2V  b (n in + out in) + out in
two_products, checkpoint    2U + V  3U + 3V  b n in
fused                       U + V   2U + 2V  b (n in + out in) + out in
fused, checkpoint           U + V   2U + 3V  b n in
==========================  ======  =======  ============================

Not here: the search over ranks (NLS) and the quantised variants of SQFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from lors.checks import flag, number, one_of, option
from lors.low_rank import LowRankLinear
from lors.plugin import register
from lors.sparse_config import SparseTunerConfig

__all__ = ["SqftConfig", "SqftLinear", "SqftModel", "fused_linear", "masked_product", "update"]


def masked_product(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """s M (.) (B A), out x in, with M = (W != 0) from W (out x in), A (r x in) and B (out x r)."""
    return ((B @ A) * (weight != 0)).mul_(scaling)  # in place: nothing more is kept for the backward pass


def update(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, p: float = 0.0) -> Tensor:
    """drop(X) (s M (.) (B A))^t, ``[..., in]`` to ``[..., out]``; p is the dropout."""
    return linear(dropout(x, p), masked_product(weight, A, B, scaling))


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """X (W + s M (.) (B A))^t + bias, ``[..., in]`` to ``[..., out]``."""
    # Not torch.add(weight, update, alpha=s): compiled on a CPU it forgets s.
    return linear(x, weight + masked_product(weight, A, B, scaling), bias)


@dataclass
class SqftConfig(SparseTunerConfig):
    """Configuration of SparsePEFT; a bad value raises ``ValueError``."""

    dropout: float = option(
        0.0,
        "Dropout of the input of the update, not of the base path; 0 for form='fused'.",
        number(">= 0", "< 1"),
    )
    form: str = option(
        "two_products",
        "'two_products': base and update apart, as published; 'fused': one product of their sum.",
        one_of("two_products", "fused"),
    )
    checkpoint: bool = option(
        False, "Compute the masked weight again in the backward pass instead of keeping it.", flag
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "fused" and self.dropout > 0:
            raise ValueError(
                f"dropout={self.dropout}: must be 0 with form='fused', whose one product has one input; "
                "use form='two_products'"
            )


class SqftLinear(LowRankLinear):
    """A linear layer with SparsePEFT adapters: ``sqft_A[name]`` is r x in, ``sqft_B[name]`` is out x r."""

    adapter_layer_names = ("sqft_A", "sqft_B")

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """X W^t + bias, the first adapter fused with it if of that form; one more product for each other."""
        base = self.get_base_layer()
        others = list(names)
        if self.options[names[0]].form == "fused":
            first = others.pop(0)
            y = self._computed(first, fused_linear, x, base.weight, base.bias, *self._in_type_of(base.weight, first))
        else:
            y = self.base_output(x)
        for name in others:
            p = self.options[name].dropout if self.training else 0.0
            y = y + self._computed(name, update, x, base.weight, *self._in_type_of(base.weight, name), p)
        return y

    def _in_type_of(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor, float]:
        A, B = self.factors(name)
        return A.to(weight.dtype), B.to(weight.dtype), self.scaling[name]

    def _computed(self, name: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``function(*inputs)``, computed again in the backward pass if the adapter asks for it."""
        if not self.options[name].checkpoint:
            return function(*inputs)
        # The dropout is drawn again too, from the saved state of the generator: not even drop(X) is kept.
        drawn = self.training and self.options[name].dropout > 0
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=drawn)


SqftModel = register("SQFT", SqftConfig, SqftLinear)
