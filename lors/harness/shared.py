"""What many runs share and only one computes: a file in the cache, made by whoever needs it first.

``<cache>/tokens/<key>.npz``   tokenised training rows, in the order of their source, and calibration samples
``<cache>/scores/<key>.json``  scores of dense and pruned models, see `models`

(Pruned models have a cache of their own kind, ``lors.prune.cache``.) A key is a hash of all that determines the
content. For tokens that is the source, the tokenizer, the lengths, and the code that makes them: a changed
template or generator must not meet the tokens of the old one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig
from torch import LongTensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lors import microworld
from lors.harness import corpora, data, template
from lors.harness.data import Row, calibration_tokens, shuffled, tokenised_rows
from lors.harness.store import atomically, cache_directory, digest, fingerprint, with_fingerprints

__all__ = ["made_once", "shared_calibration", "shared_rows"]

Content = TypeVar("Content")


def made_once(
    file: Path,
    make: Callable[[], Content],
    read: Callable[[Path], Content | None],
    write: Callable[[Path, Content], None],
) -> Content:
    """Content of a cache file, which is made first unless it is there.

    Of several processes that want it, one makes it and the others wait; the lock ends with its process.

    Args:
        file: The file.
        make: Computes the content.
        read: Reads it; None if there is no file, or if it is damaged.
        write: Writes the file under a temporary name and renames it.
    """
    content = read(file)
    if content is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f"{file.name}.lock")):
            content = read(file)
            if content is None:
                write(file, make())
                content = read(file)
    return content


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
        cache_directory(cfg) / "tokens" / f"{key}.npz",
        lambda: tokenised_rows(cfg.data, cfg.train, tokenizer),
        _read_rows,
        _write_rows,
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
        cache_directory(cfg) / "tokens" / f"{key}.npz",
        lambda: calibration_tokens(cfg.prune, tokenizer, cfg.prune.seed),
        _read_calibration,
        lambda file, tokens: _write_arrays(file, tokens=tokens.numpy()),
    )


def _origin(cfg: DictConfig, source: str) -> list[Any]:
    """What tokens come from: the source (a key of the config), the tokenizer, and the code."""
    content: Any = with_fingerprints(cfg)
    model = content["model"]
    for name in source.split("."):
        content = content[name]
    makers = [Path(module.__file__) for module in (corpora, data, template)]
    makers += sorted(Path(microworld.__file__).parent.glob("*.py"))
    code = [fingerprint(file) for file in makers]
    return [source, content, model["path"], model["revision"], version("tokenizers"), version("transformers"), code]


def _write_rows(file: Path, rows: list[Row]) -> None:
    """All rows behind one another, and the length of each."""
    columns = {name: np.concatenate([np.asarray(row[name], np.int32) for row in rows]) for name in rows[0]}
    _write_arrays(file, lengths=np.array([len(row["input_ids"]) for row in rows]), **columns)


def _read_rows(file: Path) -> list[Row] | None:
    arrays = _read_arrays(file)
    if arrays is None:
        return None
    ends = np.cumsum(arrays.pop("lengths")).tolist()
    columns = {name: tokens.tolist() for name, tokens in arrays.items()}
    return [
        {name: tokens[start:end] for name, tokens in columns.items()}
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _read_calibration(file: Path) -> LongTensor | None:
    arrays = _read_arrays(file)
    return None if arrays is None else torch.from_numpy(arrays["tokens"])


def _write_arrays(file: Path, **arrays: np.ndarray) -> None:
    with atomically(file, "wb") as stream:
        np.savez(stream, **arrays)


def _read_arrays(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
