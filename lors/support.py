"""What an adapter has to know of the zeros of its base: how many, in which pattern, and a fingerprint of where.

The support of a weight W (out x in) is M = (W != 0). The fingerprint is the SHA-256 over the layers in the order of
their names; of each its name, its shape and M, 8 columns to a byte, the first in the lowest bit, rows padded to whole
bytes. So it depends neither on the type of the weights nor on how they are stored, nor on how they are sharded.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["PackedSupports", "Support", "packed_bits", "support_of"]

# Patterns that are looked for: n weights kept of every m.
GROUPS = (2, 4, 8, 16)
BLOCK = 2**24  # weights worked on at a time


class Support(TypedDict):
    """The zeros of some layers together.

    sparsity: Fraction of zeros. pattern: ``n:m`` if they follow it and are as many as it asks for, else
    ``unstructured``. sha256: See the module's text.
    """

    sparsity: float
    pattern: str
    sha256: str


class PackedSupports(Mapping[str, Tensor]):
    """Supports of some layers by name, an eighth of a byte for each weight, in the memory of the host.

    Reading one gives M, a boolean ``[out, in]`` on the CPU, made anew each time: so nothing of this lives on a device.

    Args:
        weights: Names and weights W, ``[out, in]``, dense ones; one at a time is looked at.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._bits: dict[str, tuple[np.ndarray, int]] = {}
        for name, W in weights:
            self._bits[name] = (packed_bits(W != 0).cpu().numpy().copy(), W.shape[1])  # not a view of a tensor

    def __getitem__(self, name: str) -> Tensor:
        bits, columns = self._bits[name]
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(np.bool_))

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


def packed_bits(M: Tensor) -> Tensor:
    """A boolean ``[rows, columns]`` as uint8 ``[rows, ceil(columns / 8)]``, column 8 j + k in bit k of byte j."""
    if M.device.type == "cpu":  # ten times as fast as sums in torch
        return torch.from_numpy(np.packbits(M.contiguous().numpy(), axis=1, bitorder="little"))
    powers = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=M.device)
    return (pad(M, (0, -M.shape[1] % 8)).unflatten(1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)


def support_of(weights: Mapping[str, Callable[[], Tensor]]) -> Support:
    """The support of some layers.

    Args:
        weights: By name of the layer a function that returns W, ``[out, in]``; called in the order of the names, and
            one weight is held at a time.
    """
    digest = hashlib.sha256()
    nonzeros = total = 0
    fullest = dict.fromkeys(GROUPS, 0)  # most non-zeros in a group of m
    for name in sorted(weights):
        W = weights[name]()
        digest.update(f"{name}\0{W.shape[0]}x{W.shape[1]}\0".encode())
        for rows in W.split(max(1, BLOCK // max(1, W.shape[1]))):
            packed = packed_bits(rows != 0).cpu().numpy()
            digest.update(packed.tobytes())
            counts = np.bincount(packed.ravel(), minlength=256)  # how often each byte occurs
            nonzeros += int(counts @ _ones(8, 8))
            for m in (m for m in GROUPS if fullest[m] < m):  # a full group is soon found
                fullest[m] = max(fullest[m], _fullest_group(packed, counts, m) if W.shape[1] % m == 0 else m)
        total += W.numel()
    kept = nonzeros / total if total else 1.0
    # A pruned n:m weight has n / m of its entries, but for a few that were zero anyway.
    patterns = [f"{n}:{m}" for m, n in fullest.items() if 0 < n < m and abs(kept - n / m) < 0.01]
    return Support(
        sparsity=round(1 - kept, 6), pattern=patterns[0] if patterns else "unstructured", sha256=digest.hexdigest()
    )


def _fullest_group(packed: np.ndarray, counts: np.ndarray, m: int) -> int:
    """Most ones in an aligned group of m bits of packed rows, whose bytes occur ``counts`` times."""
    if m <= 8:
        return int(_ones(8, m)[counts > 0].max(initial=0))
    pairs = np.bincount(packed.view(f"<u{m // 8}").ravel(), minlength=1 << m)
    return int(_ones(m, m)[pairs > 0].max(initial=0))


@functools.cache
def _ones(bits: int, m: int) -> np.ndarray:
    """Of every number of so many bits the ones in the fullest of its groups of m bits."""
    numbers = np.arange(1 << bits)[:, None]
    return (numbers >> np.arange(bits) & 1).reshape(len(numbers), bits // m, m).sum(-1).max(-1)
