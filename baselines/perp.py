"""PERP (arXiv 2312.15230): retrain biases and norms of a pruned model, 0.01 to 0.05 % of its parameters.

    y = W x + b                         W (out x in) frozen, b (out) trained
    y = g (.) x / rms(x) (+ c)          g, c trained: scale and shift of every norm, LayerNorm likewise

No weight of a linear layer or an embedding is touched, so the zeros of W stay, and W needs no gradient, no moments and
no adapter. A model without biases, such as Llama, trains its norms alone. The paper's LoRA variants are other methods
here: MaskLoRA is ``sqft``, ScaleLoRA is ``scale_lora``, LoRA-Prune is LoRA, re-masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from harness.method import Method
from lors.checks import one_of

__all__ = ["PARTS", "PerpMethod", "biases", "norms"]


class PerpMethod(Method):
    """PERP in the harness.

    Args:
        parts: What is trained: ``biases``, those of the norms among them, and ``norms``, scale and shift of every norm,
            the last one among them.

    Raises:
        ValueError: No part, or one that is neither.
    """

    def __init__(self, name: str, *, parts: Sequence[str] = ("biases", "norms"), **common: Any) -> None:
        super().__init__(name, **common)
        if not parts:
            raise ValueError(f"parts=[]: must be one or more of {', '.join(PARTS)}")
        for part in parts:
            one_of(*PARTS)("parts", part)
        self.parts = tuple(parts)

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Un-freeze the parts.

        Raises:
            ValueError: The model has none of them.
        """
        chosen = [parameter for part in self.parts for parameter in PARTS[part](model)]
        if not chosen:
            raise ValueError(f"parts=[{', '.join(self.parts)}]: {type(model).__name__} has none of them to train")
        for parameter in chosen:
            parameter.requires_grad_(True)
        return model


def biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter called ``bias``."""
    return (parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias")


def norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter of a norm, which is a module with a vector ``weight`` and no parameter that is none."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and all(parameter.ndim == 1 for parameter in own.values()):
            yield from own.values()


PARTS = {"biases": biases, "norms": norms}
