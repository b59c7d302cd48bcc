"""SoRA, sparse low-rank adaptation (arXiv 2311.11696): a LoRA that starts wide and prunes its own components.

A pruned weight W (out x in, frozen) gets a low-rank update whose components carry one gate each, with A (r x in),
B (out x r), g (r) and the scale s = alpha / r, which stays that of the start:

    delta W = s B diag(g) A,        under M = (W != 0) unless keep_zeros=False

A starts Kaiming uniform, B at zero, g standard normal. The objective is L(A, B, g) + lambda sum |g|, minimised over g
by proximal gradient steps: after the gradient step of the rate eta_t

    g <- S_xi(g),        S_xi(v) = sign(v) max(|v| - xi, 0),        xi = eta_t lambda

so gates become exactly zero while training. The gradient step is that of AdamW, without weight decay for the gates. A
component with gate 0 gives A and B no gradient, but its gate has one and can revive. Afterwards components with gate 0
can be cut out (``exported``); rank pruning and the mask commute.

Options that are not the paper's formula but the published code's: ``per_step`` (xi = lambda, whatever the rate),
``repo`` thresholding, a rate for the gates of their own, and ``gate_penalty``, the same l1 norm as a term of the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.sparse_config import check_choice
from lors.sparse_tuner import SparseTunerModel

__all__ = [
    "ProximalAdamW",
    "RankLog",
    "SoraConfig",
    "SoraLinear",
    "SoraModel",
    "active_ranks",
    "gate_penalty",
    "gates_in_float32",
    "parameter_counts",
    "proximal_adamw",
    "soft_threshold",
]

log = logging.getLogger("lors")

THRESHOLDS = ("exact", "repo")
SCALES = ("rate", "per_step")


@dataclass
class SoraConfig(LowRankConfig):
    """Configuration of SoRA; r is the rank at the start. A bad value raises ``ValueError``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SORA


class SoraLinear(LowRankLinear):
    """A linear layer with SoRA adapters: ``sora_A[name]`` r x in, ``sora_B[name]`` out x r, ``sora_gate[name]`` r."""

    adapter_layer_names = ("sora_A", "sora_B", "sora_gate")

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A Kaiming uniform, B zero, g standard normal."""
        return *super().initial_factors(name), torch.randn(self.r[name])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B diag(g)."""
        B = self.sora_B[name]
        return self.sora_A[name], B * self.sora_gate[name].to(B.dtype)

    @torch.no_grad()
    def set_factors(self, name: str, A: Tensor, B: Tensor) -> None:
        """Give an adapter the update s B A, with gates of 1."""
        gate = self.sora_gate[name]
        for part, value in zip((self.sora_A, self.sora_B, self.sora_gate), (A, B, torch.ones_like(gate)), strict=True):
            part[name].data = value.to(gate.device, value.dtype, copy=True)

    @torch.no_grad()
    def exported(self, name: str) -> tuple[Tensor, Tensor]:
        """The adapter without the components of gate 0, as an ordinary LoRA of the scale 1.

        Returns:
            A' = A[I] (r' x in) and B' = s B[:, I] diag(g_I) (out x r') with I = {i: g_i != 0}; r' may be 0. Under
            ``keep_zeros`` the mask still has to be put on B' A'.
        """
        kept = self.sora_gate[name] != 0
        A, B = self.factors(name)
        return A[kept], B[:, kept] * self.scaling[name]


class SoraModel(SparseTunerModel):
    """A model with ``SoraLinear`` layers; made by ``peft.get_peft_model`` from a ``SoraConfig``."""

    prefix = "sora_"
    tuner_layer_cls = SoraLinear


def soft_threshold(v: Tensor, xi: float, form: str = "exact") -> Tensor:
    """S_xi(v), the minimiser of (u - v)^2 / 2 + xi |u| over u, entry by entry.

    Args:
        v: Any shape.
        xi: The threshold, >= 0.
        form: ``repo`` is what the published code computes: entries up to 2 xi go to 0 as well, but for those of exactly
            xi, which stay.
    """
    if form == "exact":
        return v.sign() * (v.abs() - xi).clamp(min=0)
    moved = torch.where(v.abs() > xi, v - xi * v.sign(), v)
    return torch.where(moved.abs() < xi, torch.zeros_like(v), moved)


class ProximalAdamW(torch.optim.AdamW):
    """AdamW that ends every step with the soft threshold of those groups that have a ``shrinkage``.

    Such a group has further keys: ``shrinkage`` (lambda, one for each stage), ``stage_steps``, ``scale`` and
    ``threshold``. All of it is part of ``state_dict``; the stage follows from AdamW's own count of steps.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of AdamW, then one of the threshold for every gate that has a gradient."""
        loss = super().step(closure)
        for group in self.param_groups:
            for gate in group["params"] if "shrinkage" in group else ():
                if gate.grad is not None:
                    xi = _shrinkage(group, int(self.state[gate]["step"]))
                    gate.copy_(soft_threshold(gate, xi, group["threshold"]))
        return loss


