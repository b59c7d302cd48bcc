"""State that comes back as it was: the generators of the process, the modes of a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["generator_of", "modes_kept", "random_state_kept"]


def generator_of(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own, seeded by several numbers >= 0 together (seed, step, layer); the global one is not used.

    The same key gives the same draws on the same kind of device, so nothing has to be saved to draw them again.
    """
    # With its length in front, as NumPy takes (1, 0) for (1).
    words = np.random.SeedSequence((len(key), *key)).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is afterwards in training or evaluation mode as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn inside does not move the generators of Python, NumPy and torch (CPU, CUDA)."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
