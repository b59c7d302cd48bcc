"""Weights quantised to 2, 4 or 8 bits: an asymmetric grid for each group of a row, on which zero is exactly zero.

A group is so many consecutive weights of one output, along the input dimension; the last one of a row may be shorter.
With b bits, the scale S > 0 and the zero point z, a whole number in [0, 2^b - 1]:

    q = clamp(round(w / S) + z, 0, 2^b - 1)          the code of w
    W = S (q - z)                                     what it stands for; w = 0 gives q = z and W = 0

The grid of a weight spans the least and the largest number of each group, and zero. S is a number of bfloat16
whatever the type of the weight, so that casts of a model leave the grid as it is (but of float16, below 1e-5), and
S (q - z) is exact in float32.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "BITS",
    "codes_of",
    "grid_of",
    "groups_of",
    "integer_layout",
    "numbers_of",
    "on_grid",
    "pack_codes",
    "parse_integers",
]
__all__ += ["unpack_codes"]

BITS = (2, 4, 8)


def integer_layout(bits: int, group: int) -> str:
    """The name of a layout, such as ``int4/64``.

    Raises:
        ValueError: Other bits than ``BITS``, or a group that is no whole number >= 1.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"bits={bits!r}: must be one of {', '.join(map(str, BITS))}")
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ValueError(f"group={group!r}: must be a whole number >= 1")
    return f"int{bits}/{group}"


@functools.cache
def parse_integers(layout: str) -> tuple[int, int] | None:
    """Bits and group of an integer layout; None for any other."""
    match = re.fullmatch(r"int(\d+)/(\d+)", layout)
    return match and (int(match[1]), int(match[2]))


def grid_of(weight: Tensor, layout: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scales S, in ``dtype`` (that of the weight), and zero points z, uint8, of a weight (out x in): out x groups."""
    bits, group = parse_integers(layout)
    groups = groups_of(weight.to(torch.promote_types(weight.dtype, torch.float32)), group)
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    top = 2**bits - 1
    scales = ((high - low) / top).bfloat16().to(dtype or weight.dtype)
    scales.masked_fill_(scales == 0, 1.0)  # a group of zeros, or of float16 numbers that are as good as zero
    zeros = (-low / scales).round_().clamp_(0, top)
    return scales, zeros.to(torch.uint8)


def codes_of(weight: Tensor, scales: Tensor, zeros: Tensor, layout: str) -> Tensor:
    """q of a weight (out x in), in its type or float32; ``scales`` and ``zeros`` as ``grid_of`` gives them."""
    (bits, group), width = parse_integers(layout), weight.shape[1]
    groups = groups_of(weight.to(torch.promote_types(weight.dtype, torch.float32)), group)
    S, z = (part.to(groups.dtype).unsqueeze(-1) for part in (scales, zeros))
    return (groups / S).round_().add_(z).clamp_(0, 2**bits - 1).flatten(1)[:, :width]


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, layout: str) -> Tensor:
    """S (q - z) of a weight (out x in): the nearest points of the grid, in the type of the weight or float32."""
    return numbers_of(codes_of(weight, scales, zeros, layout), scales, zeros, layout)


def numbers_of(codes: Tensor, scales: Tensor, zeros: Tensor, layout: str) -> Tensor:
    """S (q - z) of codes q (out x in), in their type, with one rounding."""
    groups = groups_of(codes, parse_integers(layout)[1])
    S, z = (part.to(codes.dtype).unsqueeze(-1) for part in (scales, zeros))
    return (groups - z).mul_(S).flatten(1)[:, : codes.shape[1]]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (out x in) as bytes, out x ceil(in bits / 8), the first code of a byte in its lowest bits."""
    fields = groups_of(codes.to(torch.int16), 8 // bits) << torch.arange(0, 8, bits, device=codes.device)
    return fields.sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of ``pack_codes``, out x width, as numbers of a type."""
    per_byte = 8 // bits
    fields = torch.empty(*packed.shape, per_byte, dtype=dtype, device=packed.device)
    for k in range(per_byte):  # faster than to look bytes up, or all shifts at once
        fields[..., k] = (packed >> bits * k) & (2**bits - 1)
    return fields.flatten(1)[:, :width]


def groups_of(values: Tensor, group: int) -> Tensor:
    """Rows (out x in) cut into groups, out x groups x group; the last one filled up with zeros."""
    missing = -values.shape[1] % group
    return (pad(values, (0, missing)) if missing else values).unflatten(1, (-1, group))
