"""Exact memory of a training step on a CPU: the peak of live tensor bytes, counted operation by operation.

A CPU has no allocator statistics and the resident set of a process says little. `LiveTensors` is a dispatch
mode: it sees every operation of forward, backward (custom autograd functions and recomputation included) and
optimizer, and keeps a ledger of storages: + bytes when one first appears, - bytes when it is freed. The peak
is the highest sum of the ledger. Storages are counted, not tensors, so that a view costs nothing and a tensor
that only autograd still holds does count.

Counted: every tensor that an operation returns. Not counted: what a kernel allocates and frees within one
operation (scratch space of a matrix product, say) and Python objects. Slow, so it runs in a step of its own,
never in a timed one.

Every storage belongs to one category:

============  ==========================================================================================
weights       parameters and buffers, except the adapters
adapters      trainable parameters of a PEFT model
gradients     what `.grad` of a parameter holds
optimizer     state of the optimizer: the moments of AdamW and its step counters
activations   everything else that forward and backward make, saved for the backward pass or transient
other         the batch, tensors that modules hold as plain attributes, temporaries of clipping and optimizer
============  ==========================================================================================
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lors.harness.loss import batch_loss
from lors.harness.randomness import random_state_kept

__all__ = ["CATEGORIES", "LiveTensors", "live_tensor_forward", "live_tensor_step", "state_kept"]

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "other")


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is entered; see the module's text.

    Attributes:
        phase: Name of what runs now; a peak remembers the phase that it happened in.
        category: Category of the storages that appear from now on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.category = "activations"
        self._categories: list[str] = []  # by serial number of the storage
        # Address of a storage -> serial number, bytes, reference.
        self._alive: dict[int, tuple[int, int, weakref.ref]] = {}
        self._ledger: list[tuple[int, int, str]] = []  # serial number, change in bytes, phase

    def count(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count tensors that exist already, or move counted ones to another category."""
        for tensor in tensors:
            for storage in _storages(tensor):
                serial = self._see(storage)
                if serial is not None:
                    self._categories[serial] = category

    @property
    def now(self) -> int:
        """Live bytes at this moment."""
        return sum(size for _, size, _ in self._alive.values())

    @property
    def peak(self) -> int:
        """Highest number of live bytes so far."""
        return self._at_peak()[0]

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak was reached first."""
        return self._at_peak()[2]

    def breakdown(self) -> dict[str, int]:
        """Live bytes by category at the peak; they add up to `peak`."""
        return self._split(self._at_peak()[1])

    def breakdown_now(self) -> dict[str, int]:
        """Live bytes by category at this moment."""
        return self._split(len(self._ledger))

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

    def _see(self, storage: torch.UntypedStorage, category: str = "other") -> int | None:
        """Enter a storage, or its new size, into the ledger; its serial number, None if it has no bytes."""
        address, size = storage._cdata, storage.nbytes()
        known = self._alive.get(address)
        if known is None:
            if size == 0:
                return None
            serial = len(self._categories)
            self._categories.append(category)
            # The Python object of a storage lives exactly as long as the storage itself, wherever it is held.
            reference = weakref.ref(storage, lambda _: self._free(address))
        else:
            serial, before, reference = known
            if before == size:
                return serial
            size_change = size - before
        self._alive[address] = (serial, size, reference)
        self._ledger.append((serial, size if known is None else size_change, self.phase))
        return serial

    def _free(self, address: int) -> None:
        serial, size, _ = self._alive.pop(address)
        self._ledger.append((serial, -size, self.phase))

    def _at_peak(self) -> tuple[int, int, str]:
        """Bytes, number of ledger lines and phase at the highest point."""
        total = peak = lines = 0
        phase = ""
        for number, (_, change, when) in enumerate(self._ledger, start=1):
            total += change
            if total > peak:
                peak, lines, phase = total, number, when
        return peak, lines, phase

    def _split(self, lines: int) -> dict[str, int]:
        sums = dict.fromkeys(CATEGORIES, 0)
        for serial, change, _ in self._ledger[:lines]:
            sums[self._categories[serial]] += change
        return sums


def live_tensor_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer_factory: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    penalty: Callable[[nn.Module], Tensor] | None = None,
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
        batch: One batch, see `data.Collator`.
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
            _step,
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
        _count_model(live, model)
        live.count(_optimizer_state(optimizer), "optimizer")
        live.count(batch.values(), "other")
        with _gradients_counted(live, model), live:
            saved = step(live)
    return {
        "kind": "live_tensors",
        "train_peak": live.peak,
        "breakdown": live.breakdown(),
        "peak_phase": live.peak_phase,
        "saved_for_backward": saved,
    }


def live_tensor_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Peak live bytes of one forward pass without gradients: model, batch, activations and logits."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    live = LiveTensors()
    with state_kept(model), torch.no_grad():
        model.eval()
        _count_model(live, model)
        live.count(inputs.values(), "other")
        with live:
            model(**inputs, use_cache=False)
    return live.peak


def _step(
    live: LiveTensors,
    *,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    penalty: Callable[[nn.Module], Tensor] | None,
    micro_batches: int,
    max_grad_norm: float | None,
    autocast: bool,
) -> int:
    """One step that tells `live` what it is doing; bytes of activations at the end of the last forward."""
    for _ in range(micro_batches):
        live.phase = "forward"
        loss = batch_loss(model, batch, micro_batches=micro_batches, penalty=penalty, autocast=autocast)
        saved = live.breakdown_now()["activations"]
        live.phase = "backward"
        loss.backward()
    live.phase, live.category = "optimizer", "other"
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return saved


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Undo, bit for bit, what a step changes: trained parameters, buffers, gradients, modes, random state."""
    changed = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    values = [tensor.detach().clone() for tensor in changed]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    gc.collect()  # so that leftovers of earlier work are not freed in the middle of a count
    try:
        with random_state_kept():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, values, strict=True):
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _count_model(live: LiveTensors, model: nn.Module) -> None:
    live.count((tensor for module in model.modules() for tensor in _attributes(module)), "other")
    live.count(model.parameters(), "weights")
    live.count(model.buffers(), "weights")
    if isinstance(model, PeftModel):
        live.count((p for p in model.parameters() if p.requires_grad), "adapters")


def _attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that a module holds without registering them, directly or in a dict or list (index lists,
    masks)."""
    registered = ("_parameters", "_buffers", "_modules")
    held = {name: value for name, value in vars(module).items() if name not in registered}
    return [leaf for leaf in tree_leaves(held) if _is_tensor(leaf)]


@contextmanager
def _gradients_counted(live: LiveTensors, model: nn.Module) -> Iterator[None]:
    """Name what becomes the `.grad` of a parameter; the name holds from the first moment of that storage."""
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.count([p.grad], "gradients"))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [leaf for state in optimizer.state.values() for leaf in tree_leaves(state) if _is_tensor(leaf)]


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return []


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
