"""The merge in C: against float64 and the eager merge, and what happens where it cannot be built."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import PATTERNS, SCALING, assert_one_rounding, problem
from torch import Tensor

from lors.kernels import PackedWeight, forced, implementation, in_use, merge, native, ops, pack

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


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_defaults_of_torch_do_not_matter(default: torch.dtype) -> None:
    W, A, B = problem(13, 72, 3, torch.bfloat16)
    packed = pack(W, "bitmap")
    expected = native.merge(packed, A, B, SCALING, torch.float32)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            T = native.merge(packed, A, B, SCALING, torch.float32)
            decoded = native.decode(packed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(T, expected) and torch.equal(decoded, W)


# Building it


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library, compiled once for the tests below."""
    file = tmp_path_factory.mktemp("built") / "native.so"
    native._build(shutil.which(os.environ.get("CC", "cc")), file)
    return file


@pytest.fixture
def builds(built: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that have been built, since the cache is there; a copy takes the place of the compiler."""
    files: list[Path] = []

    def build(compiler: str, file: Path) -> None:
        files.append(file)
        shutil.copyfile(built, file)
        file.chmod(0o600)  # as the compiler is told to

    monkeypatch.setattr(native, "_build", build)
    return files


@pytest.fixture
def cache(tmp_path: Path, rebuilt, builds: list[Path]) -> Path:
    """The folder of a cache in which a library has just been put."""
    assert rebuilt(XDG_CACHE_HOME=str(tmp_path)) and builds
    builds.clear()
    return tmp_path / "lors" / "kernels"


def files_of(cache: Path) -> tuple[Path, Path]:
    """The record and the library; there is nothing else, and nobody else may read or write them."""
    record, library = sorted(cache.iterdir(), key=lambda file: file.suffix != ".sha256")
    assert library.name == f"native-{hashlib.sha256(library.read_bytes()).hexdigest()}.so"
    assert record.read_text() == library.name.removeprefix("native-").removesuffix(".so")
    assert [stat.S_IMODE(file.lstat().st_mode) for file in (cache, record, library)] == [0o700, 0o600, 0o600]
    return record, library


def test_it_is_built_once(rebuilt, cache: Path, builds: list[Path]) -> None:
    record, _ = files_of(cache)
    assert rebuilt() and not builds
    record.unlink()  # without a record there is nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rebuilt() and len(builds) == 1
    files_of(cache)


def exchange(file: Path, content: bytes) -> None:
    """Under the old name, but not in place: this process has the old file in its memory."""
    file.unlink()
    file.write_bytes(content)


def truncate(record: Path, library: Path) -> None:
    exchange(library, library.read_bytes()[:5000])


def flip_a_bit(record: Path, library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    exchange(library, content)


def lose_the_library(record: Path, library: Path) -> None:
    library.unlink()


def truncate_the_record(record: Path, library: Path) -> None:
    os.truncate(record, 10)


def point_elsewhere(record: Path, library: Path) -> None:
    record.write_text("../native")


def link_the_library(record: Path, library: Path) -> None:
    elsewhere = library.parents[2] / "good.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def link_the_record(record: Path, library: Path) -> None:
    elsewhere = record.parents[2] / "record"
    record.rename(elsewhere)
    record.symlink_to(elsewhere)


def make_it_a_pipe(record: Path, library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


def let_the_group_write(record: Path, library: Path) -> None:
    library.chmod(0o620)


def let_others_write_the_record(record: Path, library: Path) -> None:
    record.chmod(0o602)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        lose_the_library,
        truncate_the_record,
        point_elsewhere,
        link_the_library,
        link_the_record,
        make_it_a_pipe,
        let_the_group_write,
        let_others_write_the_record,
    ],
)
def test_what_is_not_to_be_trusted_is_built_again(damage, rebuilt, cache: Path, builds: list[Path]) -> None:
    """With one notice, and in its place, so that the next process finds a good one."""
    damage(*files_of(cache))
    with pytest.warns(UserWarning, match="the merge in C is built again: .*native-") as notices:
        assert rebuilt()
    assert len(notices) == len(builds) == 1
    files_of(cache)
    assert rebuilt() and len(builds) == 1


def test_a_file_of_someone_else_is_replaced(rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch) -> None:
    library = files_of(cache)[1].stat()

    def status(descriptor: int) -> os.stat_result:
        """The first library belongs to another user."""
        true = os.stat(descriptor)
        of_another = (true.st_ino, true.st_size) == (library.st_ino, library.st_size)
        return os.stat_result([*true[:4], true.st_uid + of_another, *true[5:]])

    monkeypatch.setattr(os, "fstat", status)
    with pytest.warns(UserWarning, match="built again: .*is not a file that only this user writes to") as notices:
        assert rebuilt()
    assert len(notices) == len(builds) == 1
    assert rebuilt() and len(builds) == 1


def test_a_folder_of_someone_else_is_left_alone(rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither read nor written, though what lies there is intact."""
    before = {file: file.stat().st_mtime_ns for file in files_of(cache)}
    status = Path.lstat

    def of_another(path: Path) -> os.stat_result:
        true = status(path)
        return os.stat_result([*true[:4], true.st_uid + (path == cache), *true[5:]])

    monkeypatch.setattr(Path, "lstat", of_another)
    for count in (1, 2):
        assert rebuilt() and len(builds) == count
    assert all(cache not in file.parents for file in builds)
    assert before == {file: file.stat().st_mtime_ns for file in files_of(cache)}


def test_a_link_in_place_of_the_folder_is_not_followed(rebuilt, cache: Path, builds: list[Path]) -> None:
    elsewhere = cache.rename(cache.parents[1] / "elsewhere")
    cache.symlink_to(elsewhere)
    assert rebuilt() and len(builds) == 1
    assert elsewhere not in builds[0].parents and cache not in builds[0].parents


def test_a_folder_that_the_group_may_write_to_is_closed(rebuilt, cache: Path, builds: list[Path]) -> None:
    """As an earlier version left them where a new file is the group's (umask 002)."""
    cache.chmod(0o775)
    assert rebuilt() and not builds
    files_of(cache)


def test_a_folder_that_cannot_be_written_is_read(rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tempfile.TemporaryDirectory

    def refuse(prefix: str, dir: Path | None) -> tempfile.TemporaryDirectory:
        """What a read-only folder does, to a superuser too."""
        if dir is not None:
            raise PermissionError(f"[Errno 13] Permission denied: {dir}")
        return directory(prefix=prefix)

    def refuse_to_move(file: Path, place: Path) -> None:
        raise PermissionError(f"[Errno 13] Permission denied: {place}")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(Path, "replace", refuse_to_move)
    assert rebuilt() and not builds
    truncate(*files_of(cache))
    for count in (1, 2):  # a damaged one is not used, and stays
        with pytest.warns(UserWarning, match=r"built again: .*\.so is damaged"):
            assert rebuilt() and len(builds) == count


def test_what_was_checked_is_what_is_loaded(rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write to a parent puts another folder in its place, between the check and the loading."""
    load, (_, library) = ctypes.CDLL, files_of(cache)

    def load_late(path: str) -> ctypes.CDLL:
        exchange(library, b"something else")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", load_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rebuilt() and not builds


def test_where_nothing_is_executed_it_is_loaded_from_elsewhere(
    rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache on a file system mounted noexec, or full."""
    load = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if cache in Path(path).parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rebuilt() and not builds


def test_what_a_killed_process_left_is_cleared(rebuilt, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour later, when something is built; a younger folder may be that of a process at work."""
    monkeypatch.setattr(native, "_build", lambda compiler, file: os.kill(os.getpid(), signal.SIGKILL))
    for file in files_of(cache):
        file.unlink()
    for _ in range(2):
        victim = multiprocessing.get_context("fork").Process(target=native._library.__wrapped__)
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    old, young = cache.iterdir()
    os.utime(old, (0, 0))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert rebuilt() and young.exists() and not old.exists()
    young.rmdir()
    files_of(cache)


def load_at_once(start: Any, notices: Any) -> None:
    """In a process of its own; without torch's kernels, whose threads do not survive a fork."""
    native._library.cache_clear()
    start.wait()
    with warnings.catch_warnings(record=True) as caught:
        native._library()
    notices.put([str(notice.message) for notice in caught])


def test_processes_that_build_at_once_all_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing, and from a truncated library; a notice is given in the second case only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    for said in (set(), {0, 1}):
        start, notices = context.Barrier(4), context.Queue()
        processes = [context.Process(target=load_at_once, args=(start, notices)) for _ in range(4)]
        for process in processes:
            process.start()
        assert {len(notices.get(timeout=60)) for _ in processes} <= said | {0}
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        truncate(*files_of(tmp_path / "lors" / "kernels"))


def test_a_folder_that_takes_no_file_keeps_nothing(rebuilt, tmp_path: Path) -> None:
    (tmp_path / "lors").write_text("not a folder")
    assert rebuilt(XDG_CACHE_HOME=str(tmp_path))


def test_without_a_compiler_there_is_one_notice_and_another_implementation(rebuilt, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"no merge in C, a slower one is taken \(no C compiler: neither \$CC nor cc\)"
    ):
        assert not rebuilt(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert "no merge in C, a slower one is taken (no C compiler: neither $CC nor cc)" in in_use()["notices"]
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
    """Off by a unit in the fifth column of one row of a bfloat16 T made of a bitmap, say."""
    true_merge = native.merge

    def wrong(weight: PackedWeight, *arguments: object) -> Tensor:
        T = true_merge(weight, *arguments)
        if T.dtype is torch.bfloat16 and weight.layout == "bitmap":
            column = int(T[9].nonzero()[4])
            T[9, column] *= 1 + 2**-6
        return T

    monkeypatch.setattr(native, "merge", wrong)
    with pytest.warns(UserWarning, match=r"native computes something else here: bitmap, float32, .*, bfloat16\)"):
        assert not rebuilt()
    monkeypatch.undo()
    monkeypatch.setattr(native, "decode", lambda weight: torch.full(weight.shape, -0.0, dtype=weight.dtype))
    with pytest.warns(UserWarning, match=r"native computes something else here: bitmap, float32\)"):
        assert not rebuilt()


def test_other_types_and_devices_are_refused() -> None:
    for device, dtype in ((CPU, torch.float16), (CPU, torch.float64), (torch.device("meta"), torch.float32)):
        with forced("native"), pytest.raises(ValueError, match="LORS_KERNELS=native: needs a CPU, a C compiler"):
            implementation(device, LARGE, dtype)
        assert implementation(device, LARGE, dtype) != "native"
