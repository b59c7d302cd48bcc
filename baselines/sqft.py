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

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from lors.low_rank import LowRankLinear
from lors.plugin import register
from lors.sparse_config import SparseTunerConfig, check_choice, check_dropout
from lors.sparse_tuner import SparseTunerModel

__all__ = ["SqftConfig", "SqftLinear", "SqftModel", "fused_linear", "masked_product", "update"]

FORMS = ("two_products", "fused")


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

    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout of the input of the update, not of the base path; 0 for form='fused'."},
    )
    form: str = field(
        default="two_products",
        metadata={"help": "'two_products': base and update apart, as published; 'fused': one product of their sum."},
    )
    checkpoint: bool = field(
        default=False,
        metadata={"help": "Compute the masked weight again in the backward pass instead of keeping it."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SQFT
        check_dropout(self.dropout)
        check_choice("form", self.form, FORMS)
        if not isinstance(self.checkpoint, bool):
            raise ValueError(f"checkpoint={self.checkpoint!r}: must be True or False")
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
        apart = list(names)
        fused = self.options[names[0]].form == "fused"
        y = self._fused(x, apart.pop(0)) if fused else self.base_output(x)
        for name in apart:
            y = y + self._update(x, name)
        return y

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """s M (.) (B A)."""
        return masked_product(weight, *self._factors(name, weight.dtype), self.scaling[name])

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.factors(name)
        return A.to(dtype), B.to(dtype)

    def _fused(self, x: Tensor, name: str) -> Tensor:
        base = self.get_base_layer()
        inputs = x, base.weight, base.bias, *self._factors(name, base.weight.dtype), self.scaling[name]
        if self.options[name].checkpoint:
            return checkpoint(fused_linear, *inputs, use_reentrant=False, preserve_rng_state=False)
        return fused_linear(*inputs)

    def _update(self, x: Tensor, name: str) -> Tensor:
        weight = self.get_base_layer().weight
        p = self.options[name].dropout if self.training else 0.0
        inputs = x, weight, *self._factors(name, weight.dtype), self.scaling[name], p
        if self.options[name].checkpoint:
            # The dropout is drawn again too, from the saved state of the generator: not even drop(X) is kept.
            return checkpoint(update, *inputs, use_reentrant=False, preserve_rng_state=p > 0)
        return update(*inputs)


class SqftModel(SparseTunerModel):
    """A model with ``SqftLinear`` layers; made by ``peft.get_peft_model`` from an ``SqftConfig``."""

    prefix = "sqft_"
    tuner_layer_cls = SqftLinear


SQFT = register("SQFT", SqftConfig, SqftModel, prefix=SqftModel.prefix)
