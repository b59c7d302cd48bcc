"""Token data: instruction rows in the Alpaca template, plain text in blocks, calibration samples, batches.

One rule for special tokens everywhere: a row, block or sample starts with BOS if the tokenizer has one; EOS
ends an answer or a document that was not cut; nothing else is added, whatever the tokenizer's own default.
Evaluation has its own explicit switch, ``eval.add_bos_token``.

Instruction rows (Alpaca, Taori et al. 2023; the choices are those of the LoRS authors, arXiv 2501.08582):
    BOS prompt answer EOS, cut to `sequence_length`, EOS only if it still fits. The loss is on prompt and
    answer, or on the answer alone. Prompt and answer are encoded as one text, so that the tokens are those of
    plain inference; a token that holds any character of the answer belongs to the answer.
Text for language modelling and for calibration:
    BOS document EOS BOS document EOS ..., cut into pieces of `sequence_length` - 1 tokens with BOS in front
    of each.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.alpaca import alpaca_prompt
from harness.corpora import MICROWORLD, has_splits, read_rows, require_text, texts
from harness.errors import BadInput

__all__ = [
    "IGNORED",
    "Collator",
    "Row",
    "calibration_tokens",
    "check_token_ids",
    "random_data",
    "shuffled",
    "tokenised_rows",
    "training_data",
]

logger = logging.getLogger("lors")

Row = dict[str, list[int]]  # input_ids and labels, of equal length

IGNORED = -100  # a label that is no target; torch's and transformers' convention
ENCODED_AT_ONCE = 512  # texts per call of the tokenizer
CALIBRATION_POOL = 10_000  # calibration samples are drawn from so many documents, the first of the source


def training_data(data_cfg: Any, train_cfg: Any, tokenizer: Tokenizer, seed: int) -> list[Row]:
    """Tokenise the training data.

    Args:
        data_cfg: ``kind`` (instruction, microworld, text), ``path``, ``split``, ``limit`` (first rows; None
            for all), for instructions also ``template`` (alpaca) and ``loss_on`` (all, answer).
        train_cfg: ``sequence_length``; for text also ``steps``, ``batch_size`` and ``gradient_accumulation``:
            no more text is read than the steps need.
        tokenizer: The model's.
        seed: Shuffles the rows, so that the first ones, which an initialisation reads, are a random sample.

    Returns:
        Rows of at most ``sequence_length`` tokens; each has a target for the loss.

    Raises:
        BadInput: Missing file, malformed line (with its number), missing column, or no row left to train on.
    """
    return shuffled(tokenised_rows(data_cfg, train_cfg, tokenizer), seed)


def tokenised_rows(data_cfg: Any, train_cfg: Any, tokenizer: Tokenizer) -> list[Row]:
    """The rows of `training_data` in the order of their source."""
    if data_cfg.path is not None and data_cfg.split != "train" and not has_splits(data_cfg.path):
        raise BadInput(f"data.split={data_cfg.split}: must be train for data.path={data_cfg.path}, which has no others")
    if data_cfg.kind == "text":
        rows = _text_rows(data_cfg, train_cfg, tokenizer)
    else:
        rows = _instruction_rows(data_cfg, train_cfg.sequence_length, tokenizer)
    if not rows:
        raise BadInput(f"data.path={data_cfg.path}: no row to train on; the data set is empty")
    return rows


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in the order that `seed` draws."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


class Collator:
    """Pads rows on the right into a batch; padding is masked and never a target.

    The first position is no target either (nothing predicts it), so that the number of targets of a batch is
    simply the number of labels that are not ``IGNORED``.
    """

    def __init__(self, tokenizer: Tokenizer | None, pad: str, sequence_length: int) -> None:
        """Choose the shape of the batches.

        Args:
            tokenizer: Names the padding token; None (random data) pads with token 0, masked like any other.
            pad: ``longest`` pads to the longest row of a batch, ``fixed`` to `sequence_length` tokens.
            sequence_length: Length of ``fixed`` batches, in tokens; no row may be longer.
        """
        if pad not in ("longest", "fixed"):
            raise BadInput(f"train.pad={pad}: must be one of longest, fixed")
        # Not the tokenizer itself: the Trainer would write one that it finds here into every checkpoint.
        candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
        self.pad_id = next(token for token in candidates if token is not None)
        self.pad = pad
        self.sequence_length = sequence_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Batch of B rows: `input_ids`, `attention_mask` and `labels`, each an int64 tensor of B x T."""
        longest = max(len(row["input_ids"]) for row in rows)
        T = self.sequence_length if self.pad == "fixed" else longest
        input_ids = torch.full((len(rows), T), self.pad_id)
        labels = torch.full((len(rows), T), IGNORED)
        attention_mask = torch.zeros((len(rows), T), dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, 1:n] = torch.tensor(row["labels"][1:])
            attention_mask[i, :n] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def calibration_tokens(prune_cfg: Any, tokenizer: Tokenizer, seed: int) -> LongTensor:
    """Calibration samples for pruning, N x L token ids; each starts with BOS if the tokenizer has one.

    The first documents of the source (at most ``CALIBRATION_POOL``) are shuffled and joined. If they hold
    enough tokens the samples do not overlap; if not, evenly spaced samples overlap equally. (The samplers of
    Wanda and SparseGPT draw documents that are longer than a sample, of which small corpora have hardly any.)

    Args:
        prune_cfg: ``samples`` (N), ``sequence_length`` (L), ``text`` (source, see `corpora.texts`).
        tokenizer: The model's.
        seed: Order of the documents.

    Raises:
        BadInput: No such source, or less text than one sample.
    """
    N, L = prune_cfg.samples, prune_cfg.sequence_length
    bos = _bos(tokenizer)
    width = L - len(bos)
    split = "calibration" if prune_cfg.text == MICROWORLD else "train"
    documents = list(texts(prune_cfg.text, split=split, limit=CALIBRATION_POOL, key="prune.text"))
    random.Random(seed).shuffle(documents)
    stream = list(islice(_token_stream(documents, tokenizer), N * width))
    last = len(stream) - width
    if last < 0:
        raise BadInput(
            f"prune.text={prune_cfg.text}: holds {len(stream)} tokens; "
            f"one sample of prune.sequence_length={L} needs {width}"
        )
    if len(stream) < N * width:
        logger.warning("prune.text=%s: %d tokens, so that %d samples of %d overlap", prune_cfg.text, len(stream), N, L)
    starts = [round(i * last / max(N - 1, 1)) for i in range(N)]
    return torch.tensor([bos + stream[start : start + width] for start in starts])


