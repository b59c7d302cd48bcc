"""Token data: instruction rows in the Alpaca template, plain text in blocks, calibration samples, batches.

One rule for special tokens everywhere: a row, block or sample starts with BOS if the tokenizer has one; EOS
ends an answer or a document that was not cut; nothing else is added, whatever the tokenizer's own default.
Evaluation has its own explicit switch, ``eval.add_bos_token``.

Instruction rows (Alpaca, Taori et al. 2023; the choices are those of the LoRS authors, arXiv 2501.08582):
    BOS prompt answer EOS, cut to `sequence_length`, EOS only if it still fits. The loss is on prompt and
    answer, or on the answer alone. Prompt and answer are encoded as one text, so that the tokens are those of
    plain inference; a token that holds any character of the answer belongs to the answer. With data.template=question
    it is "Question: ...", line end, "Answer: ..."; with data.template=chat
    the tokenizer's own chat template takes the place of prompt, BOS and EOS.
Text for language modelling and for calibration: `lors.pruning.calibration`.

The first token of a row is no target, as nothing predicts it. So the number of targets of a batch is the number of
labels that are not ``IGNORED``, which is what the Trainer counts.

Tokens are made once for all runs with the same source, tokenizer, lengths and code, and kept in
``<cache>/tokens/<key>.sealed``: training rows in the order of their source, and calibration samples.
"""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import LongTensor, Tensor
from transformers import DataCollatorForSeq2Seq, default_data_collator
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.alpaca import alpaca_prompt
from harness.corpora import MICROWORLD, has_splits, instructions, texts
from harness.errors import BadInput, one_line
from harness.identity import digest, fingerprint
from harness.sealed_file import computed_once
from lors.pruning import calibration
from lors.pruning.calibration import ENCODED_AT_ONCE, chunks, if_any, token_stream

__all__ = ["IGNORED", "Batch", "Collator", "Row", "batches_of", "calibration_samples", "calibration_tokens"]
__all__ += ["check_token_ids", "collator", "held_out_rows", "random_data", "tokenised_rows", "training_rows"]

logger = logging.getLogger("lors")

Row = dict[str, list[int]]  # input_ids and labels, of equal length
Batch = Mapping[str, Tensor]  # input_ids, attention_mask and labels, B x T
Collator = Callable[[Sequence[Row]], Batch]

HERE = Path(__file__).parent
# The code that makes tokens.
MAKERS = [*(HERE / f"{name}.py" for name in ("alpaca", "corpora", "data")), Path(calibration.__file__)]
MAKERS += sorted(HERE.glob("microworld/*.py"))
IGNORED = -100  # a label that is no target; torch's and transformers' convention
CALIBRATION_POOL = 10_000  # calibration samples are drawn from so many documents, the first of the source


def training_rows(
    cfg: DictConfig, fingerprinted: Mapping[str, Any], tokenizer: Tokenizer, vocabulary: int
) -> list[Row]:
    """The training rows of a resolved config, tokenised once for all methods and seeds.

    They are shuffled by ``seed``, so that the first ones, which an initialisation reads, are a random sample.
    `fingerprinted` is the config of `identity.with_fingerprints`; the model knows the tokens 0 to `vocabulary` - 1.

    Raises:
        BadInput: See `tokenised_rows`; or a token that the model does not know.
    """
    train = cfg.train
    # No more text is read than the steps need, so that their number is part of what the rows are.
    needed = _rows_needed(train) if cfg.data.kind == "text" else None
    chosen = [fingerprinted["data"], train.sequence_length, needed]
    rows = _made_once(cfg, fingerprinted, chosen, lambda: tokenised_rows(cfg.data, train, tokenizer))
    check_token_ids((max(row["input_ids"]) for row in rows), tokenizer, vocabulary, "the training rows")
    random.Random(cfg.seed).shuffle(rows)
    return rows


def held_out_rows(
    cfg: DictConfig, fingerprinted: Mapping[str, Any], tokenizer: Tokenizer, vocabulary: int
) -> list[Row]:
    """The ``eval.held_out`` rows of the training data that follow its first ``data.limit``; answers are the targets.

    Arguments as for `training_rows`.

    Raises:
        BadInput: The training reads all rows, or there are not so many more; see also `tokenised_rows`.
    """
    asked, first = f"eval.held_out={cfg.eval.held_out}", cfg.data.limit
    if cfg.data.kind == "text" or first is None:
        raise BadInput(f"{asked}: needs instructions and a data.limit; the rows after it are held out")
    last = first + cfg.eval.held_out
    data = {**cfg.data, "limit": last, "loss_on": "answer"}

    def make() -> list[Row]:
        rows = list(instructions(OmegaConf.create(data)))
        if len(rows) < last:
            raise BadInput(f"{asked}: the data has {len(rows)} rows, {first} of them to train on (data.limit)")
        return _instruction_rows(rows[first:], OmegaConf.create(data), cfg.train, tokenizer)

    chosen = ["held out", {**data, "path": fingerprinted["data"]["path"]}, first, cfg.train.sequence_length]
    rows = _made_once(cfg, fingerprinted, chosen, make)
    check_token_ids((max(row["input_ids"]) for row in rows), tokenizer, vocabulary, "the held-out rows")
    return rows


