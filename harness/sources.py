"""Where the model and the texts that a config names are: in a folder of snapshots, or on the Hub.

A folder of snapshots, which ``python -m harness.snapshot`` makes, has for names on the Hub

    models/<model.name>/     a folder of transformers, sealed (`sealed_folder`)
    <task>/<split>.jsonl     a task of lm-eval; wikitext/test.jsonl and c4/train.jsonl, the corpora of the papers
    <name>/<split>.jsonl     any other data set owner/name: its name in lower case, with _ for -

and ``provenance.json`` in each. It is ``data_root`` where that is given, and then all texts are in it; without one
``<cache_root>/snapshots`` is used as far as it goes, and the Hub for the rest. A model that ``data_root`` does not have
may be in the cache, or on the Hub. `locate` puts the places into the config, and the commits of what is on the Hub, so
that keys are made of what lies there.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import RevisionNotFoundError
from omegaconf import DictConfig, OmegaConf

from harness.corpora import is_on_hub
from harness.errors import BadInput, one_line
from harness.hub import NO_REVISION, WELL_KNOWN, commit_of, parted, pinned
from harness.identity import ABSENT, SOURCES, fingerprint, local_path, place_in, with_fingerprints
from harness.sealed_folder import MANIFEST, damage
from harness.stock_tasks import local_files

__all__ = ["PROVENANCE", "REMEDY", "Text", "file_of", "locate", "model_folder", "origin", "provenance"]
__all__ += ["read_provenance", "recorded", "snapshots", "texts_of"]

PROVENANCE = "provenance.json"
REMEDY = "python -m harness.snapshot, with the overrides of this run, makes it (--help names the sources)"


class Text(NamedTuple):
    """A text on the Hub: the key that names it, its name, and its split."""

    key: str
    name: str
    split: str


def snapshots(config: dict[str, Any]) -> Path:
    """The folder of snapshots of a config."""
    return Path(config.get("data_root") or os.path.join(config["cache_root"], "snapshots")).expanduser()


def model_folder(root: Path, name: str) -> Path:
    """Where the snapshot of a model is."""
    return root / "models" / name


def file_of(name: str, split: str) -> str:
    """Where the snapshot of a text is, below the folder of all."""
    return f"{parted(name)[0].replace(':', '_').rpartition('/')[2].lower().replace('-', '_')}/{split}.jsonl"


def origin(name: str) -> str:
    """What the provenance of a text says: its name on the Hub; of a task its own."""
    return WELL_KNOWN[name][0] if name in WELL_KNOWN else name


def texts_of(config: dict[str, Any]) -> list[Text]:
    """The texts of the Hub that a run reads, but for those of its tasks and WikiText-2 as they read it."""
    perplexity = config["eval"]["perplexity"] or {"text": None}
    wanted = [
        Text("data.path", config["data"]["path"], config["data"]["split"]),
        Text("prune.text", config["prune"].get("text"), "train"),
        Text("eval.perplexity.text", None if perplexity["text"] == "wikitext" else perplexity["text"], "test"),
    ]
    found = [text for text in wanted if text.name is not None and is_on_hub(text.name)]
    known = {text: WELL_KNOWN.get(parted(text.name)[0]) for text in found}
    return [text._replace(split=known[text][2]) if known[text] else text for text in found]


def locate(config: dict[str, Any]) -> None:
    """Put the places of snapshots into a config in place of names on the Hub, and commits beside the other names.

    Not beside the tasks of lm-eval and WikiText-2, whose commits are in the result.

    Raises:
        BadInput: ``data_root`` lacks a text; a model in it is not as it was made; a revision that is not on the Hub.
    """
    root, model = snapshots(config), config["model"]
    if (config["mode"] == "run" or model["shape"] is None) and local_path(model["path"]) is None:
        for folder in dict.fromkeys((root, Path(config["cache_root"], "snapshots"))):
            place = model_folder(folder, model["name"])
            made = read_provenance(place)
            if made and (made.get("source"), made.get("revision")) == (model["path"], model["revision"]):
                _check_seal(place, (place / MANIFEST).stat().st_mtime_ns)
                model |= {"path": str(place), "revision": None}
                break
    if config["mode"] != "run":
        return
    if local_path(model["path"]) is None:
        model["revision"] = _commit(model)
    for key, name, split in texts_of(config):
        place = root / file_of(name, split)
        section, last = place_in(config, key)
        made = read_provenance(place.parent) or {}
        if place.exists() and made.get("source", origin(name)) == origin(name):
            section |= {last: str(place)} | ({"split": "train"} if key == "data.path" else {})  # the only one of a file
        elif config["data_root"] is not None:
            raise BadInput(f"{key}={name}: data_root has no {file_of(name, split)} (in {root}); {REMEDY}")
        else:
            section[last] = pinned(name, key)
    tasks = config["eval"]
    if tasks["data_root"] in (None, config["data_root"]):
        missing = [file for file in local_files(tasks) if not (root / file).exists()]
        if missing and config["data_root"] is not None:
            task = missing[0].partition("/")[0]
            key = "eval.perplexity.text" if task == "wikitext" else "eval.tasks"
            raise BadInput(f"{key}={task}: data_root has no {missing[0]} (in {root}); {REMEDY}")
        tasks["data_root"] = str(root) if local_files(tasks) and not missing else None


def _commit(model: dict[str, Any]) -> str | None:
    path, revision = model["path"], model["revision"]
    try:
        return commit_of(path, revision, "model") or revision
    except RevisionNotFoundError as error:
        raise BadInput(f"model.revision={revision}: {path} on the Hub: {NO_REVISION}") from error


@cache
def _check_seal(folder: Path, sealed_at: int) -> None:
    fault = damage(folder)
    if fault is not None:
        raise BadInput(f"model.path: the snapshot {folder} is not as it was made ({fault}); {REMEDY}")


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What the snapshot in a folder says of itself; None if there is none.

    Raises:
        BadInput: The file cannot be read.
    """
    file = folder / PROVENANCE
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read ({one_line(error)}); {REMEDY}") from error


