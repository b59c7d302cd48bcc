"""Where text and instructions come from: a local file, the embedded microworld, or a data set on the Hugging
Face Hub.

Local files are read here, not by `datasets`, so that a malformed line is reported with its file and number
and nothing is copied into a cache. Formats: ``.json`` (a list of objects), JSON lines under any name, and any
other file as one document of plain text. A name that is no file and has at most one slash is taken for a Hub
name, ``owner/name`` or ``owner/name:config``; from there only the rows that are asked for are downloaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lors.harness.validate import BadInput, one_line

__all__ = ["read_rows", "texts", "wikitext_rows"]

JSON_SUFFIXES = (".json", ".jsonl")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".txt", ".raw", ".md")
# Columns that hold a document, in order of preference; `page` is the name in document-level WikiText.
TEXT_COLUMNS = ("text", "page")
MICROWORLD = "microworld"
# Short names for the corpora of the papers: Hub name, config, split.
WELL_KNOWN = {
    "c4": ("allenai/c4", "en", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}


def read_rows(
    path: str, *, split: str = "train", limit: int | None = None, key: str = "data.path"
) -> Iterator[dict[str, Any]]:
    """Rows of a JSON file, a JSON-lines file or a Hub data set, in order.

    Args:
        path: Local file or Hub name, see the module's text.
        split: Split of a Hub data set; a file has none.
        limit: Stop after so many rows; None for all.
        key: Name of the config key that `path` comes from, for the messages.

    Raises:
        BadInput: No such file or data set, or a line that is not a JSON object (the message has file and
            line).
    """
    local = _is_local(path)
    rows = _json_rows(_existing_file(path, key), key) if local else _hub_rows(path, None, split, key)
    return islice(rows, limit)


def texts(source: str, *, split: str = "train", limit: int | None = None, key: str = "data.path") -> Iterator[str]:
    """Documents of a text source, in order and without special tokens.

    Args:
        source: ``microworld``, a short name (``c4``, ``wikitext``), a file (JSON with a column `text` or
            `page`; any other suffix: one document), or a Hub name.
        split: Split of the microworld (calibration, heldout, pretrain) or of a Hub data set; a short name has
            its own.
        limit: Stop after so many documents; None for all.
        key: Name of the config key that `source` comes from, for the messages.

    Raises:
        BadInput: No such source, a malformed line, or no column that holds text.
    """
    if source == MICROWORLD:
        from lors import microworld

        return islice(microworld.texts(split), limit)
    if source in WELL_KNOWN and not Path(source).exists():
        documents = _documents(_hub_rows(*WELL_KNOWN[source], key), source, key)
    elif _is_local(source) and Path(source).suffix not in JSON_SUFFIXES:
        documents = iter([_read(_existing_file(source, key), key)])
    else:
        documents = _documents(read_rows(source, split=split, key=key), source, key)
    return islice(documents, limit)


def wikitext_rows(pages: Iterable[str]) -> list[str]:
    """The rows of WikiText-2 raw, as the Hub serves them, from its pages (`page` column of the document-level
    form).

    A row is a line with its line end, or the empty string for a blank line; the published perplexities join
    these rows. The original file opens with a blank line, which belongs to no page, and one line end
    separates two pages.
    """
    lines = (" \n" + "\n".join(pages)).split("\n")[:-1]
    return [line + "\n" if line.strip() else "" for line in lines]


def require_text(row: dict[str, Any], column: str, number: int, source: str, key: str) -> str:
    """Text in a column of row `number` (from 1); BadInput names a column that is missing or no text."""
    if column not in row:
        has = ", ".join(map(str, row)) or "none"
        raise BadInput(f"{key}={source}: row {number} has no column {column!r}; its columns are {has}")
    if not isinstance(row[column], str):
        raise BadInput(f"{key}={source}: column {column!r} of row {number} must be text, not {row[column]!r}")
    return row[column]


def _is_local(path: str) -> bool:
    here = Path(path).expanduser()
    looks_like_a_file = here.suffix in FILE_SUFFIXES or path.startswith((".", "~", os.sep)) or path.count("/") > 1
    return here.exists() or looks_like_a_file


def _existing_file(path: str, key: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise BadInput(f"{key}={path}: is a folder; must be a file")
    if not file.exists():
        raise BadInput(f"{key}={path}: no such file")
    return file


def _read(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{key}={file}: not UTF-8 text ({one_line(error)})") from error


def _json_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """A list if the first character is a bracket, else one object per line; blank lines are skipped."""
    first = True
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if first and line.lstrip().startswith("["):
                    yield from _json_list(file, key)
                    return
                first = False
                yield _json_object(line, f"{file}:{number}", key)
    except UnicodeDecodeError as error:
        raise BadInput(f"{key}={file}: not UTF-8 text ({one_line(error)})") from error


def _json_list(file: Path, key: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(_read(file, key))
    except json.JSONDecodeError as error:
        raise BadInput(f"{key}: {file}:{error.lineno}: not valid JSON ({error.msg})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadInput(f"{key}: {file}: entry {number} must be a JSON object, not {type(row).__name__}")
        yield row


def _json_object(line: str, place: str, key: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{key}: {place}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise BadInput(f"{key}: {place}: must be a JSON object, not {type(row).__name__}")
    return row


def _hub_rows(name: str, config: str | None, split: str, key: str) -> Iterator[dict[str, Any]]:
    """Stream a Hub data set; the file formats and the network are the Hub's business, so are their errors."""
    import datasets

    if config is None and ":" in name:
        name, config = name.split(":", 1)
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{key}={name}: no such file, and split {split!r} of a data set of this name could not be read "
            f"from the Hub ({one_line(error)})"
        ) from error


def _documents(rows: Iterable[dict[str, Any]], source: str, key: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        column = next((name for name in TEXT_COLUMNS if name in row), TEXT_COLUMNS[0])
        yield require_text(row, column, number, source, key)
