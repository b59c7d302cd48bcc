"""Where text and instructions come from: a local file, the embedded microworld, or a data set on the Hugging Face Hub.

Local files are read here, not by `datasets`, so that a malformed line is reported with its file and number and nothing
is copied into a cache. Formats: ``.json`` (a list of objects), JSON lines under any name, and any other file as one
document of plain text. JSON is strict: no NaN, no name twice in an object, no half of a surrogate pair. A name that is
no file and has at most one slash is taken for a Hub name, ``owner/name`` or ``owner/name:config``, of the newest commit
or with ``@`` and a branch, tag or commit behind it; from there only the rows that are asked for are downloaded, and no
code is.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from pydantic_core import from_json

from harness import microworld
from harness.errors import BadInput, one_line
from harness.hub import WELL_KNOWN, commit_of, fault, parted, quiet

__all__ = ["has_splits", "instructions", "is_on_hub", "read_rows", "texts", "wikitext_rows"]

JSON_SUFFIXES = (".json", ".jsonl")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".txt", ".raw", ".md")
MICROWORLD = "microworld"


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
        BadInput: No such file or data set, or a line that is not a JSON object (the message has file and line).
    """
    if _is_local(path):
        rows = _json_rows(path, key)
    else:
        name, _, config = parted(path)[0].partition(":")
        rows = _hub_rows(name, config or None, split, False, path, key)
    return islice(rows, limit)


def texts(source: str, *, split: str = "train", limit: int | None = None, key: str = "data.path") -> Iterator[str]:
    """Documents of a text source, in order and without special tokens.

    Args:
        source: ``microworld``, a short name (``c4``, ``wikitext``), a file (JSON with a column `text` or `page`; any
            other suffix: one document), or a Hub name.
        split: Split of the microworld (calibration, heldout, pretrain) or of a Hub data set; a short name has its own.
        limit: Stop after so many documents; None for all.
        key: Name of the config key that `source` comes from, for the messages.

    Raises:
        BadInput: No such source, a malformed line, or no column that holds text.
    """
    if source == MICROWORLD:
        yield from islice(microworld.texts(split), limit)
    elif _is_local(source) and Path(source).suffix not in JSON_SUFFIXES:
        with _opened(source, key) as stream:
            text = stream.read()
        if "\0" in text:
            raise BadInput(f"{key}={source}: not text (it holds a null character)")
        yield text
    else:
        known = WELL_KNOWN.get(parted(source)[0])
        rows = _hub_rows(*known, source, key) if known else read_rows(source, split=split, key=key)
        for number, row in enumerate(islice(rows, limit), start=1):
            column = "page" if "page" in row and "text" not in row else "text"  # `page` in document-level WikiText
            yield require_text(row, column, number, source, key)


def instructions(data_cfg: Any) -> Iterator[tuple[str, str, str]]:
    """Instruction, context (may be empty) and answer of every row of a data set of instructions.

    Its columns are ``instruction``, ``input`` and ``output``, or ``question`` and ``answer``.

    Args:
        data_cfg: ``kind`` (instruction, microworld), ``path``, ``split``, ``limit`` (first rows; None for all).

    Raises:
        BadInput: No such source, a malformed line, or a column that is missing or holds no text.
    """
    if data_cfg.kind == MICROWORLD:
        source, rows = MICROWORLD, islice(microworld.instruction_rows(), data_cfg.limit)
    else:
        source, rows = data_cfg.path, read_rows(data_cfg.path, split=data_cfg.split, limit=data_cfg.limit)
    for number, row in enumerate(rows, start=1):
        if "question" in row and "instruction" not in row:  # as in GSM8K
            row = {"instruction": row["question"], "output": row.get("answer")}
        row = {**row, "input": row.get("input") or ""}
        instruction, context, answer = (
            require_text(row, column, number, source, "data.path") for column in ("instruction", "input", "output")
        )
        yield instruction, context, answer


