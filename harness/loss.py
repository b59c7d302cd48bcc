"""The training loss, the same for every method: mean cross entropy per target token over all micro-batches of
a step.

For logits z (B x T x V) and labels y (B x T), position t predicts y[t + 1]:

    loss = - sum over targets of log softmax(z[t])[y[t + 1]] / number of targets in the step

Dividing by the targets of the whole step, not of the micro-batch, makes gradient accumulation exact when rows
differ in length. The logits are float32 before the softmax, whatever the precision of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.data import IGNORED

__all__ = ["batch_loss", "causal_lm_loss", "target_count"]


def target_count(labels: Tensor) -> Tensor:
    """Number of targets in labels of B x T; the first position is none, nothing predicts it."""
    return labels[:, 1:].ne(IGNORED).sum()


def causal_lm_loss(logits: Tensor, labels: Tensor, targets: Tensor | int) -> Tensor:
    """Cross entropy summed over the targets of this micro-batch, divided by `targets` of the whole step.

    Args:
        logits: B x T x V.
        labels: B x T token ids, ``IGNORED`` where there is no target.
        targets: Number of targets in the step.
    """
    # The labels are shifted, not the logits: a slice of the logits would have to be copied to be flattened.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # B x T
    flat = logits.float().view(-1, logits.shape[-1])  # B T x V
    return F.cross_entropy(flat, following.flatten(), ignore_index=IGNORED, reduction="sum") / targets


def batch_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    micro_batches: int = 1,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    autocast: bool = False,
) -> Tensor:
    """Loss of one of `micro_batches` equal micro-batches, as the Trainer computes it, for a step made outside
    of it.

    Autocast covers the forward pass alone and the logits leave it in float32, as under accelerate.
    """
    labels = batch["labels"]
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = causal_lm_loss(logits, labels, micro_batches * target_count(labels))
    return loss if penalty is None else loss + penalty(model) / micro_batches
