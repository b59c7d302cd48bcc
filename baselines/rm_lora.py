"""RM-LoRA, regularised and masked low-rank adaptation (arXiv 2407.12074), as a PEFT tuner.

A LoRA, A (r x in), B (out x r), s = alpha / r, delta W = s B A, trained so that it uses all of its r directions:

    L = L_task + lambda R,    R = mean over all A and B of  ||A A^t - I||_F  and  ||B^t B - I||_F

(norms, not squares; both Gram matrices are r x r), and in every step but the first only k of the r components learn:
per layer k components are drawn, the rows of dA and the columns of dB outside of them are set to zero. The order is

    forward (all r), L, backward, clipping of the whole gradient, masks, AdamW

so clipping sees what is masked later, the gradient of R is masked too, and AdamW's momentum still moves a masked row.
On a pruned weight the update is M (.) (s B A), M = (W != 0), unless ``keep_zeros=False``; masks and R act on A and B.

The paper's text was not available: this follows the authors' code. Two of its faults are not here. Its mask also
wipes the gradients of everything that is not a LoRA factor (the classifier), and in its question-answering script B
learns in the first step only.

    Trainer(model, callbacks=[GradientMask()], compute_loss_func=...)      # the loss adds orthogonality_penalty(model)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lors.low_rank import LowRankConfig, LowRankLinear, kaiming_uniform
from lors.plugin import register
from lors.randomness import generator_of
from lors.sparse_config import check_choice, check_flag
from lors.sparse_tuner import SparseTunerModel, active_layers

__all__ = [
    "GradientMask",
    "RmLoraConfig",
    "RmLoraLinear",
    "RmLoraModel",
    "gram_distance",
    "mask_gradients",
    "mean_cosine",
    "orthogonality_penalty",
    "parameter_counts",
]

INITS = ("gaussian", "kaiming")
MASKS = ("coupled", "independent")
PENALTIES = ("orthonormal", "cosine")


@dataclass
class RmLoraConfig(LowRankConfig):
    """Configuration of RM-LoRA; a bad value raises ``ValueError``."""

    init: str = field(
        default="gaussian",
        metadata={"help": "A at the start: 'gaussian' with the deviation init_std (authors), or 'kaiming' as LoRA."},
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of A for init='gaussian'."})
    keep_rate: float = field(
        default=0.5,
        metadata={"help": "k / r, the share of components that learn in a step; at least one does. 1: no mask."},
    )
    mask: str = field(
        default="coupled",
        metadata={"help": "'coupled': A and B learn the same components; 'independent': drawn apart for B."},
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Masked components stand still: neither momentum nor decay moves them. Another method."},
    )
    penalty: str = field(
        default="orthonormal",
        metadata={"help": "'orthonormal': R; 'cosine': the mean |cosine| of two components, free of their scale."},
    )
    penalty_weight: float = field(default=0.1, metadata={"help": "lambda; 0 leaves the mask alone."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RM_LORA
        check_choice("init", self.init, INITS)
        check_choice("mask", self.mask, MASKS)
        check_choice("penalty", self.penalty, PENALTIES)
        check_flag("strict", self.strict)
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate!r}: must be a number with 0 < keep_rate <= 1")
        for name in ("init_std", "penalty_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a number >= 0")


class RmLoraLinear(LowRankLinear):
    """A linear layer with RM-LoRA adapters: ``rm_lora_A[name]`` is r x in, ``rm_lora_B[name]`` is out x r."""

    adapter_layer_names = ("rm_lora_A", "rm_lora_B")

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A Gaussian (or Kaiming uniform), B zero."""
        r, options = self.r[name], self.options[name]
        if options.init == "kaiming":
            A = kaiming_uniform(r, self.in_features)
        else:
            A = options.init_std * torch.randn(r, self.in_features)
        return A, torch.zeros(self.out_features, r)

    def learning(self, name: str) -> int:
        """k, the number of components of an adapter that learn in a masked step."""
        return max(1, round(self.options[name].keep_rate * self.r[name]))


