"""The operators ``lors::merge``, ``lors::decode`` and ``lors::mask_``, and the choice of their implementation.

They are custom operators of torch, so that ``torch.compile`` of a whole model, FSDP, fake tensors and counters of
FLOPs or bytes see one operation each, whatever runs inside. They have no derivative: ``lors.functional`` has.

==========  ==============================================================  =======================================
name        implementation                                                  chosen by itself
==========  ==============================================================  =======================================
eager       ``eager.py``: plain PyTorch, block by block in the cache        where nothing below is
compiled    ``compiled.py``: the same, last pass by ``torch.compile``       CPU, from ``COMPILE_FROM`` elements on
native      ``native.py``: one pass in C that reads W and writes T          likewise, in float32 and bfloat16, with a
                                                                            C compiler
triton      ``gpu.py``: one kernel that reads W and writes T                CUDA with Triton, not in float64
==========  ==============================================================  =======================================

A compilation takes a second or more, hence the bound: a small model never compiles. What is in C or Triton has to pass
``check.py`` on the machine that it is to run on. The environment variable ``LORS_KERNELS`` or ``forced`` chooses
otherwise, and Triton then without a check. Quantised weights, and the merge on a grid, are eager always.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lors.kernels import check, compiled, eager, native, usage
from lors.kernels.layout import PackedWeight, is_quantizing

__all__ = ["COMPILE_FROM", "IMPLEMENTATIONS", "decode", "forced", "implementation", "library", "mask_", "merge"]
__all__ += ["merge_on_grid"]

IMPLEMENTATIONS = ("auto", "eager", "compiled", "native", "triton")
VARIABLE = "LORS_KERNELS"
COMPILE_FROM = 2**20
_forced: list[str] = []


def merge(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """T = W + M (.) (scaling B A) in one pass over W, with M = (W != 0).

    Args:
        weight: W, out x in.
        A: r x in.
        B: out x r.
        scaling: The scale s.
        dtype: Type of T; sums are float32 (float64 if W or T is), rounded once.

    Returns:
        T, out x in in ``dtype``; +0.0 wherever W is zero.
    """
    return torch.ops.lors.merge(list(weight.parts), weight.layout, A, B, scaling, dtype)


def merge_on_grid(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, grid: str, dtype: torch.dtype) -> Tensor:
    """T rounded to the grid of W, an integer layout such as ``int4/64``; zero wherever W is zero.

    The sum is made as in ``merge``, then the nearest point of the grid is taken, then it is cast to ``dtype``. The grid
    is that of W if W is in this layout, else one that spans W.

    Raises:
        ValueError: W is in another layout that quantises.
    """
    if is_quantizing(weight.layout) and weight.layout != grid:
        raise ValueError(f"grid={grid!r}: must be that of the weight, {weight.layout!r}")
    return torch.ops.lors.merge_on_grid(list(weight.parts), weight.layout, A, B, scaling, grid, dtype)


def decode(weight: PackedWeight) -> Tensor:
    """W, out x in, dense and in its own type: a copy, unless it was dense."""
    if len(weight.parts) == 1:
        return weight.parts[0]
    return torch.ops.lors.decode(list(weight.parts), weight.layout, *weight.shape)


def mask_(D: Tensor, weight: PackedWeight) -> Tensor:
    """Set D, out x in, to +0.0 where W is zero, in place and in one pass over both.

    Returns:
        How many weights of each row are not zero, ``[out]`` in float32.
    """
    return torch.ops.lors.mask_(D, list(weight.parts), weight.layout)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Take the implementation ``name`` (``auto`` too) inside the context, on every thread.

    Raises:
        ValueError: No such implementation.
    """
    _forced.append(_known(name, "name"))
    try:
        yield
    finally:
        _forced.pop()


def implementation(device: torch.device, elements: int, *dtypes: torch.dtype) -> str:
    """Which implementation runs for a weight of so many elements on a device.

    Args:
        device: Where.
        elements: out times in.
        dtypes: Of the weight; for a merge also of A, B and T.

    Raises:
        ValueError: ``LORS_KERNELS`` is none of ``IMPLEMENTATIONS``, or asks for one that cannot run here.
    """
    name = _forced[-1] if _forced else _known(os.environ.get(VARIABLE, "auto"), VARIABLE)
    triton = _triton_runs(device) and torch.float64 not in dtypes
    if name == "triton" and not triton:
        raise ValueError(
            f"{VARIABLE}=triton: needs Triton, a CUDA device (or TRITON_INTERPRET=1) and no float64; this is {device}, "
            f"{', '.join(str(dtype) for dtype in dtypes)}"
        )
    takes_native = device.type == "cpu" and all(dtype in native.TYPES for dtype in dtypes)
    if name == "native" and not (takes_native and native.available()):
        raise ValueError(
            f"{VARIABLE}=native: needs a CPU, a C compiler, float32 or bfloat16; this is {device}, "
            f"{', '.join(str(dtype) for dtype in dtypes)}"
        )
    if name != "auto":
        return name
    if device.type == "cuda" and triton and check.triton_passes(device, *dtypes):
        return "triton"
    if device.type != "cpu" or elements < COMPILE_FROM:
        return "eager"
    return "native" if takes_native and native.available() else "compiled"


