"""SHiRA (arXiv 2406.13175) on a pruned model: train a few of the surviving weights and nothing else.

PEFT's SHiRA trains r (in + out) single entries of W (out x in), as many parameters as a LoRA of rank r has. It
draws them anywhere, hence also where W is 0, and a merge would fill those zeros. Here they are drawn from the
support M = (W != 0), so W' = W + delta W keeps every zero.

Only the draw is ours. The entries are saved with the adapter, and ``adapter_config.json`` is that of an
ordinary ``ShiraConfig``, so plain PEFT loads the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import ShiraConfig
from torch import Tensor, nn

__all__ = ["SupportShiraConfig", "support_mask"]


@dataclass
class SupportShiraConfig(ShiraConfig):
    """A ``ShiraConfig`` whose entries lie on the support of the weight; all fields are PEFT's.

    Without ``random_seed`` the entries follow PyTorch's global generator.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not a field, so it is not saved. PEFT draws anew on loading and then puts the saved entries in place.
        self.mask_fn = support_mask


def support_mask(layer: nn.Linear, r: int, random_seed: int | None = None, **_: object) -> Tensor | None:
    """Mark r (in + out) entries among the non-zero ones of a weight, all equally likely.

    The signature is that of PEFT's mask functions.

    Args:
        layer: A linear layer with a pruned weight W (out x in).
        r: The rank of a LoRA of the same size.
        random_seed: Seed of the draw; None: the global generator.

    Returns:
        Boolean out x in, on the device of W; None for a weight on the meta device, which has no entries.

    Raises:
        ValueError: W has fewer non-zero entries.
    """
    W = layer.weight.detach()
    if W.is_meta:
        return None
    # An explicit choice silences PyTorch's warning about its default; these indices are valid by construction.
    torch.sparse.check_sparse_tensor_invariants.disable()
    widths = sum(W.shape)
    wanted = r * widths
    support = W.flatten().nonzero().squeeze(1)  # positions in the flattened weight
    if wanted > len(support):
        raise ValueError(
            f"r={r}: SHiRA trains r * (in + out) = {wanted} weights of a layer, and one of "
            f"{W.shape[1]} -> {W.shape[0]} has only {len(support)} non-zero ones; r must be at most "
            f"{len(support) // widths} here"
        )
    generator = None if random_seed is None else torch.Generator().manual_seed(random_seed)
    chosen = torch.randperm(len(support), generator=generator)[:wanted].to(W.device)
    mask = torch.zeros(W.numel(), dtype=torch.bool, device=W.device)
    mask[support[chosen]] = True
    return mask.view_as(W)
