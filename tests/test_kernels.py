"""The merge T = W + M (.) (s B A): every implementation against float64, their choice, and the operators."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from peft import get_peft_model
from pruned_models import shake
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lors
from lors.kernels import (
    PackedWeight,
    compiled,
    decode,
    eager,
    forced,
    implementation,
    in_use,
    layout,
    mask_,
    merge,
    native,
    ops,
    pack,
    usage,
)
from lors.storage import compress_linear

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_c = pytest.mark.skipif(not native.available(), reason="no C compiler")
elsewhere = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_triton starts")
on_triton = pytest.mark.gpu if GPU else elsewhere
NATIVE, TRITON = pytest.param("native", marks=in_c), pytest.param("triton", marks=on_triton)
# Implementation -> types of W and T.
TYPES = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "native": native.TYPES,
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
EVERYWHERE = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}", marks=marks)
        for name, marks in (("eager", ()), ("native", in_c), ("triton", on_triton))
        for dtype in TYPES[name]
    ],
)
SCALING = 1.7
# Triton's interpreter cuts digits off where the hardware rounds to the nearest bfloat16: one unit instead of a half.
SLOPPY = {("triton", torch.bfloat16): 1.0 if INTERPRETED else 0.5}
PATTERNS = {"dense": "unstructured", "bitmap": "unstructured", "2:4": "2:4", "1:4": "1:4", "3:8": "3:8"}
ALL_LAYOUTS = ["bitmap", *(f"{n}:{m}" for m in layout.GROUPS for n in range(1, m))]


def device_of(name: str) -> torch.device:
    return torch.device("cuda" if name == "triton" and GPU else "cpu")


def problem(
    height: int, width: int, r: int, dtype: torch.dtype = torch.float32, pattern: str = "unstructured"
) -> tuple[Tensor, Tensor, Tensor]:
    """W in ``dtype`` that follows a pattern (half of it zero if unstructured), A and B in float32."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(height, width, generator=generator)
    if pattern == "unstructured":
        M = scores < 0.5
    else:
        n, m = (int(number) for number in pattern.split(":"))
        M = (scores.unflatten(1, (-1, m)).argsort(-1).argsort(-1) < n).flatten(1)
    W = torch.randn(height, width, generator=generator) * M
    return W.to(dtype), torch.randn(r, width, generator=generator), torch.randn(height, r, generator=generator)


def assert_one_rounding(T: Tensor, W: Tensor, A: Tensor, B: Tensor, sloppy: float = 0.5) -> None:
    """T is the exact value, up to float32 sums and ``sloppy`` units in its last place."""
    exact = torch.where(W != 0, W.double() + SCALING * B.double() @ A.double(), 0.0)
    size = W.double().abs() + SCALING * B.double().abs() @ A.double().abs()
    summed = 2.0 ** (-51 if T.dtype is torch.float64 else -23)  # r products and a sum, as a part of ``size``
    allowed = sloppy * torch.finfo(T.dtype).eps * exact.abs() + (len(A) + 2) * summed * size
    assert ((T.double() - exact).abs() <= allowed).all()
    assert not T[W == 0].any()


