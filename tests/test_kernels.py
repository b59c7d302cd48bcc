"""The merge T = W + M (.) (s B A): every implementation on a CPU against float64, and the operators around it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from peft import get_peft_model
from pruned_models import IDS, adapted_model, pruned_model, shake
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lors
from lors.functional import masked_linear
from lors.kernels import (
    PackedWeight,
    compiled,
    decode,
    eager,
    forced,
    implementation,
    in_use,
    layout,
    merge,
    native,
    ops,
    pack,
    usage,
)
from lors.kernels.layout import values_at
from lors.storage import compress_linear

CPU = torch.device("cpu")
SCALING = 1.7
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no C compiler"))
# float32 sums: how far r products and a sum may be off, as a part of the sum of their absolute values.
SUMMED = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-23, torch.float16: 2.0**-23, torch.float64: 2.0**-51}
PATTERNS = {"dense": "unstructured", "bitmap": "unstructured", "2:4": "2:4", "1:4": "1:4", "3:8": "3:8"}


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
    allowed = sloppy * torch.finfo(T.dtype).eps * exact.abs() + (len(A) + 2) * SUMMED[T.dtype] * size
    assert ((T.double() - exact).abs() <= allowed).all()
    assert not T[W == 0].any()


def every_number(dtype: torch.dtype, n: int = 1, m: int = 2) -> Tensor:
    """A weight (out x 256), n of every m stored, with all numbers of a 16-bit type in it.

    Of float32, all upper halves with three lower halves each. So there are zeros of either sign, subnormal numbers,
    infinities, and NaN, quiet and signalling, of either sign and with every payload.
    """
    upper = torch.arange(-(2**15), 2**15)
    if dtype is torch.float32:
        lower = torch.randint(2, 2**16, upper.shape, generator=torch.Generator().manual_seed(0))
        numbers = torch.cat([upper << 16, (upper << 16) + 1, (upper << 16) + lower]).to(torch.int32)
    else:
        numbers = upper.to(torch.int16)
    groups = -(-len(numbers) * m // (n * 256)) * 256 // m
    W = torch.zeros(groups, m, dtype=numbers.dtype)  # as whole numbers, which nothing converts
    places = (torch.arange(n) * (m // n) + torch.arange(groups)[:, None]) % m
    W[torch.arange(groups)[:, None], places] = numbers.repeat(-(-groups * n // len(numbers)))[: groups * n].view(-1, n)
    return W.view(-1, 256).view(dtype)


def bits(W: Tensor) -> Tensor:
    """What lies in memory, -0.0 taken for 0.0."""
    return layout.bits_of(torch.where(W == 0, 0.0, W))


ALL_LAYOUTS = ["bitmap", *(f"{n}:{m}" for m in layout.GROUPS for n in range(1, m))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    """From every layout: whoever decodes it, and if the values are taken from the weight again."""
    decoders = {eager.decode, compiled.decode}
    if dtype in native.TYPES and native.available():
        decoders.add(native.decode)
    for kind in ALL_LAYOUTS:
        W = every_number(dtype, *(layout.group_shape(kind)[:2] if ":" in kind else ()))
        packed = pack(W, kind)
        for unpack in decoders:
            assert torch.equal(layout.bits_of(unpack(packed)), bits(W)), (kind, unpack)
        assert torch.equal(layout.bits_of(values_at(packed, W)), layout.bits_of(packed.parts[0])), kind


def assert_every_number_is_merged(merged: Callable[..., Tensor], W: Tensor, kind: str, out: torch.dtype) -> None:
    """An update of nothing leaves W, rounded to the type of T, and a NaN a NaN."""
    T = merged(pack(W, kind), torch.ones(1, W.shape[1]), torch.zeros(len(W), 1), SCALING, out)
    number = ~W.isnan()
    assert torch.equal(T.isnan(), ~number), (kind, out)
    expected = torch.where(W == 0, 0.0, W).to(out)
    assert torch.equal(layout.bits_of(T)[number], layout.bits_of(expected)[number]), (kind, out)


@pytest.mark.parametrize("name", ["eager", NATIVE])
def test_every_number_is_merged(name: str) -> None:
    merged, types = (native.merge, native.TYPES) if name == "native" else (eager.merge, (*native.TYPES, torch.float16))
    for dtype, kind in product(types, ["dense", *ALL_LAYOUTS]):
        W = every_number(dtype, *(layout.group_shape(kind)[:2] if ":" in kind else ()))
        for out in types:
            assert_every_number_is_merged(merged, W, kind, out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_number_is_merged_by_the_compiled_pass() -> None:
    """It sees blocks of W, whatever the layout."""
    assert_every_number_is_merged(compiled.merge, every_number(torch.bfloat16), "dense", torch.bfloat16)
    assert not compiled._unavailable


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PATTERNS)
def test_eager_merge_is_float64_rounded_once(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several blocks of rows, the last one lower than the others."""
    monkeypatch.setitem(layout.BLOCK, "cpu", 2000)
    W, A, B = problem(37, 264, 5, dtype, PATTERNS[kind])
    packed = pack(W, kind)
    T = eager.merge(packed, A, B, SCALING, dtype)
    assert T.dtype is dtype
    assert_one_rounding(T, W, A, B)
    assert torch.equal(T, eager.merge(pack(W, "dense"), A, B, SCALING, dtype))
    assert torch.equal(eager.decode(packed), W)


