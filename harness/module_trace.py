"""Which module runs now, in the forward pass and in the backward pass.

Forward hooks tell where the forward pass is, also while checkpointing computes a block again. The backward pass has no
such hooks that leave memory alone (full backward hooks put nodes of their own into the graph and hold gradients), so
it is read off the autograd graph: every node has a sequence number, given out in order, and the hooks note which module
made the numbers from when on.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["ModuleTrace", "module_names", "without_index"]


class ModuleTrace:
    """The running module; call it for its name, which is empty outside of all modules."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._numbers: list[int] = []  # sequence numbers, rising
        self._makers: list[str] = []  # the module that made the nodes from that number on

    def __call__(self) -> str:
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        place = bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._makers[place] if place >= 0 else ""

    @contextmanager
    def of(self, names: Mapping[nn.Module, str]) -> Iterator[None]:
        """Trace these modules."""
        with ExitStack() as hooks:
            for module, name in names.items():
                hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                # Always: checkpointing ends its second forward pass with an exception once it has what it needs.
                hooks.enter_context(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
            yield

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._note()

    def _leave(self) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._makers.append(self._stack[-1] if self._stack else "")


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """A name for every module: that of the model without adapters; what an adapted layer holds is the layer."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    names: dict[nn.Module, str] = {}
    layer = None
    for name, module in model.named_modules():
        if layer is None or not name.startswith(f"{layer}."):
            layer = name if isinstance(module, BaseTunerLayer) else None
        names[module] = (layer or name).removeprefix(prefix)
    return names


def without_index(name: str) -> str:
    """A name with ``*`` in place of numbers, the same for the same layer of every decoder block."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
