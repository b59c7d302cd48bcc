"""The merge on a CPU in C (``native.c``): W is read and decoded once, summed in registers, and T written once.

The C compiler of the machine builds it at the first use, for this very processor, in about a second; the library is
kept in ``$XDG_CACHE_HOME/lors`` or ``~/.cache/lors``. It runs on the threads of torch, whose OpenMP library it shares.
Sums are float32, so weights and T are float32 or bfloat16. Where it cannot be built, or does not compute what
``eager.py`` computes, a notice says so once and another implementation is taken.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lors.kernels import eager
from lors.kernels.layout import BITMAP, DENSE, PackedWeight, group_shape, pack

__all__ = ["TYPES", "available", "decode", "merge"]

TYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).with_name("native.c")
# As in native.c.
ROWS, COLUMNS = 4, 64
LAYOUTS = {DENSE: 0, BITMAP: 1}  # else 2
OPTIONS = ("-O3", "-march=native", "-shared", "-fPIC")


class _Problem(ctypes.Structure):
    """``problem`` of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "places", "offsets", "panels", "B", "T")),
        *((name, ctypes.c_int64) for name in ("height", "width", "r", "stored", "stride", "pitch")),
        *((name, ctypes.c_int32) for name in ("layout", "n", "m", "bits")),
        *((name, ctypes.c_int32) for name in ("values_are_bfloat16", "T_is_bfloat16", "threads")),
    )


def merge(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """As ``eager.merge``, for ``TYPES``."""
    (height, r), width = B.shape, A.shape[1]
    T = torch.empty(height, width, dtype=dtype)
    columns, rows = (size + -size % of for size, of in ((width, COLUMNS), (height, ROWS)))
    padded_A, padded_B = torch.zeros(r, columns), torch.zeros(rows, r)
    padded_A[:, :width] = A
    torch.mul(B.float(), scaling, out=padded_B[:height])
    panels = padded_A.view(r, columns // COLUMNS, COLUMNS).transpose(0, 1).contiguous()
    _run(weight, T, panels, padded_B, r)
    return T


def decode(weight: PackedWeight) -> Tensor:
    """As ``eager.decode``."""
    W = torch.empty(weight.shape, dtype=weight.dtype)
    _run(weight, W, None, None, 0)
    return W


@functools.cache
def available() -> bool:
    """Whether the library has been built and computes what it should."""
    if platform.system() not in ("Linux", "Darwin"):  # for which there is no C compiler that takes these options
        return False
    try:
        _library()
        _check()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"lors: no merge in C, a slower one is taken ({reason})", stacklevel=2)
        return False
    return True


def _run(weight: PackedWeight, T: Tensor, panels: Tensor | None, B: Tensor | None, r: int) -> None:
    """Fill T; r = 0 only decodes."""
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
    _library().merge(ctypes.byref(problem))


def _check() -> None:
    """Against the eager merge, every layout and both types; sums of small whole numbers are exact."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((7, 136), (3, 136), (7, 3)))
    W.view(7, -1, 4)[..., ::2] = 0
    for layout in (*LAYOUTS, "2:4"):
        for dtype in TYPES:
            packed = pack(W.to(dtype), layout)
            if not torch.equal(merge(packed, A, B, 1.0, dtype), eager.merge(packed, A, B, 1.0, dtype)):
                raise RuntimeError(f"native.c computes something else here, {layout} {dtype}")


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
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lors" / "kernels"
    file = folder / f"native-{name}.so"
    if file.exists():
        return ctypes.CDLL(str(file))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder)
    except OSError:  # nothing is kept, then
        work = tempfile.TemporaryDirectory()
        file = None
    with work:
        built = Path(work.name) / "native.so"
        _build(compiler, built)
        library = ctypes.CDLL(str(built))
        if file is not None:
            os.replace(built, file)
    return library


def _build(compiler: str, file: Path) -> None:
    command = [compiler, *OPTIONS, str(SOURCE), "-o", str(file)]
    try:
        _output([*command, "-fopenmp"])
    except subprocess.CalledProcessError:  # Apple's compiler has no OpenMP of its own; one thread, then
        _output(command)


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _processor() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
