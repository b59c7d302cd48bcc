"""MoRA (arXiv 2405.12130): a square matrix between two fixed linear maps, so that a small update can have a high rank.

A pruned weight W (out x in, frozen) gets the update expand(S), of which S (q x q) is the only parameter. With as many
numbers as a LoRA of rank r has, q is sqrt(r (in + out)), rounded. There is no scale. Two of the paper's types, with
indices from 0:

    1, sharing     expand(S)[i, j] = S[i mod q, j mod q]                        rank q, for a large r
    6, rotation    the diagonal block t, q x q, is S R_t, all else is zero      rank min(in, out), for a small r

R_t rotates the pairs (j, j + q/2) by the angles t 10000^(-2j/q). Read as a map, y = expand(S) x compresses x to one or
several vectors of q numbers, multiplies each with S and spreads them over y. Where q does not divide in, x is padded
with its own beginning, so the surplus columns of the last block wrap around and add to the first ones; where q does not
divide out, the last rows are cut off. With more block rows than blocks they start again from the first block. With more
blocks than block rows (type 6, in > out) the further blocks are cut off with their inputs, as published
(``truncate``); ``fold`` adds block t to block row t modulo their number instead.

    keep_zeros=True     Y = X (W + M (.) expand(S))^t + bias, M = (W != 0), computed again in the backward pass
    keep_zeros=False    Y = X W^t + bias + spread(S compress(drop(X)))

S starts at zero: the maps around it are not zero, so it has a gradient. Under M an entry of S sees the surviving
positions only, and one that has none is dead (``dead_entries``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from lors.plugin import register
from lors.sparse_config import UnscaledTunerConfig, check_choice, check_dropout
from lors.sparse_tuner import SparseLinear, SparseTunerModel

__all__ = ["Maps", "MoraConfig", "MoraLinear", "MoraModel", "dead_entries", "log_dead_entries"]

log = logging.getLogger("lors")

SHARING, ROTATION = 1, 6
WIDE_MODES = ("truncate", "fold")
PADDINGS = ("circular", "zero")
BASE = 10000.0  # of the angles, as in rotary position embeddings


@dataclass
class MoraConfig(UnscaledTunerConfig):
    """Configuration of MoRA; r is the rank of the LoRA of the same size. A bad value raises ``ValueError``."""

    mora_type: int = field(default=6, metadata={"help": "1: sharing, for a large r; 6: rotation, for a small r."})
    wide_mode: str = field(
        default="truncate",
        metadata={
            "help": "Type 6 in layers with in > out. 'truncate': most inputs are never read, as published; 'fold': "
            "what is beyond the last output is added to the outputs again."
        },
    )
    padding: str = field(
        default="circular",
        metadata={"help": "What fills the last block of the input. 'circular': its beginning; 'zero': zeros."},
    )
    keep_zeros: bool = field(
        default=True,
        metadata={"help": "Put the mask of W on the update; False is the method as published, which fills the zeros."},
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout of the input of the update, not of the base path; 0 with keep_zeros."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MORA
        if self.mora_type not in (SHARING, ROTATION):
            raise ValueError(f"mora_type={self.mora_type!r}: must be {SHARING} (sharing) or {ROTATION} (rotation)")
        check_choice("wide_mode", self.wide_mode, WIDE_MODES)
        check_choice("padding", self.padding, PADDINGS)
        check_dropout(self.dropout)
        if self.keep_zeros and self.dropout > 0:
            raise ValueError(
                f"dropout={self.dropout}: must be 0 with keep_zeros=true, whose one product has one input; "
                "use keep_zeros=false"
            )


@dataclass(frozen=True)
class Maps:
    """The fixed linear maps around the S of one layer; all methods are differentiable.

    Attributes:
        inputs, outputs: Widths of the layer.
        r: Rank of the LoRA of the same size.
        mora_type, wide_mode, padding: As in ``MoraConfig``.
    """

    inputs: int
    outputs: int
    r: int
    mora_type: int = ROTATION
    wide_mode: str = "truncate"
    padding: str = "circular"

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
        return self._spread(linear(self._compress(x), S))

    def expand(self, S: Tensor) -> Tensor:
        """expand(S), out x in."""
        if self.mora_type == SHARING:
            padded = S.repeat(self.rows, self.blocks)
        else:
            # S R_t for every t: the rows of S, rotated back.
            turned = _rotate(S[:, None, :].expand(-1, self.blocks, -1), sign=-1)  # q x blocks x q
            grid = turned.new_zeros(self.rows, self.q, self.blocks, self.q)
            for row in range(self.rows):
                for block in self._blocks_of(row):
                    grid[row, :, block] = turned[:, block]
            padded = grid.view(self.rows * self.q, self.blocks * self.q)
        padded = padded[: self.outputs]
        delta, surplus = padded.split([self.inputs, self.blocks * self.q - self.inputs], dim=1)
        if self.padding == "zero" or surplus.shape[1] == 0:
            return delta
        first, rest = delta.split([surplus.shape[1], self.inputs - surplus.shape[1]], dim=1)
        return torch.cat([first + surplus, rest], dim=1)

    def _blocks_of(self, row: int) -> range:
        """The input blocks that a block row of type 6 reads."""
        first = row % self.blocks
        return range(first, self.blocks if self.wide_mode == "fold" else first + 1, self.rows)

    def _compress(self, x: Tensor) -> Tensor:
        """What S is multiplied with: ``[..., in]`` to ``[..., m, q]``, m = 1 for sharing."""
        surplus = self.blocks * self.q - self.inputs
        filling = x[..., :surplus] if self.padding == "circular" else x.new_zeros(*x.shape[:-1], surplus)
        blocks = torch.cat([x, filling], dim=-1).unflatten(-1, (self.blocks, self.q))
        if self.mora_type == SHARING:
            return blocks.sum(-2, keepdim=True)
        if self.wide_mode == "truncate":
            return _rotate(blocks[..., : self.rows, :])  # what would be cut off is not computed
        turned = _rotate(blocks)
        # S is linear, so the blocks of one row can be added before it.
        return torch.stack(
            [turned[..., list(self._blocks_of(row)), :].sum(-2) for row in range(min(self.rows, self.blocks))], dim=-2
        )

    def _spread(self, products: Tensor) -> Tensor:
        """``[..., m, q]`` one after the other, and again from the first: ``[..., out]``."""
        flat = products.flatten(-2)
        times = math.ceil(self.outputs / flat.shape[-1])
        return torch.cat([flat] * times, dim=-1)[..., : self.outputs]


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


def dead_entries(weight: Tensor, maps: Maps) -> int:
    """Number of entries of S that no surviving position of W (out x in) depends on."""
    # The gradient of S for a random gradient of the update: exactly zero for those, and for no other.
    generator = torch.Generator(weight.device).manual_seed(0)
    upstream = torch.randn(weight.shape, generator=generator, device=weight.device) * (weight != 0)
    with torch.enable_grad():
        S = torch.zeros(maps.q, maps.q, device=weight.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(maps.expand(S), S, upstream)
    return int((gradient == 0).sum())


class MoraLinear(SparseLinear):
    """A linear layer with MoRA adapters: ``mora_S[name]`` is q x q."""

    adapter_layer_names = ("mora_S",)

    def maps(self, name: str) -> Maps:
        """The maps around S of an adapter."""
        config = self.options[name]
        widths = self.in_features, self.out_features
        return Maps(*widths, self.r[name], config.mora_type, config.wide_mode, config.padding)

    def initial_factors(self, name: str) -> tuple[Tensor]:
        """S zero."""
        q = self.maps(name).q
        return (torch.zeros(q, q),)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One product for all adapters that keep the zeros, a branch beside it for each other."""
        base = self.get_base_layer()
        masked = [(self.maps(name), self.mora_S[name]) for name in names if self.options[name].keep_zeros]
        if masked:
            # Without the checkpoint the update and the mask, out x in, would be kept for the backward pass.
            inputs = x, base.weight, base.bias, masked
            y = checkpoint(masked_linear, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.base_output(x)
        for name in names:
            if not self.options[name].keep_zeros:
                S, p = self.mora_S[name], self.options[name].dropout if self.training else 0.0
                y = y + self.maps(name).update(dropout(x.to(S.dtype), p), S).to(y.dtype)
        return y

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """M (.) expand(S), or expand(S) for an adapter that does not keep the zeros."""
        delta = self.maps(name).expand(self.mora_S[name].to(weight.dtype))
        return delta * (weight != 0) if self.options[name].keep_zeros else delta


class MoraModel(SparseTunerModel):
    """A model with ``MoraLinear`` layers; made by ``peft.get_peft_model`` from a ``MoraConfig``."""

    prefix = "mora_"
    tuner_layer_cls = MoraLinear

    def _check_target(self, config: MoraConfig, name: str, module: nn.Module) -> None:
        """Refuse a layer that is not larger than its S, besides what no method can adapt."""
        super()._check_target(config, name, module)
        r, _ = config.layer_settings(name)
        q = Maps(module.in_features, module.out_features, r, config.mora_type).q
        if not 0 < q < module.in_features:
            raise ValueError(
                f"r={r}: the square matrix of MoRA would be {q} x {q} and {name!r} has {module.in_features} inputs; "
                "choose another r, or one for it in rank_pattern"
            )


def log_dead_entries(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = (), seed: int = 0) -> nn.Module:
    """``Method.prepare`` of MoRA: write to the log how many entries of S no surviving weight depends on."""
    layers = [part for part in model.modules() if isinstance(part, MoraLinear)]
    dead = sum(dead_entries(layer.weight, layer.maps(layer.active_adapters[0])) for layer in layers)
    total = sum(layer.maps(layer.active_adapters[0]).q ** 2 for layer in layers)
    log.info("MoRA: %d of %d entries of its matrices touch no surviving weight", dead, total)
    return model


log_dead_entries.reads_values = True


MORA = register("MORA", MoraConfig, MoraModel, prefix=MoraModel.prefix)
