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
import random
import re
import statistics
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from peft import PeftModel
from torch import Tensor, nn

from lors.blocks import decoder_blocks
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.sparse_config import check_choice
from lors.sparse_tuner import SparseTunerModel

__all__ = [
    "GeLoraConfig",
    "GeLoraLinear",
    "GeLoraModel",
    "block_ranks",
    "block_states",
    "intrinsic_dimension",
    "match_budget",
    "set_ranks",
    "two_nn",
]

log = logging.getLogger("lors")

SCALINGS = ("constant", "alpha_over_r", "rank_stabilized")
ESTIMATORS = ("fit", "likelihood")
POSITIONS = ("prompt_end", "random", "mean")
KEPT_RATIOS = 0.9  # of the sorted ratios; the largest are a heavy tail
SUBSAMPLE = 0.8  # of the points
FEW_POINTS, WIDE_SPREAD = 500, 1.0  # below and above these, ranks are noise
FIRST_POSITION = 17  # a random position has more than 16 before it
IGNORED = -100  # the label of a position without a loss


@dataclass
class GeLoraConfig(LowRankConfig):
    """Configuration of GeLoRA; a bad value raises ``ValueError``. r is the rank until ``set_ranks`` is called."""

    scaling: str = field(
        default="constant",
        metadata={
            "help": "Scale s of a block of rank r_i. 'constant': lora_alpha / r in every block; 'alpha_over_r': "
            "lora_alpha / r_i; 'rank_stabilized': lora_alpha / sqrt(r_i)."
        },
    )
    dimensions: list[float] | None = field(
        default=None,
        metadata={"help": "Measured dimensions d_0 .. d_L that rank_pattern was made from; set with it."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GELORA
        check_choice("scaling", self.scaling, SCALINGS)

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


class GeLoraModel(SparseTunerModel):
    """A model with ``GeLoraLinear`` layers; made by ``peft.get_peft_model`` from a ``GeLoraConfig``."""

    prefix = "gelora_"
    tuner_layer_cls = GeLoraLinear


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


def intrinsic_dimension(
    points: Tensor, *, estimator: str = "fit", subsamples: int = 5, seed: int = 0
) -> tuple[float, float, int]:
    """Intrinsic dimension of a cloud: the mean over random subsamples of four fifths of its different points.

    Args:
        points: N x D.
        estimator: As in ``two_nn``.
        subsamples: Their number.
        seed: Of the subsamples.

    Returns:
        The mean, the standard deviation over the subsamples, and the number of different points.
    """
    points = points.unique(dim=0).double()  # sorted too, so the order of the examples does not matter
    # Not by a product of matrices, which loses small distances.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    generator = torch.Generator().manual_seed(seed)
    size = max(min(3, len(points)), round(SUBSAMPLE * len(points)))
    found = []
    for _ in range(subsamples):
        chosen = torch.randperm(len(points), generator=generator)[:size].to(points.device)
        found.append(two_nn(distances[chosen][:, chosen], estimator))
    return statistics.fmean(found), statistics.pstdev(found), len(points)


def block_ranks(dimensions: Sequence[float], *, round_dimensions: bool = False, cap: int = 64) -> list[int]:
    """r_1 .. r_L from d_0 .. d_L, at most ``cap``; ``round_dimensions`` rounds every d first."""
    d = [round(value) for value in dimensions] if round_dimensions else dimensions
    return [min(cap, math.floor(max(after - before, 0)) + 1) for before, after in pairwise(d)]


def match_budget(ranks: Sequence[int], widths: Sequence[int], rank: int) -> list[int]:
    """Scaled ranks max(1, round(c r_i)) with the largest c for which they cost no more than one rank everywhere.

    Args:
        ranks: r_i.
        widths: Sum of in + out over the adapted matrices of each block.
        rank: The rank of the LoRA whose number of parameters is the budget.
    """

    def scaled(c: float) -> list[int]:
        return [max(1, round(c * r)) for r in ranks]

    low, high = 0.0, 2.0 * rank  # at the upper end every rank is above the budget's
    for _ in range(60):
        c = (low + high) / 2
        cost = sum(r * width for r, width in zip(scaled(c), widths, strict=True))
        low, high = (c, high) if cost <= rank * sum(widths) else (low, c)
    return scaled(low)


@torch.no_grad()
def block_states(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, position: str = "prompt_end", seed: int = 0
) -> list[Tensor]:
    """What enters the first block and what leaves every block, one vector per example.

    The model is read as it is without adapters, in evaluation mode; adapters and modes are afterwards as before.

    Args:
        model: A decoder-only model, with adapters or without.
        batches: ``input_ids``, ``attention_mask`` and ``labels``.
        position: ``prompt_end``: the token before the first one that has a label, or ``random`` in an example without
            a prompt; ``random``: one token behind the first 16, or the last of a short example; ``mean``: the mean over
            all tokens but the first, whose state is out of all proportion.
        seed: Of ``random``, which depends on the example alone and not on the others.

    Returns:
        L + 1 tensors, N x D, float32, on the CPU.
    """
    check_choice("position", position, POSITIONS)
    blocks = decoder_blocks(model)[1]
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    weights = torch.empty(0)

    def keep(index: int, state: Tensor | tuple) -> None:
        state = state[0] if isinstance(state, tuple) else state
        found[index].append(torch.einsum("bt,btd->bd", weights, state.float()).cpu())

    with _as_is(model):
        hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: keep(0, inputs))]
        hooks += [b.register_forward_hook(lambda *io, i=i: keep(i, io[2])) for i, b in enumerate(blocks, start=1)]
        try:
            device = next(model.parameters()).device
            decoder = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model  # without the head
            for batch in batches:
                weights = torch.stack([_weights(*row, position, seed) for row in _rows(batch)]).to(device)
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                decoder(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return [torch.cat(states) for states in found]


def set_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    *,
    position: str = "prompt_end",
    estimator: str = "fit",
    subsamples: int = 5,
    round_dimensions: bool = False,
    cap: int = 64,
    match_rank: int | None = None,
    permutation: int | None = None,
) -> nn.Module:
    """``Method.prepare`` of GeLoRA: measure the dimensions, give every block its rank and new factors.

    Dimensions, ranks and the pattern of the config follow from the data alone, whatever the seed of the run.

    Args:
        model: A model wrapped by ``GeLoraModel``; changed in place.
        batches: Training batches, as many examples as points are wanted.
        seed: Not used; new factors come from the global generator.
        position, estimator, subsamples: See ``block_states`` and ``intrinsic_dimension``.
        round_dimensions, cap: See ``block_ranks``. No rank exceeds the narrower side of a matrix of its block.
        match_rank: Scale the ranks to the number of parameters of a LoRA of this rank; see ``match_budget``.
        permutation: Give the ranks to the blocks in a random order of this seed: a control.

    Raises:
        ValueError: An unknown choice, or states without a dimension.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    measured = [
        intrinsic_dimension(states, estimator=estimator, subsamples=subsamples)
        for states in block_states(model, batches, position=position)
    ]
    dimensions = [mean for mean, _, _ in measured]
    _report(measured)
    name, blocks = decoder_blocks(model)
    layers = [
        {f"{name}.{i}.{key}": part for key, part in block.named_modules() if isinstance(part, GeLoraLinear)}
        for i, block in enumerate(blocks)
    ]
    ranks = block_ranks(dimensions, round_dimensions=round_dimensions, cap=cap)
    if match_rank is not None:
        widths = [sum(sum(layer.weight.shape) for layer in inside.values()) for inside in layers]
        ranks = match_budget(ranks, widths, match_rank)
    if permutation is not None:
        random.Random(permutation).shuffle(ranks)
    adapter = next(layer.active_adapters[0] for inside in layers for layer in inside.values())
    config = model.peft_config[adapter]
    config.dimensions = [round(value, 4) for value in dimensions]
    for i, (r, inside) in enumerate(zip(ranks, layers, strict=True)):
        if inside:
            narrowest = min(min(layer.weight.shape) for layer in inside.values())
            config.rank_pattern[rf"{re.escape(name)}\.{i}\..*"] = min(r, narrowest)
        for full_name, layer in inside.items():
            layer.set_rank(adapter, *config.layer_settings(full_name))
    log.info("GeLoRA: dimensions %s, ranks %s", config.dimensions, list(config.rank_pattern.values()))
    return model


set_ranks.reads_values = True


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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        for module, training in modes:
            module.training = training


def _rows(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(*(batch[name].cpu() for name in ("input_ids", "attention_mask", "labels")), strict=True)


def _weights(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position: str, seed: int) -> Tensor:
    """Weights of the tokens of one example (all of length T) in its vector."""
    tokens = attention_mask.nonzero().flatten().tolist()
    weights = torch.zeros(len(attention_mask))
    if position == "mean":
        weights[tokens[1:] or tokens] = 1 / max(1, len(tokens) - 1)
        return weights
    # The first token has no label that counts: nothing predicts it.
    target = next((k for k, t in enumerate(tokens) if k > 0 and labels[t] != IGNORED), 0)
    if position == "prompt_end" and target > 1:
        weights[tokens[target - 1]] = 1
        return weights
    first = min(FIRST_POSITION, len(tokens) - 1)
    text = f"{seed}:{input_ids[tokens].tolist()}"
    weights[tokens[first + zlib.crc32(text.encode()) % (len(tokens) - first)]] = 1
    return weights


GELORA = register("GELORA", GeLoraConfig, GeLoraModel, prefix=GeLoraModel.prefix)
