"""Full fine-tuning of a pruned model: every weight is trained, and the zeros of the decoder linears stay.

With W (out x in) a pruned weight, M = (W != 0) its support and G = dL/dW, training sees the masked gradient M
(.) G. A pruned entry then has gradient 0 at every step, hence zero moments, and every term of AdamW
(decoupled weight decay included) or of SGD with momentum is exactly 0 for it: W stays 0 bit for bit, without
touching the optimizer. The upper bound of the comparison: no adapter, no merge, all the memory of dense
training.

M is read off W itself when the gradient arrives, so there is no mask to keep, to move or to save, and a run
that is resumed from a checkpoint needs nothing but the weights. A trained entry that happens to round to 0
loses one gradient, and its moments carry it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from harness.method import Method
from lors.blocks import decoder_linears

__all__ = ["FullMethod", "hold_zeros", "mask_gradient"]


class FullMethod(Method):
    """Full fine-tuning in the harness."""

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Un-freeze every parameter and keep the zeros of the decoder linears.

        Embeddings, norms and the head are trained without a mask, as they are not pruned.

        Raises:
            ValueError: The decoder has weights that are no linear layers (see ``lors.blocks``).
        """
        model.requires_grad_(True)
        hold_zeros(model)
        return model


def hold_zeros(model: nn.Module) -> None:
    """Mask every gradient that the weights of the decoder linears will get.

    Raises:
        ValueError: As `FullMethod.prepare`.
    """
    linears = decoder_linears(model)
    pruned = {f"{name}.weight" for name in linears}
    pruned |= {name.rpartition(".")[0] for name in linears}  # fused experts: one parameter for all of them
    for name, parameter in model.named_parameters():
        if name in pruned:
            parameter.register_post_accumulate_grad_hook(mask_gradient)


def mask_gradient(weight: nn.Parameter) -> None:
    """Set the gradient of every zero weight to 0, in place.

    As a post-accumulate hook it runs before the reduction of data-parallel training and before gradient
    clipping, so the norm that clips is that of the weights which can move.
    """
    weight.grad.mul_(weight != 0)
