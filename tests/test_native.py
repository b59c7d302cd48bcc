"""The library in C: built once, kept where only its user writes, never loaded when it is not to be trusted."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import SCALING, problem
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
def cache(tmp_path: Path, rebuilt, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache in which a library has just been put, of which no number is asked here."""
    monkeypatch.setattr(native.check, "same_numbers", lambda *_: None)
    assert rebuilt(XDG_CACHE_HOME=str(tmp_path)) and builds
    builds.clear()
    return tmp_path / "lors" / "kernels"


@pytest.fixture
def in_silence() -> Iterator[None]:
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def files_of(cache: Path) -> tuple[Path, Path]:
    """The record and the library; there is nothing else, and nobody else may read or write them."""
    record, library = sorted(cache.iterdir(), key=lambda file: file.suffix != ".sha256")
    assert library.name == f"native-{hashlib.sha256(library.read_bytes()).hexdigest()}.so"
    assert record.read_text() == library.name.removeprefix("native-").removesuffix(".so")
    assert [stat.S_IMODE(file.lstat().st_mode) for file in (cache, record, library)] == [0o700, 0o600, 0o600]
    return record, library


def test_it_is_built_once(rebuilt, cache: Path, builds: list[Path], in_silence) -> None:
    files_of(cache)
    cache.chmod(0o775)  # as an earlier version left it where a new file is the group's (umask 002)
    assert rebuilt() and not builds
    files_of(cache)[RECORD].unlink()  # without a record there is nothing
    old, young = (cache / f"{native.WORK}{name}" for name in ("old", "young"))  # of a process killed, or at work
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    assert rebuilt() and len(builds) == 1
    assert young.exists() and not old.exists()
    young.rmdir()
    files_of(cache)


# ---- what lies there is not to be trusted


def exchange(file: Path, content: bytes) -> None:
    """Under the old name, but not in place: this process has the old file in its memory."""
    file.unlink()
    file.write_bytes(content)


def flip_a_bit(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    exchange(library, content)


def link(file: Path) -> None:
    file.symlink_to(file.rename(file.parents[2] / "elsewhere"))


def make_it_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


RECORD, LIBRARY = 0, 1
DAMAGES = {
    "truncated": (LIBRARY, lambda file: exchange(file, file.read_bytes()[:5000])),
    "another bit": (LIBRARY, flip_a_bit),
    "lost": (LIBRARY, Path.unlink),
    "record truncated": (RECORD, lambda file: os.truncate(file, 10)),
    "record of another place": (RECORD, lambda file: file.write_text("../native")),
    "link": (LIBRARY, link),
    "record a link": (RECORD, link),
    "pipe": (LIBRARY, make_it_a_pipe),
    "group may write": (LIBRARY, lambda file: file.chmod(0o620)),
    "others may write the record": (RECORD, lambda file: file.chmod(0o602)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_to_be_trusted_is_built_again(damage: str, rebuilt, cache: Path, builds: list[Path]) -> None:
    """With one notice, and in its place, so that the next process finds a good one."""
    which, change = DAMAGES[damage]
    change(files_of(cache)[which])
    with pytest.warns(UserWarning, match="the merge in C is built again: .*native-") as notices:
        assert rebuilt()
    assert len(notices) == len(builds) == 1
    files_of(cache)
    assert rebuilt() and len(builds) == 1


def test_a_file_of_someone_else_is_replaced(rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch) -> None:
    library = files_of(cache)[LIBRARY].stat()

    def status(descriptor: int) -> os.stat_result:
        """The first library belongs to another user."""
        true = os.stat(descriptor)
        of_another = (true.st_ino, true.st_size) == (library.st_ino, library.st_size)
        return os.stat_result([*true[:4], true.st_uid + of_another, *true[5:]])

    monkeypatch.setattr(os, "fstat", status)
    with pytest.warns(UserWarning, match="built again: .*is not a file that only this user writes to"):
        assert rebuilt()
    assert len(builds) == 1
    assert rebuilt() and len(builds) == 1


@pytest.mark.parametrize("linked", [True, False])
def test_a_folder_of_someone_else_and_a_link_are_left_alone(
    linked: bool, rebuilt, cache: Path, builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither read nor written, though what lies there is intact."""
    before = {file: file.stat().st_mtime_ns for file in files_of(cache)}
    if linked:
        cache.symlink_to(cache.rename(cache.parents[1] / "elsewhere"))
    else:
        status = Path.lstat

        def of_another(path: Path) -> os.stat_result:
            true = status(path)
            return os.stat_result([*true[:4], true.st_uid + (path == cache), *true[5:]])

        monkeypatch.setattr(Path, "lstat", of_another)
    assert rebuilt() and rebuilt() and len(builds) == 2
    assert not any(file.resolve().is_relative_to(cache.resolve()) for file in builds)
    assert before == {file: file.stat().st_mtime_ns for file in cache.iterdir()}


def test_what_was_checked_is_what_is_loaded(rebuilt, cache: Path, builds, in_silence, monkeypatch) -> None:
    """Who may write to a parent puts another folder in its place, between the check and the loading."""
    load, (_, library) = ctypes.CDLL, files_of(cache)

    def load_late(path: str) -> ctypes.CDLL:
        exchange(library, b"something else")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", load_late)
    assert rebuilt() and not builds


# ---- folders of every kind


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
    flip_a_bit(files_of(cache)[LIBRARY])
    for count in (1, 2):  # a damaged one is not used, and stays
        with pytest.warns(UserWarning, match=r"built again: .*\.so is damaged"):
            assert rebuilt() and len(builds) == count


def test_where_nothing_is_executed_it_is_loaded_from_elsewhere(
    rebuilt, cache: Path, builds, in_silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache on a file system mounted noexec, or full."""
    load = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if cache in Path(path).parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert rebuilt() and not builds


def load_at_once(start: Any, notices: Any) -> None:
    """In a process of its own; without torch's kernels, whose threads do not survive a fork."""
    native._library.cache_clear()
    start.wait()
    with warnings.catch_warnings(record=True) as caught:
        native._library()
    notices.put([str(notice.message) for notice in caught])


@pytest.mark.dist
def test_processes_that_build_at_once_all_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing, and from a damaged library; a notice is given in the second case only."""
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
        flip_a_bit(files_of(tmp_path / "lors" / "kernels")[LIBRARY])


# ---- no library


def test_without_a_compiler_there_is_one_notice_and_another_implementation(rebuilt, tmp_path: Path) -> None:
    notice = "no merge in C, a slower one is taken (no C compiler: neither $CC nor cc)"
    with pytest.warns(UserWarning) as caught:
        assert not rebuilt(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert notice in str(caught[0].message)
    assert notice in in_use()["notices"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(CPU, LARGE, torch.bfloat16) == "compiled"
    W, A, B = problem(4, 8, 2)
    with forced("native"), pytest.raises(ValueError, match="LORS_KERNELS=native: needs a CPU, a C compiler"):
        merge(pack(W, "dense"), A, B, SCALING, torch.float32)
    with pytest.warns(UserWarning, match=r"no merge in C.*false.*returned non-zero exit status 1"):
        assert not rebuilt(CC="false")


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
