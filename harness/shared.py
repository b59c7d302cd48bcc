"""What many runs share and only one computes: a file in the cache, made by whoever needs it first.

``<cache>/tokens/<key>.sealed``  tokenised training rows, in the order of their source, and calibration samples
``<cache>/scores/<key>.sealed``  scores of dense and pruned models, see `models`

(Pruned models have a cache of their own kind, ``harness.pruned_cache``.) A key is a hash of all that determines the
content. For tokens that is the source, the tokenizer, the lengths, and the code that makes them: a changed
template or generator must not meet the tokens of the old one.

A sealed file is a line with the SHA-256 of its name and content, and the content: arrays as numpy writes them, or JSON.
A file that is not what was written under this name, down to the last bit, counts as absent and is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig
from torch import LongTensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness import alpaca, corpora, data, microworld
from harness.data import Row, calibration_tokens, shuffled, tokenised_rows
from harness.errors import one_line
from harness.identity import digest, fingerprint, with_fingerprints
from harness.pruned_cache import remove
from harness.store import Damaged, atomically, cache_directory, writing

__all__ = ["made_once", "shared_calibration", "shared_rows"]

log = logging.getLogger("lors")

COLUMNS = ("input_ids", "labels")  # of a row
SEAL = 65  # bytes: 64 hexadecimal digits and the end of the line
Content = TypeVar("Content")


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _from_json(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is wanted, not {type(value).__name__}")
    return value


def made_once(
    file: Path,
    make: Callable[[], Content],
    encode: Callable[[Content], bytes] = _to_json,
    decode: Callable[[bytes], Content] = _from_json,
) -> Content:
    """Content of a cache file, which is made first unless it is there.

    Of several processes that want it, one makes it and the others wait; the lock ends with its process. A damaged file
    is made again, with one warning in the log that names the reason. To an intact one nothing is written, so it may lie
    where this user cannot write.

    Args:
        file: The file.
        make: Computes the content.
        encode: Turns it into bytes; by default a JSON object.
        decode: Turns them back; what it raises says that they are something else.

    Raises:
        BadInput: The cache does not take the file or the lock.
    """
    with suppress(FileNotFoundError, Damaged):
        return _read(file, decode)
    with writing("cache_root", file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file.with_name(f"{file.name}.lock")).acquire()
    with held:
        try:
            return _read(file, decode)
        except FileNotFoundError:
            pass
        except Damaged as error:
            log.warning("%s; it is made again", error)
        content = encode(make())
        with writing("cache_root", file.parent):
            for leftover in (file, *file.parent.glob(f".{file.name}.*")):  # of a kill in `atomically`
                remove(leftover)
            with atomically(file, "wb") as stream:
                stream.write(_seal(file, content) + content)
    return decode(content)


def _read(file: Path, decode: Callable[[bytes], Content]) -> Content:
    """The content of a sealed file.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is something else.
    """
    try:
        written = file.read_bytes()
        seal, content = written[:SEAL], written[SEAL:]
        if seal != _seal(file, content):
            raise ValueError("its SHA-256 is another")
        return decode(content)
    except FileNotFoundError:
        raise
    except Exception as error:  # what is raised for an array of another form has no common type
        raise Damaged(f"{file}: damaged ({one_line(error)})") from error


def _seal(file: Path, content: bytes) -> bytes:
    """The first line of a file; its name is part of it, as a file of another key is damage too."""
    return hashlib.sha256(file.name.encode() + b"\0" + content).hexdigest().encode() + b"\n"


def shared_rows(cfg: DictConfig, tokenizer: Tokenizer) -> list[Row]:
    """The training rows of a resolved config, tokenised once for all methods and seeds and shuffled by ``seed``.

    Raises:
        BadInput: What is wrong with the data, see `data.training_data`.
    """
    train = cfg.train
    # No more text is read than the steps need, so that their number is part of what the rows are.
    needed = [train.steps, train.batch_size, train.gradient_accumulation] if cfg.data.kind == "text" else None
    key = digest([_origin(cfg, "data"), train.sequence_length, needed])
    rows = made_once(
        cache_directory(cfg) / "tokens" / f"{key}.sealed",
        lambda: tokenised_rows(cfg.data, cfg.train, tokenizer),
        _rows_to_bytes,
        _rows_from_bytes,
    )
    return shuffled(rows, cfg.seed)


def shared_calibration(cfg: DictConfig, tokenizer: Tokenizer) -> LongTensor:
    """The calibration samples of a resolved config, N x L token ids.

    Raises:
        BadInput: See `data.calibration_tokens`.
    """
    prune = {name: cfg.prune[name] for name in ("samples", "sequence_length", "seed")}
    key = digest([_origin(cfg, "prune.text"), prune])
    return made_once(
        cache_directory(cfg) / "tokens" / f"{key}.sealed",
        lambda: calibration_tokens(cfg.prune, tokenizer, cfg.prune.seed),
        lambda tokens: _to_bytes(tokens=tokens.numpy()),
        lambda content: torch.from_numpy(_from_bytes(content, tokens=2)["tokens"]),
    )


def _origin(cfg: DictConfig, source: str) -> list[Any]:
    """What tokens come from: the source (a key of the config), the tokenizer, and the code."""
    content: Any = with_fingerprints(cfg)
    model = content["model"]
    for name in source.split("."):
        content = content[name]
    makers = [Path(module.__file__) for module in (corpora, data, alpaca)]
    makers += sorted(Path(microworld.__file__).parent.glob("*.py"))
    code = [fingerprint(file) for file in makers]
    return [source, content, model["path"], model["revision"], version("tokenizers"), version("transformers"), code]


def _rows_to_bytes(rows: list[Row]) -> bytes:
    """All rows behind one another, and the length of each."""
    columns = {name: np.concatenate([np.asarray(row[name], np.int32) for row in rows]) for name in COLUMNS}
    return _to_bytes(lengths=np.array([len(row["input_ids"]) for row in rows]), **columns)


def _rows_from_bytes(content: bytes) -> list[Row]:
    arrays = _from_bytes(content, lengths=1, **dict.fromkeys(COLUMNS, 1))
    ends = np.cumsum(arrays.pop("lengths")).tolist()
    columns = {name: tokens.tolist() for name, tokens in arrays.items()}
    if any(len(tokens) != ends[-1] for tokens in columns.values()):
        raise ValueError("the rows are longer or shorter than their lengths")
    return [
        {name: tokens[start:end] for name, tokens in columns.items()}
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _to_bytes(**arrays: np.ndarray) -> bytes:
    stream = BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _from_bytes(content: bytes, **dimensions: int) -> dict[str, np.ndarray]:
    """Arrays of whole numbers, of these names and numbers of dimensions."""
    with np.load(BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    if {name: array.ndim for name, array in arrays.items()} != dimensions:
        raise ValueError(f"other arrays than {', '.join(dimensions)}")
    if any(array.dtype.kind != "i" for array in arrays.values()):
        raise ValueError("no whole numbers")
    return arrays
