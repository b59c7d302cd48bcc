"""Calibration samples from texts: documents one after the other, cut into pieces of equal length.

    BOS document EOS BOS document EOS ..., cut into pieces of length - 1 tokens with BOS in front of each

BOS and EOS where the tokenizer has them; nothing else is added, whatever the tokenizer's own default. (The samplers of
Wanda and SparseGPT draw documents that are longer than a sample, of which small corpora have hardly any.)
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("lors")

SAMPLES, LENGTH = 128, 2048  # how many samples of how many tokens the papers take
ALLOWED = "token ids, int64 of shape (samples, length), or texts and a tokenizer"
ENCODED_AT_ONCE = 512  # texts per call of the tokenizer


def calibration_tokens(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None = None,
    length: int = LENGTH,
    seed: int = 0,
) -> LongTensor:
    """Token ids ``[samples, length]`` for a pruner.

    The documents are shuffled and joined. If they hold enough tokens the samples do not overlap; if not, evenly spaced
    samples overlap equally, and the log says so.

    Args:
        documents: Texts without special tokens.
        tokenizer: That of the model.
        samples: How many rows; None for the 128 of the papers, or as many as there are without overlap.
        length: How many tokens in each; 2048 in the papers.
        seed: Order of the documents.

    Raises:
        ValueError: Less text than one sample.
    """
    bos = if_any(tokenizer.bos_token_id)
    width = length - len(bos)
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    stream = list(islice(token_stream(documents, tokenizer), (samples or SAMPLES) * width))
    samples = samples or max(1, len(stream) // width)
    last = len(stream) - width
    if last < 0:
        raise ValueError(f"the calibration text holds {len(stream)} tokens; one sample of {length} needs {width}")
    if len(stream) < samples * width:
        log.warning("%d tokens of calibration text, so that %d samples of %d overlap", len(stream), samples, length)
    starts = [round(i * last / max(samples - 1, 1)) for i in range(samples)]
    return torch.tensor([bos + stream[start : start + width] for start in starts])


def tokens_for(
    model: nn.Module, calibration: Tensor | Iterable[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    """Token ids ``[samples, length]`` for a model, made of texts if ``calibration`` has these.

    Raises:
        ValueError: Neither texts, with a tokenizer, nor token ids that the model knows.
    """
    if isinstance(calibration, Iterable) and not isinstance(calibration, Tensor | str) and tokenizer is not None:
        length = min(LENGTH, positions_of(model.config))
        calibration = calibration_tokens([*calibration], tokenizer, length=length)
    if not isinstance(calibration, Tensor):
        got = "texts without a tokenizer" if isinstance(calibration, list | tuple) else type(calibration).__name__
        raise ValueError(f"calibration: got {got}; allowed are {ALLOWED}")
    if calibration.ndim != 2 or calibration.dtype != torch.long or not calibration.numel():
        raise ValueError(
            f"calibration: got {calibration.dtype} of shape {tuple(calibration.shape)}; allowed are {ALLOWED}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if not 0 <= int(calibration.min()) <= int(calibration.max()) < vocabulary:
        raise ValueError(f"calibration: token ids outside the vocabulary of {vocabulary}; is it another tokenizer's?")
    return calibration


def positions_of(config: PretrainedConfig) -> int:
    """How many tokens a model can look at, or those of a sample if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH


def token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The tokens of all documents, each between BOS and EOS but for the very first BOS, which the first piece
    brings; empty documents leave no trace."""
    bos, eos = if_any(tokenizer.bos_token_id), if_any(tokenizer.eos_token_id)
    boundary: list[int] = []
    for chunk in chunks((document for document in documents if document.strip()), ENCODED_AT_ONCE):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from boundary
            yield from ids
            boundary = eos + bos
    yield from eos if boundary else []


def if_any(token: int | None) -> list[int]:
    """A special token that the tokenizer may not have."""
    return [] if token is None else [token]


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The items, ``size`` at a time; the last ones may be fewer."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
