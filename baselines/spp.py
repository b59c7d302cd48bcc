"""SPP (sparsity-preserved parameter-efficient fine-tuning, arXiv 2405.16057) as a PEFT tuner.

A pruned weight W (out x in, frozen) is rescaled by a row-block factor w (r x in) and a column factor
c (out x 1):

    Y = X W^t + bias + s * drop(X) (E(w) (.) c (.) W)^t,        s = alpha / r

E(w) is out x in and repeats each row of w for out / r consecutive output rows, so r must divide out. Hence
W_eff = W (.) (1 + s E(w) (.) c): multiplicative, so the zeros stay without any mask. w starts Kaiming
uniform, c at zero. The dropout acts on the input of the update alone.

Three organisations compute the same function. With U = 2 n in out FLOPs, n tokens and b bytes per element, a
layer costs

============  =======  ========  ===================  ========================================================
organisation  forward  backward  saved between them   how
============  =======  ========  ===================  ========================================================
plain         2U       3U        b (n in + 2 out in)  autograd, as published; E(w) and the scaled weight kept
checkpoint    2U       3U        b n in               the scaled weight is computed again in the backward pass
blockwise     2U       2U        b (n in + n out)     r products (X (.) w_g) W_g^t, no out x in temporary
============  =======  ========  ===================  ========================================================

``checkpoint`` is PyTorch's non re-entrant one, which stops the recomputation as soon as the last saved tensor
is there, hence before the product. The authors' re-entrant checkpoint runs that product again: 4U in the
backward pass.

Differences from the published code: the rows of w follow r (there 16 whatever r says), a bias is supported,
the merge includes s and is done in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from lors.checks import number, one_of, option
from lors.low_rank import kaiming_uniform
from lors.plugin import register
from lors.sparse_config import SparseTunerConfig
from lors.sparse_layer import SparseLinear

__all__ = ["SppConfig", "SppLinear", "SppModel", "blockwise_update", "plain_update", "scaled_weight"]


ORGANISATIONS = ("plain", "checkpoint", "blockwise")


def scaled_weight(weight: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """E(w) (.) c (.) W, out x in, from W (out x in), w (r x in) and c (out x 1); r divides out."""
    expanded = w.repeat_interleave(weight.shape[0] // w.shape[0], dim=0)  # out x in
    # In this order autograd keeps E(w) and the result; W (.) c first would keep W (.) c as well.
    return expanded * c * weight


def plain_update(x: Tensor, weight: Tensor, w: Tensor, c: Tensor, scaling: float = 1.0, p: float = 0.0) -> Tensor:
    """drop(X) (s E(w) (.) c (.) W)^t, ``[..., in]`` to ``[..., out]``; p is the dropout."""
    # In place: nothing more is kept. Not torch.add(y, update, alpha=s): compiled on a CPU it forgets s.
    return linear(dropout(x, p), scaled_weight(weight, w, c).mul_(scaling))


def blockwise_update(x: Tensor, weight: Tensor, w: Tensor, c: Tensor, scaling: float = 1.0, p: float = 0.0) -> Tensor:
    """The same as ``plain_update`` without an out x in temporary.

    Row i of block g is c_i sum_j x_j w_gj W_ij, so the factor w_g can scale the input instead of the weight.
    """
    x = dropout(x, p)
    blocks = weight.chunk(w.shape[0], dim=0)  # r blocks of out / r rows
    products = [linear(x * w_g, W_g) for w_g, W_g in zip(w, blocks, strict=True)]
    return (torch.cat(products, dim=-1) * c.squeeze(1)).mul_(scaling)


@dataclass
class SppConfig(SparseTunerConfig):
    """Configuration of SPP; a bad value raises ``ValueError``."""

    dropout: float = option(0.0, "Dropout of the input of the update, not of the base path.", number(">= 0", "< 1"))
    organisation: str = option(
        "plain",
        "'plain': autograd of the formula; 'checkpoint': compute the update again in the backward pass; 'blockwise': "
        "one product per row of w, no temporary of the weight's size.",
        one_of(*ORGANISATIONS),
    )


class SppLinear(SparseLinear):
    """A linear layer with SPP adapters: ``spp_w[name]`` is r x in, ``spp_c[name]`` is out x 1."""

    adapter_layer_names = ("spp_w", "spp_c")

    @classmethod
    def check_fit(cls, name: str, layer: nn.Linear, config: SppConfig) -> None:
        """Raise ``ValueError`` unless r divides the output width."""
        r, _ = config.layer_settings(name)
        if layer.out_features % r:
            raise ValueError(
                f"r={r}: SPP repeats r rows over equal blocks of output rows, so r must divide the output "
                f"width of {name!r}, {layer.out_features}; choose another r, or one for it in rank_pattern"
            )

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """w Kaiming uniform, in +- 1 / sqrt(in); c zero."""
        return kaiming_uniform(self.r[name], self.in_features), torch.zeros(self.out_features, 1)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """X W^t + bias + s * update, the updates of all ``names`` added."""
        y = self.base_output(x)
        for name in names:
            y = y + self._update(x, name)
        return y

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """s E(w) (.) c (.) W."""
        w, c = self.spp_w[name].to(weight.dtype), self.spp_c[name].to(weight.dtype)
        return scaled_weight(weight, w, c).mul_(self.scaling[name])

    def _update(self, x: Tensor, name: str) -> Tensor:
        weight = self.get_base_layer().weight
        factors = self.spp_w[name].to(weight.dtype), self.spp_c[name].to(weight.dtype), self.scaling[name]
        organisation = self.options[name].organisation
        p = self.options[name].dropout if self.training else 0.0
        if organisation == "blockwise":
            return blockwise_update(x, weight, *factors, p)
        if organisation == "plain":
            return plain_update(x, weight, *factors, p)
        # The dropout is drawn again too, from the saved state of the generator, so not even drop(X) is kept.
        return checkpoint(plain_update, x, weight, *factors, p, use_reentrant=False, preserve_rng_state=p > 0)


SppModel = register("SPP", SppConfig, SppLinear)
