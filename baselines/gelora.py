"""GeLoRA (arXiv 2412.09250): a LoRA whose rank in each block follows the growth of the intrinsic dimension across it.

Before the training the frozen model reads N examples. The states that enter block i = 1 .. L and those that leave it
are clouds of N points with the intrinsic dimensions d_(i-1) and d_i, and all adapted matrices of the block get the rank

    r_i = floor(max(d_i - d_(i-1), 0)) + 1

the smallest whole number above the growth, which is a lower bound for the rank that an update of the block needs. The
rest is LoRA, here under the mask M = (W != 0): W + M (.) (s B A), A (r_i x in) Kaiming uniform, B (out x r_i) zero.

Dimensions are estimated by TwoNN (Facco et al. 2017): with the distances r1 <= r2 of a point to its two nearest others,
log(r2 / r1) is exponential with the rate d. Either a line through the origin is fitted to the sorted x = log(r2 / r1)
and y = - log(1 - k/N), without the largest tenth, or d is the maximum likelihood (N - 1) / sum x.
"""

from __future__ import annotations

import logging
import math
import re
import statistics
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from harness.method import Method
from lors.blocks import decoder_blocks
from lors.checks import one_of, option
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.randomness import modes_kept

__all__ = [
    "GeLoraConfig",
    "GeLoraLinear",
    "GeLoraMethod",
    "GeLoraModel",
    "block_ranks",
    "block_states",
    "intrinsic_dimension",
    "two_nn",
]

log = logging.getLogger("lors")

ESTIMATORS = ("fit", "likelihood")
KEPT_RATIOS = 0.9  # of the sorted ratios; the largest are a heavy tail
SUBSAMPLES, SUBSAMPLE = 5, 0.8  # of the points, each of four fifths of them
SEED = 0  # of the subsamples and of random positions: ranks follow from the data alone
LARGEST_RANK = 64
FEW_POINTS, WIDE_SPREAD = 500, 1.0  # below and above these, ranks are noise
FIRST_POSITION = 17  # a random position has more than 16 before it
IGNORED = -100  # the label of a position without a loss


