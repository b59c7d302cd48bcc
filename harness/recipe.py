"""The training recipe that all methods share: loss, AdamW with a cosine that has a floor, activation checkpointing.

Loss. Mean cross entropy per target token over all micro-batches of a step. For logits z (B x T x V) and labels y
(B x T), position t predicts y[t + 1]:

    loss = - sum over targets of log softmax(z[t])[y[t + 1]] / number of targets in the step

Dividing by the targets of the whole step, not of the micro-batch, makes gradient accumulation exact when rows
differ in length. The logits are float32 before the softmax, whatever the precision of the model.

Rate. With peak rate a, floor b, w warm-up steps and T steps, step t = 0 .. T - 1 uses

    t < w:   a (t + 1) / (w + 1)
    else:    b + (a - b) (1 + cos(pi (t - w) / (T - 1 - w))) / 2

so that no step has rate 0, the peak follows the warm-up and the last step has exactly the floor. A training in several
rounds (`Method.rounds`) has all of it in each.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler

from harness.data import IGNORED, Row
from harness.deferred_head import DeferredHead
from harness.method import Method, round_at
from lors.randomness import modes_kept, random_state_kept

__all__ = [
    "InOneOrder",
    "batch_loss",
    "causal_lm_loss",
    "cosine_with_floor",
    "enable_activation_checkpointing",
    "filled_up",
    "gradient_clipping",
    "state_kept",
    "target_count",
]

# A row that makes a batch whole and has no part in its loss.
NO_TARGET: Row = {"input_ids": [0], "labels": [IGNORED]}


def target_count(labels: Tensor) -> Tensor:
    """Number of targets in labels of B x T; the first position is none, nothing predicts it."""
    return labels[:, 1:].ne(IGNORED).sum()


def causal_lm_loss(logits: Tensor, labels: Tensor, targets: Tensor | int, head: nn.Module | None = None) -> Tensor:
    """Cross entropy summed over the targets of this micro-batch, divided by `targets` of the whole step.

    Args:
        logits: B x T x V; hidden states B x T x d while the head is deferred.
        labels: B x T token ids, ``IGNORED`` where there is no target.
        targets: Number of targets in the step.
        head: The output head of the model, which may be deferred (`deferred_head`).
    """
    if isinstance(head, DeferredHead):
        return head.loss(logits, labels, targets)
    # The labels are shifted, not the logits: a slice of the logits would have to be copied to be flattened.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # B T
    flat = logits.float().view(-1, logits.shape[-1])  # B T x V
    return F.cross_entropy(flat, following, ignore_index=IGNORED, reduction="sum") / targets


def batch_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    micro_batches: int = 1,
    method: Method | None = None,
    autocast: bool = False,
) -> Tensor:
    """Loss of one of `micro_batches` equal micro-batches, as the Trainer computes it, for a step made outside
    of it.

    Autocast covers the forward pass alone and the logits leave it in float32, as under accelerate.
    """
    labels = batch["labels"]
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=autocast):
        own = method.objective(model, batch) if method else None
        if own is not None:
            return own / micro_batches
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = causal_lm_loss(logits, labels, micro_batches * target_count(labels), model.get_output_embeddings())
    extra = method.penalty(model) if method else None
    return loss if extra is None else loss + extra / micro_batches


def gradient_clipping(train_cfg: Any, method: Method) -> float | None:
    """Global norm that gradients are clipped to outside of the optimizer; None: not clipped.

    Args:
        train_cfg: ``max_grad_norm``.
        method: Its own ``max_grad_norm`` comes first; 0 says that nothing is clipped here.
    """
    return train_cfg.max_grad_norm if method.max_grad_norm is None else method.max_grad_norm or None


def cosine_with_floor(optimizer: torch.optim.Optimizer, train_cfg: Any, steps: int, rounds: int = 1) -> LambdaLR:
    """The schedule of the module's text as a factor on the rate of every parameter group.

    Args:
        optimizer: Its groups may have different rates; each falls to the same fraction.
        train_cfg: ``learning_rate`` (a), ``minimum_learning_rate`` (b), ``warmup_steps`` (w).
        steps: T, or the steps of all rounds.
        rounds: How many rounds there are.
    """
    floor = train_cfg.minimum_learning_rate / train_cfg.learning_rate
    warmup = train_cfg.warmup_steps

    def factor(step: int) -> float:
        _, start, end = round_at(step, steps, rounds)
        step, last = step - start, end - start - 1
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, last - warmup))
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


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Undo, bit for bit, what a step changes: trained parameters, buffers, gradients, modes, random state."""
    changed = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    values = [(tensor.detach().clone(), tensor._version) for tensor in changed]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    gc.collect()  # so that leftovers of earlier work are not freed in the middle of a count
    try:
        with random_state_kept(), modes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, (value, version) in zip(changed, values, strict=True):
                if tensor._version != version:  # a write would tell a cache of something made from it to start anew
                    tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def filled_up(data: Sequence[Row], batch_size: int) -> list[Row]:
    """The rows, and at their end rows without a target that make the last batch whole.

    Accelerate would fill it up with rows from the beginning, which then count twice.
    """
    return [*data, *[NO_TARGET] * (-len(data) % batch_size)]


class InOneOrder(Sampler):
    """The order in which one process reads the rows (Accelerate's `SeedableRandomSampler`); what fills up is last."""

    def __init__(self, data: Sequence[Row], seed: int) -> None:
        self.rows, self.filling = len(data) - data.count(NO_TARGET), data.count(NO_TARGET)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.filling

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, len(self))
        self.epoch += 1
