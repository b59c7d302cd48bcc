"""What a model gives its decoder blocks besides the hidden states, for a walk from block to block.

The other arguments of a block (rotary embeddings, a mask of its own kind in a sliding-window layer, anything
a future model invents) are those that the model itself passes: its own forward runs with stubs in place of the
blocks, which note their arguments and hand on their input. That this is what the blocks are given is checked
before, on a few tokens that run through the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

__all__ = ["Call", "check_walk", "hidden_of", "in_place_of", "record"]

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block gets besides the hidden states: args, kwargs
Rest = tuple[Any, ...] | None  # what a block returns behind the hidden states; None: it returns these alone

# Tokens of as many samples as run through a block at once: the papers' one sample. More make no product faster.
BATCH_TOKENS = 2048
# Tokens of the run through the whole dense model that shows what its blocks are given.
CHECKED_TOKENS = 16


def hidden_of(output: Tensor | tuple) -> Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def in_place_of(blocks: nn.ModuleList, stub: Callable[..., Any]) -> Iterator[None]:
    """A call of block i is one of ``stub(i, forward, *args, **kwargs)`` with the block's own forward."""
    own = [vars(block).get("forward") for block in blocks]  # accelerate puts one there
    try:
        for i, block in enumerate(blocks):
            block.forward = partial(stub, i, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is not None:
                block.forward = forward
            else:
                vars(block).pop("forward", None)


def _forward(model: nn.Module, tokens: Tensor) -> None:
    """Run the model on tokens (B x L), without the head, whose logits nobody reads."""
    getattr(model, "base_model", model)(
        input_ids=tokens.to(model.get_input_embeddings().weight.device), use_cache=False
    )


def record(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, rests: Sequence[Rest]
) -> tuple[list[Tensor], list[list[Call]]]:
    """Run what the model computes around its blocks, for batches of samples.

    Args:
        tokens: All samples (samples x L).
        rests: What each block returns behind the hidden states.

    Returns:
        The hidden states that enter the first block, per batch (B x L x d), and the other arguments of every block,
        per block and batch. Equal tensors (all samples have one length, so nearly all are) are kept once.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]

    def note(i: int, _: Callable[..., Any], x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor | tuple:
        if i == 0:
            hidden.append(x)
            x = x.clone()  # what the model does to it behind the blocks must not reach the first one
        twin_args, twin_kwargs = calls[i][0] if calls[i] else ((), {})
        shared = {key: _share(value, twin_kwargs.get(key)) for key, value in kwargs.items()}
        calls[i].append((_share(args, twin_args), shared))
        return x if rests[i] is None else (x, *rests[i])

    with in_place_of(blocks, note):
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            _forward(model, batch)
    return hidden, calls


def check_walk(model: nn.Module, blocks: nn.ModuleList, calibration: Tensor) -> list[Rest]:
    """Compare what the walk would give each block with what it is given in a run of the model on a few tokens.

    That must be the output of the block before it; besides, what that block was given or has left in its arguments,
    or what the model computes without its blocks.

    Returns:
        What each block returns behind the hidden states, with zeros for the numbers.

    Raises:
        ValueError: The model computes something between its blocks, which the walk from block to block would miss.
    """
    kind = type(model).__name__
    refused = f"{kind} does not get what the block before it gives: allowed are models that compute nothing between "
    refused += "their blocks"
    tokens = calibration[:1, :CHECKED_TOKENS]
    rests: list[Rest] = []
    others: list[dict[Any, Any]] = []  # per block, by their place: arguments that it does not have from the one before
    output: Tensor | tuple = ()
    known: list[Any] = []

    def watch(i: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Tensor | tuple:
        nonlocal output, known
        if not args:
            name = type(blocks[i]).__name__
            raise ValueError(f"{name} gets its hidden states by keyword: this model is not supported")
        if i != len(rests) or (i and not _same(args[0], hidden_of(output))):
            raise ValueError(f"block {i} of {refused}")
        passed = {id(value) for value in known if isinstance(value, Tensor)}
        leaves = tree_flatten_with_path((args[1:], kwargs))[0]
        others.append({place: _copy(value) for place, value in leaves if id(value) not in passed})
        output = forward(*args, **kwargs)
        known = tree_leaves((args[1:], kwargs))
        rests.append(tuple(map(_blank, output[1:])) if isinstance(output, tuple) else None)
        return output

    with in_place_of(blocks, watch):
        _forward(model, tokens)
    if len(rests) != len(blocks):
        raise ValueError(f"block {len(rests)} of {refused}")
    _, calls = record(model, blocks, tokens, rests)
    for i, (given, (call,)) in enumerate(zip(others, calls, strict=True)):
        walked = dict(tree_flatten_with_path(call)[0])
        if not all(place in walked and _same(value, walked[place]) for place, value in given.items()):
            raise ValueError(f"block {i} of {refused}")
    return rests


def _same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal; of what is neither tensor nor plain value only the type is looked at."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        other = other.to(value.device)
        alike = value.shape == other.shape and value.dtype == other.dtype
        return alike and bool(((value == other) | ((value != value) & (other != other))).all())  # NaN is itself here
    return type(value) is type(other) and (not isinstance(value, bool | int | float | str) or value == other)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _blank(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else value


def _share(value: Any, twin: Any) -> Any:
    """The first sample's twin of an argument if it is the same, so that N samples do not keep N masks."""
    if isinstance(value, Tensor):
        same = isinstance(twin, Tensor) and value.dtype == twin.dtype and torch.equal(value, twin)
        return twin if same else value
    if type(value) is tuple:
        twins = twin if isinstance(twin, tuple) and len(twin) == len(value) else (None,) * len(value)
        return tuple(_share(x, y) for x, y in zip(value, twins, strict=True))
    return value