@dataclass
class GeLoraConfig(LowRankConfig):
    """Configuration of GeLoRA; a bad value raises ``ValueError``. r is the rank until the dimensions are measured."""

    scaling: str = option(
        "constant",
        "Scale s of a block of rank r_i. 'constant': lora_alpha / r in every block; 'alpha_over_r': lora_alpha / r_i; "
        "'rank_stabilized': lora_alpha / sqrt(r_i).",
        one_of("constant", "alpha_over_r", "rank_stabilized"),
    )
    dimensions: list[float] | None = option(
        None, "Measured dimensions d_0 .. d_L that rank_pattern was made from; set with it."
    )

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r_i of the layer called ``name`` and the scale of its update."""
        r, alpha_over_r = super().layer_settings(name)
        divided_by = {"constant": self.r, "alpha_over_r": r, "rank_stabilized": math.sqrt(r)}
        return r, alpha_over_r * r / divided_by[self.scaling]


class GeLoraLinear(LowRankLinear):
    """A linear layer with GeLoRA adapters: ``gelora_A[name]`` is r_i x in, ``gelora_B[name]`` is out x r_i."""

    adapter_layer_names = ("gelora_A", "gelora_B")

    def set_rank(self, name: str, r: int, scaling: float) -> None:
        """Replace the factors of an adapter by new ones of the rank r, of the same type."""
        dtype = self.gelora_A[name].dtype
        self.update_layer(name, self.options[name], r, scaling)
        for factors in (self.gelora_A, self.gelora_B):
            factors[name].data = factors[name].data.to(dtype)


def two_nn(distances: Tensor, estimator: str = "fit") -> float:
    """Intrinsic dimension of N points.

    Args:
        distances: N x N, symmetric, of different points. Fewer than three points have the dimension 0.
        estimator: ``fit`` or ``likelihood``, see the module's text.

    Raises:
        ValueError: Every point has its two nearest others at the same distance.
    """
    N = len(distances)
    if N < 3:
        return 0.0
    nearest = distances.topk(3, largest=False).values  # the point itself is the first
    nearest = nearest[nearest[:, 1] > 0]
    x = (nearest[:, 2] / nearest[:, 1]).log().sort().values
    if not x.any():
        raise ValueError("states: every example is equally far from its two nearest others; there is no dimension")
    if estimator == "likelihood":
        return (len(x) - 1) / x.sum().item()
    kept = max(1, int(KEPT_RATIOS * len(x)))
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=x.dtype, device=x.device) / len(x))
    x = x[:kept]
    return ((x * y).sum() / x.square().sum()).item()


def intrinsic_dimension(points: Tensor, estimator: str = "fit") -> tuple[float, float, int]:
    """Intrinsic dimension of a cloud: the mean over random subsamples of its different points.

    Args:
        points: N x D.
        estimator: As in ``two_nn``.

    Returns:
        The mean, the standard deviation over the subsamples, and the number of different points.
    """
    points = points.unique(dim=0).double()  # sorted too, so the order of the examples does not matter
    # Not by a product of matrices, which loses small distances.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    generator = torch.Generator().manual_seed(SEED)
    size = max(min(3, len(points)), round(SUBSAMPLE * len(points)))
    found = []
    for _ in range(SUBSAMPLES):
        chosen = torch.randperm(len(points), generator=generator)[:size].to(points.device)
        found.append(two_nn(distances[chosen][:, chosen], estimator))
    return statistics.fmean(found), statistics.pstdev(found), len(points)


def block_ranks(dimensions: Sequence[float]) -> list[int]:
    """r_1 .. r_L from d_0 .. d_L."""
    return [min(LARGEST_RANK, math.floor(max(after - before, 0)) + 1) for before, after in pairwise(dimensions)]


@torch.no_grad()
def block_states(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """What enters the first block and what leaves every block, at one token of each example, see ``_position``.

    The model is read as it is without adapters, in evaluation mode; adapters and modes are afterwards as before.

    Args:
        model: A decoder-only model, with adapters or without.
        batches: ``input_ids``, ``attention_mask`` and ``labels``.

    Returns:
        L + 1 tensors, N x D, float32, on the CPU.
    """
    blocks = decoder_blocks(model)[1]
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    positions: list[int] = []

    def keep(index: int, state: Tensor | tuple) -> None:
        state = state[0] if isinstance(state, tuple) else state
        found[index].append(state[range(len(positions)), positions].float().cpu())

    with _as_is(model):
        hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: keep(0, inputs))]
        hooks += [b.register_forward_hook(lambda *io, i=i: keep(i, io[2])) for i, b in enumerate(blocks, start=1)]
        try:
            device = next(model.parameters()).device
            decoder = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model  # without the head
            for batch in batches:
                rows = zip(*(batch[name].cpu() for name in ("input_ids", "attention_mask", "labels")), strict=True)
                positions = [_position(*row) for row in rows]
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                decoder(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return [torch.cat(states) for states in found]


class GeLoraMethod(Method):
    """GeLoRA in the harness.

    Args:
        estimator: Of the dimensions. ``fit``: a line through the ratios of distances; ``likelihood``.

    Raises:
        ValueError: An unknown estimator.
    """

    reads_rows = True

    def __init__(self, name: str, peft: GeLoraConfig, *, estimator: str = "fit", **common: Any) -> None:
        super().__init__(name, peft, **common)
        one_of(*ESTIMATORS)("estimator", estimator)
        self.estimator = estimator

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Measure the dimensions of as many examples as ``batches`` has, give every block its rank and new factors.

        Dimensions, ranks and the pattern of the config follow from the data alone, whatever the seed of the run. No
        rank exceeds the narrowest side of a matrix of its block.

        Raises:
            ValueError: States without a dimension.
        """
        if batches is None:
            return model
        measured = [intrinsic_dimension(states, self.estimator) for states in block_states(model, batches)]
        _report(measured)
        adapter = model.active_adapter
        config = model.peft_config[adapter]
        config.dimensions = [round(mean, 4) for mean, _, _ in measured]
        name, blocks = decoder_blocks(model)
        for i, (r, block) in enumerate(zip(block_ranks([mean for mean, _, _ in measured]), blocks, strict=True)):
            layers = {key: part for key, part in block.named_modules() if isinstance(part, GeLoraLinear)}
            if layers:
                narrowest = min(min(layer.weight.shape) for layer in layers.values())
                config.rank_pattern[rf"{re.escape(name)}\.{i}\..*"] = min(r, narrowest)
            for key, layer in layers.items():
                layer.set_rank(adapter, *config.layer_settings(f"{name}.{i}.{key}"))
        log.info("GeLoRA: dimensions %s, ranks %s", config.dimensions, list(config.rank_pattern.values()))
        return model


def _report(measured: Sequence[tuple[float, float, int]]) -> None:
    """Warn where the dimensions cannot be trusted."""
    points, spread = min(count for _, _, count in measured[1:]), max(spread for _, spread, _ in measured)
    if points < FEW_POINTS or spread > WIDE_SPREAD:
        log.warning(
            "GeLoRA: ranks may be noise: %d different examples (method.init_rows; fewer than %d are few), dimensions "
            "that differ by %.1f between subsamples",
            points,
            FEW_POINTS,
            spread,
        )


@contextmanager
def _as_is(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, in evaluation mode."""
    with modes_kept(model), model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        model.eval()
        yield


def _position(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> int:
    """The token that stands for an example of the length T: the last one of the prompt, before the first label.

    In an example without a prompt it is a random one behind the first 16, or the last of a short example; the draw
    depends on the example alone.
    """
    tokens = attention_mask.nonzero().flatten().tolist()
    # The first token has no label that counts: nothing predicts it.
    target = next((k for k, t in enumerate(tokens) if k > 0 and labels[t] != IGNORED), 0)
    if target > 1:
        return tokens[target - 1]
    first = min(FIRST_POSITION, len(tokens) - 1)
    text = f"{SEED}:{input_ids[tokens].tolist()}"
    return tokens[first + zlib.crc32(text.encode()) % (len(tokens) - first)]


GeLoraModel = register("GELORA", GeLoraConfig, GeLoraLinear)
