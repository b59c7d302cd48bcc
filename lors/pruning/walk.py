"""Prune a decoder-only model block by block, each calibrated on the output of the pruned ones before it.

The calibration tokens are embedded once. For every block: the samples run through the still dense block while
hooks gather float32 statistics of all its linears; these are pruned; the samples run again, and what comes
out feeds the next block. So statistics see the pruning of earlier blocks, though not of earlier linears of
the same block, as in Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774).

The other arguments of a block (rotary embeddings, a mask of its own kind in a sliding-window layer, anything
a future model invents) are those that the model itself passes: they are recorded in one run of the dense
model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from lors.blocks import block_linears, decoder_blocks, decoder_linears
from lors.pruning.magnitude import prune_magnitude
from lors.pruning.sparsegpt import gram_matrix, prune_sparsegpt
from lors.pruning.wanda import prune_wanda, squared_norms
from lors.randomness import modes_kept
from lors.sparsity import check_width, resolve_sparsity

# The rule, and the statistic of the inputs X (tokens x in) that it needs: added up over the samples.
PRUNERS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor] | None]] = {
    "magnitude": (prune_magnitude, None),
    "wanda": (prune_wanda, squared_norms),
    "sparsegpt": (prune_sparsegpt, gram_matrix),
}

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block gets besides the hidden states: args, kwargs


@torch.no_grad()
def prune_model(
    model: nn.Module,
    pruner: str,
    *,
    sparsity: float | None,
    pattern: str,
    calibration: Tensor | None,
    **options: Any,
) -> None:
    """Prune every linear inside the decoder blocks in place, with a progress bar over the blocks.

    Args:
        model: A decoder-only model of transformers in any floating type; statistics and scores are float32.
        pruner: ``magnitude``, ``wanda`` or ``sparsegpt``.
        sparsity: See ``lors.sparsity.resolve_sparsity``.
        pattern: ``unstructured`` or ``n:m``.
        calibration: Token ids ``[samples, length]``, unpadded; None for magnitude, which looks at no data.
        **options: Keyword arguments of the pruner: ``group`` for magnitude, ``block_size`` and ``damping``
            for sparsegpt.

    Raises:
        ValueError: Before anything is changed: an unknown pruner or option, a bad sparsity or pattern, a
            width that the pattern does not divide, bad tokens, a model that ``lors.blocks`` cannot read.
            Naming the layer, with earlier layers pruned by then: weights or statistics that are not finite.
    """
    if pruner not in PRUNERS:
        raise ValueError(f"pruner={pruner!r}: allowed are {', '.join(PRUNERS)}")
    rule, statistic = PRUNERS[pruner]
    sparsity = resolve_sparsity(sparsity, pattern)
    _check_options(pruner, rule, options)
    _check_model(model, pattern)
    rule = partial(rule, sparsity=sparsity, pattern=pattern, **options)
    name, blocks = decoder_blocks(model)
    bar = tqdm(blocks, desc=f"prune ({pruner})", unit="block")
    if statistic is None:
        for i, block in enumerate(bar):
            for linear_name, linear in block_linears(f"{name}.{i}", block):
                _prune_linear(linear_name, linear, rule)
        return
    _check_calibration(model, calibration)
    with _measuring(model):
        hidden, calls = _record(model, blocks, calibration)
        for i, block in enumerate(bar):
            linears = dict(block_linears(f"{name}.{i}", block))
            sums = _gather(block, linears, hidden, calls[i], statistic)
            for linear_name, linear in linears.items():
                _prune_linear(linear_name, linear, rule, sums.pop(linear_name))
            for sample, call in enumerate(calls[i]):
                hidden[sample] = _run(block, hidden[sample], call)


def _prune_linear(name: str, linear: nn.Linear, rule: Callable[..., Tensor], *statistic: Tensor) -> None:
    try:
        linear.weight.copy_(rule(linear.weight, *statistic))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _gather(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: list[Tensor],
    calls: list[Call],
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Run all samples through a block; per linear, the statistic of its inputs summed over samples."""
    sums: dict[str, Tensor] = {}

    def add(name: str, linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        part = statistic(args[0].flatten(0, -2))  # (..., in) -> (tokens, in)
        sums[name] = sums[name].add_(part) if name in sums else part

    hooks = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
    try:
        for x, call in zip(hidden, calls, strict=True):
            _run(block, x, call)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name in linears if name not in sums]
    if idle:
        raise ValueError(f"{idle[0]}: no calibration token reached this layer; use more samples")
    return sums


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Hidden states (1 x L x d) after a block."""
    args, kwargs = call
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _record(model: nn.Module, blocks: nn.ModuleList, calibration: Tensor) -> tuple[list[Tensor], list[list[Call]]]:
    """Run the dense model once on every sample (1 x L).

    Returns the hidden states that enter the first block, per sample (1 x L x d), and the other arguments of
    every block, per block and sample. Equal tensors (all samples have one length, so nearly all are) are kept
    once.

    Raises:
        ValueError: The model computes something between its blocks, which the walk from block to block would miss.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]
    given: list[Tensor] = []  # the output of the block before

    def record(i: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if not args:
            raise ValueError(f"{type(block).__name__} gets its hidden states by keyword: this model is not supported")
        if i == 0:
            hidden.append(args[0])
        elif not torch.allclose(given.pop().to(args[0].device), args[0], rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"block {i} of {type(model).__name__} does not get what the block before it gives: allowed are models "
                "that compute nothing between their blocks"
            )
        twin_args, twin_kwargs = calls[i][0] if calls[i] else ((), {})
        shared_args = _share(args[1:], twin_args)
        calls[i].append((shared_args, {key: _share(x, twin_kwargs.get(key)) for key, x in kwargs.items()}))

    def note(block: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        given[:] = [output[0] if isinstance(output, tuple) else output]

    hooks = [block.register_forward_pre_hook(partial(record, i), with_kwargs=True) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(note) for block in blocks]
    # Without the head, whose logits nobody reads.
    decoder = getattr(model, "base_model", model)
    try:
        samples = calibration.to(model.get_input_embeddings().weight.device)
        for sample in tqdm(samples, desc="record the dense model", unit="sample"):
            decoder(input_ids=sample[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, calls


def _share(value: Any, twin: Any) -> Any:
    """The first sample's twin of an argument if it is the same, so that N samples do not keep N masks."""
    if isinstance(value, Tensor):
        same = isinstance(twin, Tensor) and value.dtype == twin.dtype and torch.equal(value, twin)
        return twin if same else value
    if type(value) is tuple:
        twins = twin if isinstance(twin, tuple) and len(twin) == len(value) else (None,) * len(value)
        return tuple(_share(x, y) for x, y in zip(value, twins, strict=True))
    return value


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """No dropout and no TF32 in float32 products; both as they were afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with modes_kept(model):
            model.eval()
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check_options(pruner: str, rule: Callable[..., Tensor], options: dict[str, Any]) -> None:
    parameters = inspect.signature(rule).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("sparsity", "pattern")]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{option} is not an option of {pruner}: allowed are {', '.join(allowed) or 'none'}")


def _check_model(model: nn.Module, pattern: str) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model carries adapters: prune it first and wrap it with PEFT afterwards")
    for name, linear in decoder_linears(model).items():
        if linear.weight.is_meta:
            raise ValueError(f"{name}: its weight is not in memory (meta device); load the model without offloading")
        try:
            check_width(pattern, linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_calibration(model: nn.Module, calibration: Tensor | None) -> None:
    if calibration is None or calibration.ndim != 2 or calibration.dtype != torch.long or not calibration.numel():
        got = "None" if calibration is None else f"{calibration.dtype} of shape {tuple(calibration.shape)}"
        raise ValueError(f"calibration: got {got}; allowed are token ids, int64 of shape (samples, length)")
    vocabulary = model.get_input_embeddings().num_embeddings
    if not 0 <= int(calibration.min()) <= int(calibration.max()) < vocabulary:
        raise ValueError(f"calibration: token ids outside the vocabulary of {vocabulary}; is it another tokenizer's?")