@pytest.mark.parametrize("name", ["eager", NATIVE])
@pytest.mark.parametrize(
    ("height", "width", "r"), [(1, 1, 1), (5, 7, 1), (3, 300, 64), (200, 4, 3), (0, 8, 2), (8, 0, 2), (3, 5, 0)]
)
def test_any_shape(height: int, width: int, r: int, name: str) -> None:
    W, A, B = problem(height, width, r)
    for kind in ("dense", "bitmap"):
        with forced(name):
            assert_one_rounding(merge(pack(W, kind), A, B, SCALING, torch.float32), W, A, B)


def test_types_may_differ_and_are_not_cast_before_the_sum() -> None:
    """A float32 W and factors for a bfloat16 T; bfloat16 factors for a float32 T; float64 anywhere sums in float64."""
    W, A, B = problem(16, 24, 3)
    assert_one_rounding(merge(pack(W, "bitmap"), A, B, SCALING, torch.bfloat16), W, A, B)
    low = W.bfloat16(), A.bfloat16(), B.bfloat16()
    assert_one_rounding(merge(pack(low[0], "bitmap"), *low[1:], SCALING, torch.float32), *low)
    assert_one_rounding(merge(pack(W, "dense"), A, B, SCALING, torch.float64), W, A, B)


def test_strides_do_not_matter() -> None:
    W, A, B = problem(16, 24, 3)
    views = W.t().contiguous().t(), A.t().contiguous().t(), B.repeat(1, 2)[:, :3]
    assert torch.equal(
        merge(pack(views[0], "dense"), *views[1:], SCALING, W.dtype), merge(pack(W, "dense"), A, B, SCALING, W.dtype)
    )


@pytest.mark.parametrize("name", ["eager", "compiled", NATIVE])
def test_nothing_gets_through_where_the_weight_is_zero(name: str) -> None:
    """-0.0 is zero; an update that is infinite or not a number is not an update there."""
    W = torch.tensor([[0.0, -0.0, 1.0, 1.0]], dtype=torch.bfloat16)
    A, B = torch.tensor([[float("inf"), float("nan"), 2.0, float("inf")]]), torch.ones(1, 1)
    with forced(name):
        T = merge(pack(W, "dense"), A, B, 1.0, torch.bfloat16)
        without_rank = merge(pack(W, "dense"), A[:0], B[:, :0], 1.0, torch.bfloat16)
    assert T.tolist() == [[0.0, 0.0, 3.0, float("inf")]]
    assert without_rank.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert not torch.signbit(T[0, :2]).any() and not torch.signbit(without_rank).any()


@pytest.mark.parametrize("name", ["eager", "compiled", NATIVE])
def test_autocast_does_not_change_the_sums(name: str) -> None:
    W, A, B = problem(16, 24, 3, torch.bfloat16)
    with forced(name):
        expected = merge(pack(W, "dense"), A, B, SCALING, W.dtype)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(merge(pack(W, "dense"), A, B, SCALING, W.dtype), expected)


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
    assert not compiled._unavailable
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_compiled_merge_in_other_types(dtype: torch.dtype) -> None:
    W, A, B = problem(40, 64, 3, dtype)
    assert_one_rounding(compiled.merge(pack(W, "dense"), A, B, SCALING, dtype), W, A, B)
    assert not compiled._unavailable


