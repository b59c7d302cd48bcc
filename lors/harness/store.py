"""The run folder: ``<runs_root>/<name>/<key>/`` with ``result.json``, ``config.yaml``, ``log.txt`` and what
the run saves; and which runs need not be made again.

The key is a hash of everything that can change the numbers: the resolved config without output paths,
launcher and logging, and the *content* of every local file or folder that the config names (a path itself
says nothing about what lies there). The version of the code is not part of it; ``environment`` records that
beside the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lors.harness.validate import BadInput, one_line
from lors.microworld import CHECKPOINT

__all__ = ["Busy", "RunStore", "cache_directory", "digest", "fingerprint", "local_path", "run_key"]

# Keys that say where results go, which jobs are run and how, not what is computed.
NOT_IN_KEY = ("force", "only", "name", "runs_root", "cache_root", "save_merged", "launch", "train.checkpoint_every")
# The rates of all methods, of which train.learning_rate is the one that counts.
NOT_IN_KEY += ("train.tuned",)
# Outside of mode=run there are no tokens and no weights but random ones, and no scores.
NOT_IN_PROFILE_KEY = ("data", "eval", "model.path", "model.revision")
# The keys that may name a local file or folder.
SOURCES = ("model.path", "data.path", "prune.text", "eval.data_root", "eval.perplexity.text")
# A file that was written longer ago than this (in nanoseconds; clocks of file systems tick in milliseconds) and has
# kept its size and time is not read again by the same process: a sweep asks for its fingerprint once per job.
AT_REST = 2_000_000_000
# Bytes that a folder has to take before a run starts in it.
PROBE = 2**16


def run_key(cfg: DictConfig) -> str:
    """Key of a run: 16 hexadecimal digits of the hash of all that determines its numbers (see the module's
    text).

    Args:
        cfg: A config as ``validate.resolve`` returns it.
    """
    config = with_fingerprints(cfg)
    ignored = NOT_IN_KEY if cfg.mode == "run" else NOT_IN_KEY + NOT_IN_PROFILE_KEY
    for name in ignored if cfg.mode == "simulate" else (*ignored, "simulate"):
        *parents, last = name.split(".")
        _select(config, parents).pop(last, None)
    return digest(config)


def with_fingerprints(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers, with fingerprints in place of the paths of local files and folders."""
    config = OmegaConf.to_container(cfg, resolve=True)
    for name in SOURCES:
        path = local_path(OmegaConf.select(cfg, name))
        if path is not None and not (cfg.mode != "run" and name in NOT_IN_PROFILE_KEY):
            *parents, last = name.split(".")
            _select(config, parents)[last] = fingerprint(path)
    return config


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify a value made of JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def local_path(source: str | None) -> Path | None:
    """The existing file or folder that a source names; None for a name on the Hub and for generated data."""
    if source is None:
        return None
    path = CHECKPOINT if source == "microworld" else Path(source).expanduser()
    return path if path.exists() else None


def fingerprint(path: Path) -> str:
    """Hash of the content of a file, or of a folder; its documentation and hidden files do not count."""
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    total = hashlib.sha256()
    for file in files:
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        if file.suffix == ".md" or any(part.startswith(".") for part in Path(name).parts):
            continue
        stat = file.stat()
        at_rest = time.time_ns() - stat.st_mtime_ns > AT_REST
        content = _remembered_sha256(file, stat.st_size, stat.st_mtime_ns) if at_rest else _sha256(file)
        total.update(f"{name}\0{content}\0".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def cache_directory(cfg: DictConfig) -> Path:
    """Where pruned models and baseline scores are kept: ``cache_root``, else the user's cache folder."""
    if cfg.cache_root is not None:
        return Path(cfg.cache_root).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lors"


class Busy(Exception):  # noqa: N818 - named for what happened
    """Another process is at this run."""


class RunStore:
    """One run folder.

    Args:
        directory: The folder; created when something is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parts = directory / "parts"
        self.result_file = directory / "result.json"

    @classmethod
    def of(cls, cfg: DictConfig) -> RunStore:
        """The folder of the run of a resolved config."""
        return cls(Path(cfg.runs_root).expanduser() / cfg.name / run_key(cfg))

    def result(self) -> dict[str, Any] | None:
        """The result file, or None if the run has written none."""
        return read_json(self.result_file)

    def finished(self, cfg: DictConfig, since: int | None = None) -> dict[str, Any] | None:
        """The result that makes the run of `cfg` unnecessary, if there is one.

        Args:
            cfg: The resolved config: ``force``, ``save_merged``.
            since: When the sweep began that the run belongs to (see `written_since`). A result that was
                written since then stands, failed or not: another sweep on the same folder has made it.
        """
        result = self.result()
        if result is None or (since is not None and self.written_since(since)):
            return result
        complete = result["status"] == "ok" and (not cfg.save_merged or result["artifacts"]["merged"])
        return result if complete and not cfg.force else None

    def written_since(self, moment: int) -> bool:
        """Whether the result file was written after `moment`, in nanoseconds on the clock of its file system."""
        try:
            return self.result_file.stat().st_mtime_ns > moment
        except FileNotFoundError:
            return False

    def write(self, result: Mapping[str, Any]) -> None:
        """Write the result file; a reader sees the old one or the new one, never half of it.

        Raises:
            BadInput: The folder does not take it; what the run has finished is still there.
        """
        with self._writing():
            write_json(self.result_file, result)

    def write_config(self, cfg: DictConfig) -> None:
        """Write ``config.yaml``, resolved."""
        write_text(self.directory / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def once(self, part: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of one part of the run; computed unless an interrupted start got so far."""
        file = self.parts / f"{part}.json"
        if read_json(file) is None:
            write_json(file, {"value": compute()})
        return read_json(file)["value"]

    def drop_progress(self) -> None:
        """Delete what only an interrupted run needs: finished parts and checkpoints of the training."""
        for folder in (self.parts, *self.directory.glob("checkpoint*")):
            shutil.rmtree(folder, ignore_errors=True)

    def check_writable(self) -> None:
        """Make the folder and see that it takes a file.

        Raises:
            BadInput: It does not: no permission, or no space left.
        """
        probe = self.directory / f".probe.{os.getpid()}"
        with self._writing():
            write_text(probe, "\0" * PROBE)
            probe.unlink()

    def clear(self) -> None:
        """Delete everything in the folder (``force=true``), its lock excepted."""
        for entry in self.directory.iterdir():
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

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
        lock = FileLock(self.directory / ".lock")
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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadInput(f"runs_root: cannot write to {self.directory} ({one_line(error)})") from error


def read_json(file: Path) -> Any:
    """The value in a JSON file; None if there is no such file, or if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def write_json(file: Path, value: Any) -> None:
    """Write strict JSON atomically; numbers that JSON does not have (inf, nan) become null."""
    write_text(file, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomically(file, "w", encoding="utf-8") as stream:
        stream.write(text)


@contextmanager
def atomically(file: Path, mode: str, **options: Any) -> Iterator[IO]:
    """Open a file under a temporary name in the same folder; at the end flush it to the disk and rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open(mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it would be in the way of everything else
        raise


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _remembered_sha256(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, read once per process for each size and time of its last change."""
    return _sha256(file)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _select(config: dict[str, Any], parents: list[str]) -> dict[str, Any]:
    for name in parents:
        config = config[name]
    return config
