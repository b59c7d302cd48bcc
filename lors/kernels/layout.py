"""How a pruned weight lies in memory: dense, as values and a bitmap, as n:m values and indices, or quantised.

W is out x in, b bytes per element, z of them non-zero. A packed weight is a few plain tensors:

=========  ===================================================================  ================================
layout     tensors                                                              bytes
=========  ===================================================================  ================================
dense      W [out, in]                                                          b out in
bitmap     values [z], bits [out, in/8], offsets [out + 1]                      b z + out in/8 + 8 (out + 1)
n:m        values [out, in n/m], codes [out, in n/m * i/8], i bits per index    (b + i/8) out in n/m
int4/64    scales [out, in/64], codes [out, in 4/8], zeros [out, in/64]         (4/8 + (b + 1)/64) out in
nf4/64     scales [out, in/64], codes [out, in/2]                               (1/2 + b/64) out in
=========  ===================================================================  ================================

``bitmap`` takes any pattern: bit k of byte j of a row says whether weight 8 j + k is stored, and ``offsets``
says where the values of a row begin. ``n:m`` keeps n values of every m weights along the input dimension, each
with its place in the group, i = 1, 2, 4, 4 bits for m = 2, 4, 8, 16, the first in the lowest bits; a group with
fewer than n non-zeros is filled up with zeros. In bfloat16 a half-sparse bitmap and 2:4 are both 9/16 of dense.

``int4/64`` has 4 bits (or 2, or 8) for each weight and a grid for every 64 of them, see ``integers.py``, ``nf4/64`` the
sixteen numbers of ``nf4.py``: to pack a weight in these layouts quantises it. Zeros have codes like all others.

What comes back of the other packed weights is W bit for bit, infinities and every NaN included, with one exception:
every zero comes back as +0.0. Pruning by a product with a mask leaves -0.0 for half of what it prunes, so keeping the
sign of a zero would cost as much as keeping a weight. A dense weight is W itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lors.kernels.integers import codes_of, grid_of, numbers_of, pack_codes, parse_integers, unpack_codes
from lors.kernels.nf4 import pack_nf4, parse_nf4, unpack_nf4
from lors.sparsity import parse_pattern

__all__ = [
    "BITMAP",
    "DENSE",
    "GROUPED",
    "GROUPS",
    "INTEGERS",
    "NF4",
    "PackedWeight",
    "bits_of",
    "empty",
    "group_shape",
    "is_quantizing",
    "kind_of",
    "masked_",
    "pack",
    "row_blocks",
    "rows",
    "values_at",
]

DENSE = "dense"
BITMAP = "bitmap"
GROUPED, INTEGERS, NF4 = "n:m", "integers", "nf4"  # kinds of layouts
# Size m of a group -> bits of an index. Indices of 3 bits would lie across bytes.
GROUPS = {2: 1, 4: 2, 8: 4, 16: 4}
# Elements that are worked on at a time: on a CPU they stay in its outer caches (2 MiB in float32), elsewhere they
# are enough to keep a device busy.
BLOCK = {"cpu": 2**19}
BLOCK_ELSEWHERE = 2**22


class PackedWeight(NamedTuple):
    """A pruned weight W (out x in) in one of the layouts of the module's text.

    Attributes:
        layout: ``dense``, ``bitmap``, the n:m pattern itself, such as ``2:4``, ``int4/64`` or ``nf4/64``.
        parts: The tensors of the layout, the values first, or the scales.
        shape: (out, in).
    """

    layout: str
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values, or of the scales."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts)


def kind_of(layout: str) -> str:
    """``dense``, ``bitmap``, ``n:m``, ``integers`` or ``nf4``."""
    if layout in (DENSE, BITMAP):
        return layout
    return INTEGERS if parse_integers(layout) else NF4 if parse_nf4(layout) else GROUPED


def is_quantizing(layout: str) -> bool:
    """Whether the layout stores codes of few bits."""
    return kind_of(layout) in (INTEGERS, NF4)


def row_blocks(shape: tuple[int, int], device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut the rows of an out x in matrix into [start, stop) so that a block fits the cache of the device."""
    height = max(1, BLOCK.get(device.type, BLOCK_ELSEWHERE) // max(1, shape[1]))
    return ((start, min(start + height, shape[0])) for start in range(0, max(1, shape[0]), height))


def group_shape(layout: str) -> tuple[int, int, int]:
    """n, m and the bits of an index of an n:m layout."""
    n, m = parse_pattern(layout)
    return n, m, GROUPS[m]


def empty(
    layout: str, shape: tuple[int, int], dtype: torch.dtype, nonzeros: int, device: torch.device | str
) -> PackedWeight:
    """A packed weight without content; on the device ``meta`` its ``nbytes`` costs nothing to know."""
    height, width = shape

    def part(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    if layout == DENSE:
        parts = (part(height, width, dtype=dtype),)
    elif layout == BITMAP:
        bits, offsets = part(height, -(-width // 8)), part(height + 1, dtype=torch.int64)
        parts = (part(nonzeros, dtype=dtype), bits, offsets)
    elif is_quantizing(layout):
        bits, group = parse_integers(layout) or (4, parse_nf4(layout))
        groups = -(-width // group)
        parts = (part(height, groups, dtype=dtype), part(height, -(-width * bits // 8)), part(height, groups))
        parts = parts if kind_of(layout) == INTEGERS else parts[:2]
    else:
        n, m, bits = group_shape(layout)
        kept = width // m * n  # of a row
        parts = (part(height, kept, dtype=dtype), part(height, -(-kept * bits // 8)))
    return PackedWeight(layout, parts, tuple(shape))


def pack(weight: Tensor, layout: str) -> PackedWeight:
    """Pack a weight (out x in); in a layout that quantises the numbers nearest to it.

    Raises:
        ValueError: An n:m layout whose groups do not divide the rows, or with a group of more than n non-zeros.
    """
    shape = tuple(weight.shape)
    if layout == DENSE:
        return PackedWeight(DENSE, (weight,), shape)
    blocks = [weight[start:stop] for start, stop in row_blocks(shape, weight.device)]
    return PackedWeight(layout, FORMS[kind_of(layout)][0](blocks, layout), shape)


def rows(packed: PackedWeight, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of W, dense; a view if the layout is dense."""
    if packed.layout == DENSE:
        return packed.parts[0][start:stop]
    return FORMS[kind_of(packed.layout)][1](packed, start, stop)


def values_at(packed: PackedWeight, weight: Tensor) -> Tensor:
    """The values of another weight (out x in) at the places that a packed one stores, in the shape of its values.

    A zero among them is +0.0, as in ``pack``. Of a quantised one the packed codes on its grid.

    Raises:
        ValueError: The other weight does not lie on that grid.
    """
    if is_quantizing(packed.layout):
        return _codes_at(packed, weight)
    blocks = []
    for start, stop in row_blocks(packed.shape, weight.device):
        W = weight[start:stop]
        if packed.layout == BITMAP:
            blocks.append(W[_support_of_bitmap(packed, start, stop).bool()])
        else:
            blocks.append(bits_of(W).gather(1, _columns_of_groups(packed, start, stop)).view(W.dtype))
    values = torch.cat(blocks)
    return masked_(values, values != 0)


def _pack_bitmap(blocks: list[Tensor], layout: str) -> tuple[Tensor, ...]:
    values, bits, counts = [], [], []
    for W in blocks:
        M = W != 0
        values.append(W[M])
        counts.append(M.sum(1))
        padded = pad(M, (0, -M.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.int32)
        bits.append((padded << torch.arange(8, device=M.device)).sum(-1).to(torch.uint8))
    offsets = pad(torch.cat(counts).cumsum(0), (1, 0))
    return torch.cat(values), torch.cat(bits), offsets


def _rows_of_bitmap(packed: PackedWeight, start: int, stop: int) -> Tensor:
    """The k-th set bit of the block belongs to the k-th value from the offset of its first row, which is not read here:
    that would wait for a GPU."""
    values, _, offsets = packed.parts
    M = _support_of_bitmap(packed, start, stop)
    if not len(values):
        return values.new_zeros(M.shape)
    number = torch.int32 if len(values) < 2**31 else torch.int64
    index = M.flatten().cumsum(0, dtype=number).add_(offsets[start] - 1).clamp_(min=0)
    return masked_(values.index_select(0, index).view(M.shape), M)


def _support_of_bitmap(packed: PackedWeight, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the bitmap as numbers 0 and 1."""
    bits = packed.parts[1][start:stop].flatten()
    M = _fields(1, torch.int16, bits.device).index_select(0, bits.int())  # bytes x 8
    return M.view(stop - start, 8 * packed.parts[1].shape[1])[:, : packed.shape[1]].contiguous()


def _pack_groups(blocks: list[Tensor], layout: str) -> tuple[Tensor, ...]:
    n, m, bits = group_shape(layout)
    values, codes = [], []
    for W in blocks:
        if W.shape[1] % m:
            raise ValueError(f"groups of {m} do not divide the input width {W.shape[1]}")
        groups = W.unflatten(1, (-1, m))  # out x groups x m
        M = groups != 0
        if (M.sum(-1) > n).any():
            raise ValueError(f"the weight does not follow {layout}: a group of {m} has more than {n} non-zeros")
        # Non-zeros first, in their order; the sort puts the zeros that fill a group up among them.
        index = M.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :n].sort(-1).values
        kept = bits_of(groups).gather(-1, index).view(W.dtype)
        values.append(masked_(kept, kept != 0).flatten(1))
        per_byte = 8 // bits
        index = pad(index.flatten(1), (0, -(W.shape[1] // m * n) % per_byte))
        shifts = torch.arange(per_byte, device=W.device) * bits
        codes.append((index.unflatten(1, (-1, per_byte)) << shifts).sum(-1).to(torch.uint8))
    return torch.cat(values), torch.cat(codes)


def _rows_of_groups(packed: PackedWeight, start: int, stop: int) -> Tensor:
    values = packed.parts[0][start:stop]
    W = values.new_zeros(stop - start, packed.shape[1])
    bits_of(W).scatter_(1, _columns_of_groups(packed, start, stop), bits_of(values))
    return W


def _columns_of_groups(packed: PackedWeight, start: int, stop: int) -> Tensor:
    """Columns of the values in rows [start, stop)."""
    n, m, bits = group_shape(packed.layout)
    width = packed.shape[1]
    codes = packed.parts[1][start:stop]
    index = _fields(bits, torch.int64, codes.device).index_select(0, codes.flatten().int())  # bytes x 8/bits
    index = index.view(stop - start, codes.shape[1] * 8 // bits)[:, : width // m * n]
    return index + torch.arange(0, width, m, device=codes.device).repeat_interleave(n)  # where the group begins


def _pack_integers(blocks: list[Tensor], layout: str) -> tuple[Tensor, ...]:
    bits, _ = parse_integers(layout)
    scales, codes, zeros = [], [], []
    for W in blocks:
        S, z = grid_of(W, layout)
        scales.append(S)
        codes.append(pack_codes(codes_of(W, S, z, layout), bits))
        zeros.append(z)
    return torch.cat(scales), torch.cat(codes), torch.cat(zeros)


def _rows_of_integers(packed: PackedWeight, start: int, stop: int) -> Tensor:
    """S (q - z), in the type of the scales."""
    scales, codes, zeros = (part[start:stop] for part in packed.parts)
    q = unpack_codes(codes, parse_integers(packed.layout)[0], packed.shape[1], scales.dtype)
    return numbers_of(q, scales, zeros, packed.layout)


def _pack_nf4(blocks: list[Tensor], layout: str) -> tuple[Tensor, ...]:
    scales, codes = zip(*(pack_nf4(W, layout) for W in blocks), strict=True)
    return torch.cat(scales), torch.cat(codes)


def _rows_of_nf4(packed: PackedWeight, start: int, stop: int) -> Tensor:
    scales, codes = (part[start:stop] for part in packed.parts)
    return unpack_nf4(scales, codes, packed.layout, packed.shape[1])


def _codes_at(packed: PackedWeight, weight: Tensor) -> Tensor:
    integers, blocks = parse_integers(packed.layout), []
    for start, stop in row_blocks(packed.shape, weight.device):
        W, (scales, _, *zeros) = weight[start:stop], (part[start:stop] for part in packed.parts)
        if integers:
            codes = pack_codes(codes_of(W, scales, *zeros, packed.layout), integers[0])
        else:
            _, codes = pack_nf4(W, packed.layout, scales)
        own = PackedWeight(packed.layout, (scales, codes, *zeros), tuple(W.shape))
        if not torch.equal(rows(own, 0, stop - start), W):
            train = f"train the adapter with bits={integers[0]}, or " if integers else ""
            on = f"on the {packed.layout} grid of the packed one"
            raise ValueError(f"the weight does not lie {on}: {train}leave it beside the weight")
        blocks.append(codes)
    return torch.cat(blocks)


# How a weight is packed, and how rows of it are unpacked.
FORMS = {
    BITMAP: (_pack_bitmap, _rows_of_bitmap),
    GROUPED: (_pack_groups, _rows_of_groups),
    INTEGERS: (_pack_integers, _rows_of_integers),
    NF4: (_pack_nf4, _rows_of_nf4),
}


def bits_of(values: Tensor) -> Tensor:
    """The same memory as whole numbers. To move a weight as one: torch's own gather and scatter take numbers of 16
    bits through float32 on a CPU, where a NaN loses its sign and its payload."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def masked_(values: Tensor, M: Tensor) -> Tensor:
    """Set to +0.0, in place, where M is false. A product on the bits: four times as fast as ``masked_fill_`` on a
    CPU, and an infinity or a NaN does not survive it."""
    bits = bits_of(values)
    bits.mul_(M.to(bits.dtype))
    return values


@functools.cache
def _fields(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """256 x 8/bits: the bit fields of every byte, lowest first; to look up is three times as fast as to shift."""
    numbers = torch.arange(256, device=device).unsqueeze(1)
    return ((numbers >> torch.arange(0, 8, bits, device=device)) & (2**bits - 1)).to(dtype)