@pytest.fixture
def nothing_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(usage, "_ran", {operation: set() for operation in usage._ran})
    monkeypatch.setattr(usage, "_notices", [])


def test_what_has_run_is_told(nothing_has_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only asked for, or simulated, has not run."""
    nothing = {"merge": [], "decode": [], "product": [], "notices": []}
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


@pytest.mark.parametrize("name", [NATIVE])
def test_the_merge_in_c_is_told(name: str, nothing_has_run) -> None:
    W, A, B = problem(12, 24, 3)
    with forced(name):
        decode(pack(W, "bitmap"))
        merge(pack(W, "bitmap"), A, B, SCALING, torch.float32)
    assert in_use() == {"merge": [name], "decode": [name], "product": [], "notices": []}


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
    assert in_use() == {"merge": ["eager"], "decode": [], "product": [], "notices": [notice]}


# The choice


def test_small_weights_never_compile_and_large_ones_do() -> None:
    assert implementation(CPU, ops.COMPILE_FROM - 1, torch.bfloat16) == "eager"
    assert implementation(CPU, ops.COMPILE_FROM, torch.bfloat16) == ("native" if native.available() else "compiled")
    assert implementation(CPU, ops.COMPILE_FROM, torch.bfloat16, torch.float16) == "compiled"


def test_the_choice_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_triton_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    W, A, B = problem(4, 8, 2)
    with forced("triton"), pytest.raises(ValueError, match="LORS_KERNELS=triton: needs Triton, a CUDA device"):
        merge(pack(W, "dense"), A, B, SCALING, torch.float32)


# The operators


@pytest.mark.parametrize("kind", ["dense", "bitmap", "2:4"])
def test_operators_keep_their_promises(kind: str) -> None:
    """Schema and fake implementation, by torch's own checks."""
    W, A, B = problem(12, 24, 3, torch.bfloat16, PATTERNS[kind])
    parts = list(pack(W, kind).parts)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lors.merge.default, (parts, kind, A, B, SCALING, torch.float32), test_utils=checks)
    if kind != "dense":
        torch.library.opcheck(torch.ops.lors.decode.default, (parts, kind, 12, 24), test_utils=checks)


def test_a_merge_counts_the_flops_of_its_product_and_a_decoding_none() -> None:
    W, A, B = problem(12, 24, 3)
    with FlopCounterMode(display=False) as counter:
        merge(pack(W, "bitmap"), A, B, SCALING, torch.float32)
        decode(pack(W, "bitmap"))
    assert counter.get_total_flops() == 2 * 3 * 12 * 24


def test_fake_tensors_see_one_operation_each() -> None:
    W, A, B = problem(12, 24, 3, torch.bfloat16)
    packed = pack(W, "bitmap")
    with FakeTensorMode() as mode:
        fake = PackedWeight("bitmap", tuple(mode.from_tensor(part) for part in packed.parts), packed.shape)
        x, A, B = (mode.from_tensor(tensor).requires_grad_() for tensor in (torch.ones(5, 24).bfloat16(), A, B))
        output = masked_linear(x, fake, A, B, SCALING)
        assert (output.shape, output.dtype) == ((5, 12), torch.bfloat16)
        gradients = torch.autograd.grad(output.sum(), [x, A, B])
    assert [tuple(gradient.shape) for gradient in gradients] == [(5, 24), (3, 24), (12, 3)]


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("storage", ["dense", "bitmap"])
def test_a_whole_model_compiles_into_one_graph(storage: str) -> None:
    """Forward and backward of an adapted model: the same loss and gradients, and no graph break."""
    model = adapted_model(pruned_model(), target_modules=["q_proj", "up_proj"], storage=storage)
    other = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    losses = [each(input_ids=IDS, labels=IDS, use_cache=False).loss for each in (model, other)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.any()
            torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_by_inductor_may_compile_the_merge_inside() -> None:
    """Both compilations nest: the operator is called from compiled code and calls compiled code."""
    model = adapted_model(pruned_model(), target_modules=["q_proj"])
    expected = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    with forced("compiled"):
        loss = torch.compile(model, fullgraph=True)(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    torch.testing.assert_close(loss, expected)
    assert not compiled._unavailable
