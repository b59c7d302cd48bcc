"""Exact memory of a training step: the peak of live tensor bytes, counted operation by operation.

A CPU has no allocator statistics and the resident set of a process says little. `LiveTensors` is a dispatch
mode: it sees every operation of forward, backward (custom autograd functions and recomputation included) and
optimizer, and keeps a ledger of storages: + bytes when one first appears, - bytes when it is freed. The peak
is the highest sum of the ledger. Storages are counted, not tensors, so that a view costs nothing and a tensor
that only autograd still holds does count. Fake tensors have storages like any other, without memory behind
them, so the same ledger serves `simulate`.

Counted: every tensor that an operation returns. Not counted: what a kernel allocates and frees within one
operation (scratch space of a matrix product, say) and Python objects. Slow, so it runs in a step of its own
(`meter.training_cost`), never in a timed one.

Every storage belongs to one category:

============  ==========================================================================================
weights       parameters and buffers, except the adapters
adapters      trainable parameters of a PEFT model
gradients     what `.grad` of a parameter holds
optimizer     state of the optimizer: the moments of AdamW and its step counters
activations   what the forward pass leaves behind for the backward pass, logits and loss included
transients    what forward and backward make and drop again: merged weights, gradients of activations,
              a block that checkpointing computes again
other         the batch, tensors that modules hold as plain attributes, temporaries of clipping and optimizer
============  ==========================================================================================
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.flops import CountFlops, inference_pass
from harness.method import PRECISIONS, Method
from harness.recipe import batch_loss, gradient_clipping
from harness.shards import after_backward

__all__ = [
    "CATEGORIES",
    "LiveTensors",
    "Peak",
    "forward_memory",
    "step_counted",
    "training_step",
]

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "transients", "other")


@dataclass(eq=False)
class _Storage:
    """A storage in the ledger. Where it belongs may be decided after it is gone."""

    category: str
    module: str
    reference: weakref.ref
    sharded: bool = False
    bytes: int = 0


@dataclass(frozen=True)
class Peak:
    """The highest point of a ledger.

    Attributes:
        bytes: Live bytes.
        phase: What ran then; see `LiveTensors.phase`.
        module: The module that ran then; empty outside of the modules that are traced.
        parts: Live bytes by category and by the module that the storage belongs to.
    """

    bytes: int
    phase: str
    module: str
    parts: dict[tuple[str, str], int]

    def by_category(self) -> dict[str, int]:
        """Bytes by category; they add up to `bytes`."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for (category, _), size in self.parts.items():
            sums[category] += size
        return sums


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is entered; see the module's text.

    Args:
        block: Storages are rounded up to multiples of so many bytes, as the allocator of a device does.
        device: The device whose storages are counted; None: of all.
        running: Name of the module that runs at the moment of the call.

    Attributes:
        phase: Name of what runs now; a peak remembers the phase that it happened in.
        category: Category of the storages that appear from now on.
        resized: Whether storages change their size without an operation, as those do in which FSDP2 gathers weights.
    """

    def __init__(self, *, block: int = 1, device: torch.device | None = None, running: Callable[[], str] = str) -> None:
        super().__init__()
        self.phase = ""
        self.category = "transients"
        self.resized = False
        self._block = block
        self._device = device
        self._running = running
        self._alive: dict[int, _Storage] = {}  # by address
        self._ledger: list[tuple[_Storage, int, str, str]] = []  # change in bytes, phase, module

    def count(self, tensors: Iterable[Any], category: str, *, module: str = "", sharded: bool = False) -> None:
        """Count tensors that exist already, or move counted ones to another category.

        Args:
            tensors: Tensors, or dicts and lists of them; those that share a storage count once.
            category: One of ``CATEGORIES``.
            module: The module that they belong to; by default the one that made them.
            sharded: Whether they are divided among the devices of a sharded training.
        """
        for known in self._see(tensors, category):
            known.category, known.module, known.sharded = category, module or known.module, sharded

    def forward_ends(self) -> int:
        """Everything made since the last call and still alive is kept for the backward pass; bytes of it all."""
        for storage in self._alive.values():
            if storage.category == "transients":
                storage.category = "activations"
        return sum(storage.bytes for storage in self._alive.values() if storage.category == "activations")

    @property
    def now(self) -> int:
        """Live bytes at this moment."""
        return sum(storage.bytes for storage in self._alive.values())

    @property
    def peak(self) -> int:
        """Highest number of live bytes so far."""
        return self.at_peak().bytes

    def at_peak(self, shards: int = 1, whole: Callable[[str, str], int] = lambda phase, module: 0) -> Peak:
        """The highest point so far, the first of several equal ones; on one of several devices if asked for.

        Args:
            shards: Number of devices; a storage that is counted as sharded is divided by it, rounded up.
            whole: ``whole(phase, module)``, bytes that are on one of several devices in full while ``module`` runs,
                on top of its own shard of them.
        """
        if shards == 1:
            whole = lambda phase, module: 0  # noqa: E731

        def share(storage: _Storage, change: int) -> int:
            part = -(-abs(change) // shards) if storage.sharded else abs(change)
            return part if change > 0 else -part

        total = peak = lines = 0
        for number, (storage, change, phase, module) in enumerate(self._ledger, start=1):
            total += share(storage, change)
            height = total + whole(phase, module)
            if height > peak:
                peak, lines = height, number
        parts: dict[tuple[str, str], int] = defaultdict(int)
        phase = module = ""
        for storage, change, phase, module in self._ledger[:lines]:  # noqa: B007 - those of the last line
            parts[storage.category, storage.module] += share(storage, change)
        parts["transients", module] += whole(phase, module)
        return Peak(peak, phase, module, {part: size for part, size in parts.items() if size})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.resized:
            self._measure_again()
        # An input that was never seen (a constant, a tensor that a module holds) counts from its first use on.
        self._see((args, kwargs), "other")
        result = func(*args, **kwargs)
        self._see([result], self.category)
        return result

    def _see(self, trees: Iterable[Any], category: str) -> list[_Storage]:
        """Enter all storages, or their new sizes, into the ledger."""
        storages = (storage for tree in trees for storage in _storages(tree, self._device))
        return [known for storage in storages if (known := self._enter(storage, category)) is not None]

    def _measure_again(self) -> None:
        for known in list(self._alive.values()):
            storage = known.reference()
            if storage is not None:
                self._enter(storage, known.category)

    def _enter(self, storage: torch.UntypedStorage, category: str) -> _Storage | None:
        address, size = storage._cdata, -(-storage.nbytes() // self._block) * self._block
        if address not in self._alive:
            if size == 0:
                return None
            # The Python object of a storage lives exactly as long as the storage itself, wherever it is held.
            reference = weakref.ref(storage, lambda _: self._write(self._alive.pop(address), 0))
            self._alive[address] = _Storage(category, self._running(), reference)
        known = self._alive[address]
        if known.bytes != size:
            self._write(known, size)
        return known

    def _write(self, storage: _Storage, size: int) -> None:
        self._ledger.append((storage, size - storage.bytes, self.phase, self._running()))
        storage.bytes = size


def _storages(tree: Any, device: torch.device | None) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, Tensor) or device not in (None, leaf.device):
            continue
        leaf = getattr(leaf, "_local_tensor", leaf)  # of a shard what is here
        if leaf.layout is torch.strided:
            yield leaf.untyped_storage()
        elif leaf.layout is torch.sparse_coo:
            yield leaf._indices().untyped_storage()
            yield leaf._values().untyped_storage()


def forward_memory(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Peak live bytes of one forward pass without gradients on a CPU: model, batch, activations and logits."""
    live = LiveTensors()
    _count_model(live, model)
    live.count((batch["input_ids"], batch["attention_mask"]), "other")
    inference_pass(model, batch, live)
    return live.peak


