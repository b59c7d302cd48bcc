"""FLOPs, counted operation by operation; a multiply-add is two.

Counted: matrix products and attention, wherever they run (custom autograd functions and recomputation included);
attention counts in full although half of it is masked. Not counted: elementwise work, clipping and the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from harness.recipe import state_kept

__all__ = ["CountFlops", "count_inference_flops", "inference_pass"]


class CountFlops(TorchDispatchMode):
    """Adds up the FLOPs of what runs while it is entered.

    PyTorch's own `FlopCounterMode` has hooks that hold gradients for longer than a training does.

    Attributes:
        flops: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=_OTHERS).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def count_inference_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass without gradients."""
    counted = CountFlops()
    inference_pass(model, batch, counted)
    return counted.flops


def inference_pass(model: nn.Module, batch: Mapping[str, Tensor], measured: AbstractContextManager) -> None:
    """One forward pass without gradients inside of ``measured``. The model is afterwards what it was."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with state_kept(model), torch.no_grad():
        model.eval()
        with measured:
            model(**inputs, use_cache=False)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and their product with the values: query B x H x n x d, key and value with H or fewer heads."""
    return _scores_flops(query, key, query[-1]) + _scores_flops(query, key, value[-1])


def _attention_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores again, then the gradients of queries and keys, of scores and values."""
    return 3 * _scores_flops(query, key, query[-1]) + 2 * _scores_flops(query, key, value[-1])


def _scores_flops(query: Any, key: Any, width: int) -> int:
    """One product between every query and every key, of inner size `width`, in each of the query's heads."""
    batch, heads, queries, _ = query
    return 2 * batch * heads * queries * key[-2] * width


def _grouped_flops(rows: Any, matrices: Any, *_: Any, **__: Any) -> int:
    """One product for each group of rows, or of columns, which share one of three sizes between them."""
    return 2 * rows[-2] * rows[-1] * matrices[-1]


# torch has no formula for the products of fused experts and for the attention kernel of CPUs, and 2.11 fails where keys
# have fewer heads than queries.
_OTHERS = {torch.ops.aten._grouped_mm: _grouped_flops}
for _kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    _OTHERS[getattr(torch.ops.aten, f"_scaled_dot_product_{_kernel}")] = _attention_flops
    _OTHERS[getattr(torch.ops.aten, f"_scaled_dot_product_{_kernel}_backward")] = _attention_backward_flops
