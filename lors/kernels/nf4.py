"""Weights of 4 bits on the sixteen numbers of NF4 (QLoRA, arXiv 2305.14314, appendix E), zero exactly zero.

A block is so many consecutive weights of one output, along the input dimension; the last one of a row may be shorter.
With a = max |w| of the block and v the numbers of ``NUMBERS``, in [-1, 1] and one of them 0:

    q = the index of the v nearest to w / a          the code of w
    W = a v[q]                                       what it stands for

a is a number of the type of the weight, W is made in float32 and rounded to that type once, as bitsandbytes does where
the width of the weight is a multiple of the block (it cuts the flattened weight). There is no zero point.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from lors.kernels.integers import groups_of, pack_codes, unpack_codes

__all__ = ["NUMBERS", "nf4_layout", "pack_nf4", "parse_nf4", "unpack_nf4"]

NUMBERS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4_layout(block: int) -> str:
    """The name of the layout, such as ``nf4/64``.

    Raises:
        ValueError: A block that is no whole number >= 1.
    """
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"group={block!r}: must be a whole number >= 1")
    return f"nf4/{block}"


@functools.cache
def parse_nf4(layout: str) -> int | None:
    """The block of such a layout; None for any other."""
    match = re.fullmatch(r"nf4/(\d+)", layout)
    return match and int(match[1])


def pack_nf4(weight: Tensor, layout: str, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales a, out x blocks in the type of the weight, and codes, two to a byte, of a weight (out x in).

    Args:
        scales: Those of another weight, in place of its own.
    """
    groups = groups_of(weight.to(torch.promote_types(weight.dtype, torch.float32)), parse_nf4(layout))
    if scales is None:
        scales = groups.abs().amax(-1).to(weight.dtype)
        scales.masked_fill_(scales == 0, 1.0)
    numbers = groups.new_tensor(NUMBERS)
    between = (numbers[1:] + numbers[:-1]) / 2
    codes = torch.bucketize(groups / scales.to(groups.dtype).unsqueeze(-1), between)
    return scales, pack_codes(codes.flatten(1)[:, : weight.shape[1]], 4)


def unpack_nf4(scales: Tensor, codes: Tensor, layout: str, width: int) -> Tensor:
    """W, out x ``width``, in the type of the scales."""
    exact = torch.promote_types(scales.dtype, torch.float32)
    numbers = torch.tensor(NUMBERS, dtype=exact, device=scales.device)
    groups = groups_of(numbers[unpack_codes(codes, 4, width, torch.int32)], parse_nf4(layout))
    return (groups * scales.to(exact).unsqueeze(-1)).flatten(1)[:, :width].to(scales.dtype)
