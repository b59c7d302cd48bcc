"""The Triton kernels: whether they are taken, and that they can be built.

Their numbers are tested with those of the other implementations in test_kernels: on a GPU if there is one, else in
Triton's interpreter. That has to be chosen before Triton is imported for the first time, so without a GPU both files
run again in a process of their own with TRITON_INTERPRET=1. That is slow; one shape of every kernel is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from test_kernels import GPU, INTERPRETED, SCALING, on_triton, problem
from torch import Tensor

from lors import kernels
from lors.kernels import PackedWeight, check, eager, forced, implementation, merge, pack
from lors.kernels.check import milliseconds

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lors[triton]'")
DEVICE = "cuda" if GPU else "cpu"


def run(code_or_test: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code_or_test], env=os.environ | environment, capture_output=True, text=True, check=False
    )


ONE_SHAPE = """
import torch
from lors.kernels import decode, eager, forced, mask_, merge, pack

torch.manual_seed(0)
W = torch.randn(37, 1072) * (torch.arange(1072) % 4 < 2) * (torch.rand(37, 1072) < 0.8)
A, B = torch.randn(5, 1072), torch.randn(37, 5)
for kind in ("dense", "bitmap", "2:4"):
    packed = pack(W, kind)
    with forced("triton"):
        T, decoded = merge(packed, A, B, 1.7, torch.float32), decode(packed)
        counts = mask_(D := torch.ones_like(W), packed)
    torch.testing.assert_close(T, eager.merge(packed, A, B, 1.7, torch.float32), msg=kind)
    assert torch.equal(decoded, W) and torch.equal(D, (W != 0).float()), kind
    assert torch.equal(counts, (W != 0).sum(1).to(counts)), kind
"""


@pytest.mark.skipif(GPU or INTERPRETED, reason="the other tests run here")
def test_one_shape_of_every_kernel_in_the_interpreter() -> None:
    """More than one program and more than one tile in both directions."""
    result = run(["-c", ONE_SHAPE], TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the other tests run here")
def test_in_the_interpreter() -> None:
    files = [__file__, str(Path(__file__).with_name("test_kernels.py"))]
    result = run(["-m", "pytest", "-n", "0", "-k", "triton", "-p", "no:cacheprovider", *files], TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


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

    def milliseconds(device: torch.device, *calls: Callable[[], Tensor]) -> list[float]:
        taken[:] = taken[len(calls) :] + taken[: len(calls)]
        return taken[-len(calls) :]

    monkeypatch.setattr(check, "REALISTIC", (64, 64, 4))
    monkeypatch.setattr(check, "milliseconds", milliseconds)
    return taken


def assert_refused(reason: str, *types: torch.dtype) -> None:
    """With a notice that names device and reason; from then on for all types, in silence."""
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

    def changed(*arguments: object) -> Tensor:
        layouts.append(next(each for each in arguments if isinstance(each, PackedWeight)).layout)
        return change(kernel(*arguments), layouts[-1])

    monkeypatch.setattr(gpu, name, changed)
    return layouts


@on_triton
@pytest.mark.parametrize(
    "types",
    [TYPES[:1] * 4, MERGE, (torch.bfloat16, torch.float16, torch.float32, torch.float16), TYPES[1:], TYPES[:1]],
)
def test_correct_kernels_are_taken_and_checked_once(times, types, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = wrapped(monkeypatch, {4: "merge", 2: "mask_", 1: "decode"}[len(types)], lambda T, layout: T)
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
@pytest.mark.parametrize(
    ("layout", "types", "change"),
    [
        *((layout, MERGE, off_by_two_units) for layout in ("dense", "bitmap", "2:4")),
        ("bitmap", (torch.float32,) * 4, off_by_two_units),
        ("dense", (torch.float32,) * 4, less_precise),
        ("dense", MERGE, torch.Tensor.neg),
        ("bitmap", MERGE, lambda T: T.masked_fill(T == 0, -0.0)),
        ("2:4", MERGE, lambda T: T.masked_fill(T.max() == T, float("nan"))),
        ("dense", MERGE, torch.zeros_like),
        ("2:4", (torch.bfloat16,), off_by_two_units),
    ],
)
def test_wrong_numbers_are_refused(times, layout: str, types, change, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(monkeypatch, "merge" if len(types) > 1 else "decode", lambda T, of: change(T) if of == layout else T)
    assert_refused(f"computes something else here: {layout}, ", *types)


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


def test_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that rises tenfold in the first samples, as that of an idle GPU does, favours neither."""
    calls: list[str] = []
    monkeypatch.setattr(check, "_once", lambda call, device: call() or (10.0 if len(calls) < 20 else 1.0))
    first, second = milliseconds(torch.device("cpu"), lambda: calls.append("new"), lambda: calls.append("old"))
    assert first == second and calls == ["new", "old"] * (check.WARM_UP + check.SAMPLES)


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
        for types in (*product(TYPES, repeat=2), *product(TYPES)):
            assert implementation(CHECKED_ON, 2**22, *types) == "triton"


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
        ("bf16", "bf16", "ieee", gpu.MASK),
    ):
        places = "u8" if layout else kind
        tensors = {"T": kind, "values": kind, "places": places, "offsets": "i64", "A": factor, "B": factor}
        tensors["counts"] = "i32" if steps == gpu.MASK else places
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
    assert len(result.stdout.split()) == 12
