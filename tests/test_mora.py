"""MoRA: the two types against their definition entry by entry, lossless expansion, its sizes, and the masked form."""

from __future__ import annotations

import math

import pytest
import torch
from single_layers import adapted, assert_same, draw, layers, support
from torch import Tensor
from torch.nn.functional import linear

from baselines.mora import Maps, MoraConfig, MoraLinear

SHAPES = [(16, 16), (12, 30), (30, 12), (17, 23), (23, 17), (40, 9), (9, 40)]  # in, out


def rotation(t: int, q: int) -> Tensor:
    """R_t written out."""
    R, h = torch.zeros(q, q, dtype=torch.float64), q // 2
    for j in range(h):
        angle = t * 10000 ** (-2 * j / q)
        R[j, j] = R[j + h, j + h] = math.cos(angle)
        R[j, j + h], R[j + h, j] = -math.sin(angle), math.sin(angle)
    return R


def expanded(S: Tensor, maps: Maps) -> Tensor:
    """expand(S) entry by entry from the definition: circular padding, cyclic block rows."""
    q, blocks = len(S), math.ceil(maps.inputs / len(S))
    delta = torch.zeros(maps.outputs, maps.inputs, dtype=S.dtype)
    turned = [S @ rotation(t, q) for t in range(blocks)]
    for i in range(maps.outputs):
        for padded in range(blocks * q):
            t, row = padded // q, i // q
            if maps.mora_type == 1:
                delta[i, padded % maps.inputs] += S[i % q, padded % q]
            elif t == row % blocks:
                delta[i, padded % maps.inputs] += turned[t][i % q, padded % q]
    return delta


def layer_of(outputs: int, inputs: int, **fields: object) -> MoraLinear:
    """A layer with S away from zero."""
    (layer,) = layers(adapted(MoraConfig(r=2, **fields), (outputs, inputs)))
    S = layer.mora_S["default"]
    S.data.copy_(draw(*S.shape, seed=3))
    return layer


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_expansion_is_the_definition_and_loses_nothing(inputs, outputs, kind):
    maps = Maps(inputs, outputs, 2, kind)
    S, x = draw(maps.q, maps.q, seed=3).requires_grad_(), draw(2, 5, inputs)
    delta = maps.expand(S)
    torch.testing.assert_close(delta.detach(), expanded(S.detach(), maps))
    assert_same(maps.update(x, S), x @ delta.t(), S)


def test_sizes_are_those_of_a_lora_of_the_same_rank():
    table = {(4096, 4096): (256, 1448), (4096, 11008): (348, 1966), (4096, 1024): (202, 1145)}
    for (inputs, outputs), (small, large) in table.items():
        assert (Maps(inputs, outputs, 8, 6).q, Maps(inputs, outputs, 256, 1).q) == (small, large)
    llama = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    assert 32 * sum(Maps(*widths, 8, 6).q ** 2 for widths in llama) == 20_014_592


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("kind", [1, 6])
def test_output_gradients_and_merge_are_those_of_the_formula(kind, keep_zeros):
    layer = layer_of(23, 17, mora_type=kind, keep_zeros=keep_zeros)
    W, S, x = layer.weight.detach().clone(), layer.mora_S["default"], draw(2, 3, 17).requires_grad_()
    expected = linear(x, W + support(layer) * layer.maps("default").expand(S))
    assert_same(layer(x), expected, x, S)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert bool((layer.weight[W == 0] == 0).all()) == keep_zeros


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass():
    layer, x = layer_of(48, 64), draw(3, 64).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    own = {tensor.data_ptr() for tensor in (layer.weight, layer.mora_S["default"], x)}
    assert kept and all(tensor.data_ptr() in own for tensor in kept if tensor.numel())


def test_several_adapters_of_either_form_add_up():
    layer, x = layer_of(23, 17), draw(4, 17)
    expected = layer(x)
    for name, fields in (("second", {"mora_type": 1}), ("third", {"keep_zeros": False})):
        layer.update_layer(name, MoraConfig(r=2, **fields), 2, 1.0)
        layer.mora_S[name].data.copy_(draw(*layer.mora_S[name].shape, seed=5))
        layer.set_adapter(name)
        expected = expected + layer(x) - layer.base_layer(x)
    layer.set_adapter(["default", "second", "third"])
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_on_the_branch_alone():
    layer, x = layer_of(23, 17, keep_zeros=False, dropout=0.9), draw(4, 17)
    assert not torch.equal(layer(x), layer(x))
    layer.mora_S["default"].data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_layer_that_is_not_larger_than_s_is_refused():
    with pytest.raises(
        ValueError, match=r"^r=8: the square matrix of MoRA would be 16 x 16 and 'layers.0.proj' has 16"
    ):
        adapted(MoraConfig(r=8), (16, 16))
