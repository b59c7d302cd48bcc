"""The merge as one Triton kernel: every element of W is read once, decoded, summed and written once as T; and the mask,
which reads T too.

A program makes a tile of ``ROWS`` x ``SPAN`` elements of T, ``COLUMNS`` at a time. The thin product is summed in
float32, ``RANKS`` ranks at a time. On the matrix units factors of 16 bits are exact in TF32, float32 factors take
three TF32 products where T has 16 bits; for a float32 T they are multiplied in float32. What is read of W depends
on the layout:

dense     the tile itself
bitmap    the bits; the place of a value is the offset of its row, plus the bits set before the tile (counted
          when the program begins), plus the running sum of bits inside of it
n:m       for each of the n values of a group its index; the one that names this column is the weight

The tile sizes were chosen by reasoning about registers and cache lines; there is no table of tuned ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lors.kernels.layout import BITMAP, DENSE, PackedWeight, group_shape

__all__ = ["decode", "mask_", "merge"]

MASK = -1  # in place of a number of steps

ROWS, COLUMNS, SPAN, RANKS = 32, 128, 1024, 16


@triton.jit
def _set_bits(x):
    """Number of ones in the lowest 8 bits: sums of neighbours, of pairs, of halves."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


@triton.jit
def _bits_before(bits, rows, inside_rows, pitch, first_byte, BYTES: tl.constexpr, ROWS: tl.constexpr):
    """Ones of each row in the bytes [0, first_byte)."""
    count = tl.zeros([ROWS], tl.int32)
    start = 0
    while start < first_byte:  # a multiple of BYTES
        places = start + tl.arange(0, BYTES)
        chunk = tl.load(bits + rows[:, None] * pitch + places[None, :], mask=inside_rows[:, None], other=0)
        count += tl.sum(_set_bits(chunk.to(tl.int32)), axis=1)
        start += BYTES
    return count


