"""Perplexity of a text by the protocol of GPTQ, SparseGPT and Wanda.

The documents are joined by two newlines (those of the microworld as its model met them in pre-training, by
EOS BOS) and encoded once, with one BOS in front if the evaluation adds BOS at
all. The tokens are cut into windows of L that do not overlap, the tail is dropped. Window i has the mean loss
of its L - 1 predictions, from float32 log-probabilities, and

    perplexity = exp(mean over windows of those means)

For WikiText-2 raw (test split) the documents are the rows of the data set, one line each.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import LongTensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.corpora import MICROWORLD, read_rows, require_text, texts, wikitext_rows
from harness.errors import BadInput

__all__ = ["perplexity", "perplexity_windows"]

WIKITEXT = "wikitext"
KEY = "eval.perplexity.text"
TOKENS_AT_ONCE = 4096  # per forward pass; bounds the logits of a large vocabulary
LOSS_DIGITS = 6  # of a window, in nats


def perplexity_windows(tokenizer: Tokenizer, eval_cfg: Any) -> LongTensor:
    """The tokens of the text in windows, N x L; see the module's text.

    Args:
        tokenizer: The model's.
        eval_cfg: ``perplexity.text`` (``microworld``: its held-out documents, ``wikitext``: WikiText-2 raw, test split,
            or a text source as in `corpora.texts`), ``perplexity.window`` (L, in tokens), ``data_root`` (a folder with
            ``wikitext/test.jsonl``, column `page`; None takes WikiText-2 from the Hub), ``add_bos_token`` (one BOS in
            front of the whole text).

    Raises:
        BadInput: No such source, a malformed one, or one that is shorter than one window.
    """
    source, window = eval_cfg.perplexity.text, eval_cfg.perplexity.window
    between = "\n\n"
    if source == MICROWORLD:
        between = f"{tokenizer.eos_token or ''}{tokenizer.bos_token or ''}" or between
    text = between.join(_documents(source, eval_cfg.data_root))
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if eval_cfg.add_bos_token and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    count = len(ids) // window
    if count == 0:
        raise BadInput(f"eval.perplexity.window={window}: must be at most {len(ids)}, the tokens of the text")
    return torch.tensor(ids[: count * window]).view(count, window)


def _documents(source: str, data_root: str | None) -> list[str]:
    if source == WIKITEXT and data_root is not None:
        file = str(Path(data_root) / WIKITEXT / "test.jsonl")
        rows = read_rows(file, key=KEY)
        return wikitext_rows(require_text(row, "page", number, file, KEY) for number, row in enumerate(rows, start=1))
    try:
        return list(texts(source, split="heldout" if source == MICROWORLD else "test", key=KEY))
    except BadInput as error:
        if source == WIKITEXT:
            raise BadInput(f"{error}; eval.data_root=FOLDER works without them") from error
        raise


@torch.no_grad()
def perplexity(model: nn.Module, windows: LongTensor, *, progress: bool = True) -> dict[str, Any]:
    """Perplexity of a text; see the module's text.

    Args:
        model: A causal language model in evaluation mode, on its device.
        windows: The text, see `perplexity_windows`.
        progress: Show a progress bar.

    Returns:
        ``value`` (perplexity), ``loss`` (its logarithm), ``loss_stderr`` (over windows; None for one window),
        ``losses`` (of each window, in the order of the text), ``window``, ``windows`` and ``tokens`` (that were
        predicted).
    """
    count, window = windows.shape
    device = next(model.parameters()).device
    losses: list[float] = []
    with tqdm(total=count, desc="perplexity", unit="window", disable=not progress) as bar:
        for batch in windows.split(max(1, TOKENS_AT_ONCE // window)):
            batch = batch.to(device)
            logits = model(batch, use_cache=False).logits  # B x L x V
            # One window at a time: a float32 copy of all logits would be the largest tensor of the run.
            losses += [F.cross_entropy(z[:-1].float(), y[1:]).item() for z, y in zip(logits, batch, strict=True)]
            bar.update(len(batch))
    mean = math.fsum(losses) / count
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / max(1, count - 1)
    return {
        "value": torch.tensor(mean, dtype=torch.float64).exp().item(),  # infinite rather than an error
        "loss": mean,
        "loss_stderr": math.sqrt(variance / count) if count > 1 else None,
        "losses": [round(loss, LOSS_DIGITS) for loss in losses],
        "window": window,
        "windows": count,
        "tokens": count * (window - 1),
    }
