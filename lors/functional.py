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
gradient that an unmasked LoRA with the same factors would receive. ``exact_gradient=True`` keeps the mask.

Cost of one layer, with U = 2 n in out, V = 2 r in out, Z = 2 n r (in + out) FLOPs and b bytes per element:
forward U + V, backward U + V + 2Z, saved between them b n in bytes.

Precision. The compute type is the type of W or, under autocast, the autocast type (a float64 W is left
alone). X is cast outside of the function; W, A and B are cast inside of it, in forward and again in backward,
so that no copy of them is kept. Y has the compute type. Every gradient is returned in the type of its own
input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear

__all__ = ["masked_linear", "merged_weight"]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    exact_gradient: bool = False,
) -> Tensor:
    """Apply a linear layer whose weight is W + s * M (.) (B A), with M = (W != 0).

    A and B may be expressions of other parameters (a concatenation of several adapters, a gate, a
    factorisation): autograd continues through them.

    Args:
        x: Input, ``[..., in]``, of any stride and any number of rows, zero included.
        weight: W, ``[out, in]``, pruned and frozen.
        A: Input-side factor, ``[r, in]``.
        B: Output-side factor, ``[out, r]``.
        scaling: The scale s of the update.
        bias: ``[out]`` or None; receives its gradient if it asks for one.
        exact_gradient: Keep the mask in the gradients of A and B instead of the straight-through estimate.

    Returns:
        ``[..., out]`` in the compute type (see the module's text).

    Raises:
        ValueError: The shapes do not fit, or ``weight`` asks for a gradient, which this function does not
            compute.

    Source: arXiv 2501.08582, with the scale s kept in the gradients of A and B.
    """
    _check(x, weight, A, B, bias)
    dtype = _compute_dtype(x.device.type, weight.dtype)
    return _MaskedLinear.apply(x.to(dtype), weight, A, B, bias, scaling, exact_gradient)


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype | None = None) -> Tensor:
    """Compute T = W + s * M (.) (B A), with M = (W != 0) taken from ``weight`` before any cast.

    Args:
        weight: W, ``[out, in]``.
        A: ``[r, in]``.
        B: ``[out, r]``.
        scaling: The scale s.
        dtype: Compute type; by default the type of W.

    Returns:
        T, ``[out, in]`` in ``dtype``. Zero wherever W is zero (-0.0 counts as zero); equal to W if B is zero.
    """
    dtype = dtype or weight.dtype
    T = torch.addmm(weight.to(dtype), B.to(dtype), A.to(dtype), alpha=scaling)
    return T.mul_(weight != 0)


class _MaskedLinear(torch.autograd.Function):
    """Forward and backward of ``masked_linear``; x has the compute type, the other inputs may have any."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float, exact_gradient: bool
    ) -> Tensor:
        T = merged_weight(weight, A, B, scaling, x.dtype)
        return linear(x, T, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, A, B, bias, ctx.scaling, ctx.exact_gradient = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_shape = x.shape
        needs_factor_gradient = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_factor_gradient else None, weight, A, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_bias, _, _ = ctx.needs_input_grad
        dx = dA = dB = dbias = None
        with _without_autocast(grad_output.device.type):
            G = grad_output.reshape(-1, grad_output.shape[-1])  # n x out
            if needs_x:
                dx = (G @ merged_weight(weight, A, B, ctx.scaling, G.dtype)).reshape(ctx.x_shape)
            if needs_A or needs_B:
                gradients = _masked_gradients if ctx.exact_gradient else _straight_through_gradients
                X = x.reshape(-1, x.shape[-1])  # n x in
                dA, dB = gradients(G, X, weight, A, B, ctx.scaling, needs_A, needs_B)
            if needs_bias:
                dbias = G.sum(dim=0, dtype=ctx.bias_dtype)
        return dx, None, dA, dB, dbias, None, None


def _straight_through_gradients(
    G: Tensor, X: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, needs_A: bool, needs_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dA = s (G B)^t X and dB = s G^t (X A^t), 2 n r (in + out) FLOPs each; the mask is dropped."""
    dA = (G @ B.to(G.dtype)).t() @ X if needs_A else None  # r x in
    dB = G.t() @ (X @ A.to(G.dtype).t()) if needs_B else None  # out x r
    return _scaled(dA, A.dtype, scaling), _scaled(dB, B.dtype, scaling)


def _masked_gradients(
    G: Tensor, X: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, needs_A: bool, needs_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dA = s B^t D and dB = s D A^t with D = (G^t X) (.) M, an out x in buffer."""
    D = (G.t() @ X).mul_(weight != 0)
    dA = B.to(G.dtype).t() @ D if needs_A else None  # r x in
    dB = D @ A.to(G.dtype).t() if needs_B else None  # out x r
    return _scaled(dA, A.dtype, scaling), _scaled(dB, B.dtype, scaling)


def _scaled(gradient: Tensor | None, dtype: torch.dtype, scaling: float) -> Tensor | None:
    """Cast first and scale after, so that float32 factors of a half-precision layer lose no further digit."""
    return None if gradient is None else gradient.to(dtype).mul_(scaling)


def _compute_dtype(device_type: str, weight_dtype: torch.dtype) -> torch.dtype:
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast and weight_dtype is not torch.float64 else weight_dtype


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Keep a backward pass that is run under autocast in the types of its forward pass."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device has no autocast


def _check(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """Refuse wrong shapes in one line, and a weight that expects a gradient it would never get."""
    rank, width = A.shape[:1], weight.shape[1:]  # (r,) and (in,)
    fits = weight.ndim == 2 and x.shape[-1:] == width and A.shape == rank + width and B.shape == weight.shape[:1] + rank
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"shapes do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}, A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}, bias {None if bias is None else tuple(bias.shape)}; "
            "expected x [..., in], weight [out, in], A [r, in], B [out, r], bias [out] or None"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight.requires_grad=True: masked_linear computes gradients of x, A, B and bias only; "
            "freeze the pruned weight with weight.requires_grad_(False)"
        )
