"""Exact memory of a training step: the peak of live tensor bytes, counted operation by operation.

A CPU has no allocator statistics and the resident set of a process says little. `LiveTensors` is a dispatch
mode: it sees every operation of forward, backward (custom autograd functions and recomputation included) and
optimizer, and keeps a ledger of storages: + bytes when one first appears, - bytes when it is freed. The peak
is the highest sum of the ledger. Storages are counted, not tensors, so that a view costs nothing and a tensor
that only autograd still holds does count. Fake tensors have storages like any other, without memory behind
them, so the same ledger serves `simulate`.

Counted: every tensor that an operation returns. Not counted: what a kernel allocates and frees within one
operation (scratch space of a matrix product, say) and Python objects. Slow, so it runs in a step of its own
(`step_memory`), never in a timed one; the model is afterwards what it was.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.recipe import batch_loss, state_kept

__all__ = [
    "CATEGORIES",
    "LiveTensors",
    "Peak",
    "Sharding",
    "count_model",
    "count_optimizer",
    "forward_memory",
    "gradients_counted",
    "step_memory",
    "training_step",
]

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
        # An input that was never seen (a constant, a tensor that a module holds) counts from its first use on.
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


def step_memory(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer_factory: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    penalty: Callable[[nn.Module], Tensor | None] | None = None,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    autocast: bool = False,
) -> dict[str, Any]:
    """Peak memory of one training step: forward, backward, clipping and update, as in training.

    One step is made before the one that is counted, so that the optimizer holds its state, as it does from
    the second step of a training on. Model, gradients, random number generators and mode are afterwards what
    they were.

    Args:
        model: The adapted model; a copy of what is trained exists, uncounted, for the time of the call.
        batch: One batch, see `data.collator`.
        optimizer_factory: Makes the optimizer of the training.
        penalty: Added to the loss, as in `method.Method`.
        accumulation: Micro-batches per update; from 2 on gradients are alive during a forward pass.
        max_grad_norm: Gradients are clipped to this norm; None: not clipped.
        autocast: Forward in bfloat16 autocast.

    Returns:
        ``kind`` (live_tensors), ``train_peak`` (bytes), ``breakdown`` (bytes by category at that peak),
        ``peak_phase`` (forward, backward, optimizer) and ``saved_for_backward`` (bytes of activations alive
        between the last forward and its backward).
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with state_kept(model):
        model.train()
        optimizer = optimizer_factory(model)
        step = partial(
            training_step,
            model=model,
            batch=batch,
            optimizer=optimizer,
            penalty=penalty,
            micro_batches=min(accumulation, 2),  # a third one adds nothing
            max_grad_norm=max_grad_norm,
            autocast=autocast,
        )
        step(LiveTensors())  # uncounted: gives the optimizer its state
        live = LiveTensors()
        count_model(live, model)
        count_optimizer(live, optimizer)
        live.count(batch.values(), "other")
        with gradients_counted(live, model), live:
            saved = step(live)
    peak = live.at_peak()
    return {
        "kind": "live_tensors",
        "train_peak": peak.bytes,
        "breakdown": peak.by_category(),
        "peak_phase": peak.phase,
        "saved_for_backward": saved,
    }


def forward_memory(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Peak live bytes of one forward pass without gradients: model, batch, activations and logits."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    live = LiveTensors()
    with state_kept(model), torch.no_grad():
        model.eval()
        count_model(live, model)
        live.count(inputs.values(), "other")
        with live:
            model(**inputs, use_cache=False)
    return live.peak


def training_step(
    live: LiveTensors,
    *,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    penalty: Callable[[nn.Module], Tensor | None] | None,
    micro_batches: int,
    max_grad_norm: float | None,
    autocast: bool,
) -> int:
    """One step that tells `live` what it is doing; bytes of activations at the end of the last forward."""
    for _ in range(micro_batches):
        live.phase = "forward"
        loss = batch_loss(model, batch, micro_batches=micro_batches, penalty=penalty, autocast=autocast)
        saved = live.forward_ends()
        live.phase = "backward"
        loss.backward()
    live.phase, live.category = "optimizer", "other"
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return saved


def count_model(live: LiveTensors, model: nn.Module, names: Mapping[nn.Module, str] | None = None) -> None:
    """Count what a model holds: parameters (sharded), buffers, tensors in plain attributes (on every device).

    Args:
        live: The ledger.
        model: The model.
        names: What the ledger calls its modules; by default nothing.
    """
    names = names or {}
    modules = [(module, names.get(module, "")) for module in model.modules()]
    for module, name in modules:
        live.count(_attributes(module), "other", module=name)
    for module, name in modules:
        live.count(module.parameters(recurse=False), "weights", module=name, sharded=True)
        live.count(module.buffers(recurse=False), "weights", module=name)
    if isinstance(model, PeftModel):
        for module, name in modules:
            trained = (parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad)
            live.count(trained, "adapters", module=name, sharded=True)


def count_optimizer(live: LiveTensors, optimizer: torch.optim.Optimizer) -> None:
    """Count the state of an optimizer; it is sharded like the parameters that it belongs to."""
    live.count(
        (leaf for leaf in tree_leaves(list(optimizer.state.values())) if _is_tensor(leaf)), "optimizer", sharded=True
    )


@contextmanager
def gradients_counted(live: LiveTensors, model: nn.Module) -> Iterator[None]:
    """Name what becomes the `.grad` of a parameter; the name holds from the first moment of that storage."""
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.count([p.grad], "gradients", sharded=True))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that a module holds without registering them, directly or in a dict or list (index lists,
    masks)."""
    registered = ("_parameters", "_buffers", "_modules")
    held = {name: value for name, value in vars(module).items() if name not in registered}
    return [leaf for leaf in tree_leaves(held) if _is_tensor(leaf)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
