"""SPP: its three organisations against the formula written out, their dropout, their temporaries, and its errors."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from single_layers import assert_same, assert_same_dropout, draw
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baselines.spp import ORGANISATIONS, SppConfig, SppLinear, blockwise_update, plain_update

IN, OUT, R, ALPHA = 10, 12, 4, 6.0


def adapted(organisation: str = "plain", r: int = R, **fields: object) -> SppLinear:
    """A layer with a bias and an adapter whose factors are both away from zero."""
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    base.bias.copy_(draw(OUT, seed=3))
    config = SppConfig(r=r, lora_alpha=ALPHA, organisation=organisation, **fields)
    layer = SppLinear(base, "default", config, r, ALPHA / r)
    layer.spp_w["default"].data.copy_(draw(r, IN, seed=4))
    layer.spp_c["default"].data.copy_(draw(OUT, 1, seed=5))
    return layer


def effective_weight(layer: SppLinear) -> Tensor:
    """W_ij (1 + s w_gj c_i) with g = floor(i r / out), entry by entry as the paper defines it."""
    W, w, c = layer.weight, layer.spp_w["default"], layer.spp_c["default"]
    s, block = layer.scaling["default"], [i * len(w) // OUT for i in range(OUT)]
    return torch.stack([W[i] * (1 + s * w[block[i]] * c[i, 0]) for i in range(OUT)])


def factors(layer: SppLinear) -> tuple[Tensor, Tensor]:
    return layer.spp_w["default"], layer.spp_c["default"]


@pytest.mark.parametrize("organisation", ORGANISATIONS)
@pytest.mark.parametrize("r", [1, 4, OUT])
def test_output_gradients_and_merge_are_those_of_the_formula(organisation, r):
    layer, x = adapted(organisation, r), draw(2, 3, IN).requires_grad_()
    W = effective_weight(layer)
    assert_same(layer(x), linear(x, W, layer.bias), x, *factors(layer))
    layer.merge()
    torch.testing.assert_close(layer.weight.data, W.detach())


@pytest.mark.parametrize("organisation", ["checkpoint", "blockwise"])
def test_organisations_agree_under_the_same_dropout_which_leaves_the_base_path_alone(organisation):
    assert_same_dropout([adapted(name, dropout=0.4) for name in ("plain", organisation)], effective_weight)


def test_no_temporary_of_the_weights_size_in_the_blockwise_update():
    """Forward and backward; a single row makes everything but the weight small."""
    wide, rows = 512, 8
    W, x = draw(wide, wide), draw(1, wide).requires_grad_()
    w, c = draw(rows, wide).requires_grad_(), draw(wide, 1).requires_grad_()

    class LargestResult(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != W.data_ptr():
                    self.numel = max(self.numel, tensor.numel())
            return result

    largest = {}
    for update in (plain_update, blockwise_update):
        with LargestResult() as results:
            update(x, W, w, c).sum().backward()
        largest[update] = results.numel
    assert largest[plain_update] == wide * wide
    assert largest[blockwise_update] == rows * wide  # the gradient of w itself


def test_r_must_divide_the_output_width_and_the_error_says_where():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 12), "k_proj": nn.Linear(8, 10)})
    with pytest.raises(ValueError, match=r"r=4: [^\n]* 'k_proj', 10;"):
        get_peft_model(model, SppConfig(r=4, target_modules=["q_proj", "k_proj"]))
    fitting = SppConfig(r=4, rank_pattern={"k_proj": 5}, target_modules=["q_proj", "k_proj"])
    wrapped = get_peft_model(model, fitting)
    assert wrapped.get_nb_trainable_parameters()[0] == (4 * 8 + 12) + (5 * 8 + 10)
