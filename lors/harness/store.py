"""The run folder: ``<runs_root>/<name>/<key>/`` with ``result.json``, ``config.yaml``, ``log.txt`` and what
the run saves.

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
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lors.microworld import CHECKPOINT

__all__ = ["RunStore", "cache_directory", "digest", "environment", "fingerprint", "local_path", "run_key"]

# Top-level keys that say where results go and how a job is started, not what is computed.
NOT_IN_KEY = ("force", "name", "runs_root", "cache_root", "save_merged", "launch", "train.checkpoint_every")
# mode=profile draws its tokens and weights and scores nothing.
NOT_IN_PROFILE_KEY = ("data", "eval", "model.path", "model.revision")
# The keys that may name a local file or folder.
SOURCES = ("model.path", "data.path", "prune.text", "eval.data_root", "eval.perplexity.text")


def run_key(cfg: DictConfig) -> str:
    """Key of a run: 16 hexadecimal digits of the hash of all that determines its numbers (see the module's
    text).

    Args:
        cfg: A config as ``validate.resolve`` returns it.
    """
    config = with_fingerprints(cfg)
    for name in NOT_IN_KEY + (NOT_IN_PROFILE_KEY if cfg.mode == "profile" else ()):
        *parents, last = name.split(".")
        _select(config, parents).pop(last, None)
    return digest(config)


def with_fingerprints(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers, with fingerprints in place of the paths of local files and folders."""
    config = OmegaConf.to_container(cfg, resolve=True)
    for name in SOURCES:
        path = local_path(OmegaConf.select(cfg, name))
        if path is not None and not (cfg.mode == "profile" and name in NOT_IN_PROFILE_KEY):
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
        with file.open("rb") as stream:
            total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def cache_directory(cfg: DictConfig) -> Path:
    """Where pruned models and baseline scores are kept: ``cache_root``, else the user's cache folder."""
    if cfg.cache_root is not None:
        return Path(cfg.cache_root).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lors"


class RunStore:
    """One run folder.

    Args:
        directory: The folder; created when something is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parts = directory / "parts"

    def result(self) -> dict[str, Any] | None:
        """The result file, or None if the run has written none."""
        return read_json(self.directory / "result.json")

    def write(self, result: Mapping[str, Any]) -> None:
        """Write the result file; a reader sees the old one or the new one, never half of it."""
        write_json(self.directory / "result.json", result)

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
        """Raise OSError if the folder takes no file: no permission, or no space left."""
        probe = self.directory / f".probe.{os.getpid()}"
        write_text(probe, "")
        probe.unlink()

    def clear(self) -> None:
        """Delete everything in the folder (``force=true``), its lock excepted."""
        for entry in self.directory.iterdir():
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Keep other processes off this run; ``waiting`` is called once if one of them is at it already.

        The lock ends with the process, however that ends.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


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
    """Write a file under a temporary name in the same folder, flush it to the disk, rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on: code, versions, device, driver, threads. ``start`` is now."""
    cuda = device.type == "cuda"
    return {
        **_git_state(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("lors", "torch", "transformers", "peft", "lm_eval", "datasets")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "start": now(),
    }


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_state() -> dict[str, Any]:
    """Commit of this checkout, and whether the files differ from it; nulls where there is no git."""
    repository = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return run.stdout.strip()

    changes = git("status", "--porcelain")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


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
