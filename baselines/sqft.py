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

QA-SparsePEFT, ``bits``: the fused weight is rounded to the grid of a weight of few bits (``lors.kernels.integers``), in
training and in the merge alike, so that what is merged is what was trained, zeros and grid included:

    Y = X Q(W + M (.) (s B A))^t + bias,        Q(w) = S (clamp(round(w / S) + z, 0, 2^bits - 1) - z)

The gradients are those above, as if Q were not there (straight-through). It has the form 'fused', without dropout.

A rank rho below r, of neural low-rank adapter search (`baselines.sqft_nls`), uses A[:rho] and B[:, :rho] at the scale
alpha / r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from lors.checks import flag, number, one_of, option, whole
from lors.functional import masked_linear
from lors.kernels import PackedWeight, decode
from lors.low_rank import LowRankLinear
from lors.plugin import register
from lors.sparse_config import QuantizedConfig, SparseTunerConfig
from lors.sparse_layer import adapted_layers, layers_by_block
from lors.sparse_tuner import SparseTunerModel
from lors.storage import CompressedLinear

__all__ = ["EXTRACTED", "SqftConfig", "SqftLinear", "SqftModel", "elastic", "extract_ranks", "fused_linear"]
__all__ += ["masked_product", "set_ranks", "update"]

# Which entry of a space of so many ranks, the largest first.
EXTRACTED: Mapping[str, Callable[[int], int]] = {
    "maximal": lambda length: 0,
    "heuristic": lambda length: (length - 1) // 2,
    "minimal": lambda length: length - 1,
}

Weight = Tensor | PackedWeight