def _known(name: str, label: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{label}={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    return name


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_runs(device: torch.device) -> bool:
    return _has_triton() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


library = torch.library.Library("lors", "DEF")
library.define("merge(Tensor[] weight, str layout, Tensor A, Tensor B, float scaling, ScalarType dtype) -> Tensor")
library.define(
    "merge_on_grid(Tensor[] weight, str layout, Tensor A, Tensor B, float scaling, str grid, ScalarType dtype)"
    " -> Tensor"
)
library.define("decode(Tensor[] weight, str layout, SymInt rows, SymInt columns) -> Tensor")
library.define("mask_(Tensor(a!) D, Tensor[] weight, str layout) -> Tensor")
library.define("linear_2_4(Tensor x, Tensor T, Tensor? bias, bool forced) -> Tensor")  # sparse_product.py


@torch.library.impl(library, "merge", "CompositeExplicitAutograd")
def _merge(weight: list[Tensor], layout: str, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    packed = PackedWeight(layout, tuple(weight), (B.shape[0], A.shape[1]))
    # What the sums are made in is decided here, not by autocast.
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        chosen = implementation(A.device, A.shape[1] * B.shape[0], packed.dtype, A.dtype, B.dtype, dtype)
        chosen = "eager" if is_quantizing(layout) else chosen
        T = _module(chosen).merge(packed, A, B, scaling, dtype)
    # Where nothing can be compiled, the compiled merge has become the eager one.
    usage.ran("merge", "eager" if chosen == "compiled" and compiled.unavailable() else chosen)
    return T


@torch.library.impl(library, "merge_on_grid", "CompositeExplicitAutograd")
def _merge_on_grid(
    weight: list[Tensor], layout: str, A: Tensor, B: Tensor, scaling: float, grid: str, dtype: torch.dtype
) -> Tensor:
    packed = PackedWeight(layout, tuple(weight), (B.shape[0], A.shape[1]))
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        T = eager.merge_on_grid(packed, A, B, scaling, grid, dtype)
    usage.ran("merge", "eager")
    return T


@torch.library.impl(library, "decode", "CompositeExplicitAutograd")
def _decode(weight: list[Tensor], layout: str, rows: int, columns: int) -> Tensor:
    packed = PackedWeight(layout, tuple(weight), (rows, columns))
    chosen = implementation(weight[0].device, rows * columns, packed.dtype)
    chosen = "eager" if is_quantizing(layout) else chosen
    usage.ran("decode", "eager" if chosen == "compiled" else chosen)  # of which only the merge is compiled
    return _module(chosen).decode(packed)


@torch.library.impl(library, "mask_", "CompositeExplicitAutograd")
def _mask_(D: Tensor, weight: list[Tensor], layout: str) -> Tensor:
    packed = PackedWeight(layout, tuple(weight), tuple(D.shape))
    chosen = "eager"
    if D.is_contiguous() and not is_quantizing(layout):
        chosen = implementation(D.device, D.numel(), packed.dtype, D.dtype)
        chosen = "eager" if chosen == "compiled" else chosen
    usage.ran("mask", chosen)
    return _module(chosen).mask_(D, packed)


def _module(name: str) -> ModuleType:
    if name == "triton":
        from lors.kernels import gpu  # imports Triton

        return gpu
    return {"eager": eager, "compiled": compiled, "native": native}[name]


@torch.library.register_fake("lors::merge")
def _(weight: list[Tensor], layout: str, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return A.new_empty(B.shape[0], A.shape[1], dtype=dtype)


@torch.library.register_fake("lors::merge_on_grid")
def _(weight: list[Tensor], layout: str, A: Tensor, B: Tensor, scaling: float, grid: str, dtype: torch.dtype) -> Tensor:
    return A.new_empty(B.shape[0], A.shape[1], dtype=dtype)


@torch.library.register_fake("lors::decode")
def _(weight: list[Tensor], layout: str, rows: int, columns: int) -> Tensor:
    return weight[0].new_empty(rows, columns)


@torch.library.register_fake("lors::mask_")
def _(D: Tensor, weight: list[Tensor], layout: str) -> Tensor:
    return D.new_empty(D.shape[0], dtype=torch.float32)


@register_flop_formula([torch.ops.lors.merge, torch.ops.lors.merge_on_grid])
def _merge_flops(weight: object, layout: str, A: list[int], B: list[int], *_: object, **__: object) -> int:
    """V = 2 r in out: the product B A; shapes stand for the tensors."""
    return 2 * A[0] * A[1] * B[0]


@register_flop_formula([torch.ops.lors.decode, torch.ops.lors.mask_])
def _decode_flops(*_: object, **__: object) -> int:
    return 0
