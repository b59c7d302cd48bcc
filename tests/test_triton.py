"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, in a process of its own.

The interpreter has to be chosen before Triton is imported for the first time, so without a GPU this file runs
itself again with TRITON_INTERPRET=1. It shows that the kernels compute the right thing; that they can be built for
a GPU is shown by compiling them for one, which needs none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from test_kernels import PATTERNS, SCALING, assert_one_rounding, bits, every_number, problem
from torch import Tensor

from lors import kernels
from lors.kernels import PackedWeight, check, decode, eager, forced, implementation, merge, pack
from lors.kernels.check import milliseconds
from lors.kernels.layout import bits_of, group_shape

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lors[triton]'")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts digits off where the hardware rounds to the nearest bfloat16: one unit instead of half of one.
SLOPPY = {torch.bfloat16: 1.0 if INTERPRETED else 0.5}
on_triton = (
    pytest.mark.gpu
    if GPU
    else pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
)


def run(code_or_test: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code_or_test], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(GPU or INTERPRETED, reason="the other tests of this file run here")
def test_in_the_interpreter() -> None:
    result = run(["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__], TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@on_triton
@pytest.mark.parametrize("width", [1072, 176])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PATTERNS)
def test_merge_and_decode(kind: str, dtype: torch.dtype, width: int) -> None:
    """More than one program and more than one tile in both directions, no side a multiple of a tile."""
    if INTERPRETED and width > 1024 and (dtype is not torch.float32 or kind in ("1:4", "3:8")):
        pytest.skip("one type and one pattern of a kind are enough at the interpreter's speed")
    W, A, B = (tensor.to(DEVICE) for tensor in problem(37, width, 20, dtype, PATTERNS[kind]))
    packed = pack(W, kind)
    with forced("triton"):
        T = merge(packed, A, B, SCALING, dtype)
        assert torch.equal(decode(packed), W)
    assert T.dtype is dtype
    assert_one_rounding(T, W, A, B, SLOPPY.get(dtype, 0.5))


@on_triton
@pytest.mark.parametrize(("height", "width", "r"), [(1, 1, 1), (5, 7, 1), (3, 130, 256), (70, 9, 17), (0, 8, 2)])
@pytest.mark.parametrize("kind", ["dense", "bitmap"])
def test_any_shape_and_rank(kind: str, height: int, width: int, r: int) -> None:
    W, A, B = (tensor.to(DEVICE) for tensor in problem(height, width, r))
    with forced("triton"):
        assert_one_rounding(merge(pack(W, kind), A, B, SCALING, torch.float32), W, A, B)


@on_triton
def test_factors_of_sixteen_bits_lose_nothing() -> None:
    """Their products are exact, so a float32 T of bfloat16 operands has the digits of float32."""
    for dtype in (torch.bfloat16, torch.float16):
        W, A, B = (tensor.to(DEVICE, dtype) for tensor in problem(33, 140, 5))
        with forced("triton"):
            assert_one_rounding(merge(pack(W, "bitmap"), A, B, SCALING, torch.float32), W, A, B)


@on_triton
def test_what_is_not_a_number_stays_where_the_weight_is() -> None:
    W = torch.tensor([[0.0, -0.0, 1.0, 1.0, float("nan")]], device=DEVICE)
    A, B = (
        torch.tensor([[float("inf"), float("nan"), 2.0, float("inf"), 1.0]], device=DEVICE),
        torch.ones(1, 1).to(DEVICE),
    )
    for kind in ("dense", "bitmap"):
        with forced("triton"):
            T = merge(pack(W, kind), A, B, 1.0, torch.float32)
            without_rank = merge(pack(W, kind), A[:0], B[:, :0], 1.0, torch.float32)
        assert T[0, :4].tolist() == [0.0, 0.0, 3.0, float("inf")]
        assert T[0, 4].isnan()
        assert without_rank[0, :4].tolist() == [0.0, 0.0, 1.0, 1.0]
        assert not torch.signbit(T[0, :2]).any() and not torch.signbit(without_rank[0, :4]).any()


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bitmap", "2:4", "3:8"])
def test_every_number_comes_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """And a merge with an update of nothing leaves a NaN what it is, and nothing else."""
    W = every_number(dtype, *(group_shape(kind)[:2] if ":" in kind else ())).to(DEVICE)
    packed = pack(W, kind)
    with forced("triton"):
        assert torch.equal(bits_of(decode(packed)), bits(W))
        T = merge(packed, torch.ones(1, 256, device=DEVICE), torch.zeros(len(W), 1, device=DEVICE), 1.0, dtype)
    assert torch.equal(T.isnan(), W.isnan())


@on_triton
def test_strides_do_not_matter() -> None:
    W, A, B = (tensor.to(DEVICE) for tensor in problem(24, 40, 3))
    views = W.t().contiguous().t(), A.t().contiguous().t(), B.repeat(1, 2)[:, :3]
    with forced("triton"):
        T = merge(pack(views[0], "dense"), *views[1:], SCALING, torch.float32)
    torch.testing.assert_close(T, eager.merge(pack(W, "dense"), A, B, SCALING, torch.float32))


# The choice. Of the interpreter too all is real but the times, which are those of a GPU: 1 ms instead of 2 ms.

CHECKED_ON = torch.device(DEVICE, 0) if GPU else torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MERGE = (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)  # of W, A, B and T


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing has been checked yet; milliseconds that the Triton and the eager implementation take in turn."""
    monkeypatch.setattr(check, "_passed", set())
    monkeypatch.setattr(check, "_refused", set())
    taken = [1.0, 2.0]

    def milliseconds(call: Callable[[], Tensor], device: torch.device) -> float:
        taken.append(taken.pop(0))
        return taken[-1]

    monkeypatch.setattr(check, "REALISTIC", (64, 64, 4))
    monkeypatch.setattr(check, "milliseconds", milliseconds)
    return taken


def assert_refused(reason: str, *types: torch.dtype) -> None:
    """With a notice that names device and reason; from then on for all types, and in silence."""
    with pytest.warns(UserWarning, match=f"lors: no Triton on {DEVICE}.*, the eager merge is taken .*{reason}") as said:
        assert not check.triton_passes(CHECKED_ON, *types)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (types, (torch.float16,), MERGE):
            assert not check.triton_passes(CHECKED_ON, *other)


def wrapped(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor, str], Tensor]) -> list[str]:
    """Let something happen to what a kernel returns for a layout; the layouts it has been called for."""
    from lors.kernels import gpu

    layouts: list[str] = []
    kernel = getattr(gpu, name)

    def changed(weight: PackedWeight, *arguments: object) -> Tensor:
        layouts.append(weight.layout)
        return change(kernel(weight, *arguments), weight.layout)

    monkeypatch.setattr(gpu, name, changed)
    return layouts


@on_triton
@pytest.mark.parametrize(
    "types",
    [
        *((dtype,) * 4 for dtype in TYPES),
        MERGE,
        (torch.float32, torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32, torch.float16),
        *((dtype,) for dtype in TYPES),
    ],
)
def test_correct_kernels_are_taken_and_checked_once(times, types, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = wrapped(monkeypatch, "merge" if len(types) > 1 else "decode", lambda T, layout: T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert check.triton_passes(CHECKED_ON, *types)
    assert layouts == ["dense", "bitmap", "2:4"][len(types) == 1 :]


def off_by_two_units(T: Tensor) -> Tensor:
    row, column = (int(place) for place in T.nonzero()[-1])
    T[row, column] *= 1 + 2 * torch.finfo(T.dtype).eps
    return T


def less_precise(T: Tensor) -> Tensor:
    """As if the factors had been rounded to TF32."""
    return torch.where(T != 0, (T.view(torch.int32) & ~0xFFF).view(torch.float32), 0.0)


@on_triton
@pytest.mark.parametrize("layout", ["dense", "bitmap", "2:4"])
@pytest.mark.parametrize(
    ("types", "change"),
    [
        (MERGE, off_by_two_units),
        ((torch.float32,) * 4, off_by_two_units),
        ((torch.float32,) * 4, less_precise),
        (MERGE, torch.Tensor.neg),
        (MERGE, lambda T: T.masked_fill(T == 0, -0.0)),
        (MERGE, lambda T: T.masked_fill(T.max() == T, float("nan"))),
        (MERGE, torch.zeros_like),
    ],
)
def test_a_wrong_merge_is_refused(times, layout: str, types, change, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(monkeypatch, "merge", lambda T, of: change(T) if of == layout else T)
    assert_refused(f"computes something else here: {layout}, ", *types)


@on_triton
def test_a_wrong_decoding_is_refused(times, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(monkeypatch, "decode", lambda W, layout: off_by_two_units(W) if layout == "2:4" else W)
    assert_refused("computes something else here: 2:4, bfloat16", torch.bfloat16)


@on_triton
@pytest.mark.parametrize("error", [RuntimeError("ptxas: no such\ntarget"), AssertionError(), KeyError("x"), OSError(2)])
def test_a_kernel_that_raises_is_refused(times, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(T: Tensor, layout: str) -> Tensor:
        raise error

    wrapped(monkeypatch, "merge", fail)
    assert_refused(r"\((ptxas: no such|AssertionError|'x'|2)\)", *MERGE)


@on_triton
def test_a_triton_that_cannot_be_imported_is_refused(times, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "gpu", raising=False)
    monkeypatch.setitem(sys.modules, "lors.kernels.gpu", None)
    assert_refused("import", *MERGE)


@on_triton
def test_a_slower_kernel_is_refused(times) -> None:
    times[:] = [1.0, 1.0] * 2 + [1.25, 1.0]  # no slower; no slower; slower
    assert_refused("takes 1.25 ms instead of 1 ms for 64 x 64, 2:4", *MERGE)


@on_triton
@pytest.mark.skipif(GPU, reason="the interpreter is the slow kernel")
def test_times_are_measured(times, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "milliseconds", milliseconds)
    assert_refused(r"takes [0-9.e+]* ms instead of 0\.[0-9]* ms for 64 x 64, dense", *MERGE)


@on_triton
def test_nothing_is_checked_while_a_graph_is_captured(times, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "capturing", lambda device: True)
    layouts = wrapped(monkeypatch, "merge", lambda T, layout: T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not check.triton_passes(CHECKED_ON, *MERGE)
        assert not layouts
        monkeypatch.setattr(check, "capturing", lambda device: False)
        assert check.triton_passes(CHECKED_ON, *MERGE)
        monkeypatch.setattr(check, "capturing", lambda device: True)
        assert check.triton_passes(CHECKED_ON, *MERGE)


def test_whether_a_graph_is_captured_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=answer: answer)
        assert check.capturing(torch.device("cuda", 1)) is answer
        assert not check.capturing(torch.device("cpu"))
    assert asked == [torch.device("cuda", 1)] * 2


@pytest.mark.parametrize("verdict", [True, False])
def test_a_cuda_device_takes_triton_if_it_has_passed_or_is_forced(verdict: bool, monkeypatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(check, "triton_passes", lambda *arguments: asked.append(arguments) or verdict)
    monkeypatch.delenv("LORS_KERNELS", raising=False)
    device = torch.device("cuda", 3)
    assert implementation(device, 1, *MERGE) == ("triton" if verdict else "eager")
    assert asked == [(device, *MERGE)]
    with forced("triton"):
        assert implementation(device, 1, *MERGE) == "triton"
    monkeypatch.setenv("LORS_KERNELS", "triton")
    assert implementation(device, 1, *MERGE) == "triton"
    monkeypatch.setenv("LORS_KERNELS", "eager")
    assert implementation(device, 1, *MERGE) == "eager"
    assert implementation(device, 1, torch.float64) == "eager"
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_this_gpu_passes_for_all_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its true times: no notice, and Triton is what is chosen."""
    monkeypatch.setattr(check, "_passed", set())
    monkeypatch.setattr(check, "_refused", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for W, factors, T in product(TYPES, repeat=3):
            assert implementation(CHECKED_ON, 2**22, W, factors, factors, T) == "triton"
        for W in TYPES:
            assert implementation(CHECKED_ON, 2**22, W) == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_graph_captures_the_eager_merge_before_the_check_and_triton_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_passed", set())
    monkeypatch.setattr(check, "_refused", set())
    W, A, B = (tensor.to(DEVICE) for tensor in problem(64, 128, 4))
    packed = pack(W, "dense")
    expected = eager.merge(packed, A, B, SCALING, W.dtype)
    for passed in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            T = merge(packed, A, B, SCALING, W.dtype)
        graph.replay()
        torch.testing.assert_close(T, expected)
        assert bool(check._passed) is passed
        merge(packed, A, B, SCALING, W.dtype)


BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lors.kernels import gpu

tiles = {"ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS, "SPAN": gpu.SPAN, "RANKS": gpu.RANKS}
for layout, N, M, BITS in ((0, 1, 1, 1), (1, 1, 1, 1), (2, 2, 4, 2)):
    for kind, factor, precision, steps in (
        ("bf16", "bf16", "tf32", 1),
        ("bf16", "fp32", "tf32x3", 1),
        ("fp32", "fp32", "ieee", 2),
    ):
        places = "u8" if layout else kind
        tensors = {"T": kind, "values": kind, "places": places, "offsets": "i64", "A": factor, "B": factor}
        numbers = dict.fromkeys(("height", "width", "r", "row_stride", "pitch"), "i32") | {"scaling": "fp32"}
        fixed = tiles | {"LAYOUT": layout, "N": N, "M": M, "BITS": BITS, "STEPS": steps, "PRECISION": precision}
        types = {name: "*" + dtype for name, dtype in tensors.items()} | numbers
        order = {name: types.get(name, "constexpr") for name in gpu._merge_kernel.arg_names}
        source = ASTSource(gpu._merge_kernel, signature=order, constexprs=fixed)
        print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_the_kernels_build_for_a_gpu() -> None:
    """To machine code for compute capability 9.0 (H100, H200)."""
    result = run(["-c", BUILD])
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(result.stdout.split()) == 9
