"""A model on fake tensors, which have shapes, types and storages without memory, and what is read out of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lors.experts import expert_names

__all__ = ["ReadsAsOne", "count_experts", "faked", "on_meta"]

# An attention that transformers makes no mask for, because it does not know it.
UNMASKED = "sdpa_of_full_rows"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


def on_meta(shape: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of this shape on the meta device, where modules can still change type; its rows have no padding."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(UNMASKED)
    return model


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model with fake tensors on the CPU in place of those on the meta device."""
    with mode:
        fakes = {id(tensor): _fake(tensor) for tensor in [*model.parameters(), *model.buffers()] if tensor.is_meta}
    return copy.deepcopy(model, fakes)


def _fake(tensor: Tensor) -> Tensor:
    """A fake tensor on the CPU like a meta tensor."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like


def count_experts(model: nn.Module) -> int:
    """How many experts a layer of a mixture has; 0 for any other model."""
    held = (getattr(part, name) for part in model.modules() for name in expert_names(part))
    return max(map(len, held), default=0)


class ReadsAsOne(TorchDispatchMode):
    """Gives 1.0 or True to whoever reads the value of a fake tensor, and True to whoever compares two of them.

    A mixture asks which experts have a token, and which tokens an expert has, as the places of the non-zeros of a mask
    (experts) and of another one (choices x tokens): all have one, and as many as the others, rounded up.

    Args:
        whole_numbers: Whether a whole number reads as 1 too; else it is refused, because a size may depend on it.
        experts: How many experts a layer has.
    """

    def __init__(self, *, whole_numbers: bool = False, experts: int = 0) -> None:
        super().__init__()
        self._whole_numbers = whole_numbers
        self._experts = experts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.equal.default and isinstance(args[0], FakeTensor):
            return True
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            if args[0].constant is not None:
                return args[0].constant.item()
            if dtype is torch.bool or dtype.is_floating_point:
                return True if dtype is torch.bool else 1.0
            if self._whole_numbers:
                return 1
            raise RuntimeError("the step reads a whole number off a tensor, which has no value in a simulation")
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            # Without memory torch has this product of fused experts in bfloat16 only.
            narrow = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
            return func(*narrow, **(kwargs or {})).to(args[0].dtype)
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor) and self._experts:
            mask = args[0]
            if mask.ndim == 1:
                return _places(len(mask), mask.fake_mode)
            return mask.new_empty((-(-mask.numel() // self._experts), mask.ndim), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def _places(count: int, mode: FakeTensorMode) -> FakeTensor:
    """0, 1, ... (count x 1), a fake tensor whose entries can be read."""
    with unset_fake_temporarily():
        places = torch.arange(count)[:, None]
    fake = mode.from_tensor(places)
    fake.constant = places
    return fake
