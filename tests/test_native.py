"""The merge in C: against float64 and the eager merge, and what happens where it cannot be built."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_kernels import PATTERNS, SCALING, assert_one_rounding, problem

from lors.kernels import eager, forced, implementation, merge, native, ops, pack

CPU = torch.device("cpu")
LARGE = ops.COMPILE_FROM
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bool]]:
    """Function: forget the library, change the environment, and say whether there is one now."""
    caches = (native.available, native._library)

    def available(**environment: str) -> bool:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for cache in caches:
            cache.cache_clear()
        return native.available()

    yield available
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PATTERNS)
def test_float64_rounded_once(kind: str, dtype: torch.dtype, out: torch.dtype) -> None:
    """No side a multiple of a tile; the last values of a packed weight lie at the end of their memory."""
    for height, width, r in [(37, 264, 5), (1, 8, 1), (6, 72, 33), (4, 64, 256)]:
        W, A, B = problem(height, width, r, dtype, PATTERNS[kind])
        packed = pack(W, kind)
        assert_one_rounding(native.merge(packed, A, B, SCALING, out), W, A, B)
        if kind != "dense":
            assert torch.equal(native.decode(packed), W)


def test_rounding_is_that_of_torch() -> None:
    """Ties, subnormal numbers, infinities and NaN, to bfloat16."""
    W = torch.tensor(
        [[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2.0**-140, 3.4e38, -3.4e38, float("inf"), 2.0**-149]]
    )
    W = torch.cat([W, torch.tensor([[float("nan"), -float("inf"), 1e-40, 65504.0, 0.1, -0.1, 1.0, -0.0]])], dim=1)
    T = native.merge(pack(W, "dense"), torch.zeros(1, 16), torch.zeros(1, 1), 1.0, torch.bfloat16)
    torch.testing.assert_close(T, torch.where(W != 0, W, 0.0).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_part_of_a_larger_tensor_is_read_in_place() -> None:
    """Rows of another stride, and columns that are not next to each other."""
    W, A, B = problem(24, 144, 3, torch.bfloat16)
    expected = native.merge(pack(W, "dense"), A, B, SCALING, W.dtype)
    for view in (torch.cat([W, W], dim=1)[:, :144], W.t().contiguous().t()):
        assert torch.equal(native.merge(pack(view, "dense"), A, B, SCALING, W.dtype), expected)


def test_the_number_of_threads_changes_no_bit() -> None:
    W, A, B = problem(130, 200, 8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(native.merge(pack(W, "bitmap"), A, B, SCALING, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# Building it


def test_it_is_built_once(rebuilt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rebuilt(XDG_CACHE_HOME=str(tmp_path))
    (library,) = (tmp_path / "lors" / "kernels").iterdir()
    assert library.suffix == ".so"

    def refuse(*_: object) -> None:
        raise OSError("built again")

    monkeypatch.setattr(native, "_build", refuse)
    assert rebuilt()
    library.unlink()
    with pytest.warns(UserWarning, match=r"no merge in C, a slower one is taken \(built again\)"):
        assert not rebuilt()


def test_a_folder_that_takes_no_file_keeps_nothing(rebuilt, tmp_path: Path) -> None:
    (tmp_path / "lors").write_text("not a folder")
    assert rebuilt(XDG_CACHE_HOME=str(tmp_path))


def test_without_a_compiler_there_is_one_notice_and_another_implementation(rebuilt, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"no merge in C, a slower one is taken \(no C compiler: neither \$CC nor cc\)"
    ):
        assert not rebuilt(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(CPU, LARGE, torch.bfloat16) == "compiled"
    W, A, B = problem(4, 8, 2)
    with forced("native"), pytest.raises(ValueError, match="LORS_KERNELS=native: needs a CPU, a C compiler"):
        merge(pack(W, "dense"), A, B, SCALING, torch.float32)


def test_a_compiler_that_fails_is_named(rebuilt, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no merge in C.*false.*returned non-zero exit status 1"):
        assert not rebuilt(CC="false", XDG_CACHE_HOME=str(tmp_path))


def test_a_library_that_computes_something_else_is_not_used(rebuilt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "merge", lambda *arguments: torch.zeros(7, 136))
    with pytest.warns(UserWarning, match=r"native\.c computes something else here, dense torch\.float32"):
        assert not rebuilt()


def test_other_types_and_devices_are_refused() -> None:
    for device, dtype in ((CPU, torch.float16), (CPU, torch.float64), (torch.device("meta"), torch.float32)):
        with forced("native"), pytest.raises(ValueError, match="LORS_KERNELS=native: needs a CPU, a C compiler"):
            implementation(device, LARGE, dtype)
        assert implementation(device, LARGE, dtype) != "native"
