"""Weights and inputs to prune: realistic ones, and ones full of ties and zeros."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)


def correlated(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows x width) and inputs (tokens x width) whose columns are correlated, of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    decay = 1 / torch.arange(1.0, width + 1)  # a few directions carry most of the variance, as in real activations
    mix = decay[:, None] * torch.randn(width, width, generator=generator)
    scale = torch.exp(torch.randn(width, generator=generator))
    X = torch.randn(tokens, width, generator=generator) @ mix * scale
    return torch.randn(rows, width, generator=generator), X


@st.composite
def coarse_problems(draw) -> tuple[Tensor, Tensor, str, float | None]:
    """Weights and inputs on a coarse grid: ties, zeros, -0.0, dead inputs, empty rows. And a target."""
    n, m = draw(st.tuples(st.integers(1, 7), st.integers(2, 8)).filter(lambda p: p[0] < p[1]))
    structured = draw(st.booleans())
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 4)) * (m if structured else 5)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    W = torch.randint(-2, 3, (rows, width), generator=generator) / 4
    W = torch.where(torch.rand(W.shape, generator=generator) < 0.1, -0.0, W)
    X = torch.randint(-1, 2, (draw(st.integers(1, 4)), width), generator=generator).float()
    if structured:
        return W, X, f"{n}:{m}", None
    return W, X, "unstructured", draw(st.floats(0, 1, exclude_max=True))
