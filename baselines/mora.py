"""MoRA (arXiv 2405.12130): a square matrix between two fixed linear maps, so that a small update can have a high rank.

A pruned weight W (out x in, frozen) gets the update expand(S), of which S (q x q) is the only parameter. With as many
parameters as a LoRA of rank r has, q is sqrt(r (in + out)), rounded. There is no scale. Two of the paper's types, with
indices from 0:

    1, sharing     expand(S)[i, j] = S[i mod q, j mod q]                        rank q, for a large r
    6, rotation    the diagonal block t, q x q, is S R_t, all else is zero      rank min(in, out), for a small r

R_t rotates the pairs (j, j + q/2) by the angles t 10000^(-2j/q). Read as a map, y = expand(S) x compresses x to one or
several vectors of q entries, multiplies each with S and spreads them over y. Where q does not divide in, x is padded
with its own beginning, so the surplus columns of the last block wrap around and add to the first ones; where q does not
divide out, the last rows are cut off. With more block rows than blocks they start again from the first block; with more
blocks than block rows (type 6, in > out) the further blocks are cut off with their inputs, as published.

    keep_zeros=True     Y = X (W + M (.) expand(S))^t + bias, M = (W != 0), computed again in the backward pass
    keep_zeros=False    Y = X W^t + bias + spread(S compress(drop(X)))

S starts at zero: the maps around it are not zero, so it has a gradient. Under M an entry of S sees the surviving
positions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from lors.checks import one_of, option
from lors.plugin import register
from lors.sparse_config import MaskedConfig
from lors.sparse_layer import MaskedLinear

__all__ = ["Maps", "MoraConfig", "MoraLinear", "MoraModel"]

SHARING, ROTATION = 1, 6
BASE = 10000.0  # of the angles, as in rotary position embeddings


@dataclass
class MoraConfig(MaskedConfig):
    """Configuration of MoRA; r is the rank of the LoRA of the same size. A bad value raises ``ValueError``."""

    mora_type: int = option(
        ROTATION,
        "6: rotation, the paper's choice for r = 8; 1: sharing, its choice for r = 256.",
        one_of(SHARING, ROTATION),
    )


@dataclass(frozen=True)
class Maps:
    """The fixed linear maps around the S of one layer; all methods are differentiable.

    Attributes:
        inputs, outputs: Widths of the layer.
        r: Rank of the LoRA of the same size.
        mora_type: 1, sharing, or 6, rotation.
    """

    inputs: int
    outputs: int
    r: int
    mora_type: int = ROTATION

    @property
    def q(self) -> int:
        """Side of S: sqrt(r (in + out)) rounded, and down to an even number for the pairs of a rotation."""
        q = int(math.sqrt(self.r * (self.inputs + self.outputs)) + 0.5)
        return q - q % 2 if self.mora_type == ROTATION else q

    @property
    def blocks(self) -> int:
        """Blocks of q inputs, the last one padded."""
        return math.ceil(self.inputs / self.q)

    @property
    def rows(self) -> int:
        """Blocks of q outputs, the last one cut off."""
        return math.ceil(self.outputs / self.q)

    def update(self, x: Tensor, S: Tensor) -> Tensor:
        """x expand(S)^t without expand(S): ``[..., in]`` to ``[..., out]``."""
        products = linear(self._compress(x), S).flatten(-2)  # one after the other, and again from the first
        times = math.ceil(self.outputs / products.shape[-1])
        return torch.cat([products] * times, dim=-1)[..., : self.outputs]

    def expand(self, S: Tensor) -> Tensor:
        """expand(S), out x in."""
        if self.mora_type == SHARING:
            padded = S.repeat(self.rows, self.blocks)
        else:
            # S R_t for every t: the rows of S, rotated back.
            turned = _rotate(S[:, None, :].expand(-1, self.blocks, -1), sign=-1)  # q x blocks x q
            grid = turned.new_zeros(self.rows, self.q, self.blocks, self.q)
            for row in range(self.rows):
                block = row % self.blocks
                grid[row, :, block] = turned[:, block]
            padded = grid.view(self.rows * self.q, self.blocks * self.q)
        delta, surplus = padded[: self.outputs, : self.inputs], padded[: self.outputs, self.inputs :]
        wrapped = surplus.shape[1]
        return torch.cat([delta[:, :wrapped] + surplus, delta[:, wrapped:]], dim=1) if wrapped else delta

    def _compress(self, x: Tensor) -> Tensor:
        """What S is multiplied with: ``[..., in]`` to ``[..., m, q]``, m = 1 for sharing."""
        surplus = self.blocks * self.q - self.inputs
        blocks = torch.cat([x, x[..., :surplus]], dim=-1).unflatten(-1, (self.blocks, self.q))
        if self.mora_type == SHARING:
            return blocks.sum(-2, keepdim=True)
        return _rotate(blocks[..., : self.rows, :])  # what would be cut off is not computed


def _rotate(u: Tensor, sign: int = 1) -> Tensor:
    """R_t u_t for the vectors u_t of ``[..., blocks, q]``, t = 0, 1, ...; its inverse for ``sign=-1``."""
    blocks, q = u.shape[-2:]
    exact = torch.promote_types(u.dtype, torch.float32)  # a half-precision angle would lose the late blocks
    rates = BASE ** (-2 * torch.arange(q // 2, dtype=exact, device=u.device) / q)
    angles = torch.arange(blocks, dtype=exact, device=u.device)[:, None] * rates  # blocks x q/2
    cosine, sine = angles.cos().to(u.dtype), sign * angles.sin().to(u.dtype)
    first, second = u.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[tuple[Maps, Tensor]]) -> Tensor:
    """X (W + M (.) sum of expand(S))^t + bias; the sum is rounded once to the type of W."""
    delta = sum(maps.expand(S) for maps, S in updates)
    return linear(x, (weight + delta * (weight != 0)).to(weight.dtype), bias)


class MoraLinear(MaskedLinear):
    """A linear layer with MoRA adapters: ``mora_S[name]`` is q x q."""

    adapter_layer_names = ("mora_S",)

    @classmethod
    def check_fit(cls, name: str, layer: nn.Linear, config: MoraConfig) -> None:
        """Raise ``ValueError`` for a layer that is not larger than its S."""
        super().check_fit(name, layer, config)
        r, _ = config.layer_settings(name)
        q = Maps(layer.in_features, layer.out_features, r, config.mora_type).q
        if not 0 < q < layer.in_features:
            raise ValueError(
                f"r={r}: the square matrix of MoRA would be {q} x {q} and {name!r} has {layer.in_features} inputs; "
                "choose another r, or one for it in rank_pattern"
            )

    def maps(self, name: str) -> Maps:
        """The maps around S of an adapter."""
        return Maps(self.in_features, self.out_features, self.r[name], self.options[name].mora_type)

    def initial_factors(self, name: str) -> tuple[Tensor]:
        """S zero."""
        q = self.maps(name).q
        return (torch.zeros(q, q),)

    def masked_output(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """X (W + M (.) sum of expand(S))^t + bias."""
        base = self.get_base_layer()
        updates = [(self.maps(name), self.mora_S[name]) for name in names]
        # Without the checkpoint the update and the mask, out x in, would be kept for the backward pass.
        return checkpoint(
            masked_linear, x, base.weight, base.bias, updates, use_reentrant=False, preserve_rng_state=False
        )

    def branch(self, x: Tensor, name: str) -> Tensor:
        """spread(S compress(drop(X))), in the type of S."""
        S, p = self.mora_S[name], self.options[name].dropout if self.training else 0.0
        return self.maps(name).update(dropout(x.to(S.dtype), p), S)

    def update(self, name: str, dtype: torch.dtype) -> Tensor:
        """expand(S)."""
        return self.maps(name).expand(self.mora_S[name].to(dtype))


MoraModel = register("MORA", MoraConfig, MoraLinear)