class RmLoraModel(SparseTunerModel):
    """A model with ``RmLoraLinear`` layers; made by ``peft.get_peft_model`` from an ``RmLoraConfig``."""

    prefix = "rm_lora_"
    tuner_layer_cls = RmLoraLinear


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


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """``Method.penalty`` of RM-LoRA: lambda times the mean over the factors of all active adapters, a scalar.

    In float32 (or better), under autocast too.
    """
    total, count, weight = None, 0, 0.0
    for layer, name in active_layers(model, RmLoraLinear):
        options = layer.options[name]
        distance = gram_distance if options.penalty == "orthonormal" else mean_cosine
        A, B = layer.factors(name)
        weight = options.penalty_weight
        with torch.autocast(A.device.type, enabled=False):
            A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (A, B.t()))
            both = distance(A) + distance(B) if weight else A.new_zeros(())
        total = both if total is None else total + both
        count += 2
    if total is None:
        raise ValueError("the model has no active RM-LoRA adapter")
    return weight * total / count


@torch.no_grad()
def mask_gradients(model: nn.Module, seed: int, step: int) -> list[tuple[nn.Parameter, Tensor]]:
    """Set the gradients of all but k components of every active adapter to zero, in place.

    The draw depends on its arguments and on the place of the layer in the model alone, so replicas and resumed
    runs agree.

    Args:
        model: A model with RM-LoRA adapters and gradients.
        seed: Seed of the run.
        step: Number of the step, from 0.

    Returns:
        Every factor with a boolean mask that broadcasts to it: True where the gradient was set to zero.
    """
    masked = []
    for index, (layer, name) in enumerate(active_layers(model, RmLoraLinear)):
        generator = generator_of(seed, step, index)
        A, B = layer.rm_lora_A[name], layer.rm_lora_B[name]
        still_A = _left_out(layer.r[name], layer.learning(name), generator).to(A.device)
        coupled = layer.options[name].mask == "coupled"
        still_B = still_A if coupled else _left_out(layer.r[name], layer.learning(name), generator).to(B.device)
        for factor, still in ((A, still_A[:, None]), (B, still_B[None, :])):
            if factor.grad is not None:
                factor.grad.masked_fill_(still, 0.0)
                masked.append((factor, still))
    return masked


class GradientMask(TrainerCallback):
    """Masks the gradients of every step but the first, after clipping and before the optimizer."""

    def __init__(self) -> None:
        # With strict=True, between the mask and the end of the update: (tensor, its values before, mask).
        self._standing: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        self._standing = []  # a run that died in an update may have left something
        if state.global_step == 0:
            return
        masked = mask_gradients(model, args.seed, state.global_step)
        if any(layer.options[name].strict for layer, name in active_layers(model, RmLoraLinear)):
            self._standing = [
                (tensor, tensor.detach().clone(), still)
                for factor, still in masked
                for tensor in (factor, *_moments(optimizer, factor))
            ]

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for tensor, before, still in self._standing:
                tensor.copy_(torch.where(still, before, tensor))
        self._standing = []


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``Method.counts`` of RM-LoRA: ``updated_per_step``, k (in + out) per layer, beside the r (in + out) trainable."""
    return {
        "updated_per_step": sum(
            layer.learning(name) * (layer.in_features + layer.out_features)
            for layer, name in active_layers(model, RmLoraLinear)
        )
    }


def _left_out(r: int, k: int, generator: torch.Generator) -> Tensor:
    """Boolean r: True for r - k components, all choices equally likely."""
    still = torch.ones(r, dtype=torch.bool)
    still[torch.randperm(r, generator=generator)[:k]] = False
    return still


def _moments(optimizer: torch.optim.Optimizer, factor: nn.Parameter) -> list[Tensor]:
    state = optimizer.state.get(factor, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == factor.shape]


RM_LORA = register("RM_LORA", RmLoraConfig, RmLoraModel, prefix=RmLoraModel.prefix)
