"""Files that are whole or not there, and whose failures are one line; digests of what is in them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from harness.errors import BadInput, one_line

__all__ = ["Damaged", "atomically", "check_writable", "content_digest", "finite", "remove", "sha256_of", "write_json"]
__all__ += ["write_text", "writing"]

# Bytes that a folder has to take before a run starts in it.
PROBE = 2**16


class Damaged(ValueError):  # noqa: N818 - named for what happened
    """A file is not what was written; the message is one line that names it."""


def write_json(file: Path, value: Any) -> None:
    """Write strict JSON atomically; numbers that JSON does not have (inf, nan) become null."""
    write_text(file, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomically(file, "w", encoding="utf-8") as stream:
        stream.write(text)


@contextmanager
def atomically(file: Path, mode: str, **options: Any) -> Iterator[IO]:
    """Open a file under a temporary name in the same folder; at the end flush it to the disk and rename it.

    Nobody can guess the name, and nothing that lies under it is opened or followed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would be in the way of everything else
        raise


@contextmanager
def writing(key: str, folder: Path) -> Iterator[None]:
    """What goes wrong with files inside is the user's to mend: one line that names the config key and the folder."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{key}: cannot write to {folder} ({one_line(error)})") from error


def check_writable(key: str, folder: Path) -> None:
    """Make the folder and see that it takes a file and a lock.

    Raises:
        BadInput: It does not: no permission, no space left, a file in its place, or a file system without locks, on
            which two processes would make the same run. `key` is the one to change.
    """
    with writing(key, folder):
        probe = folder / f".probe.{secrets.token_hex(8)}.tmp"
        write_text(probe, "\0" * PROBE)
        with probe.open("r+b") as stream:
            probe.unlink()
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(f"its file system must have locks, flock: {one_line(error)}") from error


def remove(entry: Path) -> None:
    """Delete a file, a folder, or a link but not what it leads to, if there is one.

    Raises:
        OSError: It cannot be deleted.
    """
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """SHA-256 of what is in a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_digest(value: Any) -> str:
    """SHA-256 of a value made of JSON types, however its file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def finite(value: Any) -> Any:
    """A value made of JSON types, with None for numbers that JSON does not have (inf, nan)."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
