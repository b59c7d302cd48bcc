"""The rows of a snapshot: which files a run reads, and what reads each of them, from the Hub or from a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from harness.corpora import instructions, texts
from harness.data import CALIBRATION_POOL
from harness.errors import BadInput, one_line
from harness.hub import commit_in, fault, parted, pinned
from harness.sources import file_of, origin, texts_of
from harness.stock_tasks import ZERO_SHOT, local_files, local_items

__all__ = ["Rows", "make_rows", "rows_of"]


class Rows(NamedTuple):
    """Rows of a snapshot: where they come from, how many (None: all), and what reads them: a file, or None: the Hub."""

    source: str
    limit: int | None
    read: Callable[[Path | None], Iterable[Mapping[str, Any]]]

    def count(self, file: Path) -> int:
        """The rows in a file, each read as a run reads it."""
        return sum(1 for _ in self.read(file))


def rows_of(config: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """The files of texts and tasks of a config, each with its rows."""
    data, tasks = config["data"], config["eval"]
    read_first = data["limit"] and data["limit"] + (tasks.get("held_out") or 0)
    for key, name, split in texts_of(config):
        limit = {"data.path": read_first, "prune.text": CALIBRATION_POOL}.get(key)
        instructed = key == "data.path" and data["kind"] == "instruction"
        read = partial(_instructions, name, split, limit) if instructed else partial(_texts, key, name, split, limit)
        yield file_of(name, split), Rows(origin(name), limit, read)
    for file in local_files(tasks) if tasks["data_root"] in (None, config["data_root"]) else ():
        task = file.partition("/")[0]
        yield file, Rows(origin(task), None, _wikitext if task == "wikitext" else partial(_items, task))


def _instructions(name: str, split: str, limit: int | None, file: Path | None) -> Iterator[dict[str, Any]]:
    source = SimpleNamespace(kind="instruction", path=str(file or name), split=split, limit=None if file else limit)
    return (dict(zip(("instruction", "input", "output"), row, strict=True)) for row in instructions(source))


def _texts(key: str, name: str, split: str, limit: int | None, file: Path | None) -> Iterator[dict[str, Any]]:
    found = texts(str(file or name), split=split, limit=None if file else limit, key=key)
    return ({"text": text} for text in found)


def _wikitext(file: Path | None) -> Iterator[dict[str, Any]]:
    """The inverse of `corpora.wikitext_rows`, whose first row no page holds."""
    pages = texts(str(file)) if file else ["".join(row or " \n" for row in list(texts("wikitext"))[1:])]
    return ({"page": page} for page in pages)


def _items(task: str, file: Path | None) -> Iterable[dict[str, Any]]:
    if file is not None:
        return local_items(str(file.parents[1]), task)
    from lm_eval import tasks  # it takes seconds

    split, folder, _ = ZERO_SHOT[task]
    try:
        manager = tasks.TaskManager(include_defaults=False, include_path=Path(tasks.__file__).parent / folder)
        return manager.load([task])["tasks"][task].dataset[split]
    except Exception as error:  # of any of five libraries
        raise BadInput(f"eval.tasks={task}: cannot be read from the Hub ({fault(error) or one_line(error)})") from error


def make_rows(files: dict[str, Rows], copied: Path | None, folder: Path) -> dict[str, Any]:
    """Write the files of a snapshot, or copy them, and return what its provenance says of them."""
    commits = dict.fromkeys(files)
    for name, rows in files.items():
        if copied is not None:
            shutil.copyfile(copied / name, folder / name)
        else:
            found = rows.read(None)
            with (folder / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            commits[name] = parted(pinned(rows.source, "data.path"))[1] if "/" in rows.source else commit_in(found)
    # Read back as a run does it.
    counts = {name: rows.count(folder / name) for name, rows in files.items()}
    limits = {name: None if copied else rows.limit for name, rows in files.items()}
    return {"rows": counts, "limit": limits, "commits": commits}
