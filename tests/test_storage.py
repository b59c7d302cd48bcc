"""Compressed weights: exact round trips, their bytes, and a single layer that is kept so."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pruned_models import KINDS
from torch import Tensor, nn

from lors.kernels import decode, layout, pack
from lors.sparsity import random_support
from lors.storage import CompressedLinear, best_layout, compress_linear, decompress_linear


def random_weight(seed: int, height: int, width: int, dtype: torch.dtype, pattern: str, sparsity: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    M = random_support((height, width), None if ":" in pattern else sparsity, pattern, generator)
    return (torch.randn(height, width, generator=generator) * M).to(dtype)


# Packing


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 9),
    groups=st.integers(1, 5),
    pattern=st.sampled_from(["unstructured", "1:2", "2:4", "1:4", "3:4", "4:8", "5:8", "7:16"]),
    extra=st.integers(0, 7),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from([1, 40, 2**19]),
)
@example(0, 3, 1, "unstructured", 0, 0.999, torch.bfloat16, 1)
def test_round_trip_is_exact(
    seed: int, height: int, groups: int, pattern: str, extra: int, sparsity: float, dtype: torch.dtype, block: int
) -> None:
    """At any size and any size of block; and other values in the same places. test_kernels has every number."""
    width = groups * int(pattern.split(":")[1]) if ":" in pattern else 8 * groups + extra
    W = random_weight(seed, height, width, dtype, pattern, sparsity)
    other = torch.where(W != 0, torch.randn(height, width).to(dtype), 0.0)
    with mock.patch.dict(layout.BLOCK, {"cpu": block}):
        packed = pack(W, pattern if ":" in pattern else "bitmap")
        moved = packed._replace(parts=(layout.values_at(packed, other), *packed.parts[1:]))
        assert torch.equal(decode(packed), W)
        assert torch.equal(decode(moved), other)
    like = layout.empty(packed.layout, packed.shape, dtype, int((W != 0).sum()), "meta")
    assert [(part.shape, part.dtype) for part in like.parts] == [(part.shape, part.dtype) for part in packed.parts]


@pytest.mark.parametrize(("kind", "pattern", "table"), [("bitmap", "unstructured", 8 * 65), ("2:4", "2:4", 0)])
def test_half_of_bfloat16_takes_nine_sixteenths(kind: str, pattern: str, table: int) -> None:
    W = random_weight(0, 64, 128, torch.bfloat16, pattern, 0.5)
    assert pack(W, kind).nbytes == 2 * 64 * 128 * 9 / 16 + table


@pytest.mark.parametrize(
    ("pattern", "sparsity", "width", "chosen"),
    [
        ("unstructured", 0.9, 64, {"n:m": "5:16", "auto": "bitmap"}),
        ("unstructured", 0.0, 64, {"n:m": "refused", "auto": "dense"}),
        ("unstructured", 0.5, 63, {"n:m": "refused", "auto": "bitmap"}),
        ("2:4", None, 64, {"n:m": "2:4", "auto": "2:4"}),
        ("1:4", None, 64, {"n:m": "1:4", "auto": "1:4"}),
        ("2:16", None, 64, {"n:m": "2:16", "auto": "2:16"}),
        ("4:8", None, 256, {"n:m": "4:8", "auto": "bitmap"}),  # indices of 4:8 cost twice as much as its bits
    ],
)
def test_the_smallest_layout_is_chosen(pattern: str, sparsity: float | None, width: int, chosen: dict) -> None:
    W = random_weight(0, 256, width, torch.bfloat16, pattern, sparsity)
    assert best_layout(W, "dense") == "dense"
    assert best_layout(W, "bitmap") == "bitmap"
    assert best_layout(W, "auto") == chosen["auto"]
    if chosen["n:m"] == "refused":
        with pytest.raises(ValueError, match=f"storage='n:m': the weight .256 x {width}. follows no n:m pattern"):
            best_layout(W, "n:m")
        message = "does not follow 2:4: a group of 4 has more" if width == 64 else "4 do not divide the input width 63"
        with pytest.raises(ValueError, match=message):
            pack(W, "2:4")
    else:
        assert best_layout(W, "n:m") == chosen["n:m"]


# A layer


@pytest.mark.parametrize("storage", KINDS)
def test_a_compressed_layer_is_the_layer(storage: str) -> None:
    """Output and gradients of a plain linear layer; the same object, and a plain one again afterwards."""
    plain = nn.Linear(16, 9)
    plain.weight = nn.Parameter(random_weight(0, 9, 16, torch.float32, KINDS[storage], 0.5), requires_grad=False)
    layer, x = copy.deepcopy(plain), torch.randn(2, 3, 16, requires_grad=True)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    compress_linear(layer, storage)
    assert isinstance(layer, CompressedLinear) and isinstance(layer, nn.Linear)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        output = layer(x)
    assert torch.equal(output, plain(x))
    assert {tensor.data_ptr() for tensor in saved} == {part.data_ptr() for part in layer.packed.parts}
    for one, two in zip(
        torch.autograd.grad(layer(x).square().sum(), [x, layer.bias]),
        torch.autograd.grad(plain(x).square().sum(), [x, plain.bias]),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
    assert calls
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = plain.weight
    decompress_linear(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, plain.weight)
    assert list(layer.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("storage", KINDS)
def test_copies_casts_and_states(storage: str) -> None:
    W = random_weight(0, 9, 16, torch.float32, KINDS[storage], 0.5)
    layer = nn.Linear(16, 9)
    layer.weight = nn.Parameter(W, requires_grad=False)
    compress_linear(layer, storage)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, W)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(low.weight, W.bfloat16())
    assert low.packed.parts[1].dtype is torch.uint8
    assert layer.to("meta").weight.shape == (9, 16)
    assert low.packed.parts[0].requires_grad is False

    other = copy.deepcopy(low)
    other.values.data.zero_()
    other.load_state_dict(low.state_dict())
    assert torch.equal(other.weight, low.weight)


def test_a_layer_without_content_has_the_size_of_the_real_one() -> None:
    for storage, pattern in [*KINDS.items(), ("auto", "2:4"), ("auto", "unstructured")]:
        real, like = nn.Linear(32, 24, dtype=torch.bfloat16), nn.Linear(32, 24, dtype=torch.bfloat16, device="meta")
        real.weight.data = random_weight(0, 24, 32, torch.bfloat16, pattern, 0.5)
        compress_linear(real, storage)
        compress_linear(like, storage, sparsity=0.5, pattern=pattern)
        assert like.layout == real.layout
        assert like.packed.nbytes == real.packed.nbytes
        assert all(part.is_meta for part in like.packed.parts)
        assert like(torch.empty(3, 32, dtype=torch.bfloat16, device="meta")).shape == (3, 24)
