"""Merge and mask on a CPU in C (``native.c``): W is read and decoded once, summed in registers, and T written once.

The C compiler of the machine builds it at the first use, for this very processor, in about a second. It runs on the
threads of torch, whose OpenMP library it shares. Sums are float32, so weights and T are float32 or bfloat16. Where it
cannot be built, or does not compute what ``eager.py`` computes, a notice says so once and another implementation is
taken.

The library is kept in ``$XDG_CACHE_HOME/lors/kernels`` or ``~/.cache/lors/kernels``, and never loaded on faith: a
truncated one would kill the process, a foreign one could do anything.

=========================  ======================================================================================
native-<key>.sha256        the digest of the library for a key: of source, options, compiler and processor
native-<digest>.so         the library of that digest
=========================  ======================================================================================

Each file is moved to its place in one step, the library first, so a digest never names a library that is not there yet,
however many processes build at once. Both are read without following a link, and only if they and the folder are this
user's and nobody else may write to them. A folder that is not is left alone, and what is built is then used once.

The loader takes a path, and what lies under a path may be exchanged after it was checked, by whoever may write to a
parent of the folder. So the bytes that were checked are written again, into a new folder of this process whose name
cannot be guessed, and loaded from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lors.kernels import check, usage
from lors.kernels.layout import BITMAP, DENSE, PackedWeight, group_shape

__all__ = ["TYPES", "available", "decode", "mask_", "merge"]

TYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).with_name("native.c")
# As in native.c.
ROWS, COLUMNS = 4, 64
LAYOUTS = {DENSE: 0, BITMAP: 1}  # else 2
OPTIONS = ("-O3", "-march=native", "-shared", "-fPIC")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
WORK = "work-"
ABANDONED = 3600  # seconds after which the folder of a process is that of a killed one; a build takes one

Result = TypeVar("Result")


class _Problem(ctypes.Structure):
    """``problem`` of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "places", "offsets", "panels", "B", "T", "counts")),
        *((name, ctypes.c_int64) for name in ("height", "width", "r", "stored", "stride", "pitch")),
        *((name, ctypes.c_int32) for name in ("layout", "n", "m", "bits")),
        *((name, ctypes.c_int32) for name in ("values_are_bfloat16", "T_is_bfloat16", "threads")),
    )


