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
``repo`` thresholding, a rate for the gates of their own, and the l1 norm as a term of the loss (``penalty_weight``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from harness.method import Method
from lors.checks import number, one_of
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.sparse_layer import active_layers, adapted_layers

__all__ = [
    "ProximalAdamW",
    "RankLog",
    "SoraConfig",
    "SoraLinear",
    "SoraMethod",
    "SoraModel",
    "active_ranks",
    "soft_threshold",
]

log = logging.getLogger("lors")


class SoraConfig(LowRankConfig):
    """Configuration of SoRA; r is the rank at the start. A bad value raises ``ValueError``."""


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

    def rank(self, name: str) -> int:
        """Number of gates that are not zero; waits for the device."""
        return int(self.sora_gate[name].count_nonzero())

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


class SoraMethod(Method):
    """SoRA in the harness.

    Args:
        shrinkage: lambda; or an increasing list of them, one for each stage of ``stage_steps`` steps, of which the
            last goes on to the end (the paper's sparsifying schedule).
        stage_steps: Steps of a stage; needed for a list.
        scale: ``rate``: xi = eta_t lambda with the rate eta_t of the gates, as in the paper; ``per_step``: xi = lambda,
            as in the published code.
        threshold: ``exact``: soft thresholding; ``repo``: that of the published code, see ``soft_threshold``.
        gate_rate: Peak rate of the gates; None: ``learning_rate``. It follows the same schedule.
        penalty_weight: Weight of the mean of |g| over all gates in the loss; the published code has 10 or 1e-3.

    Raises:
        ValueError: A value that is not allowed.
    """

    def __init__(
        self,
        name: str,
        peft: SoraConfig,
        *,
        shrinkage: float | list[float] = 0.375,
        stage_steps: int | None = None,
        scale: str = "rate",
        threshold: str = "exact",
        gate_rate: float | None = None,
        penalty_weight: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(name, peft, **common)
        one_of("rate", "per_step")("scale", scale)
        one_of("exact", "repo")("threshold", threshold)
        number("> 0", optional=True)("gate_rate", gate_rate)
        number(">= 0")("penalty_weight", penalty_weight)
        stages = shrinkage if isinstance(shrinkage, list) else [shrinkage]
        if not stages or min(stages) < 0:
            raise ValueError(f"shrinkage={shrinkage!r}: must be one number >= 0 or a list of them")
        if (len(stages) > 1) != (stage_steps is not None) or (stage_steps is not None and stage_steps < 1):
            raise ValueError(f"stage_steps={stage_steps!r}: must be a positive number of steps for a list, else null")
        self.shrinking = {"shrinkage": stages, "stage_steps": stage_steps, "scale": scale, "threshold": threshold}
        self.gate_rate, self.penalty_weight = gate_rate, penalty_weight

    def prepare(self, model: nn.Module, batches: Any, seed: int) -> nn.Module:
        """Gates in float32: near |g| = 1 a bfloat16 cannot be moved by a threshold below 0.004."""
        for gate in _gates(model).values():
            gate.data = gate.data.float()
        return model

    def optimizer(self, model: nn.Module, train_cfg: Any) -> ProximalAdamW:
        """Two groups; the weight decay is not for gates."""
        gates = _gates(model)
        others = [p for name, p in model.named_parameters() if p.requires_grad and name not in gates]
        rate = train_cfg.learning_rate if self.gate_rate is None else self.gate_rate
        gate_group = {"params": list(gates.values()), "lr": rate, "weight_decay": 0.0, **self.shrinking}
        return ProximalAdamW(
            [{"params": others, "weight_decay": train_cfg.weight_decay}, gate_group],
            lr=train_cfg.learning_rate,
            betas=tuple(train_cfg.betas),
        )

    def callbacks(self) -> list[TrainerCallback]:
        """The log of the ranks."""
        return [RankLog()]

    def penalty(self, model: nn.Module) -> Tensor | None:
        """``penalty_weight`` times the mean of |g| over all gates, a scalar."""
        if not self.penalty_weight:
            return None
        gates = _gates(model).values()
        return self.penalty_weight * sum(gate.float().abs().sum() for gate in gates) / sum(g.numel() for g in gates)

    def counts(self, model: nn.Module) -> dict[str, int]:
        """``after_pruning``, r' (in + out) over all layers with the rank r' that is left."""
        layers = active_layers(model, SoraLinear)
        return {"after_pruning": sum(layer.rank(name) * sum(layer.weight.shape) for layer, name in layers)}


class RankLog(TrainerCallback):
    """Writes the ranks that are left to the log, at the end of the training."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        ranks = active_ranks(model)
        total = sum(gate.numel() for gate in _gates(model).values())
        log.info("SoRA: %d of %d gates are not zero; %s", sum(ranks.values()), total, ranks)


def active_ranks(model: PeftModel) -> dict[str, int]:
    """Number of non-zero gates of the active adapter in every adapted layer, by the layer's name in the model."""
    adapter = model.active_adapter
    return {name: layer.rank(adapter) for name, layer in adapted_layers(model.get_base_model(), adapter).items()}


def _gates(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".sora_gate." in name}


def _shrinkage(group: Mapping[str, Any], step: int) -> float:
    """The threshold xi of a step, counted from 1."""
    stages = group["shrinkage"]
    stage = 0 if group["stage_steps"] is None else min((step - 1) // group["stage_steps"], len(stages) - 1)
    return stages[stage] * (group["lr"] if group["scale"] == "rate" else 1.0)


SoraModel = register("SORA", SoraConfig, SoraLinear)
