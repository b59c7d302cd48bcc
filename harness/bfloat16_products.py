"""Matrix products of bfloat16 on a CPU that cannot make them: in float32, rounded to bfloat16.

Where oneDNN has no bfloat16 (x86 without AVX-512, which most laptops lack) PyTorch multiplies in plain loops, far more
slowly than in float32. The numbers here are those that the hardware would give: factors in bfloat16, sums in float32,
one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["InFloat32", "bfloat16_products", "has_bfloat16"]

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 itself."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bfloat16_products(device: torch.device, used: bool = True) -> AbstractContextManager:
    """The context for computing on a device; a result says which it was (``environment.bfloat16_products``).

    Args:
        used: Whether there are such products at all. The context costs a few per cent of a step of a small model.
    """
    return InFloat32() if used and not has_bfloat16(device) else nullcontext()


class InFloat32(TorchDispatchMode):
    """Makes the products of `PRODUCTS` in float32 whose first factor is bfloat16.

    What counts FLOPs or memory enters later, and sees the product as it was asked for.
    """

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it comes back with its part
        plain = all(kind in (Tensor, nn.Parameter) for kind in types)
        if func not in PRODUCTS or not plain or args[0].dtype is not torch.bfloat16:
            return func(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), torch.bfloat16, torch.float32)  # of an attention also its mask
        found = func(*args, **kwargs)
        if func is ATTENTION:  # beside its output the logarithms of the sums, which are float32 always
            return _cast(found[0], torch.float32, torch.bfloat16), *found[1:]
        return _cast(found, torch.float32, torch.bfloat16)


def _cast(values: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(new) if tensor.dtype is old else tensor, values)
