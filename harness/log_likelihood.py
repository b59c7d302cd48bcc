"""Log-likelihoods of answers for lm-evaluation-harness, each prompt computed once for all of its answers.

A multiple-choice item asks for log P(answer | prompt) of every answer. The stock `HFLM` runs prompt + answer
for each of them. `PromptSharingLM` runs the prompt once, keeps its keys and values, and runs the answers on
top: the same numbers up to rounding, for a third of the work on four short answers. Whether a model can do that
is tried on a few words whenever one is wrapped; a model that cannot (most with a recurrent state) is scored the
stock way.

Prompts of equal length are batched, so that nothing is padded on the left and positions and masks are the
model's own defaults; answers are padded on the right, where causal attention ignores it. Log-probabilities
are float32 whatever the model's precision. BOS is put in front if and only if `add_bos_token` says so, not
when the tokenizer happens to. Of prompt and answer together the last tokens that fit are kept.
"""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.errors import BadInput, one_line

__all__ = ["PromptSharingLM"]

logger = logging.getLogger("lors")
_say_once = cache(logger.warning)  # once in a process, however many models it scores

# ((prompt text, answer text), prompt tokens, answer tokens), as `HFLM` encodes a request.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# A prompt with the numbers of the requests that share it.
Group = tuple[tuple[int, ...], list[int]]
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
        self._shares_prompts = self._try_sharing()

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
        if self._shares_prompts:
            return self._shared(requests, override_bs or int(self.batch_size), self._progress)
        return super()._loglikelihood_tokens(requests, disable_tqdm=not self._progress, override_bs=override_bs)

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
        words = (self.tok_encode(TRIAL, add_special_tokens=False) or [0]) * 18
        prompts, answers = (words[:6], words[6:12]), (words[12:16], words[16:18])
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
        _say_once(
            f"scoring: every answer is run with its prompt; {type(self.model).__name__} cannot share it ({reason})"
        )
        return False

    def _shared(self, requests: Sequence[Request], size: int, progress: bool) -> list[tuple[float, bool]]:
        """`_loglikelihood_tokens` with each prompt computed once, at most `size` answers at a time."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, prompt, _) in enumerate(requests):
            groups[tuple(prompt)].append(number)
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="score", unit="answer", disable=not progress) as bar:
            for batch in _batches(groups, size):
                prompts, shared = zip(*batch, strict=True)
                numbers = [number for group in shared for number in group]
                scores = self._score(prompts, [len(group) for group in shared], [requests[n][2] for n in numbers])
                results |= zip(numbers, scores, strict=True)
                bar.update(len(numbers))
        return [results[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], answers: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score R answers to P prompts of T tokens; counts[i] of them, in order, belong to prompt i."""
        last_only = {"logits_to_keep": 1} if self._keeps_last_logits else {}
        output = self.model(torch.tensor(prompts, device=self.device), use_cache=True, **last_only)
        rows = torch.repeat_interleave(torch.tensor(counts)).to(self.device)  # R: the prompt of each answer
        log_probabilities = output.logits[:, -1:].float().log_softmax(-1)[rows]  # R x 1 x V
        tokens = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(self.device)  # R x L
        if tokens.shape[1] > 1:
            past = output.past_key_values
            past.batch_select_indices(rows)
            logits = self.model(tokens[:, :-1], past_key_values=past, use_cache=True).logits
            later = logits.float().log_softmax(-1)  # R x L - 1 x V
            log_probabilities = torch.cat([log_probabilities, later], dim=1)
        lengths = torch.tensor([len(answer) for answer in answers], device=self.device)
        counted = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]  # R x L
        chosen = log_probabilities.gather(-1, tokens[..., None])[..., 0]  # R x L
        greedy = (log_probabilities.argmax(-1) == tokens) | ~counted
        return list(zip((chosen * counted).sum(-1).tolist(), greedy.all(-1).tolist(), strict=True))


def _batches(groups: dict[tuple[int, ...], list[int]], size: int) -> Iterator[list[Group]]:
    """Batches of prompts of one length, longest first, of at most `size` answers or one prompt."""
    batch: list[Group] = []
    answers = 0
    for prompt, numbers in sorted(groups.items(), key=lambda group: len(group[0]), reverse=True):
        if batch and (len(prompt) < len(batch[0][0]) or answers + len(numbers) > size):
            yield batch
            batch, answers = [], 0
        batch.append((prompt, numbers))
        answers += len(numbers)
    if batch:
        yield batch