def calibration_samples(
    cfg: DictConfig, fingerprinted: Mapping[str, Any], tokenizer: Tokenizer, vocabulary: int
) -> LongTensor:
    """The calibration samples of a resolved config, N x L token ids; arguments as for `training_rows`.

    Raises:
        BadInput: See `calibration_tokens`; or a token that the model does not know.
    """
    prune = cfg.prune
    chosen = [fingerprinted["prune"]["text"], prune.samples, prune.sequence_length, prune.seed]
    samples = _made_once(cfg, fingerprinted, chosen, lambda: calibration_tokens(prune, tokenizer, prune.seed).tolist())
    check_token_ids(map(max, samples), tokenizer, vocabulary, "prune.text")
    return torch.tensor(samples)


def tokenised_rows(data_cfg: Any, train_cfg: Any, tokenizer: Tokenizer) -> list[Row]:
    """Tokenise the training data.

    Args:
        data_cfg: ``kind`` (instruction, microworld, text), ``path``, ``split``, ``limit`` (first rows; None
            for all), for instructions also ``template`` (alpaca, question, chat) and ``loss_on`` (all, answer).
        train_cfg: ``sequence_length``; for text also ``steps``, ``batch_size`` and ``gradient_accumulation``:
            no more text is read than the steps need.

    Returns:
        Rows of at most ``sequence_length`` tokens, in the order of their source; each has a target for the loss.

    Raises:
        BadInput: Missing file, malformed line (with its number), missing column, or no row left to train on.
    """
    source = data_cfg.path or MICROWORLD
    if data_cfg.split != "train" and not has_splits(source):
        raise BadInput(f"data.split={data_cfg.split}: must be train, the only split of {source}")
    if data_cfg.kind == "text":
        split = "pretrain" if source == MICROWORLD else data_cfg.split
        return _text_rows(texts(source, split=split, limit=data_cfg.limit), source, train_cfg, tokenizer)
    return _instruction_rows(instructions(data_cfg), data_cfg, train_cfg, tokenizer)


def collator(tokenizer: Tokenizer | None, pad: str, sequence_length: int) -> Collator:
    """What makes a batch of B rows: `input_ids`, `attention_mask` and `labels`, each an int64 tensor of B x T.

    Rows are padded on the right; padding is masked and never a target.

    Args:
        tokenizer: Names the padding token; None for random rows, which are all of one length.
        pad: ``longest`` pads to the longest row of a batch, ``fixed`` to `sequence_length` tokens.
        sequence_length: Length of ``fixed`` batches, in tokens; no row may be longer.
    """
    if tokenizer is None:
        return default_data_collator
    tokenizer = copy.deepcopy(tokenizer)  # the model keeps the side that its own is padded on
    tokenizer.padding_side = "right"
    padding = {"longest": "longest", "fixed": "max_length"}[pad]
    return DataCollatorForSeq2Seq(
        tokenizer, padding=padding, max_length=sequence_length, label_pad_token_id=IGNORED, return_tensors="pt"
    )


def batches_of(rows: Sequence[Row], train_cfg: Any, tokenizer: Tokenizer | None) -> tuple[Collator, Batch]:
    """What makes the batches of the training, and the first one at its full length, the costliest that can be."""
    length = train_cfg.sequence_length
    first = collator(tokenizer, "fixed", length)(rows[: train_cfg.batch_size])
    return collator(tokenizer, train_cfg.pad, length), first


def calibration_tokens(prune_cfg: Any, tokenizer: Tokenizer, seed: int) -> LongTensor:
    """`lors.pruning.calibration_tokens` of the first documents of a source, at most ``CALIBRATION_POOL``.

    Args:
        prune_cfg: ``samples``, ``sequence_length``, ``text`` (source, see `corpora.texts`).
        seed: Order of the documents.

    Raises:
        BadInput: No such source, or less text than one sample.
    """
    source, length = prune_cfg.text, prune_cfg.sequence_length
    split = "calibration" if source == MICROWORLD else "train"
    documents = list(texts(source, split=split, limit=CALIBRATION_POOL, key="prune.text"))
    try:
        return calibration.calibration_tokens(documents, tokenizer, samples=prune_cfg.samples, length=length, seed=seed)
    except ValueError as error:
        raise BadInput(f"prune.text={source} prune.sequence_length={length}: {error}") from error