@triton.jit
def _grouped_tile(
    values,
    codes,
    rows,
    columns,
    inside,
    kept,
    pitch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
):
    W = tl.zeros([ROWS, COLUMNS], values.dtype.element_ty)
    for t in tl.static_range(N):
        k = columns // M * N + t  # number of the value in its row
        code = tl.load(codes + rows[:, None] * pitch + (k * BITS // 8)[None, :], mask=inside, other=0).to(tl.int32)
        here = inside & (((code >> (k * BITS % 8)[None, :]) & ((1 << BITS) - 1)) == (columns % M)[None, :])
        W = tl.where(here, tl.load(values + rows[:, None] * kept + k[None, :], mask=here, other=0.0), W)
    return W


@triton.jit
def _product(
    A,
    B,
    rows,
    columns,
    height,
    width,
    r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of B A in float32."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        ranks = step * RANKS + tl.arange(0, RANKS)
        b_inside = (rows < height)[:, None] & (ranks < r)[None, :]
        a_inside = (ranks < r)[:, None] & (columns < width)[None, :]
        b = tl.load(B + rows[:, None] * r + ranks[None, :], mask=b_inside, other=0.0)
        a = tl.load(A + ranks[:, None] * width + columns[None, :], mask=a_inside, other=0.0)
        total = tl.dot(b.to(tl.float32), a.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _merge_kernel(
    T,
    values,  # W itself if dense
    places,  # bits or codes
    offsets,
    A,
    B,
    counts,  # of the mask: non-zero weights by row
    scaling,
    height,
    width,
    r,
    row_stride,  # of the values
    pitch,  # bytes of places in a row
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,  # over the ranks; 0 only decodes, -1 masks T
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    RANKS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SPAN
    inside_rows = rows < height
    number_of_weights = tl.zeros([ROWS], tl.int32)
    if LAYOUT == 1:
        begin = tl.load(offsets + rows, mask=inside_rows, other=0)
        begin += _bits_before(places, rows, inside_rows, pitch, first // 8, SPAN // 8, ROWS)
    for tile in range(SPAN // COLUMNS):
        if first + tile * COLUMNS < width:
            columns = first + tile * COLUMNS + tl.arange(0, COLUMNS)
            inside = inside_rows[:, None] & (columns < width)[None, :]
            if LAYOUT == 0:
                W = tl.load(values + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
            elif LAYOUT == 1:
                byte = tl.load(places + rows[:, None] * pitch + (columns // 8)[None, :], mask=inside, other=0)
                bit = (byte.to(tl.int32) >> (columns % 8)[None, :]) & 1
                number = begin[:, None] + tl.cumsum(bit, axis=1) - 1
                W = tl.load(values + number, mask=inside & (bit == 1), other=0.0)
                begin += tl.sum(bit, axis=1)
            else:
                W = _grouped_tile(values, places, rows, columns, inside, row_stride, pitch, ROWS, COLUMNS, N, M, BITS)
            target = T + rows[:, None] * width + columns[None, :]
            if STEPS > 0:
                update = _product(A, B, rows, columns, height, width, r, ROWS, COLUMNS, RANKS, STEPS, PRECISION)
                exact = W.to(tl.float32)
                W = tl.where(exact != 0.0, exact + scaling * update, 0.0)
            if STEPS < 0:
                kept = W.to(tl.float32) != 0.0
                number_of_weights += tl.sum(kept.to(tl.int32), axis=1)
                W = tl.where(kept, tl.load(target, mask=inside, other=0.0), 0.0)
            tl.store(target, W.to(T.dtype.element_ty), mask=inside)
    if STEPS < 0:
        tl.atomic_add(counts + rows, number_of_weights, mask=inside_rows)


def merge(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """As ``eager.merge``, for bfloat16, float16 and float32."""
    T = torch.empty(weight.shape, dtype=dtype, device=A.device)
    exact = A.itemsize == B.itemsize == 2  # TF32 has the digits of float16 and the exponents of bfloat16
    precision = "tf32" if exact else "ieee" if dtype == torch.float32 else "tf32x3"
    # A step at least: without a rank it is a merge all the same, with its mask.
    _launch(weight, T, A.contiguous(), B.contiguous(), scaling, max(1, triton.cdiv(A.shape[0], RANKS)), precision)
    return T


def decode(weight: PackedWeight) -> Tensor:
    """As ``eager.decode``."""
    values = weight.parts[0]
    W = torch.empty(weight.shape, dtype=weight.dtype, device=values.device)
    _launch(weight, W, values, values, 0.0, 0, "ieee")
    return W


def mask_(D: Tensor, weight: PackedWeight) -> Tensor:
    """As ``eager.mask_``, for a contiguous D."""
    counts = torch.zeros(len(D), dtype=torch.int32, device=D.device)  # of whole numbers any order has one sum
    _launch(weight, D, D, D, 0.0, MASK, "ieee", counts)
    return counts.float()


def _launch(
    weight: PackedWeight,
    T: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    steps: int,
    precision: str,
    counts: Tensor | None = None,
) -> None:
    """Fill T with so many steps over the ranks; 0 only decodes, ``MASK`` masks it and counts."""
    height, width = weight.shape
    values, places, offsets = (*(part.contiguous() for part in weight.parts), *weight.parts[:1] * 2)[:3]
    if not T.numel():
        return
    grouped = weight.layout not in (DENSE, BITMAP)
    n, m, bits = group_shape(weight.layout) if grouped else (1, 1, 1)
    launch = _merge_kernel[triton.cdiv(height, ROWS), triton.cdiv(width, SPAN)]
    with torch.cuda.device_of(T):  # Triton launches on the current device, which may be another one
        launch(
            T,
            values,
            places,
            offsets,
            A,
            B,
            places if counts is None else counts,
            float(scaling),
            height,
            width,
            A.shape[0],
            width // m * n if grouped else width,
            places.shape[1] if weight.layout != DENSE else 0,
            LAYOUT=2 if grouped else int(weight.layout == BITMAP),
            N=n,
            M=m,
            BITS=bits,
            STEPS=steps,
            PRECISION=precision,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            SPAN=SPAN,
            RANKS=RANKS,
        )
