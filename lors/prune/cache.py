"""The pruned model, kept on disk under a key, so that a sweep prunes once.

``<directory>/<key>/`` is a plain Hugging Face folder plus ``manifest.json``, which lists the SHA-256 of every
file. It is written as ``<key>.partial/`` and renamed, so a folder under its final name was complete once; the
digests, checked at every use, say whether it still is. ``<key>.lock`` admits one process at a time: of two
that want the same key, one builds and the other waits and reuses. The lock is the operating system's and ends
with its process, however that dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def pruned_checkpoint(directory: str | Path, key: str, build: Callable[[], PreTrainedModel]) -> Path:
    """Folder of the checkpoint under ``key``; built and saved first unless an intact one is there.

    A folder that is damaged (a file missing, truncated or altered), or that an interrupted process left half
    written, is replaced, with one warning in the log that names the reason. If ``build`` fails, its error
    passes through and nothing is left under the key.

    Args:
        directory: The cache; made if it is not there.
        key: Name of the folder: letters, digits, ``_``, ``-`` and ``.``.
        build: Returns the model to save.

    Raises:
        ValueError: The key is not such a name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", key):
        raise ValueError(f"key={key!r}: allowed is a file name of letters, digits, '_', '-' and '.'")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    folder, partial = directory / key, directory / f"{key}.partial"
    with FileLock(directory / f"{key}.lock"):
        damage = _damage(folder)
        if damage is None:
            shutil.rmtree(partial, ignore_errors=True)
            return folder
        if folder.exists() or partial.exists():
            log.warning(
                "pruned checkpoint %s: %s; it is built again",
                folder,
                damage if folder.exists() else "interrupted while being written",
            )
        _remove(folder)
        _remove(partial)
        model = build()
        model.save_pretrained(partial)
        digests = {path.relative_to(partial).as_posix(): _sha256(path) for path in _files(partial)}
        (partial / MANIFEST).write_text(json.dumps({"key": key, "sha256": digests}, indent=2))
        partial.rename(folder)
    return folder


def _damage(folder: Path) -> str | None:
    """What is wrong with a stored folder, in a few words; None if it is as it was written."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())["sha256"].items()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{MANIFEST} cannot be read"
    for name, digest in digests:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} is damaged"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Delete a folder, or a file that stands where the folder belongs, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
