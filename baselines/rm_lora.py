"""RM-LoRA, regularised and masked low-rank adaptation (arXiv 2407.12074), as a PEFT tuner.

A LoRA, A (r x in), B (out x r), s = alpha / r, delta W = s B A, trained so that it uses all of its r directions:

    L = L_task + lambda R,    R = mean over all A and B of  ||A A^t - I||_F  and  ||B^t B - I||_F

(norms, not squares; both Gram matrices are r x r), and in every step but the first only k of the r components learn:
per layer k components are drawn, the rows of dA and the columns of dB outside of them are set to zero. The order is

    forward (all r), L, backward, clipping of the whole gradient, masks, AdamW

so clipping sees what is masked later, the gradient of R is masked too, and AdamW's momentum still moves a masked row.
On a pruned weight the update is M (.) (s B A), M = (W != 0), unless ``keep_zeros=False``; masks and R act on A and B.
A starts Gaussian with the deviation 0.02, B at zero.

The paper's text was not available: this follows the authors' code. Two of its faults are not here. Its mask also
wipes the gradients of everything that is not a LoRA factor (the classifier), and in its question-answering script B
learns in the first step only.

    Trainer(model, callbacks=[GradientMask()], compute_loss_func=...)      # the loss adds RmLoraMethod.penalty
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from harness.method import Method
from lors.checks import number, one_of, option
from lors.functional import without_autocast
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.randomness import generator_of
from lors.sparse_layer import active_layers

__all__ = [
    "GradientMask",
    "RmLoraConfig",
    "RmLoraLinear",
    "RmLoraMethod",
    "RmLoraModel",
    "gram_distance",
    "mask_gradients",
    "mean_cosine",
]

INIT_STD = 0.02  # initializer_range of the authors' model


@dataclass
class RmLoraConfig(LowRankConfig):
    """Configuration of RM-LoRA; a bad value raises ``ValueError``."""

    keep_rate: float = option(
        0.75,
        "k / r, the share of components that learn in a step; at least one does. 1: no mask.",
        number("> 0", "<= 1"),
    )
    mask: str = option(
        "coupled",
        "'coupled': A and B learn the same components; 'independent': drawn apart for B.",
        one_of("coupled", "independent"),
    )
    penalty: str = option(
        "orthonormal",
        "'orthonormal': R, the mean of ||A A^t - I|| and ||B^t B - I||; 'cosine': the mean |cosine| of two components.",
        one_of("orthonormal", "cosine"),
    )
    penalty_weight: float = option(0.01, "lambda; 0: no penalty.", number(">= 0"))


class RmLoraLinear(LowRankLinear):
    """A linear layer with RM-LoRA adapters: ``rm_lora_A[name]`` is r x in, ``rm_lora_B[name]`` is out x r."""

    adapter_layer_names = ("rm_lora_A", "rm_lora_B")

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A Gaussian, B zero."""
        r = self.r[name]
        return INIT_STD * torch.randn(r, self.in_features), torch.zeros(self.out_features, r)

    def learning(self, name: str) -> int:
        """k, the number of components of an adapter that learn in a masked step."""
        return max(1, round(self.options[name].keep_rate * self.r[name]))


def gram_distance(rows: Tensor) -> Tensor:
    """||C C^t - I||_F of r components, the rows of C (r x width); a scalar, 0 if they are orthonormal."""
    gram = rows @ rows.t()
    return torch.linalg.matrix_norm(gram - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def mean_cosine(rows: Tensor) -> Tensor:
    """Mean of |cosine| over all pairs of different components, the rows of C (r x width); 0 for a single one."""
    unit = nn.functional.normalize(rows, dim=1)  # a zero row stays zero
    cosines = (unit @ unit.t()).abs()
    pairs = len(rows) * (len(rows) - 1)
    return (cosines.sum() - cosines.diagonal().sum()) / max(1, pairs)


@torch.no_grad()
def mask_gradients(model: nn.Module, seed: int, step: int) -> None:
    """Set the gradients of all but k components of every active adapter to zero, in place.

    The draw depends on its arguments and on the place of the layer in the model alone, so replicas and resumed
    runs agree.

    Args:
        model: A model with RM-LoRA adapters and gradients.
        seed: Seed of the run.
        step: Number of the step, from 0.
    """
    for index, (layer, name) in enumerate(active_layers(model, RmLoraLinear)):
        generator = generator_of(seed, step, index)
        A, B = layer.factors(name)
        still_A = still_B = _left_out(layer.r[name], layer.learning(name), generator).to(A.device)
        if layer.options[name].mask == "independent":
            still_B = _left_out(layer.r[name], layer.learning(name), generator).to(B.device)
        for factor, still in ((A, still_A[:, None]), (B, still_B[None, :])):
            if factor.grad is not None:
                factor.grad.masked_fill_(still, 0.0)


def _left_out(r: int, k: int, generator: torch.Generator) -> Tensor:
    """Boolean r: True for r - k components, all choices equally likely."""
    still = torch.ones(r, dtype=torch.bool)
    still[torch.randperm(r, generator=generator)[:k]] = False
    return still


class GradientMask(TrainerCallback):
    """Masks the gradients of every step but the first, after clipping and before the optimizer."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step > 0:
            mask_gradients(model, args.seed, state.global_step)


class RmLoraMethod(Method):
    """RM-LoRA in the harness."""

    def callbacks(self) -> list[TrainerCallback]:
        """The mask."""
        return [GradientMask()]

    def penalty(self, model: nn.Module) -> Tensor | None:
        """lambda R over the factors of all active adapters, a scalar; in float32 (or better), under autocast too."""
        if not self.peft.penalty_weight:
            return None
        distance = gram_distance if self.peft.penalty == "orthonormal" else mean_cosine
        sums = []  # of the two factors of a layer
        for layer, name in active_layers(model, RmLoraLinear):
            A, B = layer.factors(name)
            with without_autocast(A.device.type):
                A, B = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (A, B.t()))
                sums.append(distance(A) + distance(B))
        return self.peft.penalty_weight * sum(sums) / (2 * len(sums))

    def counts(self, model: nn.Module) -> dict[str, int]:
        """``updated_per_step``, k (in + out) per layer, beside the r (in + out) trainable."""
        layers = active_layers(model, RmLoraLinear)
        return {"updated_per_step": sum(layer.learning(name) * sum(layer.weight.shape) for layer, name in layers)}


RmLoraModel = register("RM_LORA", RmLoraConfig, RmLoraLinear)
