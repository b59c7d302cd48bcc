"""Calibration samples run through decoder blocks, one block after the other, each of them alone on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lors.blocks import decoder_blocks
from lors.pruning.block_calls import Call, check_walk, hidden_of, record
from lors.randomness import modes_kept

__all__ = ["hidden_states", "measuring", "moved", "run_samples"]


@torch.no_grad()
def hidden_states(
    model: nn.Module, title: str, calibration: Tensor, device: torch.device | str | None = None
) -> Iterator[list[Tensor]]:
    """What enters each block of a model, and at last what leaves the last one, as it is at that time.

    Args:
        model: As for ``prune_model``.
        title: Of the progress bar.
        calibration: Token ids, samples x length.
        device: Where blocks run, one at a time; None: where they are.

    Yields:
        Batches of hidden states, ``[batch, length, d]``: one list, whose content changes with the next block.

    Raises:
        ValueError: A model that a walk from block to block cannot follow.
    """
    _, blocks = decoder_blocks(model)
    bar = tqdm(desc=title, total=len(blocks) * len(calibration), unit="sample")
    with measuring(model), bar:
        hidden, calls = record(model, blocks, calibration, check_walk(model, blocks, calibration))
        yield hidden
        for i, block in enumerate(blocks):
            with moved(block, device):
                run_samples(block, hidden, calls[i], bar, onward=True)
            calls[i].clear()
            yield hidden


def run_samples(block: nn.Module, hidden: list[Tensor], calls: list[Call], bar: tqdm, *, onward: bool) -> None:
    """Run all samples through a block; ``onward``: what comes out takes the place of what went in."""
    for batch, call in enumerate(calls):
        output = _run(block, hidden[batch], call)
        if onward:
            hidden[batch] = output
        del output  # before the next one is made
        bar.update(len(hidden[batch]))


@contextmanager
def moved(block: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The block is on the device, and afterwards where it was."""
    if device is None:
        yield
        return
    home = next(block.parameters()).device
    try:
        block.to(device)
        yield
    finally:
        block.to(home)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No dropout and no TF32 in float32 products; both as they were afterwards."""
    # Since torch 2.9 each backend has a precision of its own, and the older name cannot be read where one was set.
    backends = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    own = [(backend, backend.fp32_precision) for backend in backends if hasattr(backend, "fp32_precision")]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = None
    torch.set_float32_matmul_precision("highest")
    try:
        with modes_kept(model):
            model.eval()
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, value in own:
            backend.fp32_precision = value


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Hidden states (B x L x d) after a block, on the device that they came from."""
    device = next(block.parameters(), hidden).device
    args, kwargs = call
    output = block(_to(device, hidden), *_to(device, args), **{key: _to(device, x) for key, x in kwargs.items()})
    return hidden_of(output).to(hidden.device)


def _to(device: torch.device, value: Any) -> Any:
    """An argument on a device. Dicts and lists stay what they are: blocks may leave something there for later ones."""
    if type(value) is tuple:
        return tuple(_to(device, x) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value