def check_token_ids(ids: Iterable[int], tokenizer: Tokenizer, vocabulary: int, where: str) -> None:
    """Hold the tokens that occur against the model; that its tokenizer has more of them does not matter.

    Args:
        ids: The tokens, or some of them with the largest; not looked at if the tokenizer has none too many.
        tokenizer: The model's.
        vocabulary: Tokens that the model knows, 0 to `vocabulary` - 1.
        where: What they occur in, for the message.

    Raises:
        BadInput: The model does not know one of them.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocabulary:
        return
    largest = max(ids, default=0)
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(
            f"model.path: token {largest} ({token!r}) occurs in {where}; "
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}"
        )


def random_data(vocab_size: int, train_cfg: Any, seed: int) -> list[Row]:
    """Random rows of exactly ``train.sequence_length`` tokens, enough for all steps, for ``mode=profile``."""
    count = train_cfg.steps * train_cfg.batch_size * train_cfg.gradient_accumulation
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (count, train_cfg.sequence_length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def _instruction_rows(data_cfg: Any, sequence_length: int, tokenizer: Tokenizer) -> list[Row]:
    if data_cfg.template != "alpaca":
        raise BadInput(f"data.template={data_cfg.template}: must be alpaca for data.kind={data_cfg.kind}")
    if data_cfg.loss_on == "answer" and not tokenizer.is_fast:
        raise BadInput("data.loss_on=answer: this tokenizer reports no character offsets; must be all")
    encoded: list[Row] = []
    for chunk in _chunks(_prompts_and_answers(data_cfg), ENCODED_AT_ONCE):
        encoded += _encode_rows(chunk, tokenizer, data_cfg.loss_on, sequence_length)
    # A prompt that fills the row leaves nothing to learn from, and a batch of such rows has no mean loss.
    rows = [row for row in encoded if any(label != IGNORED for label in row["labels"][1:])]
    if len(rows) < len(encoded):
        dropped = f"{len(encoded) - len(rows)} of {len(encoded)} rows dropped"
        logger.warning("%s: no answer begins within train.sequence_length=%d", dropped, sequence_length)
    if encoded and not rows:
        raise BadInput(f"train.sequence_length={sequence_length}: shorter than every prompt of the data")
    return rows


def _prompts_and_answers(data_cfg: Any) -> Iterator[tuple[str, str]]:
    if data_cfg.kind == MICROWORLD:
        from harness import microworld

        if data_cfg.split != "train":
            raise BadInput(f"data.split={data_cfg.split}: must be train for data.kind={MICROWORLD}")
        source, raw = MICROWORLD, islice(microworld.instruction_rows(), data_cfg.limit)
    else:
        source, raw = data_cfg.path, read_rows(data_cfg.path, split=data_cfg.split, limit=data_cfg.limit)
    for number, row in enumerate(raw, start=1):
        instruction = require_text(row, "instruction", number, source, "data.path")
        answer = require_text(row, "output", number, source, "data.path")
        context = require_text(row, "input", number, source, "data.path") if row.get("input") else ""
        yield alpaca_prompt(instruction, context), answer


def _encode_rows(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, loss_on: str, sequence_length: int
) -> Iterator[Row]:
    answer_only = loss_on == "answer"
    joined = [prompt + answer for prompt, answer in pairs]
    encoding = tokenizer(joined, add_special_tokens=False, return_offsets_mapping=answer_only, verbose=False)
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    for i, ids in enumerate(encoding["input_ids"]):
        labels = ids
        if answer_only:
            prompt_end = len(pairs[i][0])
            ends = [end for _, end in encoding["offset_mapping"][i]]
            labels = [token if end > prompt_end else IGNORED for token, end in zip(ids, ends, strict=True)]
        yield {
            "input_ids": (bos + ids + eos)[:sequence_length],
            "labels": ([IGNORED] * len(bos) + labels + eos)[:sequence_length],
        }


def _text_rows(data_cfg: Any, train_cfg: Any, tokenizer: Tokenizer) -> list[Row]:
    bos = _bos(tokenizer)
    needed = None
    if train_cfg.steps is not None:
        needed = train_cfg.steps * train_cfg.batch_size * train_cfg.gradient_accumulation
    split = "pretrain" if data_cfg.path == MICROWORLD else data_cfg.split
    documents = texts(data_cfg.path, split=split, limit=data_cfg.limit)
    width = train_cfg.sequence_length - len(bos)
    pieces = _chunks(_token_stream(documents, tokenizer), width)
    blocks = [bos + piece for piece in islice(pieces, needed) if len(piece) == width]  # the tail is dropped
    if not blocks:
        raise BadInput(
            f"data.path={data_cfg.path}: less text than one block of train.sequence_length={width + len(bos)}"
        )
    return [{"input_ids": block, "labels": block} for block in blocks]


def _token_stream(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[int]:
    """The tokens of all documents, each between BOS and EOS but for the very first BOS, which the first piece
    brings; empty documents leave no trace."""
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    boundary: list[int] = []
    for chunk in _chunks((document for document in documents if document.strip()), ENCODED_AT_ONCE):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from boundary
            yield from ids
            boundary = eos + bos
    yield from eos if boundary else []


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _eos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