def provenance(cfg: DictConfig) -> dict[str, Any] | None:
    """Where the model and the texts of a run come from: what their snapshots say, a name on the Hub with its revision,
    or a file with a fingerprint; None outside of mode=run, where there are only random ones."""
    if cfg.mode != "run":
        return None
    found = {}
    for key in SOURCES:
        name = OmegaConf.select(cfg, key)
        if name is not None:
            found[key] = _origin(cfg, key, name)
    return found


def _origin(cfg: DictConfig, key: str, name: str) -> dict[str, Any]:
    path = local_path(name)
    if name == "microworld" or path is None:
        if key == "model.path":
            revision = cfg.model.revision
        else:
            of_root = name == "wikitext" and cfg.eval.data_root is not None
            name, revision = parted(pinned(name, key)) if is_on_hub(name) and not of_root else (name, None)
        return {"source": name} | ({"revision": revision} if revision else {})
    folder = path.parent if path.is_file() else path
    made = None if key == "eval.data_root" else read_provenance(folder)
    if made is None:
        value = OmegaConf.select(OmegaConf.create(with_fingerprints(cfg)), key)
        return {"source": f"{folder.name}/{path.name}" if path.is_file() else "a folder", "sha256": value}
    return made | ({"sha256": fingerprint(path)} if path.is_file() else {})


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The config as a result holds it; the key that follows from it is that of the run.

    A snapshot is what is in it, wherever it lay, and an option that is what its absence meant is absent: so results of
    two machines, and of two versions, are of the same run where the run is the same.
    """
    config, contents = OmegaConf.to_container(cfg, resolve=True), with_fingerprints(cfg)
    roots = {str(snapshots(config)), os.path.join(cfg.cache_root, "snapshots")}
    for key in SOURCES:
        value = OmegaConf.select(cfg, key)
        if value is not None and any(value == root or value.startswith(os.path.join(root, "")) for root in roots):
            section, last = place_in(config, key)
            section[last] = place_in(contents, key)[0][last]
    config["model"].pop("wheel", None)
    for key, absent in ABSENT.items():
        if not key.startswith("method.") and OmegaConf.select(cfg, key) == absent:
            section, last = place_in(config, key)
            section.pop(last, None)
    return config
