"""Log-likelihoods of answers for lm-evaluation-harness, each prompt computed once for all of its answers.

A multiple-choice item asks for log P(answer | prompt) of every answer. The stock `HFLM` runs prompt + answer
for each of them. `PromptSharingLM` runs one row an item, the prompt and behind it its answers, each of which sees
the prompt and itself and has the positions that follow the prompt: the same numbers up to rounding, for a third of
the work on four short answers. Whether a model can do that is tried on a few words whenever one is wrapped; a model
that cannot (most with a recurrent state) is scored the stock way.

=======  =====  =====  =====  =====  =====  =====  =====  =====
column       0      1      2      3      4      5      6      7
=======  =====  =====  =====  =====  =====  =====  =====  =====
row 0      p_0    p_1    p_2    p_3    a_0    a_1    b_0    pad
row 1      pad    pad    p_0    p_1    a_0    b_0    b_1    b_2
=======  =====  =====  =====  =====  =====  =====  =====  =====

Prompts end in one column, so that logits are asked of it and of what is right of it alone. The last token of an
answer is predicted and never read. Log-probabilities are float32 whatever the model's precision. BOS is put in front
if and only if `add_bos_token` says so, not when the tokenizer happens to. Of prompt and answer together the last
tokens that fit are kept.
"""

from __future__ import annotations

import inspect
import logging
import math
import reprlib
from collections import ChainMap, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import compress
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.errors import BadInput, one_line
from harness.processes import shared_out, turns

__all__ = ["PromptSharingLM"]

logger = logging.getLogger("lors")
_say_once = cache(logger.warning)  # once in a process, however many models it scores

# ((prompt text, answer text), prompt tokens, answer tokens), as `HFLM` encodes a request.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# A prompt, and the answers of the requests that share it, each with the number of its request.
Item = tuple[tuple[int, ...], list[tuple[int, list[int]]]]
# Layers (`layer_types` of a config) whose columns meet nowhere but where a mask lets them.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
TRIAL = "the cat sat on a mat and then it ran to the old house by the river where all of the others had been"
# The two ways may differ by rounding: by this part of what another prompt changes, or the root of the precision's
# epsilon if that is more. An answer on top of another prompt, or of none, differs by about all of it.
TRIAL_TOLERANCE = 0.01