def wikitext_rows(pages: Iterable[str]) -> list[str]:
    """The rows of WikiText-2 raw, as the Hub serves them, from its pages (column `page` of the document-level form).

    A row is a line with its line end, or the empty string for a blank line; the published perplexities join these rows.
    The original file opens with a blank line, which belongs to no page, and one line end separates two pages.
    """
    lines = (" \n" + "\n".join(pages)).split("\n")[:-1]
    return [line + "\n" if line.strip() else "" for line in lines]


def require_text(row: dict[str, Any], column: str, number: int, source: str, key: str) -> str:
    """Text in a column of row `number` (from 1); BadInput names a column that is missing or no text."""
    if not isinstance(row.get(column), str):
        found = f"{reprlib.repr(row.get(column))} (the row has {reprlib.repr(list(row))})"
        raise BadInput(f"{key}={source}: column {column!r} of row {number} must be text, not {found}")
    return row[column]


def has_splits(source: str) -> bool:
    """Whether a source is a data set of the Hub whose split can be chosen: no file, and no short name."""
    return is_on_hub(source) and parted(source)[0] not in WELL_KNOWN


def is_on_hub(source: str) -> bool:
    """Whether a source is a data set of the Hub, by a short name or its own."""
    return source != MICROWORLD and not _is_local(source)


def _is_local(path: str) -> bool:
    looks_like_a_file = path.endswith(FILE_SUFFIXES) or path.startswith((".", "~", os.sep)) or path.count("/") > 1
    return looks_like_a_file or os.path.exists(path)


@contextmanager
def _opened(path: str, key: str) -> Iterator[TextIO]:
    """A text file, which is named in what goes wrong while it is read."""
    # os.path, because it takes whatever cannot be looked at (no home, no permission, a name too long) for missing.
    file = os.path.expanduser(path)
    if not os.path.exists(file):
        raise BadInput(f"{key}={path}: no such file")
    if not os.path.isfile(file):  # reading a pipe could wait for ever, a device have no end
        raise BadInput(f"{key}={path}: must be a regular file")
    try:
        with open(file, encoding="utf-8-sig") as stream:
            yield stream
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{key}={path}: cannot be read ({one_line(error)})") from error


def _json_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    """The objects of a list if the first character is a bracket, else one a line; blank lines are skipped."""
    place = f"{key}={path}"
    with _opened(path, key) as stream:
        first = next((line for line in stream if line.strip()), "")
        stream.seek(0)
        if first.lstrip().startswith("["):
            values = enumerate(_parsed(stream.read(), place), start=1)
        else:
            lines = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
            values = ((number, _parsed(line, f"{place}:{number}")) for number, line in lines)
        for number, value in values:
            if not isinstance(value, dict):
                raise BadInput(f"{place}: line or entry {number} must be a JSON object, not {type(value).__name__}")
            yield value


def _parsed(text: str, place: str) -> Any:
    try:
        from_json(text, allow_inf_nan=False)  # refuses what Python's own reader lets through
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        reason = str(error).replace("line 1 ", "")
        raise BadInput(f"{place}: not valid JSON ({reason})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"an object with a name twice, among {reprlib.repr(sorted(name for name, _ in pairs))}")
    return dict(pairs)


def _hub_rows(
    name: str, config: str | None, split: str, whole: bool, source: str, key: str
) -> Iterator[dict[str, Any]]:
    """Stream a Hub data set, or download it whole into the cache of `datasets`, which works without a network then."""
    import datasets

    quiet()
    shown, revision = parted(source)
    try:
        commit = commit_of(name, revision, "dataset")
        options = {"split": split, "streaming": not whole, "revision": commit}
        yield from datasets.load_dataset(name, config, **options, trust_remote_code=False)
    except Exception as error:  # of any of five libraries
        said = one_line(error)
        if said.startswith(("Bad split", "Unknown split")) and has_splits(source) and key == "data.path":
            raise BadInput(f"data.split={split}: the data set {shown} has no such split ({said})") from error
        reason = fault(error) or said
        raise BadInput(f"{key}={shown}: no such file, and the data set on the Hub cannot be read: {reason}") from error
