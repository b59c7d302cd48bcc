"""The training recipe that all methods share: AdamW, a cosine with a floor, activation checkpointing.

With peak rate a, floor b, w warm-up steps and T steps, step t = 0 .. T - 1 uses

    t < w:   a (t + 1) / (w + 1)
    else:    b + (a - b) (1 + cos(pi (t - w) / (T - 1 - w))) / 2

so that no step has rate 0, the peak follows the warm-up and the last step has exactly the floor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from harness.method import Method

__all__ = [
    "check_length",
    "cosine_with_floor",
    "enable_activation_checkpointing",
    "gradient_clipping",
    "make_optimizer",
]


def check_length(train_cfg: Any, rows: int) -> None:
    """See that a training has an end and at least one step.

    Args:
        train_cfg: ``steps``, or ``epochs`` where that is None.
        rows: Number of training rows.

    Raises:
        ValueError: It does not.
    """
    steps, epochs = train_cfg.steps, train_cfg.epochs
    if rows < 1:
        raise ValueError("the training data has no row")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"train.steps={steps}: must be a whole number >= 1")
    if steps is None and (epochs is None or not 0 < epochs * rows < math.inf):
        raise ValueError(f"train.epochs={epochs}: must be a finite number > 0")


def make_optimizer(model: nn.Module, train_cfg: Any, method: Method) -> torch.optim.Optimizer:
    """The method's own optimizer, or AdamW with one rate and one weight decay for all that is trainable.

    Args:
        model: The adapted model.
        train_cfg: ``learning_rate``, ``betas``, ``weight_decay``.
        method: The method.
    """
    if method.optimizer is not None:
        return method.optimizer(model, train_cfg)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trainable,
        lr=train_cfg.learning_rate,
        betas=tuple(train_cfg.betas),
        weight_decay=train_cfg.weight_decay,
    )


def gradient_clipping(train_cfg: Any, method: Method) -> float | None:
    """Global norm that gradients are clipped to outside of the optimizer; None: not clipped.

    Args:
        train_cfg: ``max_grad_norm``.
        method: Its own ``max_grad_norm`` comes first; 0 says that nothing is clipped here.
    """
    return train_cfg.max_grad_norm if method.max_grad_norm is None else method.max_grad_norm or None


def cosine_with_floor(optimizer: torch.optim.Optimizer, train_cfg: Any, steps: int) -> LambdaLR:
    """The schedule of the module's text as a factor on the rate of every parameter group.

    Args:
        optimizer: Its groups may have different rates; each falls to the same fraction.
        train_cfg: ``learning_rate`` (a), ``minimum_learning_rate`` (b), ``warmup_steps`` (w).
        steps: T.
    """
    floor = train_cfg.minimum_learning_rate / train_cfg.learning_rate
    warmup = train_cfg.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each decoder block in the backward pass, non-re-entrant; calling it twice changes nothing."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in older transformers
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