def every_number(dtype: torch.dtype, kind: str) -> Tensor:
    """A weight (out x 256) that follows a layout, with all numbers of a 16-bit type in it.

    Of float32, all upper halves with four lower halves each. So there are zeros of either sign, subnormal numbers,
    infinities, ties on the way to bfloat16, and NaN, quiet and signalling, of either sign and with every payload.
    """
    n, m = layout.group_shape(kind)[:2] if ":" in kind else (1, 2)
    upper = torch.arange(-(2**15), 2**15)
    if dtype is torch.float32:
        lower = torch.randint(2, 2**16, upper.shape, generator=torch.Generator().manual_seed(0))
        numbers = torch.cat([(upper << 16) + each for each in (0, 1, 0x8000, lower)]).to(torch.int32)
    else:
        numbers = upper.to(torch.int16)
    groups = -(-len(numbers) * m // (n * 256)) * 256 // m
    W = torch.zeros(groups, m, dtype=numbers.dtype)  # as whole numbers, which nothing converts
    places = (torch.arange(n) * (m // n) + torch.arange(groups)[:, None]) % m
    W[torch.arange(groups)[:, None], places] = numbers.repeat(-(-groups * n // len(numbers)))[: groups * n].view(-1, n)
    return W.view(-1, 256).view(dtype)


def assert_same_bits(found: Tensor, expected: Tensor, where: object, any_nan: bool = False) -> None:
    same = layout.bits_of(found) == layout.bits_of(expected)
    assert (same | (found.isnan() & expected.isnan()) if any_nan else same).all(), where


@EVERYWHERE
def test_every_number_is_decoded_and_merged(name: str, dtype: torch.dtype) -> None:
    """From every layout; an update of nothing leaves W, rounded to the type of T, and a NaN a NaN."""
    if dtype is torch.float64:
        pytest.skip("too many")
    kinds = ALL_LAYOUTS
    if name == "triton":  # one type for every kind and one kind for every type are enough at the interpreter's speed
        kinds = ["bitmap", "2:4", "3:8"] if dtype is torch.bfloat16 else ["bitmap"]
    for kind in kinds:
        W = every_number(dtype, kind).to(device_of(name))
        positive = torch.where(W == 0, 0.0, W)
        packed, A, B = pack(W, kind), torch.ones(1, 256, device=W.device), torch.zeros(len(W), 1, device=W.device)
        with forced(name):
            assert_same_bits(decode(packed), positive, kind)
            if name == "triton":
                assert torch.equal(merge(packed, A, B, SCALING, dtype).isnan(), W.isnan())
                continue
            assert_same_bits(layout.values_at(packed, W), packed.parts[0], kind)
            for out in native.TYPES if kind in ("bitmap", "1:2", "2:4", "3:8", "7:16") else ():
                assert_same_bits(merge(packed, A, B, SCALING, out), positive.to(out), (kind, out), any_nan=True)


# More than one program of Triton and more than one tile in both directions, no side a multiple of a tile.
SHAPES = [(37, 264, 5), (37, 1072, 20), (1, 16, 1), (4, 64, 256)]
ODD_SHAPES = [(1, 1, 1), (5, 7, 1), (200, 4, 3), (0, 8, 2), (8, 0, 2), (3, 5, 0)]


@pytest.mark.parametrize("kind", PATTERNS)
@EVERYWHERE
def test_a_merge_is_float64_rounded_once(
    name: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of rows, the last one lower; factors of other types are not cast before the sum."""
    monkeypatch.setitem(layout.BLOCK, "cpu", 2000)
    shapes, types = SHAPES + ODD_SHAPES * (kind in ("dense", "bitmap")), TYPES[name]
    if name == "triton" and INTERPRETED:  # slow
        types = {torch.float32, dtype}
        shapes = shapes if dtype is torch.float32 and kind in ("bitmap", "2:4") else SHAPES[:1]
    for height, width, r in shapes:
        W, A, B = (tensor.to(device_of(name)) for tensor in problem(height, width, r, dtype, PATTERNS[kind]))
        packed = pack(W, kind)  # its last values lie at the end of their memory
        with forced(name):
            for out, factors in product(types, {torch.float32, dtype}):
                T = merge(packed, A.to(factors), B.to(factors), SCALING, out)
                assert T.dtype is out
                assert_one_rounding(T, W, A.to(factors), B.to(factors), SLOPPY.get((name, out), 0.5))
            assert torch.equal(decode(packed), W)


@pytest.mark.parametrize("name", ["eager", NATIVE, TRITON])
def test_strides_threads_autocast_and_defaults_of_torch_change_no_bit(name: str) -> None:
    W, A, B = (tensor.to(device_of(name)) for tensor in problem(24, 144, 3, torch.bfloat16))
    threads = torch.get_num_threads()
    with forced(name):
        expected = merge(pack(W, "dense"), A, B, SCALING, torch.float32)
        for view in (torch.cat([W, W], dim=1)[:, :144], W.t().contiguous().t()):
            factors = A.t().contiguous().t(), B.repeat(1, 2)[:, :3]
            assert torch.equal(merge(pack(view, "dense"), *factors, SCALING, torch.float32), expected)
        packed = pack(W, "bitmap")
        try:
            torch.set_num_threads(3)
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"), torch.autocast("cpu", torch.float16):
                T, decoded = merge(packed, A, B, SCALING, torch.float32), decode(packed)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(threads)
    assert torch.equal(T, expected) and torch.equal(decoded, W)


@pytest.mark.parametrize("name", ["eager", "compiled", NATIVE, TRITON])
def test_nothing_gets_through_where_the_weight_is_zero(name: str) -> None:
    """-0.0 is zero; an update that is infinite or not a number is not an update there."""
    W = torch.tensor([[0.0, -0.0, 1.0, 1.0, float("nan")]], dtype=torch.bfloat16, device=device_of(name))
    A = torch.tensor([[float("inf"), float("nan"), 2.0, float("inf"), 1.0]], device=W.device)
    B = torch.ones(1, 1, device=W.device)
    for kind in ("dense", "bitmap"):
        with forced(name):
            T = merge(pack(W, kind), A, B, 1.0, torch.bfloat16)
            without_rank = merge(pack(W, kind), A[:0], B[:, :0], 1.0, torch.bfloat16)
        assert T[0, :4].tolist() == [0.0, 0.0, 3.0, float("inf")]
        assert without_rank[0, :4].tolist() == [0.0, 0.0, 1.0, 1.0]
        assert T[0, 4].isnan() and without_rank[0, 4].isnan()
        assert not torch.signbit(T[0, :2]).any() and not torch.signbit(without_rank[0, :4]).any()


@pytest.mark.parametrize("kind", ["dense", *ALL_LAYOUTS])
@pytest.mark.parametrize("name", ["eager", NATIVE, TRITON])
def test_a_mask_leaves_what_stands_at_weights_and_counts_them(name: str, kind: str) -> None:
    """Of every type that a weight and a gradient can have; also what is no number, at zeros of either sign."""
    if name == "triton" and INTERPRETED and kind not in ("dense", "bitmap", "1:2", "2:4", "5:8", "11:16"):
        pytest.skip("one layout of every size of group is enough at the interpreter's speed")
    pairs = list(product(TYPES[name], repeat=2))
    for of_W, of_D in pairs if kind == "dense" or not INTERPRETED else pairs[1:2]:  # the interpreter is slow
        W = problem(37, 1056, 1, of_W, kind if ":" in kind else "unstructured")[0].to(device_of(name))
        W[W == 0] = -0.0
        W[3], W[:, -5:] = 0.0, W[:, -5:] * 2
        D = torch.randn(37, 1056, generator=torch.Generator().manual_seed(1)).to(W.device, of_D)
        D[:, ::7], D[:, ::11] = float("nan"), float("-inf")
        expected = torch.where(W != 0, D, 0.0)
        with forced(name):
            counts = mask_(D, pack(W, kind))
        assert_same_bits(D, expected, kind)
        assert counts.tolist() == (W != 0).sum(1).tolist()


def test_a_mask_of_a_transposed_matrix_and_of_a_large_one() -> None:
    """In place whatever the strides are; by itself in C where the matrix is large."""
    W = problem(64, 32, 1)[0]
    D = torch.ones(32, 64).t()
    mask_(D, pack(W, "bitmap"))
    assert torch.equal(D, (W != 0).float())
    W = problem(1024, ops.COMPILE_FROM // 1024, 1)[0]
    mask_(D := torch.ones_like(W), pack(W, "dense"))
    assert torch.equal(D, (W != 0).float())


@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4", "int4/64"])
def test_nothing_waits_for_a_device(kind: str) -> None:
    """To read a number of a tensor is to wait for a GPU, and breaks a captured graph; a fake tensor has none."""
    W, A, B = problem(96, 128, 4, torch.bfloat16, "2:4")
    packed, grid = pack(W, kind), kind if "/" in kind else "int4/64"
    with FakeTensorMode() as mode:
        fake = packed._replace(parts=tuple(map(mode.from_tensor, packed.parts)))
        A, B, D = map(mode.from_tensor, (A, B, W))
        try:
            merged = eager.merge(fake, A, B, SCALING, W.dtype), eager.merge_on_grid(fake, A, B, SCALING, grid, W.dtype)
            assert {tensor.shape for tensor in (*merged, eager.decode(fake))} == {W.shape}
            assert eager.mask_(D, fake).shape == (96,)
        finally:
            layout._fields.cache_clear()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_merge_is_float64_rounded_once_and_new_shapes_do_not_compile_again() -> None:
    merge_in_bfloat16 = partial(compiled.merge, scaling=SCALING, dtype=torch.bfloat16)
    W, A, B = problem(40, 64, 3, torch.bfloat16)
    merge_in_bfloat16(pack(W, "dense"), A, B)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for height, width, r in [(40, 64, 3), (17, 130, 8), (100, 72, 1), (64, 64, 16), (33, 65, 2), (1, 4, 1)]:
        W, A, B = problem(height, width, r, torch.bfloat16)
        for kind in ("dense", "bitmap"):
            assert_one_rounding(merge_in_bfloat16(pack(W, kind), A, B), W, A, B)
    W = every_number(torch.bfloat16, "bitmap")
    T = merge_in_bfloat16(pack(W, "dense"), torch.ones(1, 256), torch.zeros(len(W), 1))
    assert_same_bits(T, torch.where(W == 0, 0.0, W), "dense", any_nan=True)
    assert not compiled._unavailable
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.fixture
def nothing_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(usage, "_ran", {operation: set() for operation in usage._ran})
    monkeypatch.setattr(usage, "_notices", [])


def test_what_has_run_is_told(nothing_has_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only asked for, or simulated, has not run."""
    nothing = {"merge": [], "decode": [], "mask": [], "product": [], "notices": []}
    assert in_use() == nothing
    W, A, B = problem(12, 24, 3)
    packed = pack(W, "bitmap")
    with FakeTensorMode() as mode:
        fake = PackedWeight("bitmap", tuple(mode.from_tensor(part) for part in packed.parts), packed.shape)
        merge(fake, mode.from_tensor(A), mode.from_tensor(B), SCALING, torch.float32)
    implementation(CPU, ops.COMPILE_FROM, torch.float16)
    assert in_use() == nothing
    merge(packed, A, B, SCALING, torch.float32)
    assert in_use() == nothing | {"merge": ["eager"]}
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled.last_pass)
    with forced("compiled"):
        merge(packed, A, B, SCALING, torch.float32)
        decode(packed)  # of which there is no compiled one
    told = nothing | {"merge": ["compiled", "eager"], "decode": ["eager"]}
    assert in_use() == told == json.loads(json.dumps(in_use()))
    if native.available():
        with forced("native"):
            decode(packed)
        assert in_use()["decode"] == ["eager", "native"]


def test_without_a_compiler_there_is_one_notice_and_the_same_result(
    nothing_has_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Tensor) -> None:
        raise RuntimeError("No working C++ compiler found\nin 3 places")

    monkeypatch.setattr(compiled, "_compiled", lambda: no_compiler)
    monkeypatch.setattr(compiled, "_unavailable", False)
    W, A, B = problem(16, 24, 3)
    expected = eager.merge(pack(W, "dense"), A, B, SCALING, torch.float32)
    with forced("compiled"):
        with pytest.warns(UserWarning, match=r"runs in eager mode \(No working C\+\+ compiler found\)"):
            assert torch.equal(merge(pack(W, "dense"), A, B, SCALING, torch.float32), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(merge(pack(W, "dense"), A, B, SCALING, torch.float32), expected)
    notice = "the merge cannot be compiled and runs in eager mode (No working C++ compiler found)"
    assert in_use() == {"merge": ["eager"], "decode": [], "mask": [], "product": [], "notices": [notice]}


# The choice


def test_small_weights_never_compile_and_the_choice_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementation(CPU, ops.COMPILE_FROM - 1, torch.bfloat16) == "eager"
    assert implementation(CPU, ops.COMPILE_FROM, torch.bfloat16) == ("native" if native.available() else "compiled")
    assert implementation(CPU, ops.COMPILE_FROM, torch.bfloat16, torch.float16) == "compiled"
    monkeypatch.setenv("LORS_KERNELS", "compiled")
    assert implementation(CPU, 1, torch.float32) == "compiled"
    with forced("eager"):
        assert implementation(CPU, 2**30, torch.float32) == "eager"
        with forced("auto"):
            assert implementation(CPU, 2**30, torch.float16) == "compiled"
    monkeypatch.setenv("LORS_KERNELS", "fast")
    with pytest.raises(ValueError, match="LORS_KERNELS='fast': must be one of auto, eager, compiled, native, triton"):
        implementation(CPU, 1, torch.float32)
    with pytest.raises(ValueError, match="name='fast': must be one of"), forced("fast"):
        pass
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with forced("triton"), pytest.raises(ValueError, match="LORS_KERNELS=triton: needs Triton, a CUDA device"):
        implementation(CPU, 1, torch.float32)


# The operators


@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4"])
def test_operators_keep_their_promises(kind: str) -> None:
    """Schema and fake implementation, by torch's own checks; of the FLOPs those of the product count."""
    W, A, B = problem(12, 24, 3, torch.bfloat16, PATTERNS[kind])
    parts = list(pack(W, kind).parts)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lors.merge.default, (parts, kind, A, B, SCALING, torch.float32), test_utils=checks)
    torch.library.opcheck(torch.ops.lors.mask_.default, (torch.ones(12, 24), parts, kind), test_utils=checks)
    if kind != "dense":
        torch.library.opcheck(torch.ops.lors.decode.default, (parts, kind, 12, 24), test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        merge(pack(W, kind), A, B, SCALING, torch.float32)
        decode(pack(W, kind))
        mask_(torch.ones(12, 24), pack(W, kind))
    assert counter.get_total_flops() == 2 * 3 * 12 * 24


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stack_of_layers_compiles_into_one_graph() -> None:
    """Two adapted layers, one dense and one packed, in one graph with their backward pass."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    for layer in (layers[0], layers[2]):
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.5)
    model = get_peft_model(layers, lors.LorsConfig(r=4, target_modules=["0", "2"])).base_model
    compress_linear(model.model[2].base_layer, "bitmap")
    shake(model, 1)
    x = torch.randn(5, 16)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    other = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = [each(x) for each in (model, other)]
    torch.testing.assert_close(*outputs)
    one, two = (torch.autograd.grad(output.square().sum(), parameters) for output in outputs)
    assert all(gradient.any() for gradient in one)
    torch.testing.assert_close(one, two)
