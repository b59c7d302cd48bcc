"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, in a process of its own.

The interpreter has to be chosen before Triton is imported for the first time, so without a GPU this file runs
itself again with TRITON_INTERPRET=1. It shows that the kernels compute the right thing; that they can be built for
a GPU is shown by compiling them for one, which needs none.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_kernels import PATTERNS, SCALING, assert_one_rounding, problem

from lors.kernels import decode, eager, forced, merge, pack

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lors[triton]'")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts digits off where the hardware rounds to the nearest bfloat16: one unit instead of half of one.
SLOPPY = {torch.bfloat16: 1.0 if INTERPRETED else 0.5}
on_triton = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="runs in the process that test_in_the_interpreter starts"
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
        assert T[0, :4].tolist() == [0.0, 0.0, 3.0, float("inf")]
        assert T[0, 4].isnan()


@on_triton
def test_strides_do_not_matter() -> None:
    W, A, B = (tensor.to(DEVICE) for tensor in problem(24, 40, 3))
    views = W.t().contiguous().t(), A.t().contiguous().t(), B.repeat(1, 2)[:, :3]
    with forced("triton"):
        T = merge(pack(views[0], "dense"), *views[1:], SCALING, torch.float32)
    torch.testing.assert_close(T, eager.merge(pack(W, "dense"), A, B, SCALING, torch.float32))


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
