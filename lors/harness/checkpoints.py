"""Which checkpoint of a killed run can be trusted.

The Trainer writes a checkpoint file by file into its final place, so a kill leaves a folder that looks like
one. A checkpoint counts here only with its seal: a list of its files with their SHA-256, written last and
renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

__all__ = ["newest_intact", "seal"]

logger = logging.getLogger(__name__)

SEAL = "sealed.json"


def seal(checkpoint: Path) -> None:
    """Declare that all files of `checkpoint` are complete."""
    temporary = checkpoint / (SEAL + ".tmp")
    temporary.write_text(json.dumps(_digests(checkpoint)))
    os.replace(temporary, checkpoint / SEAL)


def newest_intact(directory: Path) -> Path | None:
    """The newest checkpoint (``checkpoint-<step>``) in `directory` that is as it was sealed; None if there is
    none.

    Damaged and unfinished checkpoints that are newer are deleted, with one line of warning each.
    """
    by_step = {int(path.name.rpartition("-")[2]): path for path in directory.glob("checkpoint-*[0-9]")}
    for step in sorted(by_step, reverse=True):
        if _is_intact(by_step[step]):
            return by_step[step]
        logger.warning("%s is damaged or unfinished: going back to the checkpoint before it", by_step[step])
        shutil.rmtree(by_step[step])
    return None


def _is_intact(checkpoint: Path) -> bool:
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())
    except (OSError, ValueError):
        return False
    return sealed == _digests(checkpoint)


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file below `checkpoint`, except the seal itself, by relative path."""
    digests = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and not file.name.startswith(SEAL):
            with file.open("rb") as content:
                digests[str(file.relative_to(checkpoint))] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests
