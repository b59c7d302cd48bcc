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

__all__ = ["perplexity", "perplexity_text", "text_windows"]

WIKITEXT = "wikitext"
KEY = "eval.perplexity.text"
TOKENS_AT_ONCE = 4096  # per forward pass; bounds the logits of a large vocabulary
LOSS_DIGITS = 6  # of a window, in nats


def perplexity_text(source: str, data_root: str | None = None, boundary: str = "\n\n") -> str:
    """The text whose perplexity is measured.

    Args:
        source: ``microworld`` (its held-out documents), ``wikitext`` (WikiText-2 raw, test split), or a text
            source as in `corpora.texts`.
        data_root: Folder with ``wikitext/test.jsonl`` (column `page`); None takes WikiText-2 from the Hub.
        boundary: What stands between two documents of the microworld; its model has seen EOS BOS.

    Raises:
        BadInput: No such source, or a malformed one.
    """
    if source == WIKITEXT and data_root is not None:
        file = str(Path(data_root) / WIKITEXT / "test.jsonl")
        rows = read_rows(file, key=KEY)
        pages = [require_text(row, "page", number, file, KEY) for number, row in enumerate(rows, start=1)]
        documents = wikitext_rows(pages)
    elif source == WIKITEXT:
        try:
            documents = list(texts(source, key=KEY))
        except BadInput as error:
            raise BadInput(f"{error}; eval.data_root=FOLDER works without them") from error
    else:
        documents = list(texts(source, split="heldout" if source == MICROWORLD else "test", key=KEY))
    return (boundary if source == MICROWORLD else "\n\n").join(documents)


def text_windows(tokenizer: Tokenizer, text: str, window: int, add_bos_token: bool) -> LongTensor:
    """The tokens of a text in windows, N x L; see the module's text.

    Args:
        tokenizer: The model's.
        text: The documents, already joined.
        window: L, in tokens.
        add_bos_token: Put one BOS in front of the whole text.

    Raises:
        BadInput: The text is shorter than one window.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if add_bos_token and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    count = len(ids) // window
    if count == 0:
        raise BadInput(f"eval.perplexity.window={window}: must be at most {len(ids)}, the tokens of the text")
    return torch.tensor(ids[: count * window]).view(count, window)


@torch.no_grad()
def perplexity(model: nn.Module, windows: LongTensor, *, progress: bool = True) -> dict[str, Any]:
    """Perplexity of a text; see the module's text.

    Args:
        model: A causal language model in evaluation mode, on its device.
        windows: The text, see `text_windows`.
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
