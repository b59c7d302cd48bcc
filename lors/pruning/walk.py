"""Prune or quantise a decoder-only model block by block, each calibrated on the output of the changed ones before it.

The calibration tokens are embedded once. For every block: the samples run through the still dense block while
hooks gather float32 statistics of all its linears; these are pruned; the samples run again, and what comes
out feeds the next block. So statistics see the pruning of earlier blocks, though not of earlier linears of
the same block, as in Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774). Each matrix of a fused expert is a
linear with the statistics of the tokens that were routed to it; one without a token is pruned by magnitude, row by row.
OWL and RMI take a walk over the dense model before.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lors.blocks import block_linears, decoder_blocks, decoder_linears
from lors.experts import ExpertLinears, expert_names, experts_as_linears
from lors.kernels import PackedWeight, integer_layout, nf4_layout
from lors.pruning.block_calls import check_walk, record
from lors.pruning.block_runs import hidden_states, measuring, moved, run_samples
from lors.pruning.calibration import tokens_for
from lors.pruning.layerwise import check_layerwise
from lors.pruning.magnitude import prune_magnitude
from lors.pruning.owl import outlier_share, owl_sparsities
from lors.pruning.quantize import quantize_gptq, quantize_rtn
from lors.pruning.rmi import importances, rmi_sparsities, sample_kernel
from lors.pruning.sparsegpt import gram_matrix, prune_sparsegpt
from lors.pruning.wanda import prune_wanda, squared_norms
from lors.sparsity import UNSTRUCTURED, check_width, resolve_sparsity
from lors.storage import CompressedLinear, hold

log = logging.getLogger("lors")

# The rule, and the statistic of the inputs X (tokens x in) that it needs: added up over the samples.
PRUNERS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor] | None]] = {
    "magnitude": (prune_magnitude, None),
    "wanda": (prune_wanda, squared_norms),
    "sparsegpt": (prune_sparsegpt, gram_matrix),
}

QUANTIZERS: dict[str, tuple[Callable[..., PackedWeight], Callable[[Tensor], Tensor] | None]] = {
    "rtn": (quantize_rtn, None),
    "gptq": (quantize_gptq, gram_matrix),
    "nf4": (quantize_rtn, None),
}

Rule = Callable[..., Tensor | PackedWeight]
# Does something with block i: its linears, and by their names the statistics of their inputs.
Visit = Callable[[int, dict[str, nn.Linear], dict[str, Tensor]], None]


@torch.no_grad()
def prune_model(
    model: nn.Module,
    pruner: str = "wanda",
    *,
    sparsity: float | None = None,
    pattern: str = UNSTRUCTURED,
    calibration: Tensor | Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    layerwise: str = "none",
    outlier_threshold: float = 5.0,
    sparsity_range: float = 0.08,
    **options: Any,
) -> None:
    """Prune every linear inside the decoder blocks in place, fused experts one by one, with a progress bar.

    Experts that no calibration token reaches are pruned by magnitude, row by row; one warning in the log names them.

    In memory besides the model: the hidden states of all samples, what one block makes of a batch of samples, and the
    statistics of its linears.

    Args:
        model: A decoder-only model of transformers in any floating type; statistics and scores are float32.
        pruner: ``magnitude``, ``wanda`` or ``sparsegpt``.
        sparsity: Fraction of the weights to prune; None for what the pattern implies (1 - n/m; 0.5 if unstructured).
        pattern: ``unstructured`` or ``n:m``, n weights kept of every m along the input.
        calibration: Token ids ``[samples, length]``, unpadded; or texts, of which ``calibration_tokens`` makes at
            most 128 samples of 2048 tokens, or of as many as the model has positions. None for magnitude, which needs
            no data by itself.
        tokenizer: That of the model, for texts.
        device: Where blocks are pruned; each is moved there and back, so that a model on the CPU needs a GPU for
            one block. None: where they are.
        layerwise: ``none``, or a sparsity of each block, of mean ``sparsity`` over all weights: ``owl``, the lower the
            more outliers it has (OWL, arXiv 2310.05175; see ``lors.pruning.owl``); ``rmi``, the higher the more its
            input is like those of the others (LoSA, arXiv 2502.14816; see ``lors.pruning.rmi``). Unstructured only, and
            with calibration, which runs through the dense model once more.
        outlier_threshold: Of owl: an outlier is so many times the mean of |W_ij| * ||X_j|| in its block (M).
        sparsity_range: Of owl and rmi: no block is farther than this from ``sparsity`` (lambda).
        **options: Keyword arguments of the pruner: ``group`` for magnitude, ``block_size`` and ``damping``
            for sparsegpt.

    Raises:
        ValueError: Before anything is changed: an unknown pruner or option, a bad sparsity or pattern, a
            width that the pattern does not divide, bad tokens, a model that ``lors.blocks`` cannot read or whose
            blocks are not given what the walk from block to block would give them.
            Naming the layer, with earlier layers pruned by then: weights or statistics that are not finite.
    """
    if pruner not in PRUNERS:
        raise ValueError(f"pruner={pruner!r}: allowed are {', '.join(PRUNERS)}")
    rule, statistic = PRUNERS[pruner]
    sparsity = resolve_sparsity(sparsity, pattern)
    _check_options(pruner, rule, options)
    check_layerwise(layerwise, sparsity, pattern, outlier_threshold=outlier_threshold, sparsity_range=sparsity_range)
    _check_model(model, pattern)
    if statistic is not None or layerwise != "none":
        calibration = tokens_for(model, calibration, tokenizer)
    with experts_as_linears(model):
        limits = {"sparsity": sparsity, "sparsity_range": sparsity_range}
        if layerwise == "owl":
            targets = owl_sparsities(*_outliers(model, outlier_threshold, calibration, device), **limits)
        elif layerwise == "rmi":
            targets = rmi_sparsities(*_importances(model, calibration, device), **limits)
        else:
            targets = [sparsity] * len(decoder_blocks(model)[1])
        pair = (partial(rule, **options), partial(prune_magnitude, group="row"))
        rules = [[partial(each, sparsity=S, pattern=pattern) for each in pair] for S in targets]
        _change_model(model, f"prune ({pruner})", rules, statistic, calibration, device)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    quantizer: str,
    *,
    bits: int = 4,
    group: int = 64,
    calibration: Tensor | Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> None:
    """Quantise every linear inside the decoder blocks in place; zeros stay zero.

    A layer then keeps codes and their grid (``lors.storage.CompressedLinear``), and its weight is dense only
    while it is multiplied.

    Args:
        model: As for ``prune_model``, pruned or not, without fused experts.
        quantizer: ``rtn`` or ``gptq`` on a grid of whole numbers, or ``nf4``: the nearest of the numbers of QLoRA.
        bits: 2, 4 or 8; nf4 has 4.
        group: So many weights of a row have one scale, and one zero point but for nf4.
        calibration, tokenizer, device: As there; rtn and nf4 look at no data.
        **options: ``block_size`` and ``damping`` of gptq.

    Raises:
        ValueError: As ``prune_model``; a model with fused experts, or with layers that are quantised already.
    """
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer={quantizer!r}: allowed are {', '.join(QUANTIZERS)}")
    rule, statistic = QUANTIZERS[quantizer]
    _check_options(quantizer, rule, options)
    if quantizer == "nf4" and bits != 4:
        raise ValueError(f"bits={bits!r}: must be 4 with quantizer='nf4'")
    layout = nf4_layout(group) if quantizer == "nf4" else integer_layout(bits, group)
    _check_model(model, UNSTRUCTURED)
    if any(expert_names(part) for part in model.modules()):
        raise ValueError(f"{type(model).__name__} has fused experts: allowed are models without")
    if statistic is not None:
        calibration = tokens_for(model, calibration, tokenizer)
    pair = (partial(rule, layout=layout, **options), partial(quantize_rtn, layout=layout))
    rules = [pair] * len(decoder_blocks(model)[1])
    _change_model(model, f"quantise ({quantizer})", rules, statistic, calibration, device)


def _outliers(
    model: nn.Module, threshold: float, calibration: Tensor, device: torch.device | str | None
) -> tuple[list[float], list[int]]:
    """Of every block of the dense model the share of outliers, without the experts that no token has reached, and the
    number of weights, with them."""
    shares: list[float] = []
    sizes: list[int] = []

    def measure(_: int, linears: dict[str, nn.Linear], norms: dict[str, Tensor]) -> None:
        shares.append(outlier_share(((linears[name].weight, norms[name]) for name in norms), threshold))
        sizes.append(_size(linears))

    _walk(model, "outliers (owl)", measure, squared_norms, calibration, device, changes=False)
    return shares, sizes


def _importances(
    model: nn.Module, calibration: Tensor, device: torch.device | str | None
) -> tuple[list[float], list[int]]:
    """Of every block of the dense model the importance by its input, and the number of weights."""
    name, blocks = decoder_blocks(model)
    with closing(hidden_states(model, "inputs (rmi)", calibration, device)) as inputs:
        kernels = [sample_kernel(hidden) for hidden in islice(inputs, len(blocks))]
    return importances(kernels), [_size(dict(block_linears(f"{name}.{i}", block))) for i, block in enumerate(blocks)]


def _size(linears: dict[str, nn.Linear]) -> int:
    return sum(linear.weight.numel() for linear in linears.values())


def _change_model(
    model: nn.Module,
    title: str,
    rules: Sequence[Sequence[Rule]],
    statistic: Callable[[Tensor], Tensor] | None,
    calibration: Tensor | None,
    device: torch.device | str | None,
) -> None:
    """Apply the first of its two rules to each block; the second to its experts without a token, hence a statistic."""
    idle: list[str] = []

    def change(i: int, linears: dict[str, nn.Linear], sums: dict[str, Tensor]) -> None:
        rule, without = rules[i]
        for name, linear in linears.items():
            if statistic is None:
                _change_linear(name, linear, rule)
            elif name in sums:
                _change_linear(name, linear, rule, sums.pop(name))
            else:
                _change_linear(name, linear, without)
                idle.append(name)

    _walk(model, title, change, statistic, calibration, device)
    if idle:
        log.warning(
            "no calibration token reached %d matrices of experts, which were pruned by magnitude: %s",
            len(idle),
            ", ".join(idle),
        )


def _walk(
    model: nn.Module,
    title: str,
    visit: Visit,
    statistic: Callable[[Tensor], Tensor] | None,
    calibration: Tensor | None,
    device: torch.device | str | None,
    *,
    changes: bool = True,
) -> None:
    """Visit one block after the other, each fed by those before it as the visits have left them; ``changes`` says
    whether they change a block."""
    name, blocks = decoder_blocks(model)
    if statistic is None:
        for i, block in enumerate(tqdm(blocks, desc=title, unit="block")):
            with moved(block, device):
                visit(i, dict(block_linears(f"{name}.{i}", block)), {})
        return
    passes = 2 * len(blocks) - 1 if changes else len(blocks)  # the last block feeds no other
    bar = tqdm(total=passes * len(calibration), desc=title, unit="sample")
    with measuring(model), bar:
        hidden, calls = record(model, blocks, calibration, check_walk(model, blocks, calibration))
        for i, block in enumerate(blocks):
            bar.set_postfix_str(f"block {i + 1}/{len(blocks)}")
            linears = dict(block_linears(f"{name}.{i}", block))
            with moved(block, device):
                with _gathering(block, linears, statistic) as sums:
                    run_samples(block, hidden, calls[i], bar, onward=not changes)
                visit(i, linears, sums)
                if changes and i + 1 < len(blocks):
                    run_samples(block, hidden, calls[i], bar, onward=True)
            calls[i].clear()


def _change_linear(name: str, linear: nn.Linear, rule: Rule, *statistic: Tensor) -> None:
    try:
        changed = rule(linear.weight.detach(), *statistic)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if isinstance(changed, PackedWeight):
        hold(linear, changed)
    else:
        linear.weight.copy_(changed)


@contextmanager
def _gathering(
    block: nn.Module, linears: dict[str, nn.Linear], statistic: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Per linear of a block, the statistic of its inputs summed over the samples that run through it meanwhile. An
    expert without a token has none."""
    sums: dict[str, Tensor] = {}

    def add(name: str, linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        X = args[0]
        for x in X if X.ndim > 2 else (X,):  # one sample after the other: the sum is the same whatever the batch
            x = x.flatten(0, -2)  # (..., in) -> (tokens, in)
            if len(x):
                part = statistic(x)
                sums[name] = sums[name].add_(part) if name in sums else part

    hooks = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
    experts = {id(layer) for part in block.modules() if isinstance(part, ExpertLinears) for layer in part.children()}
    idle = [name for name, linear in linears.items() if name not in sums and id(linear) not in experts]
    if idle:
        raise ValueError(f"{idle[0]}: no calibration token reached this layer; use more samples")


def _check_options(name: str, rule: Rule, options: dict[str, Any]) -> None:
    parameters = inspect.signature(rule).parameters.values()
    allowed = [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("sparsity", "pattern", "layout")
    ]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{option} is not an option of {name}: allowed are {', '.join(allowed) or 'none'}")


def _check_model(model: nn.Module, pattern: str) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model carries adapters: prune it first and wrap it with PEFT afterwards")
    for name, linear in decoder_linears(model).items():
        if isinstance(linear, CompressedLinear):
            raise ValueError(f"{name}: is compressed already ({linear.layout})")
        if linear.weight.is_meta:
            raise ValueError(f"{name}: its weight is not in memory (meta device); load the model without offloading")
        try:
            check_width(pattern, linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
