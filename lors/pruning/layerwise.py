"""Which blocks get more sparsity than others: none, by their outliers (``owl``), or by their inputs (``rmi``)."""

from __future__ import annotations

import math

from lors.sparsity import parse_pattern

LAYERWISE = ("none", "owl", "rmi")


def check_layerwise(
    layerwise: str, sparsity: float, pattern: str, *, outlier_threshold: float, sparsity_range: float
) -> None:
    """Raise ValueError, in a line that begins with the option, unless ``prune_model`` can do what these ask for."""
    if layerwise not in LAYERWISE:
        raise ValueError(f"layerwise={layerwise!r}: allowed are {', '.join(LAYERWISE)}")
    if layerwise == "none":
        return
    if parse_pattern(pattern) is not None:
        raise ValueError(f"layerwise={layerwise!r}: allowed is none with pattern={pattern!r}, which all blocks share")
    if not 0 < outlier_threshold < math.inf:
        raise ValueError(f"outlier_threshold={outlier_threshold!r}: allowed is a number above 0")
    if not (0 < sparsity_range <= sparsity and sparsity + sparsity_range < 1):
        raise ValueError(
            f"sparsity_range={sparsity_range!r}: allowed is a number above 0 by which sparsity={sparsity:g} can be "
            "changed and stay at least 0 and below 1"
        )
