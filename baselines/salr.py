"""SALR (arXiv 2601.16991): LoRA on a pruned weight, and a second adapter that starts as what the pruning took away.

With the dense weight W0, the pruned one W (out x in, frozen), E = W0 - W and its singular values s_1 >= s_2 >= ...,

    Y = X (W + s (B A + B_e A_e))^t + bias
    A Kaiming uniform, B = 0                                  r - r_e rows, as in LoRA
    A_e = V_e^t, B_e = E V_e / s                              r_e rows, the first r_e right singular vectors V_e of E

so that the model starts at W plus the best approximation E_e of E of rank r_e, and |E - E_e|^2 = s_(r_e + 1)^2 + ...
is at most 1 - r_e / min(out, in) of |E|^2, the theorem of the paper. Both adapters are one of PEFT's, of rank r: the
single product of concatenated factors that the paper asks for. The sum has few zeros, so it is scored as LoRA is.

A layer costs what LoRA of rank r costs, the start an SVD of each weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from harness.method import Method
from lors.checks import whole

__all__ = ["SalrMethod"]


class SalrMethod(Method):
    """LoRA with the residual of the pruning beside it.

    Args:
        name: As for every method.
        peft: A ``LoraConfig``, with the rank r of both adapters together.
        residual_rank: r_e, below r; None: half of r.
    """

    reads_dense = True

    def __init__(self, name: str, peft: LoraConfig, *, residual_rank: int | None = None, **common: Any) -> None:
        residual_rank = peft.r // 2 if residual_rank is None else residual_rank
        whole(">= 1", f"< {peft.r}")("residual_rank", residual_rank)
        self.residual_rank = residual_rank
        super().__init__(name, peft, **({"keep_zeros": False} | common))

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None, seed: int) -> nn.Module:
        """Start the second adapter; without a dense model, where weights have no meaning, nothing happens.

        Raises:
            ValueError: The dense model has no such layer: experts that were fused.
        """
        for name, layer in model.get_base_model().named_modules() if self.dense is not None else ():
            if isinstance(layer, LoraLayer):
                try:
                    dense = self.dense.get_submodule(name).weight
                except AttributeError:
                    raise ValueError(f"{name}: not in the dense model; must be a model without experts") from None
                self._start(layer, dense)
        return model

    @torch.no_grad()
    def _start(self, layer: nn.Module, dense: Tensor) -> None:
        """Fill the last rows and columns."""
        W, last = layer.get_base_layer().weight, slice(-self.residual_rank, None)
        E = dense.to(W.device, torch.promote_types(W.dtype, torch.float32)) - W
        V = torch.linalg.svd(E, full_matrices=False).Vh[: self.residual_rank]  # r_e x in
        for adapter in layer.lora_A:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            A[last] = V.to(A.dtype)
            B[:, last] = (E @ V.t() / layer.scaling[adapter]).to(B.dtype)
