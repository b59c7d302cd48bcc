"""Where text and instructions come from: a local file, the embedded microworld, or a data set on the Hugging
Face Hub.

Local files are read here, not by `datasets`, so that a malformed line is reported with its file and number
and nothing is copied into a cache. Formats: ``.json`` (a list of objects), JSON lines under any name, and any
other file as one document of plain text. JSON is what RFC 8259 calls interoperable: no NaN, no name twice in an
object, no half of a surrogate pair. A name that is no file and has at most one slash is taken for a Hub name,
``owner/name`` or ``owner/name:config``; from there only the rows that are asked for are downloaded, and no code is.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import BadInput, one_line

__all__ = ["has_splits", "instructions", "read_rows", "texts", "wikitext_rows"]

JSON_SUFFIXES = (".json", ".jsonl")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".txt", ".raw", ".md")
# Columns that hold a document, in order of preference; `page` is the name in document-level WikiText.
TEXT_COLUMNS = ("text", "page")
MICROWORLD = "microworld"
# Short names for the corpora of the papers: Hub name, config, split, and whether all of it is downloaded and kept.
WELL_KNOWN = {
    "c4": ("allenai/c4", "en", "train", False),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True),
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
    if _is_local(path):
        rows = _json_rows(_existing_file(path, key), key)
    else:
        name, _, config = path.partition(":")
        rows = _hub_rows(name, config or None, split, False, path, key)
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
    if source in WELL_KNOWN and not os.path.exists(source):
        documents = _documents(_hub_rows(*WELL_KNOWN[source], source, key), source, key)
    elif source != MICROWORLD and not (_is_local(source) and Path(source).suffix not in JSON_SUFFIXES):
        documents = _documents(read_rows(source, split=split, key=key), source, key)
    elif source != MICROWORLD:
        documents = iter([_read(_existing_file(source, key), key)])
    else:
        from harness import microworld

        documents = microworld.texts(split)
    return islice(documents, limit)


def instructions(data_cfg: Any) -> Iterator[tuple[str, str, str]]:
    """Instruction, context (may be empty) and answer of every row of a data set of instructions.

    Args:
        data_cfg: ``kind`` (instruction, microworld), ``path``, ``split``, ``limit`` (first rows; None for all).

    Raises:
        BadInput: No such source, a malformed line, or a column that is missing or holds no text.
    """
    if data_cfg.kind == MICROWORLD:
        from harness import microworld

        if data_cfg.split != "train":
            raise BadInput(f"data.split={data_cfg.split}: must be train for data.kind={MICROWORLD}")
        source, rows = MICROWORLD, islice(microworld.instruction_rows(), data_cfg.limit)
    else:
        source, rows = data_cfg.path, read_rows(data_cfg.path, split=data_cfg.split, limit=data_cfg.limit)
    for number, row in enumerate(rows, start=1):
        instruction = require_text(row, "instruction", number, source, "data.path")
        answer = require_text(row, "output", number, source, "data.path")
        context = require_text(row, "input", number, source, "data.path") if row.get("input") else ""
        yield instruction, context, answer


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
        has = ", ".join(map(reprlib.repr, row)) or "none"
        raise BadInput(f"{key}={source}: row {number} has no column {column!r}; its columns are {has}")
    if not isinstance(row[column], str):
        shown = reprlib.repr(row[column])
        raise BadInput(f"{key}={source}: column {column!r} of row {number} must be text, not {shown}")
    return row[column]


def has_splits(source: str) -> bool:
    """Whether a source is a data set of the Hub whose split can be chosen: no file, and no short name."""
    return source != MICROWORLD and source not in WELL_KNOWN and not _is_local(source)


def _is_local(path: str) -> bool:
    looks_like_a_file = path.endswith(FILE_SUFFIXES) or path.startswith((".", "~", os.sep)) or path.count("/") > 1
    return looks_like_a_file or os.path.exists(path)


def _existing_file(path: str, key: str) -> Path:
    # os.path, because it takes whatever cannot be looked at (no home, no permission, a name too long) for missing.
    file = os.path.expanduser(path)
    if os.path.isdir(file):
        raise BadInput(f"{key}={path}: is a folder; must be a file")
    if not os.path.exists(file):
        raise BadInput(f"{key}={path}: no such file")
    if not os.path.isfile(file):  # reading a pipe could wait for ever, a device have no end
        raise BadInput(f"{key}={path}: is no regular file")
    return Path(file)


@contextmanager
def _reading(file: Path, key: str) -> Iterator[None]:
    """Names the file in what goes wrong while it is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(f"{key}={file}: not UTF-8 text ({one_line(error)})") from error
    except OSError as error:
        raise BadInput(f"{key}={file}: cannot be read ({error.strerror})") from error


def _read(file: Path, key: str) -> str:
    with _reading(file, key):
        text = file.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise BadInput(f"{key}={file}: not text (it holds a null character)")
    return text


def _json_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """A list if the first character is a bracket, else one object per line; blank lines are skipped."""
    first = True
    with _reading(file, key), file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield from _json_list(file, key)
                return
            first = False
            yield _object(_parsed(line, f"{key}: {file}", number), f"{key}: {file}:{number}:")


def _json_list(file: Path, key: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_parsed(_read(file, key), f"{key}: {file}"), start=1):
        yield _object(row, f"{key}: {file}: entry {number}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadInput(f"{place} must be a JSON object, not {type(row).__name__}")
    return row


def _parsed(text: str, place: str, first_line: int = 1) -> Any:
    """The JSON value that a text holds, which begins in line `first_line`; strict, see the module's text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if "\\u" in text:  # the only way to half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except UnicodeEncodeError:
        line, reason = first_line, "half of a surrogate pair"
    except RecursionError:
        line, reason = first_line, "nested too deeply"
    except ValueError as error:  # of this module; or of Python, for a number of thousands of digits
        line, reason = first_line, one_line(error)
    raise BadInput(f"{place}:{line}: not valid JSON ({reason})")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"an object with a name twice, among {reprlib.repr(sorted(name for name, _ in pairs))}")
    return row


def _hub_rows(
    name: str, config: str | None, split: str, whole: bool, source: str, key: str
) -> Iterator[dict[str, Any]]:
    """Stream a Hub data set, or download it whole into the cache of `datasets`, which works without a network then.

    The file formats and the network are the Hub's business, so are their errors.
    """
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=not whole, trust_remote_code=False)
    except Exception as error:  # of any of five libraries
        raise BadInput(
            f"{key}={source}: no such file, and split {split!r} of the data set {name} could not be read from the Hub "
            f"or the cache of datasets ({one_line(error)})"
        ) from error


def _documents(rows: Iterable[dict[str, Any]], source: str, key: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        column = next((name for name in TEXT_COLUMNS if name in row), TEXT_COLUMNS[0])
        yield require_text(row, column, number, source, key)
