"""Weights of 2, 4 or 8 bits: whole numbers on a grid for each group of a row, on which zero is exactly zero.

A group is so many consecutive weights of one output, along the input dimension; the last one of a row may be shorter.
With b bits, the scale S > 0 and the zero point z, a whole number in [0, 2^b - 1]:

    q = clamp(round(w / S) + z, 0, 2^b - 1)          the code of w
    W = S (q - z)                                     what it stands for; w = 0 gives q = z and W = 0

The grid of a weight spans the least and the largest number of each group, and zero. S is a number of bfloat16
whatever the type of the weight, so that casts of a model leave the grid as it is, and S (q - z) is exact in float32.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["BITS", "codes_of", "grid_of", "integer_layout", "on_grid", "pack_codes", "parse_integers", "unpack_codes"]

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


def grid_of(weight: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Scales S, in the type of the weight, and zero points z, uint8, of a weight (out x in): both out x groups."""
    bits, group = parse_integers(layout)
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    groups = pad(exact, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    top = 2**bits - 1
    scales = ((high - low) / top).bfloat16().to(exact.dtype)
    scales.masked_fill_(scales == 0, 1.0)  # a group of zeros
    zeros = (-low / scales).round_().clamp_(0, top)
    return scales.to(weight.dtype), zeros.to(torch.uint8)


def codes_of(weight: Tensor, scales: Tensor, zeros: Tensor, layout: str) -> Tensor:
    """q of a weight (out x in), in its type or float32; ``scales`` and ``zeros`` as ``grid_of`` gives them."""
    bits, group = parse_integers(layout)
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    S, z = (_by_column(part.to(exact.dtype), group, weight.shape[1]) for part in (scales, zeros))
    return (exact / S).round_().add_(z).clamp_(0, 2**bits - 1)


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, layout: str) -> Tensor:
    """S (q - z) of a weight (out x in): the nearest points of the grid, in the type of the weight or float32."""
    _, group = parse_integers(layout)
    q = codes_of(weight, scales, zeros, layout)
    S, z = (_by_column(part.to(q.dtype), group, weight.shape[1]) for part in (scales, zeros))
    return q.sub_(z).mul_(S)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (out x in) as bytes, out x ceil(in bits / 8), the first code of a byte in its lowest bits."""
    per_byte = 8 // bits
    fields = pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    return (fields.to(torch.int16) << torch.arange(0, 8, bits, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of ``pack_codes``, out x width, as numbers of a type."""
    fields = packed.unsqueeze(-1) >> torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (fields & (2**bits - 1)).flatten(1)[:, :width].to(dtype)


def _by_column(values: Tensor, group: int, width: int) -> Tensor:
    """A number for each group (out x groups) as one for each column, out x width."""
    return values.repeat_interleave(group, dim=1)[:, :width]
