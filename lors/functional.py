"""The LoRS linear layer on plain tensors: a low-rank update that keeps the zeros at the memory of LoRA.

LoRS (arXiv 2501.08582) adapts a pruned weight W (out x in, frozen) with A (r x in) and B (out x r) under the
mask M = (W != 0):

    T = W + s * M (.) (B A)             the merged weight, out x in
    Y = X T^t + bias                    X is n x in, Y is n x out

Autograd of this formula would keep out x in temporaries of every layer from forward to backward.
``masked_linear`` saves X and references to W, A, B, throws T away, and computes T again in the backward pass,
where G = dL/dY (n x out):

    dX = G T                            exact
    dA = s * (G B)^t X                  two products of inner size r; the mask is dropped
    dB = s * G^t (X A^t)                likewise

The exact adapter gradients have ((G^t X) (.) M) in place of G^t X. The elementwise product forbids the thin
order and costs one more full product and an out x in buffer, so LoRS takes the straight-through estimate: the
gradient that an unmasked LoRA with the same factors would receive. ``gradient_share=1`` keeps the mask, and less is an
estimate in between (``lors.gradients``).

Cost of one layer, with U = 2 n in out, V = 2 r in out, Z = 2 n r (in + out) FLOPs and b bytes per element:
forward U + V, backward U + V + 2Z, saved between them b n in bytes.

Precision. The compute type is the type of W or, under autocast, the autocast type (a float64 W is left
alone). X is cast to it outside of the function and Y has it. T is summed in float32 from W, A and B as they
are and rounded to it once, in forward and again in backward, so that no copy of them is kept. Every gradient is
returned in the type of its own input.

A grid. For a model that is to be quantised T is rounded to the points of a grid (``lors.kernels.integers``), in both
passes, and the gradients are those above as if it were not: the straight-through estimate of the rounding.

Activation checkpointing. T is made in the forward pass, in the recomputation and in the backward pass. Keeping
the T of the recomputation would cost b in out bytes for every layer of a block, 405 MB for one of Llama-2-7B in
bfloat16, which is what LoRS is there to avoid; one T at a time would be free only for the last layer of a block,
where backward follows at once. There PyTorch's non re-entrant checkpoint stops the recomputation as soon as the
last tensor is saved. So the function saves its inputs before it computes anything (``_Inputs`` comes before
``_Product``), and the last layer of a block is not recomputed at all: one T and one product less, and no byte
more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear

from lors.gradients import factor_gradients
from lors.kernels import DENSE, PackedWeight, decode, merge, merge_on_grid, product

__all__ = ["frozen_linear", "masked_linear", "merged_weight", "without_autocast"]


def masked_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    gradient_share: float = 0.0,
    forward_product: str = DENSE,
    grid: str = "",
) -> Tensor:
    """Apply a linear layer whose weight is W + s * M (.) (B A), with M = (W != 0).

    A and B may be expressions of other parameters (a concatenation of several adapters, a gate, a
    factorisation): autograd continues through them.

    Args:
        x: Input, ``[..., in]``, of any stride and any number of rows, zero included.
        weight: W, ``[out, in]``, pruned and frozen; dense, or packed (``lors.kernels.pack``).
        A: Input-side factor, ``[r, in]``.
        B: Output-side factor, ``[out, r]``.
        scaling: The scale s of the update.
        bias: ``[out]`` or None; receives its gradient if it asks for one.
        gradient_share: Of the tokens that go into the full product G^t X for the gradients of A and B: 0 is the
            straight-through estimate, 1 keeps the mask, in between they are sampled (``lors.gradients``).
        forward_product: How X T^t is computed, one of ``lors.kernels.PRODUCTS``; for other than ``dense`` the
            weight has to be 2:4.
        grid: An integer layout, such as ``int4/64``, to whose points the merged weight is rounded.

    Returns:
        ``[..., out]`` in the compute type (see the module's text).

    Raises:
        ValueError: The shapes do not fit, ``weight`` asks for a gradient, which this function does not
            compute, or ``forward_product`` is ``2:4`` on a device that cannot.

    Source: arXiv 2501.08582, with the scale s kept in the gradients of A and B.
    """
    packed = _packed(weight)
    _check(x, packed, A, B, bias)
    dtype = _compute_dtype(x.device.type, packed.dtype)
    x = x.to(dtype)
    token = _Inputs.apply(x, A, B, bias, scaling, gradient_share, grid, packed.layout, *packed.parts)
    return _Product.apply(token, x.detach(), A, B, bias, scaling, forward_product, grid, packed.layout, *packed.parts)


def frozen_linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, like_weight: Tensor | None = None
) -> Tensor:
    """X W^t + bias with a frozen packed weight, which is dense only while it is multiplied.

    Args:
        x: Input, ``[..., in]``.
        weight: W, ``[out, in]``.
        bias: ``[out]`` or None; receives its gradient if it asks for one.
        like_weight: ``[out, in]``, of any content; if it asks for a gradient it receives that of W.

    Returns:
        ``[..., out]`` in the compute type (see the module's text).
    """
    packed = _packed(weight)
    dtype = _compute_dtype(x.device.type, packed.dtype)
    return _FrozenLinear.apply(x.to(dtype), bias, like_weight, packed.layout, packed.shape, *packed.parts)


@torch.no_grad()
def merged_weight(
    weight: Tensor | PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype | None = None,
    *,
    grid: str = "",
) -> Tensor:
    """Compute T = W + s * M (.) (B A), with M = (W != 0) taken from ``weight`` before any cast.

    Args:
        weight: W, ``[out, in]``, dense or packed.
        A: ``[r, in]``.
        B: ``[out, r]``.
        scaling: The scale s.
        dtype: Compute type; by default the type of W.
        grid: As for `masked_linear`.

    Returns:
        T, ``[out, in]`` in ``dtype``, rounded once. Zero wherever W is zero (-0.0 counts as zero); equal to W
        if B is zero. It has no derivative.
    """
    packed = _packed(weight)
    return _merged(packed, A, B, scaling, dtype or packed.dtype, grid)


class _Inputs(torch.autograd.Function):
    """The backward pass of ``masked_linear``, and what it needs; x has the compute type.

    The forward pass computes nothing. It returns a stand-in of the shape of Y, without memory, whose gradient
    is G: ``_Product`` hands it on.
    """

    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scaling: float,
        gradient_share: float,
        grid: str,
        layout: str,
        *parts: Tensor,
    ) -> Tensor:
        return x.new_empty(()).expand(*x.shape[:-1], B.shape[0])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, A, B, bias, ctx.scaling, ctx.share, ctx.grid, ctx.layout, *parts = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_shape = x.shape
        needs_factor_gradient = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_factor_gradient else None, A, B, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, *parts = ctx.saved_tensors
        weight = PackedWeight(ctx.layout, tuple(parts), (B.shape[0], A.shape[1]))
        needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
        dx = dA = dB = dbias = None
        with without_autocast(grad_output.device.type):
            G = grad_output.reshape(-1, grad_output.shape[-1])  # n x out
            if needs_x:
                dx = (G @ _merged(weight, A, B, ctx.scaling, G.dtype, ctx.grid)).reshape(ctx.x_shape)
            if needs_A or needs_B:
                X = x.reshape(-1, x.shape[-1])  # n x in
                dA, dB = factor_gradients(G, X, weight, A, B, ctx.scaling, ctx.share, needs_A, needs_B)
            if needs_bias:
                dbias = G.sum(dim=0, dtype=ctx.bias_dtype)
        return dx, dA, dB, dbias, None, None, None, None, *[None] * len(parts)


class _Product(torch.autograd.Function):
    """Y = X T^t + bias; saves nothing and passes the gradient of Y to ``_Inputs``."""

    @staticmethod
    def forward(
        token: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scaling: float,
        forward_product: str,
        grid: str,
        layout: str,
        *parts: Tensor,
    ) -> Tensor:
        T = _merged(PackedWeight(layout, parts, (B.shape[0], A.shape[1])), A, B, scaling, x.dtype, grid)
        return product(x, T, None if bias is None else bias.to(x.dtype), forward_product)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.others = len(inputs) - 1

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, *[None] * ctx.others


class _FrozenLinear(torch.autograd.Function):
    """Forward and backward of ``frozen_linear``; x has the compute type."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        like_weight: Tensor | None,
        layout: str,
        shape: tuple[int, int],
        *parts: Tensor,
    ) -> Tensor:
        W = decode(PackedWeight(layout, parts, shape)).to(x.dtype)
        return linear(x, W, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, like_weight, ctx.layout, ctx.shape, *parts = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = None if like_weight is None else like_weight.dtype
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        needs_x, needs_bias, needs_weight = ctx.needs_input_grad[:3]
        dx = dbias = dW = None
        with without_autocast(grad_output.device.type):
            G = grad_output.reshape(-1, grad_output.shape[-1])  # n x out
            if needs_x:
                W = decode(PackedWeight(ctx.layout, tuple(parts), ctx.shape))
                dx = (G @ W.to(G.dtype)).reshape(ctx.x_shape)
            if needs_weight:
                dW = (G.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
            if needs_bias:
                dbias = G.sum(dim=0, dtype=ctx.bias_dtype)
        return dx, dbias, dW, None, None, *[None] * len(parts)


def _merged(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, grid: str) -> Tensor:
    if grid:
        return merge_on_grid(weight, A, B, scaling, grid, dtype)
    return merge(weight, A, B, scaling, dtype)


def _compute_dtype(device_type: str, weight_dtype: torch.dtype) -> torch.dtype:
    autocast = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast and weight_dtype is not torch.float64 else weight_dtype


def without_autocast(device_type: str) -> AbstractContextManager:
    """Products in the types of their factors, also where autocast is on, as it may be in a backward pass."""
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


def _has_autocast(device_type: str) -> bool:
    """All but the meta device; torch's own `is_autocast_available` does not compile in torch 2.11."""
    return device_type != "meta"


def _packed(weight: Tensor | PackedWeight) -> PackedWeight:
    return PackedWeight(DENSE, (weight,), tuple(weight.shape)) if isinstance(weight, Tensor) else weight


def _check(x: Tensor, weight: PackedWeight, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Refuse wrong shapes in one line, and a weight that expects a gradient it would never get."""
    rank, shape = tuple(A.shape[:1]), tuple(weight.shape)
    height, width = shape[:1], shape[1:]  # (out,) and (in,)
    fits = len(shape) == 2 and tuple(x.shape[-1:]) == width
    fits = fits and tuple(A.shape) == rank + width and tuple(B.shape) == height + rank
    if not fits or (bias is not None and tuple(bias.shape) != height):
        raise ValueError(
            f"shapes do not fit: x {tuple(x.shape)}, weight {shape}, A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}, bias {None if bias is None else tuple(bias.shape)}; "
            "expected x [..., in], weight [out, in], A [r, in], B [out, r], bias [out] or None"
        )
    devices = {tensor.device for tensor in (x, weight.parts[0], A, B)}
    if len(devices) > 1:
        places = f"x {x.device}, weight {weight.parts[0].device}, A {A.device}, B {B.device}"
        raise ValueError(f"devices differ: {places}; all must be on one")
    if weight.parts[0].requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight.requires_grad=True: masked_linear computes gradients of x, A, B and bias only; "
            "freeze the pruned weight with weight.requires_grad_(False)"
        )