def proximal_adamw(
    model: nn.Module,
    train_cfg: Any,
    *,
    shrinkage: float | Sequence[float],
    scale: str = "rate",
    threshold: str = "exact",
    gate_rate: float | None = None,
    stage_steps: int | None = None,
) -> ProximalAdamW:
    """``Method.optimizer`` of SoRA.

    Args:
        model: A model wrapped by ``SoraModel``.
        train_cfg: ``learning_rate``, ``betas``, ``weight_decay`` (not for gates).
        shrinkage: lambda; or an increasing list of them, one for each stage of ``stage_steps`` steps, of which the
            last goes on to the end (the paper's sparsifying schedule).
        scale: ``rate``: xi = eta_t lambda with the rate eta_t of the gates; ``per_step``: xi = lambda.
        threshold: ``exact`` or ``repo``, see ``soft_threshold``.
        gate_rate: Peak rate of the gates; None: ``learning_rate``. It follows the same schedule.
        stage_steps: Steps of a stage; needed for a list.

    Raises:
        ValueError: A value that is not allowed, or a model without gates.
    """
    check_choice("scale", scale, SCALES)
    check_choice("threshold", threshold, THRESHOLDS)
    stages = [shrinkage] if isinstance(shrinkage, int | float) else list(shrinkage)
    if not stages or min(stages) < 0:
        raise ValueError(f"shrinkage={shrinkage!r}: must be one number >= 0 or a list of them")
    if (len(stages) > 1) != (stage_steps is not None) or (stage_steps is not None and stage_steps < 1):
        raise ValueError(f"stage_steps={stage_steps!r}: must be a positive number of steps for a list, else null")
    gates = dict(_gates(model))
    if not gates:
        raise ValueError("the model has no trainable SoRA gate")
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in gates]
    gate_group = {
        "params": list(gates.values()),
        "lr": train_cfg.learning_rate if gate_rate is None else gate_rate,
        "weight_decay": 0.0,
        "shrinkage": stages,
        "stage_steps": stage_steps,
        "scale": scale,
        "threshold": threshold,
    }
    return ProximalAdamW(
        [{"params": others, "weight_decay": train_cfg.weight_decay}, gate_group],
        lr=train_cfg.learning_rate,
        betas=tuple(train_cfg.betas),
    )


def gates_in_float32(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = (), seed: int = 0) -> nn.Module:
    """``Method.prepare`` of SoRA: near |g| = 1 a bfloat16 cannot be moved by a threshold below 0.004."""
    for _, gate in _gates(model):
        gate.data = gate.data.float()
    return model


def gate_penalty(model: nn.Module, *, weight: float) -> Tensor:
    """``Method.penalty`` of the published code: ``weight`` times the mean of |g| over all gates, a scalar."""
    gates = [gate for _, gate in _gates(model)]
    if not weight:
        return torch.zeros((), device=gates[0].device)
    return weight * sum(gate.float().abs().sum() for gate in gates) / sum(gate.numel() for gate in gates)


def active_ranks(model: nn.Module) -> dict[str, int]:
    """Number of non-zero gates of the active adapter in every adapted layer, by the layer's name in the model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: part for name, part in base.named_modules() if isinstance(part, SoraLinear)}
    return {name: int(layer.sora_gate[layer.active_adapters[0]].count_nonzero()) for name, layer in layers.items()}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``Method.counts`` of SoRA: ``after_pruning``, r' (in + out) over all layers with the rank r' that is left."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    widths = {name: sum(part.weight.shape) for name, part in base.named_modules() if isinstance(part, SoraLinear)}
    return {"after_pruning": sum(rank * widths[name] for name, rank in active_ranks(model).items())}


class RankLog(TrainerCallback):
    """Writes the ranks that are left to the log, at the end of the training."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        ranks = active_ranks(model)
        total = sum(gate.numel() for _, gate in _gates(model))
        log.info("SoRA: %d of %d gates are not zero; %s", sum(ranks.values()), total, ranks)


def _gates(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and ".sora_gate." in name)


def _shrinkage(group: Mapping[str, Any], step: int) -> float:
    """The threshold xi of a step, counted from 1."""
    stages = group["shrinkage"]
    stage = 0 if group["stage_steps"] is None else min((step - 1) // group["stage_steps"], len(stages) - 1)
    return stages[stage] * (group["lr"] if group["scale"] == "rate" else 1.0)


SORA = register("SORA", SoraConfig, SoraModel, prefix=SoraModel.prefix)
