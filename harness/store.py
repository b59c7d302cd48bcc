"""The run folder: ``<runs_root>/<name>/<key>/`` with ``result.json``, ``config.yaml``, ``log.txt`` and what
the run saves; and which runs need not be made again.

Three promises. A good result gives way only to a good one: where one lies, the run is repeated in the folder
``.repeat`` below and moved over it when it has ended well. Every JSON file carries the SHA-256 of its content: one that
was changed or cut counts as absent. Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from harness.errors import one_line
from harness.files import Damaged, content_digest, finite, remove, write_json, write_text, writing
from harness.identity import raised_versions, run_key
from harness.sealed_file import computed_once

__all__ = ["Busy", "RunStore", "read_result"]

log = logging.getLogger("lors")

LOCK, RESULT, REPEAT = ".lock", "result.json", ".repeat"
TEMPORARY = ".*.tmp"
STATUSES = ("ok", "failed", "oom")


class Busy(Exception):  # noqa: N818 - named for what happened
    """Another process is at this run."""


class RunStore:
    """One run folder.

    Args:
        directory: The folder; created when something is written.
        key: Key of the run; the name of the folder unless it is given.
        stages: Versions above 1 that are part of the key, see `identity.raised_versions`.
    """

    def __init__(self, directory: Path, key: str | None = None, stages: Mapping[str, int] | None = None) -> None:
        self.directory = directory
        self.key = key or directory.name
        self.stages = stages or {}
        self.parts = directory / "parts"
        self.result_file = directory / RESULT

    @classmethod
    def of(cls, cfg: DictConfig) -> RunStore:
        """The folder of the run of a resolved config."""
        directory = Path(cfg.runs_root).expanduser() / cfg.name / run_key(cfg)
        return cls(directory, stages=raised_versions(cfg.mode, cfg.prune))

    def result(self) -> dict[str, Any] | None:
        """The result; None if the run has written none, or, with a line of warning, if the file is damaged."""
        try:
            result = read_result(self.result_file)
            if result is not None and result["key"] != self.key:
                raise Damaged(f"{self.result_file}: belongs to the run {result['key']}")
        except Damaged as error:
            log.warning("%s; it counts as absent", error)
            return None
        return result

    def finished(self, cfg: DictConfig, since: int | None = None) -> dict[str, Any] | None:
        """The result that makes the run of `cfg` unnecessary, if there is one.

        Args:
            cfg: The resolved config: ``force``, ``save_merged``, ``save_base``.
            since: When the sweep began that the run belongs to (see `written_since`). A result that was
                written since then stands, failed or not: another sweep on the same folder has made it.
        """
        result = self.result()
        if result is None or (since is not None and self.written_since(since)):
            return result
        merges = result.get("end_state") != "adapter" or result["variants"]
        asked = {"merged": cfg.save_merged and merges, "base": cfg.save_base}
        wanted = [name for name in asked if asked[name] and cfg.mode != "simulate"]
        complete = result["status"] == "ok" and all(result["artifacts"].get(name) for name in wanted)
        return result if complete and not cfg.force else None

    def written_since(self, moment: int) -> bool:
        """Whether the result file was written after `moment`, in nanoseconds on the clock of its file system."""
        try:
            return self.result_file.stat().st_mtime_ns > moment
        except FileNotFoundError:
            return False

    def attempt(self, cfg: DictConfig) -> RunStore:
        """The folder in which the run is made now, rid of what kills have left there; hold the lock.

        It is this one, or ``.repeat`` below it if a good result is here; ``config.yaml`` is written. With ``force``
        nothing of an earlier start is taken over, but for that of an interrupted start with ``force``.
        """
        good = self._is_good()
        attempt = RunStore(self.directory / REPEAT, self.key) if good else self
        if cfg.force and not (attempt.parts / "forced.sealed").exists():
            attempt.clear()
            attempt.once("forced", lambda: True)
        attempt.directory.mkdir(parents=True, exist_ok=True)
        for leftover in attempt.directory.glob(TEMPORARY):
            remove(leftover)
        with writing("runs_root", attempt.directory):
            write_text(attempt.directory / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        return attempt

    def accept(self, attempt: RunStore) -> None:
        """Move the good result of `attempt`, a folder below this one, over the result here; hold the lock.

        A kill in the middle does no harm: `settle` does the rest.
        """
        if attempt.directory == self.directory or not attempt._is_good():
            return
        entries = {entry.name: entry for entry in attempt.directory.iterdir()}
        for name in sorted(entries, key=lambda name: name == RESULT):  # the result last
            target = self.directory / name
            if target.is_dir() or entries[name].is_dir():
                remove(target)
            entries[name].replace(target)
        self._sweep_out(keep={*self._artifacts(), RESULT})

    def settle(self) -> None:
        """Move a repeated run over the old one that had ended well when its process was killed; hold the lock."""
        self.accept(RunStore(self.directory / REPEAT, self.key))

    def write(self, result: Mapping[str, Any]) -> None:
        """Write the result file; a reader sees the old one or the new one, never half of it.

        Raises:
            BadInput: The folder does not take it; what the run has finished is still there.
        """
        with writing("runs_root", self.directory):
            value = finite({**{name: item for name, item in result.items() if name != "sha256"}, "key": self.key})
            write_json(self.result_file, {**value, "sha256": content_digest(value)})
        (self.parts / "forced.sealed").unlink(missing_ok=True)

    def once(self, part: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of one part of the run; computed unless an interrupted start got so far."""
        return computed_once(self.parts / f"{part}.sealed", compute, key="runs_root")

    @contextmanager
    def artifact(self, name: str) -> Iterator[Path]:
        """Where to write an artifact: a new folder, which gets its name at the end, in place of whatever has it."""
        folder = self.directory / name
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            remove(folder)
            temporary.replace(folder)
        except BaseException:
            remove(temporary)
            raise

    def drop_progress(self) -> None:
        """Delete what only an interrupted run needs: finished parts and checkpoints of the training."""
        # The parts last: while they are there something is left.
        for entry in (*self.directory.glob("checkpoint*"), self.parts):
            remove(entry)

    def clear(self) -> None:
        """Delete everything in the folder, its lock excepted."""
        self._sweep_out(keep=())

    def busy(self) -> bool:
        """Whether another process is at this run."""
        if not self.directory.is_dir():
            return False
        try:
            with self.lock():
                return False
        except Busy:
            return True

    @contextmanager
    def lock(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Keep other processes off this run. The lock ends with the process, however that ends.

        Args:
            waiting: Called once, before waiting, if one of them is at it already; None: do not wait.

        Raises:
            Busy: One of them is at it, and ``waiting`` is None.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if waiting is None:
                raise Busy from error
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _is_good(self) -> bool:
        result = self.result()
        return result is not None and result["status"] == "ok"

    def _artifacts(self) -> set[str]:
        return {name for name in (self.result() or {}).get("artifacts", {}).values() if name is not None}

    def _sweep_out(self, keep: Iterable[str]) -> None:
        for entry in self.directory.iterdir() if self.directory.is_dir() else ():
            if entry.name not in {LOCK, *keep}:
                remove(entry)


def read_result(file: Path) -> dict[str, Any] | None:
    """The content of a ``result.json``; None if there is no such file.

    Raises:
        Damaged: It is no result, or not the one that was written (``sha256``, which old files do not have).
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file}: not a result file ({one_line(error)})") from error
    if not isinstance(result, dict) or not isinstance(result.get("key"), str) or result.get("status") not in STATUSES:
        raise Damaged(f"{file}: not a result file (it must be an object with key and status)")
    written = result.pop("sha256", None)
    if written is not None and written != content_digest(result):
        raise Damaged(f"{file}: was changed or damaged after it was written (its sha256 is another)")
    return result
