"""A step of training as the benchmark times it: that of the Trainer, with the optimizer and callbacks of a method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from harness.live_memory import LiveTensors, training_step
from harness.method import Method

__all__ = ["Training"]

# Steps of the training that callbacks are told of.
STEPS = 1000
RECIPE = {
    "learning_rate": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0, "max_grad_norm": 1.0, "warmup_steps": 0,
    "gradient_accumulation": 1,
}  # fmt: skip


class Training:
    """A model in the middle of its training, where every callback has something to do.

    Args:
        method: Gives optimizer, callbacks and penalty where it has its own.
        model: The adapted model; a step has begun when this returns.
        precision: A key of ``PRECISIONS``.
    """

    def __init__(self, method: Method, model: nn.Module, precision: str) -> None:
        self.method, self.model = method, model
        self._recipe = OmegaConf.create({**RECIPE, "precision": precision})
        self._callbacks = method.callbacks()
        self._optimizer: torch.optim.Optimizer | None = None
        self._arguments = TrainingArguments(output_dir=".", seed=0, report_to="none")
        # Not at a round number, where a booster of XGBLoRA would begin, with a factor of zeros.
        self._state = TrainerState(global_step=STEPS // 2 + 1, max_steps=STEPS)
        self._tell("on_step_begin")

    def make_optimizer(self) -> None:
        """Make the optimizer, around whose updates the callbacks are called; must precede the first `step`."""
        self._optimizer = self.method.optimizer(self.model, self._recipe)
        self._optimizer.register_step_pre_hook(lambda *_: self._tell("on_pre_optimizer_step"))
        self._optimizer.register_step_post_hook(lambda *_: self._tell("on_optimizer_step"))

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Forward, backward, clipping and update, the end of this step and the beginning of the next."""
        not_entered = LiveTensors()  # it counts nothing
        training_step(self.model, batch, self._optimizer, self.method, self._recipe, not_entered)
        self._state.global_step += 1
        self._tell("on_step_end")
        self._tell("on_step_begin")

    def _tell(self, event: str) -> None:
        seen = {"model": self.model, "optimizer": self._optimizer}
        for callback in self._callbacks:
            getattr(callback, event)(self._arguments, self._state, TrainerControl(), **seen)
