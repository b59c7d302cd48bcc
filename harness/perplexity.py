"""Perplexity of a text by the protocol of GPTQ, SparseGPT and Wanda, and of answers to instructions.

Text. The documents are joined by two newlines (those of the microworld as its model met them in pre-training, by
EOS BOS) and encoded once, with one BOS in front if the evaluation adds BOS at all. The tokens are cut into windows
of L that do not overlap, the tail is dropped. Window i has the mean loss of its L - 1 predictions, from float32
log-probabilities, and

    perplexity = exp(mean over windows of those means)

For WikiText-2 raw (test split) the documents are the rows of the data set, one line each.

Answers. Row i has n_i target tokens, those of its answer, and the summed loss s_i; perplexity = exp(sum s / sum n).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import LongTensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.corpora import MICROWORLD, texts, wikitext_rows
from harness.data import IGNORED, Row
from harness.errors import BadInput
from harness.processes import shared_out, turns

__all__ = ["held_out_perplexity", "perplexity", "perplexity_windows"]

TOKENS_AT_ONCE = 4096  # per forward pass; bounds the logits of a large vocabulary
LOSS_DIGITS = 6  # of a window or row, in nats


def perplexity_windows(tokenizer: Tokenizer, eval_cfg: Any) -> LongTensor:
    """The tokens of the text in windows, N x L; see the module's text.

    Args:
        eval_cfg: ``perplexity.text`` (``microworld``: its held-out documents, ``wikitext``: WikiText-2 raw, test split,
            or a text source as in `corpora.texts`), ``perplexity.window`` (L, in tokens), ``perplexity.windows`` (the
            first ones only; None: all), ``data_root`` (a folder with ``wikitext/test.jsonl``, column `page`; None takes
            WikiText-2 from the Hub), ``add_bos_token`` (one BOS in front of the whole text).

    Raises:
        BadInput: No such source, a malformed one, or one that is shorter than one window.
    """
    source, window, between = eval_cfg.perplexity.text, eval_cfg.perplexity.window, "\n\n"
    if source == MICROWORLD:
        documents = texts(source, split="heldout")
        between = f"{tokenizer.eos_token or ''}{tokenizer.bos_token or ''}" or between
    elif source == "wikitext" and eval_cfg.data_root is not None:
        file = os.path.join(eval_cfg.data_root, "wikitext", "test.jsonl")
        documents = wikitext_rows(texts(file, key="eval.perplexity.text"))
    else:
        documents = texts(source, split="test", key="eval.perplexity.text")
    ids = tokenizer.encode(between.join(documents), add_special_tokens=False, verbose=False)
    if eval_cfg.add_bos_token and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    count = len(ids) // window
    if count == 0:
        raise BadInput(f"eval.perplexity.window={window}: must be at most {len(ids)}, the tokens of the text")
    return torch.tensor(ids[: count * window]).view(count, window)[: eval_cfg.perplexity.windows]


@torch.no_grad()
def perplexity(model: nn.Module, windows: LongTensor, *, progress: bool = True) -> dict[str, Any]:
    """Perplexity of a text in windows, N x L, for a causal language model in evaluation mode; see the module's text.

    Returns:
        ``value`` (perplexity), ``loss`` (its logarithm), ``loss_stderr`` (over windows; None for one window),
        ``losses`` (of each window, in the text's order), ``window``, ``windows`` and ``tokens`` (that were predicted).
    """
    count, window = windows.shape
    device = next(model.parameters()).device
    batches = windows.split(max(1, TOKENS_AT_ONCE // window))
    with tqdm(total=sum(map(len, turns(batches))), desc="perplexity", unit="window", disable=not progress) as bar:

        def score(batch: LongTensor) -> list[float]:
            batch = batch.to(device)
            logits = model(batch, use_cache=False).logits  # B x L x V
            bar.update(len(batch))
            # One window at a time: a float32 copy of all logits would be the largest tensor of the run.
            return [F.cross_entropy(z[:-1].float(), y[1:]).item() for z, y in zip(logits, batch, strict=True)]

        losses = [*chain.from_iterable(shared_out(score, batches))]
    return {**_summary(losses, [1] * count), "window": window, "windows": count, "tokens": count * (window - 1)}


@torch.no_grad()
def held_out_perplexity(model: nn.Module, rows: Sequence[Row], *, progress: bool = True) -> dict[str, Any]:
    """Perplexity of the targets in rows of instructions, for a causal language model in evaluation mode.

    Args:
        model: The model.
        rows: ``input_ids`` and ``labels``; each has a target.

    Returns:
        ``value`` (perplexity), ``loss`` (its logarithm), ``loss_stderr`` (over rows; None for one), ``losses`` (of each
        row, mean per target, in their order), ``targets`` (of each row), ``rows`` and ``tokens`` (targets in all).
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
    longest = len(rows[order[0]]["input_ids"])
    batches = torch.tensor(order).split(max(1, TOKENS_AT_ONCE // longest))
    with tqdm(total=sum(map(len, turns(batches))), desc="held-out answers", unit="row", disable=not progress) as bar:

        def score(batch: LongTensor) -> list[tuple[int, float, int]]:
            tokens = pad_sequence([torch.tensor(rows[row]["input_ids"]) for row in batch], batch_first=True)
            # Padding is on the right, where causal attention does not look.
            logits = model(tokens.to(device), use_cache=False).logits  # B x T x V
            bar.update(len(batch))
            scored = []
            for row, z in zip(batch.tolist(), logits, strict=True):
                labels = torch.tensor(rows[row]["labels"])[1:]
                counted = (labels != IGNORED).nonzero()[:, 0]
                loss = F.cross_entropy(z[counted.to(device)].float(), labels[counted].to(device))
                scored.append((row, loss.item(), len(counted)))
            return scored

        _, losses, targets = map(list, zip(*sorted(chain.from_iterable(shared_out(score, batches))), strict=True))
    return {**_summary(losses, targets), "targets": targets, "rows": len(rows), "tokens": sum(targets)}


def _summary(losses: list[float], weights: list[int]) -> dict[str, Any]:
    """Perplexity of parts that have these mean losses and weights; the standard error is that of a ratio of sums."""
    count, total = len(losses), sum(weights)
    mean = math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / total
    squares = math.fsum((weight * (loss - mean)) ** 2 for loss, weight in zip(losses, weights, strict=True))
    return {
        "value": torch.tensor(mean, dtype=torch.float64).exp().item(),  # infinite rather than an error
        "loss": mean,
        "loss_stderr": math.sqrt(squares * count / (count - 1)) / total if count > 1 else None,
        "losses": [round(loss, LOSS_DIGITS) for loss in losses],
    }