def merge(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """As ``eager.merge``, for ``TYPES``."""
    (height, rank), width = B.shape, A.shape[1]
    T = torch.empty(height, width, dtype=dtype, device="cpu")  # neither type nor device may be torch's default
    columns, rows = (size + -size % of for size, of in ((width, COLUMNS), (height, ROWS)))
    r = max(1, rank)  # without a rank it is a merge all the same, with its mask and its rounding
    padded_A, padded_B = (torch.zeros(size, dtype=torch.float32, device="cpu") for size in ((r, columns), (rows, r)))
    padded_A[:rank, :width] = A
    padded_B[:height, :rank] = B.float() * scaling
    panels = padded_A.view(r, columns // COLUMNS, COLUMNS).transpose(0, 1).contiguous()
    _run("merge", weight, T, panels, padded_B, r)
    return T


def decode(weight: PackedWeight) -> Tensor:
    """As ``eager.decode``."""
    W = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    _run("merge", weight, W)
    return W


def mask_(D: Tensor, weight: PackedWeight) -> Tensor:
    """As ``eager.mask_``, for ``TYPES`` and a contiguous D."""
    counts = torch.zeros(len(D), dtype=torch.float32, device="cpu")
    _run("mask", weight, D, counts=counts)
    return counts


@functools.cache
def available() -> bool:
    """Whether the library has been built and computes what it should."""
    if platform.system() not in ("Linux", "Darwin"):  # for which there is no C compiler that takes these options
        return False
    try:
        _library()
        for types in product(TYPES, repeat=4):
            check.same_numbers(sys.modules[__name__], torch.device("cpu"), *types)
        for types in (*product(TYPES, repeat=2), *product(TYPES, repeat=1)):
            check.same_numbers(sys.modules[__name__], torch.device("cpu"), *types)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        usage.notice(f"no merge in C, a slower one is taken ({reason})")
        return False
    return True


def _run(
    function: str,
    weight: PackedWeight,
    T: Tensor,
    panels: Tensor | None = None,
    B: Tensor | None = None,
    r: int = 0,
    counts: Tensor | None = None,
) -> None:
    """Call a function of native.c; a merge with r = 0 only decodes."""
    if not T.numel():
        return
    values, *places = weight.parts
    if weight.layout == DENSE and values.stride(1) != 1:
        values = values.contiguous()
    n, m, bits = group_shape(weight.layout) if weight.layout not in LAYOUTS else (1, 1, 1)
    address = [None if part is None else part.data_ptr() for part in (*places, None, None)][:2]
    problem = _Problem(
        values.data_ptr(),
        *address,
        None if panels is None else panels.data_ptr(),
        None if B is None else B.data_ptr(),
        T.data_ptr(),
        None if counts is None else counts.data_ptr(),
        *T.shape,
        r,
        values.numel(),
        0 if weight.layout == BITMAP else values.stride(0),
        places[0].stride(0) if places else 0,
        LAYOUTS.get(weight.layout, 2),
        n,
        m,
        bits,
        values.dtype is torch.bfloat16,
        T.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    getattr(_library(), function)(ctypes.byref(problem))


@functools.cache
def _library() -> ctypes.CDLL:
    """Built for this source, compiler and processor, unless that has been done before.

    Raises:
        OSError: No compiler, or a library that cannot be loaded.
        subprocess.SubprocessError: The compiler failed.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise OSError("no C compiler: neither $CC nor cc")
    version = _output([compiler, "--version"])
    what = "\0".join((SOURCE.read_text(encoding="utf-8"), " ".join(OPTIONS), version, _processor()))
    folder = _folder()
    record = folder and folder / f"native-{_digest(what.encode())[:16]}.sha256"
    if record and os.path.lexists(record):
        try:
            return _loaded(_kept(record), folder)
        except OSError as error:
            warnings.warn(f"lors: the merge in C is built again: {error}", stacklevel=2)
    content = _in_a_folder_of_its_own(folder, lambda work: _built(compiler, work / "native.so"))
    library = _loaded(content, folder)
    if record:
        with contextlib.suppress(OSError):  # it is used all the same
            _keep(content, record)
    return library


def _loaded(content: bytes, folder: Path | None) -> ctypes.CDLL:
    """The library with this very content."""

    def load(work: Path) -> ctypes.CDLL:
        file = work / "native.so"
        file.write_bytes(content)
        return ctypes.CDLL(str(file))

    return _in_a_folder_of_its_own(folder, load)


def _in_a_folder_of_its_own(parent: Path | None, do: Callable[[Path], Result]) -> Result:
    """What ``do`` returns for a new folder, which goes afterwards; in ``parent`` if that has room for it."""
    try:
        with tempfile.TemporaryDirectory(prefix=WORK, dir=parent) as work:
            return do(Path(work))
    except OSError:  # read-only, full, or nothing is executed there
        if parent is None:
            raise
        return _in_a_folder_of_its_own(None, do)


def _folder() -> Path | None:
    """Where libraries are kept; None if that is not, or cannot be made, a folder that only this user writes to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lors" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if status.st_mode & OTHERS_WRITE:
            folder.chmod(0o700)
    except OSError:
        return None
    return folder


def _kept(record: Path) -> bytes:
    """The library that a record names, if it is what was built.

    Raises:
        OSError: It is not, or one of the two files cannot be trusted.
    """
    digest = _read(record).decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise OSError(f"{record} holds no digest")
    library = record.with_name(f"native-{digest}.so")
    content = _read(library)
    if _digest(content) != digest:
        raise OSError(f"{library} is damaged")
    return content


def _keep(content: bytes, record: Path) -> None:
    """Put a library where its record, written afterwards, says; what killed processes have left goes."""
    digest = _digest(content)
    folder = record.parent
    for work in folder.glob(f"{WORK}*"):
        if time.time() - work.lstat().st_mtime > ABANDONED:
            shutil.rmtree(work, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=WORK, dir=folder) as work:
        for place, written in ((folder / f"native-{digest}.so", content), (record, digest.encode())):
            file = Path(work) / place.name
            file.touch(mode=0o600)
            file.write_bytes(written)
            file.replace(place)


def _read(file: Path) -> bytes:
    """The content of a plain file that is this user's own.

    Raises:
        OSError: It is a link, something other than a file, someone else's, or others may write to it.
    """
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:  # a pipe must not block
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
            raise OSError(f"{file} is not a file that only this user writes to")
        return opened.read()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _built(compiler: str, file: Path) -> bytes:
    _build(compiler, file)
    return _read(file)


def _build(compiler: str, file: Path) -> None:
    command = [compiler, *OPTIONS, str(SOURCE), "-o", str(file)]
    try:
        _output([*command, "-fopenmp"])
    except subprocess.CalledProcessError:  # Apple's compiler has no OpenMP of its own; one thread, then
        _output(command)


def _output(command: list[str]) -> str:
    """What a command prints; what it writes is nobody else's."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, umask=0o077).stdout


def _processor() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
