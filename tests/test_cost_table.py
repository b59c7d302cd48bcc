"""What one linear layer costs to train: FLOPs and saved bytes of every method, against closed formulas.

n tokens (batch x length), d input width, k output width, r rank, b bytes per element; a multiply-add is 2
FLOPs. U = 2 n d k is one full product, V = 2 r d k forms a low-rank weight, Z = 2 n r (d + k) is one pass
through thin factors. FLOPs are counted by ``FlopCounterMode``, matrix products only. Saved bytes are the
storages that autograd holds between forward and backward, each counted once, beyond the frozen weight and the
adapter itself.

The layers are those that the files of ``conf/method`` build, not copies of the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from baselines.spp import plain_update
from baselines.sqft import fused_linear

METHODS = Path(__file__).parents[1] / "conf" / "method"
# All different, so that no two terms of a formula can be mistaken for each other.
n, d, k, r, b = 40, 24, 56, 4, 4
U, V, Z = 2 * n * d * k, 2 * r * d * k, 2 * n * r * (d + k)
SCALING = 0.5


@dataclass(frozen=True)
class Cost:
    """FLOPs of forward and backward pass, and bytes saved between them."""

    forward: int
    backward: int
    saved: int


# Every row is the published one, but for that of ScaleLoRA, whose paper has none. The two checkpointed methods are
# published with PyTorch's re-entrant checkpoint, which costs one U more: see
# test_reentrant_checkpoints_cost_one_product_more.
TABLE = {
    "none": Cost(U, U, 0),
    "lora": Cost(U + Z, U + 2 * Z, b * (n * d + n * r)),
    "lors": Cost(U + V, U + V + 2 * Z, b * n * d),
    "spp": Cost(2 * U, 3 * U, b * (n * d + 2 * k * d)),
    "spp_gc": Cost(2 * U, 3 * U, b * n * d),
    "spp_blockwise": Cost(2 * U, 2 * U, b * (n * d + n * k)),
    "scale_lora": Cost(U + V, 2 * U + 2 * V, b * (n * d + k * d)),
    "sqft": Cost(2 * U + V, 3 * U + 2 * V, b * (n * d + k * d) + k * d),
    "sqft_fused": Cost(U + V, 2 * U + 2 * V, b * (n * d + k * d) + k * d),
    "sqft_gc": Cost(U + V, 2 * U + 3 * V, b * n * d),
}


def measure(layer: Callable[[Tensor], Tensor], free: list[Tensor]) -> Cost:
    """Cost of one forward and backward pass through ``layer`` for an input that asks for its gradient.

    Args:
        layer: Maps n x d to n x k.
        free: Tensors whose storage does not count: the frozen weight and the adapter.
    """
    # A result of another operation, as inside a network: nothing is special about a leaf.
    x = torch.randn(n, d, requires_grad=True) * 1.0
    owned = {tensor.untyped_storage().data_ptr() for tensor in free}
    saved: dict[int, torch.UntypedStorage] = {}  # holding on to a storage keeps its address from being used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    bytes_saved = sum(storage.nbytes() for storage in saved.values())
    return Cost(forward.get_total_flops(), backward.get_total_flops(), bytes_saved)


def pruned_weight() -> Tensor:
    return torch.randn(k, d) * (torch.rand(k, d) < 0.5)


def layer_of(name: str) -> nn.Module:
    """One pruned linear under the PEFT config of a method file, called as in a training step."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(d, k, bias=False)}).requires_grad_(False)
    model["q_proj"].weight.copy_(pruned_weight())
    shared = {"adapter": {"r": r, "alpha": r * SCALING, "targets": ["q_proj"]}}
    config = OmegaConf.create({**shared, "method": OmegaConf.load(METHODS / f"{name}.yaml")}).method
    if "peft" not in config:
        return model["q_proj"]
    config.peft.pop("task_type")
    return get_peft_model(model, instantiate(config.peft, _convert_="all")).base_model.model["q_proj"]


@pytest.mark.parametrize("name", TABLE)
def test_cost_of_one_linear(name):
    layer = layer_of(name)
    assert measure(layer, list(layer.parameters())) == TABLE[name]


def test_the_cost_does_not_depend_on_the_shape_of_the_input():
    layer = layer_of("lors")
    flat = measure(layer, list(layer.parameters()))
    batched = measure(lambda x: layer(x.view(4, n // 4, d)), list(layer.parameters()))
    assert batched == flat


def test_reentrant_checkpoints_cost_one_product_more():
    """The published rows, 6U and 4U + 4V. Ours stop early: they save that product, and no more bytes."""
    weight = pruned_weight()
    w, c = torch.randn(r, d, requires_grad=True), torch.randn(k, 1, requires_grad=True)
    A, B = torch.randn(r, d, requires_grad=True), torch.randn(k, r, requires_grad=True)

    def spp(x: Tensor) -> Tensor:
        return x @ weight.t() + SCALING * checkpoint(plain_update, x, weight, w, c, use_reentrant=True)

    def sqft(x: Tensor) -> Tensor:
        return checkpoint(fused_linear, x, weight, None, A, B, SCALING, use_reentrant=True)

    assert measure(spp, [weight, w, c]) == Cost(2 * U, 4 * U, b * n * d)
    assert measure(sqft, [weight, A, B]) == Cost(U + V, 3 * U + 3 * V, b * n * d)


def test_two_products_can_be_checkpointed_too():
    """Not published: method=sqft method.peft.checkpoint=true. One more V, and nothing but x is kept."""
    layer = layer_of("sqft")
    layer.options["default"].checkpoint = True
    assert measure(layer, list(layer.parameters())) == Cost(2 * U + V, 3 * U + 3 * V, b * n * d)


def test_exact_gradient_of_lors_costs_one_full_product():
    """The mask in the gradients of A and B forbids the thin order: U + 2V instead of 2Z."""
    layer = layer_of("lors")
    layer.options["default"].exact_gradient = True
    assert measure(layer, list(layer.parameters())) == Cost(U + V, 2 * U + 3 * V, b * n * d)


@pytest.mark.parametrize("name", ["spp", "spp_gc", "spp_blockwise", "sqft"])
def test_dropout_adds_no_product(name):
    """It may keep its mask and the dropped input, but the count of products stays that of the table."""
    layer = layer_of(name)
    layer.options["default"].dropout = 0.1
    measured = measure(layer, list(layer.parameters()))
    assert (measured.forward, measured.backward) == (TABLE[name].forward, TABLE[name].backward)
    if name == "spp_gc":
        assert measured.saved == TABLE[name].saved
