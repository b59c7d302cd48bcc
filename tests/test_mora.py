"""MoRA: the two types against their definition entry by entry, lossless expansion, its edges, and the masked form."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from contract import batch, method_of, pruned
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.mora import Maps, MoraConfig, MoraLinear, dead_entries
from harness.method import adapt

SHAPES = [(16, 16), (24, 24), (12, 30), (30, 12), (17, 23), (23, 17), (40, 9), (9, 40)]  # in, out
FORMS = [(1, "truncate"), (6, "truncate"), (6, "fold")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    q, blocks, rows = len(S), math.ceil(maps.inputs / len(S)), math.ceil(maps.outputs / len(S))
    delta = torch.zeros(maps.outputs, maps.inputs, dtype=S.dtype)
    turned = [S @ rotation(t, q) for t in range(blocks)]
    for i in range(maps.outputs):
        for padded in range(blocks * q):
            t, row = padded // q, i // q
            if maps.mora_type == 1:
                value = S[i % q, padded % q]
            elif t == row % blocks or (maps.wide_mode == "fold" and t % rows == row):
                value = turned[t][i % q, padded % q]
            else:
                continue
            delta[i, padded % maps.inputs] += value
    return delta


def layer_of(inputs: int, outputs: int, r: int = 2, **fields: object) -> MoraLinear:
    """A float64 layer, half pruned, with S away from zero."""
    base = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(outputs, inputs, seed=1) * (draw(outputs, inputs, seed=2) > 0))
    layer = MoraLinear(base, "default", MoraConfig(r=r, **fields), r, 1.0)
    S = layer.mora_S["default"]
    S.data.copy_(draw(*S.shape, seed=3))
    return layer


@pytest.mark.parametrize(("kind", "wide"), FORMS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_expansion_is_the_definition_and_loses_nothing(inputs, outputs, kind, wide):
    maps = Maps(inputs, outputs, 2, kind, wide)
    S = draw(maps.q, maps.q, seed=3).requires_grad_()
    delta, x = maps.expand(S), draw(2, 5, inputs)
    torch.testing.assert_close(delta.detach(), expanded(S.detach(), maps))
    torch.testing.assert_close(maps.update(x, S), x @ delta.t())
    upstream = draw(2, 5, outputs, seed=4)
    (through_maps,) = torch.autograd.grad(maps.update(x, S), S, upstream)
    (through_matrix,) = torch.autograd.grad(x @ delta.t(), S, upstream)
    torch.testing.assert_close(through_maps, through_matrix)


@pytest.mark.parametrize("kind", [1, 6])
def test_zero_padding_reads_every_input_once(kind):
    circular, zero = (Maps(17, 17, 2, kind, padding=padding) for padding in ("circular", "zero"))
    S, x = draw(circular.q, circular.q), draw(4, 17, seed=1)
    wrapped = circular.blocks * circular.q - 17
    assert wrapped > 0
    torch.testing.assert_close(zero.update(x, S), x @ zero.expand(S).t())
    assert torch.equal(zero.expand(S)[:, wrapped:], circular.expand(S)[:, wrapped:])
    assert not torch.equal(zero.expand(S)[:, :wrapped], circular.expand(S)[:, :wrapped])


def test_ranks_of_the_two_types():
    sharing, turning = Maps(30, 24, 2, 1), Maps(30, 24, 2, 6, "fold")
    assert torch.linalg.matrix_rank(sharing.expand(draw(sharing.q, sharing.q))) == sharing.q
    assert torch.linalg.matrix_rank(turning.expand(draw(turning.q, turning.q))) == 24


def test_blocks_of_a_rotation_are_turned_copies_of_the_first():
    maps = Maps(40, 40, 2, 6)
    S, q = draw(maps.q, maps.q), maps.q
    delta = maps.expand(S)
    torch.testing.assert_close(delta[:q, q : 2 * q], torch.zeros(q, q, dtype=S.dtype))
    for t in (1, 2):
        R = torch.linalg.solve(S, delta[t * q : (t + 1) * q, t * q : (t + 1) * q])
        torch.testing.assert_close(R @ R.t(), torch.eye(q, dtype=S.dtype))
        torch.testing.assert_close(R, rotation(t, q))


def test_sizes_are_those_of_a_lora_of_the_same_rank():
    table = {
        (4096, 4096): (256, 1448),
        (4096, 11008): (348, 1966),
        (11008, 4096): (348, 1966),
        (4096, 1024): (202, 1145),
    }
    for (inputs, outputs), (small, large) in table.items():
        for r, kind, q in ((8, 6, small), (256, 1, large)):
            maps = Maps(inputs, outputs, r, kind)
            assert maps.q == q
            assert q * q == pytest.approx(r * (inputs + outputs), rel=0.01)
    llama = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    assert 32 * sum(Maps(*widths, 8, 6).q ** 2 for widths in llama) == 20_014_592


def test_inputs_that_a_wide_layer_never_reads_and_fold_does():
    truncated, folded = (Maps(40, 9, 2, 6, mode) for mode in ("truncate", "fold"))
    S, q = draw(truncated.q, truncated.q), truncated.q
    unread = truncated.rows * q
    assert unread < 40
    assert not truncated.expand(S)[:, unread:].any()
    assert folded.expand(S).any(dim=0).all()
    assert truncated.expand(S)[:, :unread].any(dim=0).all()


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("kind", [1, 6])
def test_output_gradients_and_merge_are_those_of_the_formula(kind, keep_zeros):
    layer = layer_of(17, 23, mora_type=kind, keep_zeros=keep_zeros)
    W, S = layer.weight.detach().clone(), layer.mora_S["default"]
    x = draw(2, 3, 17).requires_grad_()
    M = W != 0 if keep_zeros else torch.ones_like(W)
    expected = linear(x, W + M * layer.maps("default").expand(S), layer.base_layer.bias)
    y, upstream = layer(x), draw(2, 3, 23, seed=4)
    torch.testing.assert_close(y, expected)
    for gradient, reference in zip(*(torch.autograd.grad(out, [x, S], upstream) for out in (y, expected)), strict=True):
        torch.testing.assert_close(gradient, reference)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert bool((layer.weight[W == 0] == 0).all()) == keep_zeros
    layer.unmerge()
    assert torch.equal(layer.weight, W)


def test_at_the_start_nothing_changes_and_the_matrix_has_a_gradient():
    layer = layer_of(17, 23)
    S = layer.mora_S["default"]
    S.data.zero_()
    x = draw(4, 17)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.square().sum().backward()
    assert S.grad.count_nonzero() == S.numel() - dead_entries(layer.weight, layer.maps("default")) > 0


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass():
    layer = layer_of(64, 48, r=2)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = draw(3, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = {layer.weight.data_ptr(), layer.mora_S["default"].data_ptr(), x.data_ptr(), layer.bias.data_ptr()}
    assert all(tensor.data_ptr() in own for tensor in kept if tensor.numel())


def test_several_adapters_of_either_form_add_up():
    layer = layer_of(17, 23)
    x = draw(4, 17)
    base = layer.base_layer(x)
    for name, fields in (("second", {"mora_type": 1}), ("third", {"keep_zeros": False})):
        layer.update_layer(name, MoraConfig(r=2, **fields), 2, 1.0)
        layer.mora_S[name].data.copy_(draw(*layer.mora_S[name].shape, seed=5))
    changes = []
    for name in ("default", "second", "third"):
        layer.set_adapter(name)
        changes.append(layer(x) - base)
    layer.set_adapter(["default", "second", "third"])
    together = layer(x)
    torch.testing.assert_close(together, base + sum(changes))
    layer.merge()
    torch.testing.assert_close(layer(x), together)


@pytest.mark.parametrize("kind", [1, 6])
def test_dead_entries_are_those_without_a_surviving_position(kind):
    maps = Maps(16, 16, 2, kind)
    W = torch.ones(16, 16)
    assert maps.q == 8
    assert dead_entries(W, maps) == 0
    W[:, 3 :: maps.q] = 0
    if kind == 6:  # pairs are mixed except in block 0, so both halves have to go
        assert dead_entries(W, maps) == 0
        W[:, 3 + maps.q // 2 :: maps.q] = 0
    assert dead_entries(W, maps) == maps.q * (1 if kind == 1 else 2)


def test_the_log_counts_dead_entries(caplog):
    with caplog.at_level(logging.INFO, "lors"):
        adapt(method_of("mora"), pruned(), [batch()])
    assert caplog.messages[0].startswith("MoRA: ") and "touch no surviving weight" in caplog.messages[0]


def test_dropout_acts_on_the_branch_alone():
    layer = layer_of(17, 23, keep_zeros=False, dropout=0.9).train()
    x = draw(4, 17)
    assert not torch.equal(layer(x), layer(x))
    layer.mora_S["default"].data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mora_type": 2}, r"mora_type=2: must be 1 \(sharing\) or 6 \(rotation\)"),
        ({"wide_mode": "cut"}, "wide_mode='cut': must be one of truncate, fold"),
        ({"padding": "none"}, "padding='none': must be one of circular, zero"),
        ({"dropout": 0.1}, "dropout=0.1: must be 0 with keep_zeros=true"),
        ({"r": 8, "target_modules": ["q_proj"]}, "r=8: the square matrix of MoRA would be 16 x 16 and 'q_proj' has 16"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(16, 16)}), MoraConfig(**fields))
    assert "\n" not in str(error.value)
