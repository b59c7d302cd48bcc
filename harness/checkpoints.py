"""Which checkpoint of a killed run can be trusted.

The Trainer writes a checkpoint file by file into its final place, so a kill leaves a folder that looks like
one. A checkpoint counts here only with its seal: a list of its files with their SHA-256, written last and
renamed into place. No link is followed, neither in the place of a checkpoint nor inside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.errors import one_line
from harness.store import atomically, remove

__all__ = ["drop_older", "newest_intact", "seal", "whole_or_gone"]

logger = logging.getLogger("lors")

SEAL = "sealed.json"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def seal(checkpoint: Path) -> None:
    """Declare that all files of `checkpoint` are complete."""
    digests = _digests(checkpoint)
    with atomically(checkpoint / SEAL, "w", encoding="utf-8") as file:
        json.dump(digests, file)


def newest_intact(directory: Path) -> Path | None:
    """The newest checkpoint (``checkpoint-<step>``) in `directory` that is as it was sealed; None if there is
    none.

    What is newer, whatever it is, is in the way of the checkpoints to come and is deleted; what has another name is
    left alone. One line of warning each.
    """
    for path in sorted(directory.glob("checkpoint-*")):
        if NAME.fullmatch(path.name) is None:
            logger.warning("%s is no checkpoint of this run: left alone", path)
    for path in _newest_first(directory):
        if _is_intact(path):
            return path
        logger.warning("%s is damaged or unfinished: going back to the checkpoint before it", path)
        remove(path)
    return None


def drop_older(directory: Path, keep: int) -> None:
    """Delete all checkpoints in `directory` but the newest `keep`."""
    for path in _newest_first(directory)[keep:]:
        remove(path)


@contextmanager
def whole_or_gone(checkpoint: Path) -> Iterator[None]:
    """Write into `checkpoint`. If that fails the folder goes, so that a full disk has room for what tells of it.

    Raises:
        OSError: One line with the folder, the reason and the space that was left. PyTorch's writer says of a full disk
            only that a position was unexpected.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        remove(checkpoint)
        raise OSError(f"{checkpoint}: cannot be written ({one_line(error)}); {free:.1f} MiB were free") from error


def _newest_first(directory: Path) -> list[Path]:
    """Everything that has the name of a checkpoint."""
    steps = {path: NAME.fullmatch(path.name) for path in directory.glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)


def _is_intact(checkpoint: Path) -> bool:
    seal = checkpoint / SEAL
    if checkpoint.is_symlink() or seal.is_symlink() or not seal.is_file():
        return False
    try:
        sealed = json.loads(seal.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return sealed == _digests(checkpoint)


def _digests(checkpoint: Path) -> dict[str, str | None]:
    """SHA-256 of every file below `checkpoint`, except the seal itself, by relative path; None for a link, a pipe."""
    digests = {}
    for entry in sorted(checkpoint.rglob("*")):
        name = entry.relative_to(checkpoint).as_posix()
        if name == SEAL or (entry.is_dir() and not entry.is_symlink()):
            continue
        digests[name] = None
        if entry.is_file() and not entry.is_symlink():
            with entry.open("rb") as content:
                digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests
