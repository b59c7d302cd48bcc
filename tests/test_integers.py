"""Weights of 2, 4 or 8 bits: the grid against its definition, zeros, bytes, single layers, and their merges."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from single_layers import assert_same, draw
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.sqft import SqftConfig, SqftLinear
from lors import LorsConfig, LorsLinear, masked_linear
from lors.functional import merged_weight
from lors.kernels import decode, forced, integer_layout, layout, pack
from lors.kernels.integers import codes_of, grid_of, on_grid, pack_codes
from lors.sparse_layer import SparseLinear
from lors.storage import CompressedLinear, decompress_linear, hold, is_quantized

R, ALPHA = 3, 4.5


def sparse(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Half of it zero."""
    return (draw(height, width, seed=seed) * (draw(height, width, seed=seed + 1) > 0)).to(dtype)


def by_definition(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    """S (clamp(round(w / S) + z, 0, 2^bits - 1) - z), one number after the other, in Python's own arithmetic."""

    def number(w: float, S: float, z: int) -> float:
        return S * (max(0, min(2**bits - 1, round(w / S) + z)) - z)

    rows = zip(weight.double().tolist(), scales.double().tolist(), zeros.tolist(), strict=True)
    numbers = [[number(w, S[j // group], z[j // group]) for j, w in enumerate(row)] for row, S, z in rows]
    return torch.tensor(numbers, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 5),
    width=st.integers(1, 40),
    group=st.sampled_from([1, 3, 8, 64]),
    bits=st.sampled_from([2, 4, 8]),
    sign=st.sampled_from([0, 1, -1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from([1, 40, 2**19]),
)
def test_packed_numbers_are_those_of_the_definition(seed, height, width, group, bits, sign, dtype, block):
    """Zeros of any weight, the grid, a round trip, and zero points at both ends (weights of one sign)."""
    W = sparse(height, width, seed, dtype)
    if sign:
        W = sign * W.abs()
    kind = integer_layout(bits, group)
    with mock.patch.dict(layout.BLOCK, {"cpu": block}):
        packed = pack(W, kind)
        quantised = decode(packed)
        again = packed._replace(parts=(packed.parts[0], layout.values_at(packed, quantised), packed.parts[2]))
    scales, _, zeros = packed.parts
    assert quantised.dtype == W.dtype and (scales > 0).all() and torch.equal(scales, scales.bfloat16().to(dtype))
    assert (quantised[W == 0] == 0).all() and not quantised[W == 0].signbit().any()
    if sign:
        columns = torch.arange(width) // group
        # Of 8 bits the rounding of S can cost the last one.
        one_sign = zeros == 0 if sign > 0 else zeros >= 2**bits - 1 - (bits == 8)
        empty = torch.stack([(W == 0)[:, columns == i].all(1) for i in range(int(columns[-1]) + 1)], 1)
        assert (one_sign | empty).all()
    torch.testing.assert_close(quantised.double(), by_definition(W, scales, zeros, bits, group).to(dtype).double())
    error = (quantised.double() - W.double()).abs()
    step = scales.double().repeat_interleave(group, 1)[:, :width]
    assert (error <= 1.6 * step + 1e-2 * W.double().abs()).all()
    assert torch.equal(decode(again), quantised), "what lies on the grid does not move"
    like = layout.empty(kind, W.shape, dtype, 0, "meta")
    assert [(part.shape, part.dtype) for part in like.parts] == [(part.shape, part.dtype) for part in packed.parts]


def test_a_cast_leaves_the_numbers_and_the_grid():
    W = sparse(8, 64, dtype=torch.float32)
    packed = pack(W, "int4/16")
    scales, *others = packed.parts
    low = packed._replace(parts=(scales.bfloat16(), *others))
    assert torch.equal(decode(low), decode(packed).bfloat16())
    back = low._replace(parts=(low.parts[0].float(), layout.values_at(low, decode(low)), others[1]))
    assert torch.equal(decode(back), decode(packed))


@pytest.mark.parametrize(("bits", "of_bfloat16"), [(2, 0.25 + 3 / 64), (4, 0.5 + 3 / 64), (8, 1 + 3 / 64)])
def test_bytes(bits, of_bfloat16):
    assert pack(sparse(32, 256, dtype=torch.bfloat16), f"int{bits}/64").nbytes == 32 * 256 * of_bfloat16


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (16, 64), (True, 64), (4, 0), (4, 2.0)])
def test_other_grids_are_refused(bits, group):
    with pytest.raises(ValueError, match=r"bits=.*one of 2, 4, 8|group=.*whole number >= 1"):
        integer_layout(bits, group)


# The merged weight on a grid


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("exact_gradient", [True, False])
def test_output_and_gradients_on_a_grid_are_those_of_the_formula(dense, exact_gradient):
    """The rounding as a constant beside the sum: W_m + stopgrad(W_q - W_m); without the mask as LoRS has it."""
    W = sparse(7, 20)
    packed = pack(W, "int4/8")
    base = W if dense else decode(packed)
    scales, zeros = grid_of(W, "int4/8")
    A, B, bias, x = draw(R, 20, seed=4), draw(7, R, seed=5), draw(7, seed=6), draw(5, 20, seed=7)
    for tensor in (A, B, bias, x):
        tensor.requires_grad_()
    update, M = 1.5 * B @ A, (base != 0).double()
    with torch.no_grad():
        T = by_definition(base + M * update, scales, zeros, 4, 8)
    passed = M * update if exact_gradient else update
    expected = linear(x, T + passed - passed.detach(), bias)
    y = masked_linear(x, W if dense else packed, A, B, 1.5, bias, gradient_share=float(exact_gradient), grid="int4/8")
    assert_same(y, expected, x, A, B, bias)
    assert (T[base == 0] == 0).all()


def test_a_fine_grid_is_no_grid():
    """Output and gradients come to those of SparsePEFT as the steps of the grid become small."""
    W, A, B, x = sparse(7, 20), draw(R, 20, seed=4), draw(7, R, seed=5), draw(5, 20, seed=7)
    inputs = [tensor.requires_grad_() for tensor in (x, A, B)]
    results = []
    for factor in (1e-3, 1e-6):
        scales, zeros = torch.full((7, 1), factor, dtype=torch.float64), torch.full((7, 1), 128, dtype=torch.uint8)
        small = W * factor * 8  # codes stay within 8 bits
        codes = pack_codes(codes_of(small, scales, zeros, "int8/20"), 8)
        packed = layout.PackedWeight("int8/20", (scales, codes, zeros), (7, 20))
        y = masked_linear(x, packed, A, B, factor, gradient_share=1, grid="int8/20")
        plain = masked_linear(x, decode(packed), A, B, factor, gradient_share=1)
        results.append(y - plain)
        for one, two in zip(*(torch.autograd.grad(out.sum(), inputs[1:]) for out in (y, plain)), strict=True):
            assert torch.equal(one, two), "G does not depend on the rounding here"
    assert results[1].abs().max() < 2e-3 * results[0].abs().max()


def quantised_base(dtype: torch.dtype, kind: str = "int4/8", seed: int = 1, sign: int = 0) -> nn.Linear:
    base = nn.Linear(20, 7, dtype=dtype).requires_grad_(False)
    W = sparse(7, 20, seed, dtype)
    base.weight.copy_(sign * W.abs() if sign else W)
    hold(base, pack(base.weight.detach(), kind))
    return base


def layer_on(base: nn.Linear, kind: str, name: str = "default", **fields: object) -> SparseLinear:
    if kind == "lors":
        layer, parts = LorsLinear(base, name, LorsConfig(r=R, lora_alpha=ALPHA, **fields), R, ALPHA / R), "lors"
    else:
        layer, parts = SqftLinear(base, name, SqftConfig(r=R, lora_alpha=ALPHA, **fields), R, ALPHA / R), "sqft"
    for number, part in enumerate(("A", "B")):
        factor = getattr(layer, f"{parts}_{part}")[name]
        factor.data.copy_(0.1 * draw(*factor.shape, seed=4 + number))
    return layer


QUANTISED = [("lors", {}), ("sqft", {"form": "fused"}), ("sqft", {"form": "fused", "checkpoint": True})]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("sign", [0, 1, -1])
@pytest.mark.parametrize(("kind", "fields"), QUANTISED[:2])
def test_a_merge_is_the_weight_of_the_forward_pass_bit_for_bit(kind, fields, sign, packed, dtype):
    """Also where the zero point is 0 or 15; zeros and the grid stay, and the base comes back."""
    base = quantised_base(dtype, sign=sign)
    scales, _, zeros = (part.clone() for part in base.packed.parts)
    if not packed:
        base = decompress_linear(base)
    W = base.weight.clone()
    layer = layer_on(base, kind, bits=4, group=8, **fields)
    x = torch.eye(20, dtype=dtype)
    expected = layer(x)
    M = W != 0
    layer.merge()
    assert torch.equal(layer(x), expected)
    assert (layer.base_layer.weight[~M] == 0).all()
    if packed:
        assert is_quantized(layer.base_layer)
        assert torch.equal(layer.base_layer.scales, scales) and torch.equal(layer.base_layer.zeros, zeros)
        assert torch.equal(layer.base_layer.weight, on_grid(layer.base_layer.weight, scales, zeros, "int4/8").to(dtype))
    assert not torch.equal(layer.base_layer.weight, W)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_after_a_cast_to_float32_has_the_codes_of_the_training(dtype):
    """As the harness merges."""
    layer = layer_on(quantised_base(dtype), "sqft", bits=4, group=8, form="fused")
    layer.base_layer.bias = None
    expected = layer(torch.eye(20, dtype=dtype))
    with forced("eager"):
        layer.float().merge()
    layer.base_layer.to(dtype)
    assert torch.equal(layer.base_layer.weight.T, expected)


def test_two_adapters_share_the_grid_and_merge_in_any_order():
    layer = layer_on(quantised_base(torch.float64), "lors", bits=4, group=8)
    layer.update_layer("second", LorsConfig(r=2, bits=4, group=8), 2, 0.5)
    layer.lors_B["second"].data.copy_(0.1 * draw(7, 2, seed=8))
    layer.set_adapter(["default", "second"])
    x = torch.eye(20, dtype=torch.float64)
    expected = layer(x)
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer.unmerge()
    layer.options["second"] = LorsConfig(r=2, bits=8, group=8)
    with pytest.raises(ValueError, match="differ in bits or group"):
        layer(x)


@pytest.mark.parametrize(
    ("kind", "fields"), [("lors", {}), ("sqft", {}), ("sqft", {"form": "fused"}), ("sqft", {"checkpoint": True})]
)
def test_without_bits_the_adapter_works_beside_quantised_weights_and_cannot_be_merged(kind, fields):
    base = quantised_base(torch.float64)
    layer, x = layer_on(base, kind, **fields), draw(5, 20).requires_grad_()
    W = base.weight
    A, B = layer.factors("default")
    expected = linear(x, W + (W != 0) * (ALPHA / R * B @ A), base.bias)
    if kind == "lors":
        torch.testing.assert_close(layer(x), expected)
    else:
        assert_same(layer(x), expected, x, A, B)
    with pytest.raises(ValueError, match=r"not lie on the int4/8 grid .*: train the adapter with bits=4, or leave it"):
        layer.merge()
    assert torch.equal(base.weight, W)


def test_a_checkpointed_update_keeps_no_dense_copy_of_a_quantised_weight():
    layer, x = layer_on(quantised_base(torch.float64), "sqft", form="fused", checkpoint=True), draw(5, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        layer(x.requires_grad_())
    assert not [tensor for tensor in saved if tensor.is_floating_point() and tensor.shape == (7, 20)]


def test_another_grid_than_that_of_the_base_is_refused():
    with pytest.raises(ValueError, match="bits=8, group=8: the weight of 'proj' is int4/8"):
        SqftLinear.check_fit("proj", quantised_base(torch.float32), SqftConfig(r=R, bits=8, group=8, form="fused"))
    with pytest.raises(ValueError, match=r"bits=4: must be None with form='two_products'"):
        SqftConfig(bits=4)
    with pytest.raises(ValueError, match=r"grid='int4/4': must be that of the weight, 'int4/8'"):
        merged_weight(quantised_base(torch.float32).packed, torch.ones(1, 20), torch.ones(7, 1), 1.0, grid="int4/4")


def test_copies_casts_and_states_of_a_layer():
    layer = quantised_base(torch.float32)
    W, x = layer.weight, torch.randn(3, 20)
    torch.testing.assert_close(layer(x), linear(x, W, layer.bias))
    low = copy.deepcopy(layer).bfloat16()
    assert low.codes.dtype == low.zeros.dtype == torch.uint8 and torch.equal(low.float().weight, W)
    other = quantised_base(torch.float32, seed=9)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, W)
    moved = layer.packed_with(torch.zeros_like(layer.codes))
    layer.load_state_dict({"weight": decode(moved), "bias": layer.bias})
    assert torch.equal(layer.weight, decode(moved))
    assert layer.to("meta").weight.shape == (7, 20)
    plain = decompress_linear(other)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, W) and not isinstance(plain, CompressedLinear)