class PromptSharingLM(HFLM):
    """`HFLM` on a live model; see the module's text."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        add_bos_token: bool,
        progress: bool = True,
    ) -> None:
        """Wrap a decoder-only model, which is put into evaluation mode, and its tokenizer, which gets a padding token.

        `batch_size` counts answers (rows) per forward pass.
        """
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=add_bos_token,
            softmax_dtype=torch.float32,
            trust_remote_code=False,
        )
        self._progress = progress
        self._keeps_last_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Of a prompt and an answer on top of it: more than a layer looks back on are scored the stock way.
        self._longest_shared = _shortest_view(model) if self._try_sharing() else 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; BOS in front if `add_bos_token`, unless `add_special_tokens` is False."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if self.add_bos_token and add_special_tokens is not False and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # Silences the bar of the tokenisation; the scoring has its own.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its answer, and whether greedy decoding gives it."""
        requests = list(self._cut(requests))
        short = [len(prompt) + len(answer) - 1 <= self._longest_shared for _, prompt, answer in requests]
        shared = self._shared([*compress(requests, short)], override_bs or int(self.batch_size), self._progress)
        long = [request for request, is_short in zip(requests, short, strict=True) if not is_short]
        bars = {"disable_tqdm": not self._progress, "override_bs": override_bs}
        stock = super()._loglikelihood_tokens(long, **bars) if long else []
        scores = {True: iter(shared), False: iter(stock)}
        return [next(scores[is_short]) for is_short in short]

    def _cut(self, requests: Sequence[Request]) -> Iterator[Request]:
        """The requests with at least one token of prompt, and with what fits into the model."""
        longer = sum(len(answer) > self.max_length for _, _, answer in requests)
        if longer:
            logger.warning(
                "%d of %d answers are longer than the model (%d tokens): their last tokens are scored",
                *(longer, len(requests), self.max_length),
            )
        for text, prompt, answer in requests:
            if not answer:
                raise BadInput(f"eval.tasks: an answer has no token ({reprlib.repr(text)})")
            kept = answer[-self.max_length :]
            whole = [*(prompt or [self.prefix_token_id]), *answer][-(self.max_length + 1) :]
            yield text, whole[: -len(kept)], kept

    def _try_sharing(self) -> bool:
        """Whether the answers can share their prompts, on a few words; the log says why not.

        Raises:
            Exception: What the model raises when it is scored the stock way.
        """
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        if getattr(self.model, "_is_stateful", False) or not kinds <= ATTENTION:
            return self._cannot_share("its layers hand on more than a mask hides")
        words = (self.tok_encode(TRIAL, add_special_tokens=False) or [0]) * 18
        prompts, answers = (words[:6], words[6:10]), (words[12:16], words[16:18])
        trial = list(self._cut([(None, prompt, answer) for prompt in prompts for answer in answers]))
        stock = [score for score, _ in super()._loglikelihood_tokens(trial, disable_tqdm=True)]
        try:
            shared = [score for score, _ in self._shared(trial, len(trial), progress=False)]
        except Exception as error:  # anything, because every architecture has a cache of its own
            reason = f"{type(error).__name__}: {one_line(error)}"
        else:
            difference = max(abs(a - b) for a, b in zip(stock, shared, strict=True))
            effect = max(abs(a - b) for a, b in zip(stock[:2], stock[2:], strict=True))
            if difference <= effect * max(TRIAL_TOLERANCE, torch.finfo(self.model.dtype).eps ** 0.5):
                return True
            reason = f"a log-likelihood changes by {difference:.2g}"
        return self._cannot_share(reason)

    def _cannot_share(self, reason: str) -> Literal[False]:
        _say_once(
            f"scoring: every answer is run with its prompt; {type(self.model).__name__} cannot share it ({reason})"
        )
        return False

    def _shared(self, requests: Sequence[Request], size: int, progress: bool) -> list[tuple[float, bool]]:
        """`_loglikelihood_tokens` with each prompt computed once, about `size` answers at a time."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, prompt, _) in enumerate(requests):
            groups[tuple(prompt)].append(number)
        items = [(prompt, [(n, requests[n][2]) for n in numbers]) for prompt, numbers in groups.items()]
        batches = list(_batches(items, size))
        total = sum(len(answers) for batch in turns(batches) for _, answers in batch)
        with tqdm(total=total, desc="score", unit="answer", disable=not progress) as bar:

            def score(batch: list[Item]) -> dict[int, tuple[float, bool]]:
                scores = self._score(batch)
                bar.update(len(scores))
                return scores

            scores = dict(ChainMap(*shared_out(score, batches)))
        return [scores[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, batch: Sequence[Item]) -> dict[int, tuple[float, bool]]:
        """Score the answers of P items in one forward pass of N columns; by the number of the request."""
        start = max(len(prompt) for prompt, _ in batch)  # the column behind the prompts
        columns = start + max(sum(len(answer) - 1 for _, answer in answers) for _, answers in batch)
        tokens = torch.zeros(len(batch), columns, dtype=torch.long)
        positions = torch.zeros_like(tokens)
        parts = torch.zeros_like(tokens)  # 0 padding, 1 prompt, 2 and more the answers
        asked: list[tuple[int, int, int]] = []  # row, column, token that is predicted there
        for row, (prompt, answers) in enumerate(batch):
            spans = [(start - len(prompt), 0, list(prompt))]
            for _, answer in answers:
                begin = spans[-1][0] + len(spans[-1][2])
                spans.append((begin, len(prompt), answer[:-1]))
                read = [start - 1, *range(begin, begin + len(answer) - 1)]
                asked += [(row, column, token) for column, token in zip(read, answer, strict=True)]
            for part, (begin, position, ids) in enumerate(spans, start=1):
                span = slice(begin, begin + len(ids))
                tokens[row, span] = torch.tensor(ids, dtype=torch.long)
                positions[row, span] = torch.arange(position, position + len(ids))
                parts[row, span] = part
        # P x N x N: what a column sees is left of it or itself, and of its own part or, of an answer, the prompt.
        # Padding sees padding: a row of the mask without a key would be a row of NaN.
        sees = (parts[:, :, None] == parts[:, None, :]) | ((parts[:, :, None] > 1) & (parts[:, None, :] == 1))
        mask = torch.zeros(sees.shape, dtype=self.model.dtype)
        mask.masked_fill_(~sees.tril(), torch.finfo(mask.dtype).min)
        kept = {"logits_to_keep": columns - start + 1} if self._keeps_last_logits else {}
        logits = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            position_ids=positions.to(self.device),
            use_cache=False,
            **kept,
        ).logits[:, start - columns - 1 :]
        rows, read, predicted = torch.tensor(asked, device=self.device).unbind(1)
        log_probabilities = logits.float().log_softmax(-1)[rows, read - (start - 1)]  # all tokens of answers x V
        chosen = log_probabilities.gather(-1, predicted[:, None])[:, 0].tolist()
        greedy = (log_probabilities.argmax(-1) == predicted).tolist()
        results, begin = {}, 0
        for number, answer in (numbered for _, answers in batch for numbered in answers):
            span = slice(begin, begin + len(answer))
            results[number] = sum(chosen[span]), all(greedy[span])
            begin = span.stop
        return results


def _shortest_view(model: PreTrainedModel) -> float:
    """Tokens that every layer sees at least: a mask that is given holds for all layers, without their own windows."""
    config = model.config.get_text_config()
    views = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((view for view in views if view), default=math.inf)


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Batches of items of about one length, longest first, of at most `size` answers or one item."""
    batch: list[Item] = []
    answered = 0
    for item in sorted(items, key=_columns, reverse=True):
        if batch and answered + len(item[1]) > size:
            yield batch
            batch, answered = [], 0
        batch.append(item)
        answered += len(item[1])
    if batch:
        yield batch


def _columns(item: Item) -> int:
    prompt, answers = item
    return len(prompt) + sum(len(answer) - 1 for _, answer in answers)
