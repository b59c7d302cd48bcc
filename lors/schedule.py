"""How far the training is, for ``LorsConfig(gradient_until=...)``; apart, because it imports the Trainer's modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from lors.tuner import LorsLinear

__all__ = ["GradientSchedule"]


class GradientSchedule(TrainerCallback):
    """Tells the layers how far the training is, for ``gradient_until``. It has no state: a resumed training goes on."""

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, LorsLinear):
                layer.progress = state.global_step / state.max_steps
