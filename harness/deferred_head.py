"""The loss of a language model without its logits: the output head is applied to a few tokens at a time.

For N tokens and V words the logits are N x V, in float32 for the softmax, with a gradient of that size: for a large
vocabulary most of the memory of a step. While a head is deferred the model's ``logits`` are the hidden states H
(N x d), and the loss takes one chunk of tokens after the other through the head:

    Z = H_c W^t,    loss += sum(logsumexp(Z) - Z[y]),    dH_c = (softmax(Z) - onehot(y)) W / targets

The gradient is made in the forward pass, from the same products that the backward pass would make, so that nothing is
computed twice; what is kept is dH, and dW where the head is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harness.data import IGNORED
from harness.method import PRECISIONS
from lors.randomness import modes_kept, random_state_kept

__all__ = ["DeferredHead", "deferred_by", "head_deferred"]

TRIAL = 8  # tokens


class DeferredHead(nn.Linear):
    """A head that gives its input back, and the loss of what it would have made of it."""

    tokens_at_once: int
    dtype: torch.dtype  # of the products

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def loss(self, hidden: Tensor, labels: Tensor, targets: Tensor | int) -> Tensor:
        """Cross entropy, float32: summed over the targets, divided by `targets`.

        Args:
            hidden: B x T x d.
            labels: B x T token ids, ``IGNORED`` where there is no target.
            targets: Number to divide by.
        """
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # B T
        hidden, weight = hidden.flatten(0, 1).to(self.dtype), self.weight.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return _Loss.apply(hidden, weight, bias, following, targets, self.tokens_at_once)

    def loss_function(
        self, logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Tensor | int | None = None, **__: Any
    ) -> Tensor:
        """The loss as a model of transformers calls it: the mean over the targets."""
        targets = labels[:, 1:].ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return self.loss(logits, labels, targets)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        following: Tensor,
        targets: Tensor | int,
        tokens_at_once: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        dH = torch.empty_like(hidden) if of_hidden else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        db = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        for start in range(0, len(hidden), tokens_at_once):
            chunk = slice(start, start + tokens_at_once)
            h, y = hidden[chunk], following[chunk]  # n x d, n
            counted = y != IGNORED
            y = y.where(counted, 0)[:, None]
            dZ = F.linear(h, weight, bias).float().log_softmax(-1)  # n x V
            total -= (dZ.gather(1, y)[:, 0] * counted).sum()
            dZ = dZ.exp_().scatter_add_(1, y, dZ.new_full(y.shape, -1.0))
            dZ = dZ.mul_((counted / targets)[:, None]).to(h.dtype)
            if dH is not None:
                torch.mm(dZ, weight, out=dH[chunk])
            if dW is not None:
                dW += dZ.t() @ h
            if db is not None:
                db += dZ.sum(0)
        ctx.save_for_backward(*(g if g is None else g.to(hidden.dtype) for g in (dH, dW, db)))
        return total / targets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * of_loss for g in ctx.saved_tensors), None, None, None


@contextmanager
def head_deferred(model: nn.Module, tokens_at_once: int | None, *, autocast: bool = False) -> Iterator[None]:
    """Defer the head of a causal language model of transformers, in PEFT's wrapper or not, and its loss function.

    A head that is not a plain linear layer, or whose output is not the logits (soft-capping, scaling), stays as it is.

    Args:
        model: The model.
        tokens_at_once: Tokens whose logits exist at once; None: all, nothing is changed.
        autocast: Whether the model is run under autocast to bfloat16.
    """
    head = model.get_output_embeddings() if tokens_at_once else None
    if type(head) is not nn.Linear or not _gives_the_logits(head, model, autocast):
        yield
        return
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    usual = vars(plain).get("_loss_function")
    head.__class__, head.tokens_at_once = DeferredHead, tokens_at_once
    head.dtype = torch.bfloat16 if autocast else head.weight.dtype
    plain._loss_function = head.loss_function
    try:
        yield
    finally:
        head.__class__ = nn.Linear
        del head.tokens_at_once, head.dtype, plain._loss_function
        if usual is not None:
            plain._loss_function = usual


def deferred_by(model: nn.Module, train_cfg: Any) -> AbstractContextManager[None]:
    """`head_deferred` as the recipe says: ``logits_at_once``, and autocast by ``precision``."""
    return head_deferred(model, train_cfg.logits_at_once, autocast=PRECISIONS[train_cfg.precision].autocast)


@torch.no_grad()
def _gives_the_logits(head: nn.Linear, model: nn.Module, autocast: bool) -> bool:
    """Whether the logits of a few tokens are the output of the head."""
    outputs: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, args, output: outputs.append(output))
    device = head.weight.device
    try:
        with random_state_kept(), modes_kept(model), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            tokens = torch.arange(TRIAL, device=device)[None] % head.out_features
            logits = model.eval()(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return len(outputs) == 1 and outputs[0].shape == logits.shape and bool((outputs[0] == logits).all())