def check_token_ids(ids: Iterable[int], tokenizer: Tokenizer, vocabulary: int, where: str) -> None:
    """Raise `BadInput` if one of the tokens is not among the `vocabulary` that the model knows; `where` they occur.

    That its tokenizer has more of them does not matter; if it has not, the tokens are not looked at.
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
    shape = (_rows_needed(train_cfg), train_cfg.sequence_length)
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    mask = [1] * train_cfg.sequence_length
    return [row | {"attention_mask": mask} for row in map(_all_targets, tokens.tolist())]


def _rows_needed(train_cfg: Any) -> int | None:
    """Rows that the steps take; None where they are counted in epochs."""
    return train_cfg.steps and train_cfg.steps * train_cfg.batch_size * train_cfg.gradient_accumulation


def _instruction_rows(
    source: Iterable[tuple[str, str, str]], data_cfg: Any, train_cfg: Any, tokenizer: Tokenizer
) -> list[Row]:
    if data_cfg.template is None:
        raise BadInput(f"data.template=null: must be alpaca, question or chat for data.kind={data_cfg.kind}")
    chat = data_cfg.template == "chat"
    if chat and not tokenizer.chat_template:
        raise BadInput(
            "data.template=chat: the tokenizer of the model has no chat template; must be alpaca or question"
        )
    if data_cfg.loss_on == "answer" and not tokenizer.is_fast:
        raise BadInput("data.loss_on=answer: this tokenizer reports no character offsets; must be all")
    length = train_cfg.sequence_length
    if chat:
        pairs = (_as_chat(tokenizer, *row) for row in source)
    else:
        as_pair = _as_question if data_cfg.template == "question" else _as_alpaca
        pairs = (as_pair(*row) for row in source)
    encoded = [
        row
        for chunk in chunks(pairs, ENCODED_AT_ONCE)
        for row in _encode_rows(chunk, tokenizer, data_cfg.loss_on, length, chat)
    ]
    # A prompt that fills the row leaves nothing to learn from, and a batch of such rows has no mean loss.
    rows = [row for row in encoded if any(label != IGNORED for label in row["labels"])]
    if not encoded:
        raise BadInput(f"data.path={data_cfg.path}: no row to train on; the data set is empty")
    if not rows:
        raise BadInput(f"train.sequence_length={length}: shorter than every prompt of the data")
    if len(rows) < len(encoded):
        dropped = f"{len(encoded) - len(rows)} of {len(encoded)} rows dropped"
        logger.warning("%s: no answer begins within train.sequence_length=%d", dropped, length)
    return rows


def _as_alpaca(instruction: str, context: str, answer: str) -> tuple[str, str]:
    return alpaca_prompt(instruction, context), answer


def _as_question(instruction: str, context: str, answer: str) -> tuple[str, str]:
    """Prompt and answer as lm-eval's GSM8K has them."""
    question = f"{instruction}\n\n{context}" if context else instruction
    return f"Question: {question}\nAnswer:", f" {answer}"


def _as_chat(tokenizer: Tokenizer, instruction: str, context: str, answer: str) -> tuple[str, str]:
    """Prompt and answer as the chat template of the tokenizer has them, with its special tokens."""
    question = {"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}
    chat = [question, {"role": "assistant", "content": answer}]
    try:
        prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise BadInput(f"data.template=chat: the template of the model fails ({one_line(error)})") from error
    if not whole.startswith(prompt):
        raise BadInput("data.template=chat: the template of the model does not begin an answer as it begins a reply")
    return prompt, whole.removeprefix(prompt)


def _encode_rows(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, loss_on: str, sequence_length: int, chat: bool = False
) -> Iterator[Row]:
    answer_only = loss_on == "answer"
    joined = [prompt + answer for prompt, answer in pairs]
    encoding = tokenizer(joined, add_special_tokens=False, return_offsets_mapping=answer_only, verbose=False)
    bos, eos = ([] if chat else if_any(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for i, ids in enumerate(encoding["input_ids"]):
        labels = ids
        if answer_only:
            spans = zip(ids, encoding["offset_mapping"][i], strict=True)
            labels = [token if end > len(pairs[i][0]) else IGNORED for token, (_, end) in spans]
        row = _all_targets((bos + ids + eos)[:sequence_length])
        row["labels"][1:] = ([IGNORED] * len(bos) + labels + eos)[1:sequence_length]
        yield row


def _text_rows(documents: Iterable[str], source: str, train_cfg: Any, tokenizer: Tokenizer) -> list[Row]:
    bos, length = if_any(tokenizer.bos_token_id), train_cfg.sequence_length
    pieces = (bos + piece for piece in chunks(token_stream(documents, tokenizer), length - len(bos)))
    rows = [
        _all_targets(piece) for piece in islice(pieces, _rows_needed(train_cfg)) if len(piece) == length
    ]  # the tail is dropped
    if not rows:
        raise BadInput(f"data.path={source}: less text than one block of train.sequence_length={length}")
    return rows


def _all_targets(tokens: list[int]) -> Row:
    return {"input_ids": tokens, "labels": [IGNORED, *tokens[1:]]}


def _made_once(
    cfg: DictConfig, fingerprinted: Mapping[str, Any], chosen: list[Any], make: Callable[[], list[Any]]
) -> list[Any]:
    """Tokens from the cache, of a source and lengths that were chosen, by this tokenizer and code."""
    model, code = fingerprinted["model"], [fingerprint(file) for file in MAKERS]
    versions = [version("tokenizers"), version("transformers")]
    key = digest([chosen, model["path"], model["revision"], versions, code])
    file = Path(cfg.cache_root, "tokens", f"{key}.sealed")
    return computed_once(file, make, lambda tokens: json.dumps(tokens).encode())
