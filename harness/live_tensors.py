"""Exact memory of a training step: the peak of live tensor bytes, counted operation by operation.

A CPU has no allocator statistics and the resident set of a process says little. `LiveTensors` is a dispatch
mode: it sees every operation of forward, backward (custom autograd functions and recomputation included) and
optimizer, and keeps a ledger of storages: + bytes when one first appears, - bytes when it is freed. The peak
is the highest sum of the ledger. Storages are counted, not tensors, so that a view costs nothing and a tensor
that only autograd still holds does count. Fake tensors have storages like any other, without memory behind
them, so the same ledger serves `simulate`.

Counted: every tensor that an operation returns. Not counted: what a kernel allocates and frees within one
operation (scratch space of a matrix product, say) and Python objects. Slow, so it runs in a step of its own,
never in a timed one (`live_step`).

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CATEGORIES", "LiveTensors", "Peak", "Sharding"]

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "transients", "other")


@dataclass(frozen=True)
class Sharding:
    """What one of several devices holds, see `simulate`.

    Attributes:
        shards: Number of devices; a storage that is counted as sharded is divided by it, rounded up.
        whole: ``whole(phase, module)``, bytes that are on the device in full while ``module`` runs, on top of
            its own shard of them.
    """

    shards: int = 1
    whole: Callable[[str, str], int] = field(default=lambda phase, module: 0)


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


@dataclass
class _Storage:
    """Where a storage belongs; what follows from it may be decided after it is gone."""

    category: str
    module: str
    sharded: bool = False


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is entered; see the module's text.

    Args:
        block: Storages are rounded up to multiples of so many bytes, as the allocator of a device does.
        running: Name of the module that runs at the moment of the call.

    Attributes:
        phase: Name of what runs now; a peak remembers the phase that it happened in.
        category: Category of the storages that appear from now on.
    """

    def __init__(self, *, block: int = 1, running: Callable[[], str] = str) -> None:
        super().__init__()
        self.phase = ""
        self.category = "transients"
        self._block = block
        self._running = running
        self._storages: list[_Storage] = []  # by serial number
        # Address of a storage -> serial number, bytes, reference.
        self._alive: dict[int, tuple[int, int, weakref.ref]] = {}
        self._ledger: list[tuple[int, int, str, str]] = []  # serial number, change in bytes, phase, module

    def count(self, tensors: Iterable[Tensor], category: str, *, module: str = "", sharded: bool = False) -> None:
        """Count tensors that exist already, or move counted ones to another category.

        Args:
            tensors: Any tensors; those that share a storage count once.
            category: One of ``CATEGORIES``.
            module: The module that they belong to.
            sharded: Whether they are divided among the devices of a sharded training.
        """
        for tensor in tensors:
            for storage in _storages(tensor):
                serial = self._see(storage, category)
                if serial is not None:
                    # A gradient stays with the module that made it.
                    self._storages[serial] = _Storage(category, module or self._storages[serial].module, sharded)

    def forward_ends(self) -> int:
        """Everything made since the last call and still alive is kept for the backward pass; bytes of it all."""
        for serial, _, _ in self._alive.values():
            if self._storages[serial].category == "transients":
                self._storages[serial].category = "activations"
        return self._at(len(self._ledger)).by_category()["activations"]

    @property
    def now(self) -> int:
        """Live bytes at this moment."""
        return sum(size for _, size, _ in self._alive.values())

    @property
    def peak(self) -> int:
        """Highest number of live bytes so far."""
        return self.at_peak().bytes

    def at_peak(self, sharding: Sharding | None = None) -> Peak:
        """The highest point so far, the first of several equal ones; on one of several devices if asked for."""
        sharding = sharding or Sharding()
        total = peak = lines = 0
        for number, (serial, change, phase, module) in enumerate(self._ledger, start=1):
            total += self._share(serial, change, sharding)
            height = total + sharding.whole(phase, module)
            if height > peak:
                peak, lines = height, number
        return self._at(lines, sharding)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # An input that was never seen (a constant, a tensor that a module holds) counts from its first use
        # on.
        self._see_all((args, kwargs), "other")
        result = func(*args, **kwargs)
        self._see_all(result, self.category)
        return result

    def _see_all(self, tree: Any, category: str) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                for storage in _storages(leaf):
                    self._see(storage, category)

    def _see(self, storage: torch.UntypedStorage, category: str) -> int | None:
        """Enter a storage, or its new size, into the ledger; its serial number, None if it has no bytes."""
        address, size = storage._cdata, -(-storage.nbytes() // self._block) * self._block
        known = self._alive.get(address)
        if known is None:
            if size == 0:
                return None
            serial, before = len(self._storages), 0
            self._storages.append(_Storage(category, self._running()))
            # The Python object of a storage lives exactly as long as the storage itself, wherever it is held.
            reference = weakref.ref(storage, lambda _: self._free(address))
        else:
            serial, before, reference = known
            if before == size:
                return serial
        self._alive[address] = (serial, size, reference)
        self._write(serial, size - before)
        return serial

    def _free(self, address: int) -> None:
        serial, size, _ = self._alive.pop(address)
        self._write(serial, -size)

    def _write(self, serial: int, change: int) -> None:
        self._ledger.append((serial, change, self.phase, self._running()))

    def _share(self, serial: int, change: int, sharding: Sharding) -> int:
        """What a change in the bytes of a storage means on one device."""
        if not self._storages[serial].sharded:
            return change
        share = -(-abs(change) // sharding.shards)
        return share if change > 0 else -share

    def _at(self, lines: int, sharding: Sharding | None = None) -> Peak:
        """The state after so many lines of the ledger."""
        sharding = sharding or Sharding()
        parts: dict[tuple[str, str], int] = defaultdict(int)
        phase = module = ""
        for serial, change, phase, module in self._ledger[:lines]:  # noqa: B007 - those of the last line
            storage = self._storages[serial]
            parts[storage.category, storage.module] += self._share(serial, change, sharding)
        whole = sharding.whole(phase, module)
        if whole:
            parts["transients", module] += whole
        parts = {part: size for part, size in parts.items() if size}
        return Peak(sum(parts.values()), phase, module, parts)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
