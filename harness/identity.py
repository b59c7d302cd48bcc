"""What makes two runs the same run: keys made of what was chosen and of the versions of what was done.

A key is a hash of the resolved config, with the *content* of every local file or folder that it names (a path itself
says nothing about what lies there), and of the versions of the stages that the run goes through. Not part of it: where
results go, who launches the run, what it logs, and class paths, for a method enters by its name.

Two rules keep keys true over time:

- A fix that changes the numbers of a stage raises its number in `VERSIONS`, one that changes those of a method the
  ``version`` in its file (``conf/method``). A number that is 1 is left out.
- An option is left out while it has the value that its absence meant when it was introduced (`ABSENT`, which only
  grows). So a new option changes no key of an older run, and a default that changes later never meets old results.

Both are explicit on purpose: the version of the code says neither that numbers have changed nor that they have not;
``environment`` records it beside them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.errors import BadInput, one_line
from harness.files import content_digest, sha256_of
from harness.microworld import CHECKPOINT
from harness.stock_tasks import local_files

__all__ = ["VERSIONS", "digest", "fingerprint", "idle_options", "local_path", "place_in", "raised_versions", "run_key"]
__all__ += ["version_of", "with_fingerprints"]

# Raised by a fix that changes what a stage makes of the same config; what is not listed is 1.
VERSIONS: Mapping[str, int] = {
    "microworld": 1,  # its texts, instructions and tasks; tests/test_identity.py pins them to this number
    "data": 1,  # rows and batches from files
    "prune.magnitude": 1,  # tests/test_identity.py pins what each pruner keeps to its number
    "prune.wanda": 1,
    "prune.sparsegpt": 1,
    "quantize.rtn": 1,
    "quantize.gptq": 1,
    "quantize.nf4": 1,
    "layerwise.owl": 1,
    "layerwise.rmi": 1,
    "train": 1,
    "measure": 1,  # memory, FLOPs, time
    "simulate": 1,
    "evaluate": 1,
}
# Stages that the numbers of a mode depend on; the pruner is added by its name.
STAGES = {
    "run": ("microworld", "data", "train", "measure", "evaluate"),
    "profile": ("train", "measure"),
    "simulate": ("simulate",),
}
# Option -> what it was before there was such an option. Append only; a default that changes is not changed here.
ABSENT: Mapping[str, Any] = {
    "method.peft.bits": None,
    "method.peft.forward_product": "dense",
    "method.peft.gradient": "straight_through",
    "method.peft.gradient_share": 0.25,
    "method.peft.gradient_until": 1.0,
    "method.peft.group": 64,
    "method.peft.storage": "dense",
    "method.version": 1,
    "train.logits_at_once": None,
    "prune.when": "before",
    "prune.quantize": "none",
    "prune.bits": 4,
    "prune.group_size": 64,
    "prune.layerwise": "none",
    "prune.outlier_threshold": 5.0,
    "prune.sparsity_range": 0.08,
    "eval.chat_template": False,
    "eval.held_out": None,
    "eval.perplexity.windows": None,
    "model.attn_implementation": None,
    "model.device_map": None,
    "model.dtype": None,
    "model.pad_token": None,
    "save_base": False,
}
# Keys that say where results go, which jobs are run and how, not what is computed.
NOT_IN_KEY = ("force", "only", "name", "runs_root", "cache_root", "save_merged", "save_base", "launch")
NOT_IN_KEY += ("train.checkpoint_every",)
# Who else is told of the steps.
NOT_IN_KEY += ("train.report_to",)
# Where snapshots are, and how one is made; what is in them counts.
NOT_IN_KEY += ("data_root", "model.wheel")
# The rates of all methods and the steps of all modes; train.learning_rate and train.steps are those that count.
NOT_IN_KEY += ("train.tuned", "train.steps_by_mode")
# Outside of mode=run there are no tokens and no weights but random ones, and no scores; where the model is matters then
# only if its shape is read from there.
NOT_IN_PROFILE_KEY = ("data", "eval")
PLACE_OF_MODEL = ("model.path", "model.revision")
# Without a pruner these say what is expected of the model, which is measured.
NOT_IN_UNPRUNED_KEY = ("sparsity", "pattern")
CLASS = "_target_"  # which class Hydra builds
# The keys that may name a local file or folder.
SOURCES = ("model.path", "data.path", "prune.text", "eval.data_root", "eval.perplexity.text")
# A file that was written longer ago than this (in nanoseconds; clocks of file systems tick in milliseconds) and has
# kept its size and time is not read again by the same process: a sweep asks for its fingerprint once per job.
AT_REST = 2_000_000_000


def run_key(cfg: DictConfig) -> str:
    """Key of a run: 16 hexadecimal digits of the hash of all that determines its numbers (see the module's text).

    Args:
        cfg: A config as ``config.resolve`` returns it.
    """
    config = with_fingerprints(cfg)
    mode, pruner = config["mode"], config["prune"]["name"]
    processes = config["launch"].get("processes", 1)
    if mode == "profile" and processes > 1:  # they share the rows of a step: its time and memory are others
        config["processes"] = [processes, config["launch"]["shard"]]
    if mode == "run" and processes > 1 and config["method"].get("peft", {}).get("gradient") == "sampled":
        config["processes"] = processes  # each draws among its own rows
    ignored = list(NOT_IN_KEY)
    if mode != "run":
        ignored += NOT_IN_PROFILE_KEY + (() if config["model"]["shape"] is None else PLACE_OF_MODEL)
    elif pruner == "none":
        ignored += NOT_IN_UNPRUNED_KEY
    if mode != "simulate":
        ignored.append("simulate")
    for name in ignored:
        section, last = place_in(config, name)
        section.pop(last, None)
    chosen = {key: value for key, value in _choices(config) if key not in ABSENT or value != ABSENT[key]}
    return digest([chosen, raised_versions(mode, config["prune"])])


def idle_options(peft: Mapping[str, Any]) -> list[str]:
    """Options of an adapter that change nothing beside its other ones."""
    gradient, exact = peft.get("gradient", "sampled"), peft.get("exact_gradient", False)
    idle = ["gradient_share"] if gradient != "sampled" else []
    idle += ["gradient_until"] if gradient == "straight_through" and not exact else []
    return idle + (["group"] if peft.get("bits", "") is None else [])


def raised_versions(mode: str, prune: Mapping[str, Any]) -> dict[str, int]:
    """The numbers above 1 of the stages that a run goes through, which says ``prune`` of its config."""
    of_pruning = {"prune": "name", "quantize": "quantize", "layerwise": "layerwise"} if mode == "run" else {}
    stages = [*STAGES[mode], *(f"{stage}.{prune.get(key)}" for stage, key in of_pruning.items())]
    return {stage: version_of(stage) for stage in stages if version_of(stage) != 1}


def version_of(stage: str) -> int:
    """The number of a stage, see `VERSIONS`."""
    return VERSIONS.get(stage, 1)


def with_fingerprints(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers, with fingerprints in place of the paths of local files and folders."""
    config = OmegaConf.to_container(cfg, resolve=True)
    for name in SOURCES:
        path = local_path(OmegaConf.select(cfg, name))
        if path is not None and (cfg.mode == "run" or (name == "model.path" and cfg.model.shape is None)):
            section, last = place_in(config, name)
            try:
                files = local_files(config["eval"]) if name == "eval.data_root" else None
                section[last] = fingerprint(path, files if cfg.mode == "run" else ["config.json"])
            except OSError as error:
                raise BadInput(f"{name}={section[last]}: cannot be read ({one_line(error)})") from error
    return config


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify a value made of JSON types."""
    return content_digest(value)[:16]


def place_in(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The part of a nested config that a dotted key is in (empty if it has none), and the last word of the key."""
    *parents, last = key.split(".")
    for name in parents:
        config = config.get(name) or {}
    return config, last


def local_path(source: str | None) -> Path | None:
    """The existing file or folder that a source names; None for a name on the Hub and for generated data."""
    if source is None:
        return None
    path = CHECKPOINT if source == "microworld" else Path(os.path.expanduser(source))  # ~nobody is no error
    return path if os.path.exists(path) else None


def fingerprint(path: Path, only: Iterable[str] | None = None) -> str:
    """Hash of the content of a file, or of a folder, whose documentation and hidden files do not count.

    Args:
        path: The file or folder.
        only: The files of the folder that count, as far as they are there; None: all.
    """
    if path.is_file():
        files = {"": path}
    elif only is not None:
        files = {name: path / name for name in sorted(only) if (path / name).exists()}
    else:
        entries = {entry.relative_to(path).as_posix(): entry for entry in path.rglob("*") if entry.is_file()}
        files = {name: entry for name, entry in sorted(entries.items()) if _counts(name)}
    total = hashlib.sha256()
    for name, file in files.items():
        stat = file.stat()
        at_rest = time.time_ns() - stat.st_mtime_ns > AT_REST
        content = _remembered_sha256(file, stat.st_size, stat.st_mtime_ns) if at_rest else sha256_of(file)
        total.update(f"{name}\0{content}\0".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def _counts(name: str) -> bool:
    return not name.endswith(".md") and not any(part.startswith(".") for part in Path(name).parts)


def _choices(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, without what only says how an object is built; 16.0 is 16."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name != CLASS:
                yield from _choices(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):  # callbacks, in order
        for number, item in enumerate(value):
            yield from _choices(item, f"{key}.{number}")
    else:
        yield key, int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def _remembered_sha256(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, read once per process for each size and time of its last change."""
    return sha256_of(file)
