"""What numbers are measured on: code, library versions, device, driver, threads, time."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

__all__ = ["default_device", "environment", "now"]


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU; CUDA_VISIBLE_DEVICES="" hides a GPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


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
        "command": _command(),
        "start": now(),
    }


def _command() -> list[str]:
    """What composes this config again; in a sweep the overrides of this job."""
    return ["run.py", *HydraConfig.get().overrides.task] if HydraConfig.initialized() else sys.argv


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_state() -> dict[str, Any]:
    """Commit of this checkout, and whether the files differ from it; nulls where there is no git."""
    repository = Path(__file__).parents[1]

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