def training_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    method: Method,
    train_cfg: Any,
    live: LiveTensors,
    flops: CountFlops | None = None,
) -> int:
    """One step that tells `live` what it is doing. `flops` gets those of the forward and backward passes of all
    micro-batches, of which at most two are made: with a second one gradients are alive in a forward pass, a third one
    would not raise the peak.

    Returns:
        Bytes of activations at the end of the last forward.
    """
    autocast, clipping = PRECISIONS[train_cfg.precision].autocast, gradient_clipping(train_cfg, method)
    micro_batches = min(train_cfg.gradient_accumulation, 2)
    with flops or nullcontext():
        for _ in range(micro_batches):
            live.phase = "forward"
            loss = batch_loss(model, batch, micro_batches=micro_batches, method=method, autocast=autocast)
            saved = live.forward_ends()
            live.phase = "backward"
            loss.backward()
            after_backward(model)
    if flops is not None:
        flops.flops = flops.flops * train_cfg.gradient_accumulation // micro_batches
    live.phase, live.category = "optimizer", "other"
    if clipping is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clipping)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return saved


@contextmanager
def step_counted(
    live: LiveTensors,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Module, str] | None = None,
) -> Iterator[None]:
    """Count what exists before a step, then what the step makes, by category.

    Parameters, gradients and the state of the optimizer are counted as sharded, buffers and batch are not.

    Args:
        live: The ledger; it is entered last.
        names: What the ledger calls the modules of the model; by default nothing.
    """
    _count_model(live, model, names)
    live.count(optimizer.state.values(), "optimizer", sharded=True)
    live.count(batch.values(), "other")

    def count_gradient(parameter: Tensor) -> None:
        live.count([parameter.grad], "gradients", sharded=True)

    with ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:  # its gradient has its category from the first moment of that storage
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(count_gradient))
        with live:
            yield


def _count_model(live: LiveTensors, model: nn.Module, names: Mapping[nn.Module, str] | None = None) -> None:
    """Parameters, buffers, tensors in plain attributes such as index lists."""
    live.resized = any(hasattr(parameter, "_local_tensor") for parameter in model.parameters())
    modules = [(module, (names or {}).get(module, "")) for module in model.modules()]
    for module, name in modules:
        registered = ("_parameters", "_buffers", "_modules")
        held = [value for attribute, value in vars(module).items() if attribute not in registered]
        live.count(held, "other", module=name)
    for module, name in modules:
        for parameter in module.parameters(recurse=False):
            adapter = isinstance(model, PeftModel) and parameter.requires_grad
            live.count([parameter], "adapters" if adapter else "weights", module=name, sharded=True)
        live.count(module.buffers(recurse=False), "weights", module=name)
