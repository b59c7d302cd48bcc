"""What numbers are measured on: code, library versions, device, driver, threads, time."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from harness import processes
from harness.bfloat16_products import has_bfloat16

__all__ = ["default_device", "environment", "now"]


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU; CUDA_VISIBLE_DEVICES="" hides a GPU."""
    here = int(os.environ.get("LOCAL_RANK", "0"))  # of the processes of this run on this machine
    return torch.device("cuda", here) if torch.cuda.is_available() else torch.device("cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on: code, versions, device, driver, threads. ``start`` is now."""
    cuda = device.type == "cuda"
    git = ("git", "-C", str(Path(__file__).parents[1]))
    changes = _output(*git, "status", "--porcelain")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "git_commit": _output(*git, "rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("lors", "torch", "transformers", "peft", "lm_eval", "datasets")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": driver.split()[0] if driver else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "bfloat16_products": "of the device" if has_bfloat16(device) else "in float32",
        "processes": processes.count(),
        # What composes this config again; in a sweep the overrides of this job.
        "command": ["run.py", *HydraConfig.get().overrides.task] if HydraConfig.initialized() else sys.argv,
        "start": now(),
    }


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _output(*command: str) -> str | None:
    """What a program prints; None where there is none or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*: (.+)", file.read_text(encoding="utf-8"), re.MULTILINE) if file.exists() else None
    )
    return found[1].strip() if found else platform.processor() or platform.machine()
