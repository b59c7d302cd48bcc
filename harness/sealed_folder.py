"""A folder that says whether it is as it was written.

Its seal is ``manifest.json``, written last: the name of the folder, and the SHA-256 of every file below it. At every
use it says whether the folder is whole and whether there is nothing else: ``from_pretrained`` follows whatever lies in
a folder, an ``adapter_config.json`` for one. No link is followed, neither in the place of a folder nor inside it.

`sealed_once` keeps folders under a key, so that a sweep prunes once. A folder is written as ``<key>.partial/`` and
renamed, so one under its final name was complete once. ``<key>.lock`` admits one process at a time: of two that want
the same key, one builds and the other waits and reuses. The lock is the operating system's and ends with its process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedModel

from harness.files import remove, sha256_of, write_json

__all__ = ["damage", "seal", "sealed_once"]

log = logging.getLogger("lors")

MANIFEST = "manifest.json"
FOLDER = "folder"  # in place of a digest


def seal(folder: Path, name: str | None = None) -> None:
    """Declare that all files of a folder are complete.

    Args:
        folder: The folder.
        name: The name that it will have; None: that it has.
    """
    entries = _entries(folder)
    entries.pop(MANIFEST, None)
    write_json(folder / MANIFEST, {"key": name or folder.name, "sha256": entries})


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, in a few words; None if it is as it was sealed."""
    if folder.is_symlink():
        return "it is a link"
    try:
        found = _entries(folder)
        if not found.pop(MANIFEST, None):
            return f"{MANIFEST} is missing"
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read ({error})"
    match manifest:
        case {"key": folder.name, "sha256": dict(sealed)}:
            pass
        case _:
            return f"{MANIFEST} is damaged"
    for name in sorted({*sealed, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in sealed:
            return f"{name} is not in {MANIFEST}"
        if found[name] is None or found[name] != sealed[name]:
            return f"{name} is damaged"
    return None


def sealed_once(
    directory: str | Path,
    key: str,
    build: Callable[[], PreTrainedModel],
    save: Callable[[PreTrainedModel, Path], None] = lambda model, folder: model.save_pretrained(folder),
) -> Path:
    """Folder of the model under ``key``; built and saved first unless an intact one is there.

    A folder that is damaged (an entry missing, altered, no plain file, or not in the seal), or that an interrupted
    process left half written, is replaced, with one warning in the log that names the reason. If ``build`` fails, its
    error passes through and nothing is left under the key. To an intact one nothing is written, so it may lie where
    this user cannot write.

    Args:
        directory: The cache; made if it is not there.
        key: Name of the folder: letters, digits, ``_``, ``-`` and ``.``.
        build: Returns the model to save.
        save: Saves it into a folder.

    Raises:
        ValueError: The key is not such a name.
        OSError: The directory does not take the folder or the lock.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", key):
        raise ValueError(f"key={key!r}: allowed is a file name of letters, digits, '_', '-' and '.'")
    directory = Path(directory)
    folder, partial = directory / key, directory / f"{key}.partial"
    if not os.path.lexists(partial) and damage(folder) is None:
        return folder
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / f"{key}.lock"):
        fault, interrupted = damage(folder), os.path.lexists(partial)
        remove(partial)
        if fault is None:
            return folder
        if interrupted or os.path.lexists(folder):
            reason = fault if os.path.lexists(folder) else "interrupted while being written"
            log.warning("%s: %s; it is built again", folder, reason)
        remove(folder)
        model = build()
        partial.mkdir()  # fails if something has been laid there, which saving would follow
        try:
            save(model, partial)
            seal(partial, key)
            partial.rename(folder)
        except BaseException:
            remove(partial)  # on a full disk it would be in the way of everything else
            raise
    return folder


def _entries(folder: Path) -> dict[str, str | None]:
    """The SHA-256 of every file, by its path; ``FOLDER`` for a folder, None for a link or anything else."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = sha256_of(path) if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else None
        entries[path.relative_to(folder).as_posix()] = content
    return entries