def masked_product(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """s M (.) (B A), out x in, with M = (W != 0) from W (out x in), A (r x in) and B (out x r)."""
    return ((B @ A) * (weight != 0)).mul_(scaling)  # in place: nothing more is kept for the backward pass


def update(x: Tensor, weight: Weight, A: Tensor, B: Tensor, scaling: float = 1.0, p: float = 0.0) -> Tensor:
    """drop(X) (s M (.) (B A))^t, ``[..., in]`` to ``[..., out]``; p is the dropout."""
    return linear(dropout(x, p), masked_product(_dense(weight), A, B, scaling))


def fused_linear(x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """X (W + s M (.) (B A))^t + bias, ``[..., in]`` to ``[..., out]``."""
    # Not torch.add(weight, update, alpha=s): compiled on a CPU it forgets s.
    W = _dense(weight)
    return linear(x, W + masked_product(W, A, B, scaling), bias)


def _dense(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else decode(weight)


def _shares(name: str, values: Any) -> None:
    """None, or falling shares of r that begin with 1."""
    if values is None:
        return
    fits = isinstance(values, list) and all(isinstance(x, int | float) and 0 < x <= 1 for x in values)
    if not fits or values[:1] != [1] or sorted(set(values), reverse=True) != values:
        raise ValueError(f"{name}={values!r}: must be falling shares of r from 1 on, as in [1, 0.75, 0.5], or None")


@dataclass
class SqftConfig(QuantizedConfig, SparseTunerConfig):
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
    rank_shares: list[float] | None = option(
        None,
        "NLS: the ranks that a block can have, as shares of r, the largest first: [1, 0.75, 0.5] is 32, 24, 16 at "
        "r=32. Every step trains one random rank for each block. None: rank r throughout.",
        _shares,
    )
    extract: str = option(
        "heuristic",
        "NLS: the rank that is left of rank_shares: 'maximal', the first; 'heuristic', the middle one; 'minimal', the "
        "last; 'search': hill climbing from the middle ones.",
        one_of(*EXTRACTED, "search"),
    )
    seed: int = option(0, "NLS: seed of the ranks of every step.", whole(">= 0"))
    subnetwork: list[int] | None = option(
        None, "NLS: for every block the entry of rank_shares that a search has found; leave it out for a new adapter."
    )

    def ranks(self, r: int) -> list[int]:
        """The ranks that a layer of the largest rank r can have, the largest first."""
        return [max(1, int(share * r + 0.5)) for share in self.rank_shares or [1]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "fused" and self.dropout > 0:
            raise ValueError(
                f"dropout={self.dropout}: must be 0 with form='fused', whose one product has one input; "
                "use form='two_products'"
            )
        if self.bits is not None and self.form != "fused":
            raise ValueError(
                f"bits={self.bits}: must be None with form={self.form!r}: on a grid there is one weight, hence one "
                "product; use form='fused'"
            )


class SqftLinear(LowRankLinear):
    """A linear layer with SparsePEFT adapters: ``sqft_A[name]`` is r x in, ``sqft_B[name]`` is out x r."""

    adapter_layer_names = ("sqft_A", "sqft_B")
    other_param_names = (*LowRankLinear.other_param_names, "active_rank")

    def update_layer(self, adapter_name: str, config: SqftConfig, r: int, scaling: float) -> None:
        """As for every method; ``active_rank[name]``, how many rows of A and columns of B take part, is r at first."""
        if not hasattr(self, "active_rank"):
            self.active_rank: dict[str, int] = {}
        self.active_rank[adapter_name] = r
        super().update_layer(adapter_name, config, r, scaling)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A[:rho] and B[:, :rho], rho the rank that is active."""
        A, B = super().factors(name)
        rho = self.active_rank[name]
        return (A, B) if rho == self.r[name] else (A[:rho], B[:, :rho])

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """X W^t + bias, the first adapter fused with it if of that form; one more product for each other.

        With ``bits`` one product with the sum of all on the grid, as in LoRS, but with the mask in the gradients.
        """
        weight, bias = self._frozen_weight(), self.get_base_layer().bias
        grid = self.grid(names)
        if grid:
            return masked_linear(x, weight, *self._stacked(names), bias, gradient_share=1, grid=grid)
        others = list(names)
        if self.options[names[0]].form == "fused":
            first = others.pop(0)
            y = self._computed(first, fused_linear, x, weight, bias, *self._in_type_of(weight, first))
        else:
            y = self.base_output(x)
        for name in others:
            p = self.options[name].dropout if self.training else 0.0
            y = y + self._computed(name, update, x, weight, *self._in_type_of(weight, name), p)
        return y

    def _in_type_of(self, weight: Weight, name: str) -> tuple[Tensor, Tensor, float]:
        A, B = self.factors(name)
        return A.to(weight.dtype), B.to(weight.dtype), self.scaling[name]

    def _computed(self, name: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``function(*inputs)``, computed again in the backward pass if the adapter asks for it."""
        if not self.options[name].checkpoint:
            return function(*inputs)
        # The dropout is drawn again too, from the saved state of the generator: not even drop(X) is kept.
        drawn = self.training and self.options[name].dropout > 0
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=drawn)


class SqftModel(SparseTunerModel):
    """A model with ``SqftLinear`` layers; made by ``peft.get_peft_model`` from a ``SqftConfig``."""

    tuner_layer_cls = SqftLinear
    other_base_layers = (CompressedLinear,)

    def _injected(self, adapter_name: str) -> None:
        """Besides what every tuner does, the ranks that are extracted."""
        super()._injected(adapter_name)
        extract_ranks(self.model, adapter_name)


register("SQFT", SqftConfig, SqftModel)


def set_ranks(model: nn.Module, name: str, choice: Sequence[int]) -> None:
    """Give all layers of block i the entry ``choice[i]`` of their space of ranks.

    Raises:
        ValueError: ``choice`` does not have a valid entry for every block with layers of the adapter.
    """
    blocks = layers_by_block(adapted_layers(model, name))
    spaces = [[layer.options[name].ranks(layer.r[name]) for layer in block] for block in blocks]
    length = len(spaces[0][0])
    if len(choice) != len(blocks) or not all(isinstance(i, int) and 0 <= i < length for i in choice):
        raise ValueError(f"subnetwork={list(choice)}: must be {len(blocks)} whole numbers from 0 to {length - 1}")
    for block, space, index in zip(blocks, spaces, choice, strict=True):
        for layer, ranks in zip(block, space, strict=True):
            layer.active_rank[name] = ranks[index]


def extract_ranks(model: nn.Module, name: str) -> list[int]:
    """Activate the sub-network that the config extracts, and return its entries, one for each block."""
    options, blocks = elastic(model, name)
    choice = options.subnetwork
    if choice is None:
        rule = EXTRACTED["heuristic" if options.extract == "search" else options.extract]
        choice = [rule(len(options.rank_shares or [1]))] * blocks
    set_ranks(model, name, choice)
    return choice


def elastic(model: nn.Module, name: str) -> tuple[SqftConfig, int]:
    """Config of an adapter, and the number of blocks that have layers of it."""
    layers = adapted_layers(model, name)
    return next(iter(layers.values())).options[name], len(layers_by_block(layers))
