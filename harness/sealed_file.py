"""A file that many runs want and one of them makes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from harness.errors import one_line
from harness.files import Damaged, atomically, finite, remove, writing
from harness.processes import from_first

__all__ = ["computed_once"]

log = logging.getLogger("lors")

SEAL = 65  # bytes: 64 hexadecimal digits and the end of the line
Content = TypeVar("Content")


def _json_bytes(value: Any) -> bytes:
    return json.dumps(finite(value), allow_nan=False).encode()


def computed_once(
    file: Path,
    make: Callable[[], Content],
    encode: Callable[[Content], bytes] = _json_bytes,
    decode: Callable[[bytes], Content] = json.loads,
    *,
    key: str = "cache_root",
) -> Content:
    """Content of a file that many processes want and one computes; it is made first unless it is there.

    The file is a line with the SHA-256 of its name and content, and the content. One that is not what was written under
    this name, down to the last bit, counts as absent.

    Of several runs one makes it and the others wait; the lock ends with its process. All processes of a run
    make it together, and have what the first one has made. A damaged file
    is made again, with one warning in the log that names the reason. To an intact one nothing is written, so it may lie
    where this user cannot write.

    Args:
        file: The file.
        make: Computes the content.
        encode: Turns it into bytes; by default JSON, whose numbers are finite (inf and nan become null).
        decode: Turns them back; what it raises says that they are something else.
        key: Config key of the folder.

    Raises:
        BadInput: The folder does not take the file or the lock.
    """

    def look(report: bool) -> tuple[Content] | None:
        try:
            return (_read_sealed(file, decode),)
        except FileNotFoundError:
            return None
        except Damaged as error:
            if report:
                log.warning("%s; it is made again", error)
            return None

    def look_alone() -> tuple[Content] | None:
        with writing(key, file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(file.with_name(f"{file.name}.lock")))
        return look(report=True)

    def keep() -> bytes:
        with writing(key, file.parent):
            for leftover in (file, *file.parent.glob(f".{file.name}.*")):  # of a kill in `atomically`
                remove(leftover)
            with atomically(file, "wb") as stream:
                stream.write(_seal(file, content) + content)
        return content

    with ExitStack() as held:
        found = from_first(lambda: look(report=False)) or from_first(look_alone)
        if found is not None:
            return found[0]
        content = encode(make())
        return decode(from_first(keep))


def _read_sealed(file: Path, decode: Callable[[bytes], Content]) -> Content:
    """The content of a sealed file.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is something else.
    """
    try:
        written = file.read_bytes()
        seal, content = written[:SEAL], written[SEAL:]
        if seal != _seal(file, content):
            raise ValueError("its SHA-256 is another")
        return decode(content)
    except FileNotFoundError:
        raise
    except Exception as error:  # what is raised for an array of another form has no common type
        raise Damaged(f"{file}: damaged ({one_line(error)})") from error


def _seal(file: Path, content: bytes) -> bytes:
    """The first line of a file; its name is part of it, as a file of another key is damage too."""
    return hashlib.sha256(file.name.encode() + b"\0" + content).hexdigest().encode() + b"\n"
