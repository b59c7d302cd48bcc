"""Log-likelihoods of answers for lm-evaluation-harness, each prompt computed once for all of its answers.

A multiple-choice item asks for log P(answer | prompt) of every answer. The stock `HFLM` runs prompt + answer
for each of them. `PromptSharingLM` runs the prompt once, keeps its keys and values, and runs the answers on
top: the same numbers up to rounding, for a third of the work on four short answers. Whether a model can do that
is tried on a few words whenever one is wrapped; a model that cannot (most with a recurrent state) is scored the
stock way.

Prompts of equal length are batched, so that nothing is padded on the left and positions and masks are the
model's own defaults; answers are padded on the right, where causal attention ignores it. Log-probabilities
are float32 whatever the model's precision. BOS is put in front if and only if `add_bos_token` says so, not
when the tokenizer happens to. Of prompt and answer together the last tokens that fit are kept; of an answer
that is longer than the model, what comes first is then read and not scored.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness.errors import BadInput, one_line

__all__ = ["PromptSharingLM"]

logger = logging.getLogger("lors")

# ((prompt text, answer text), prompt tokens, answer tokens), as `HFLM` encodes a request.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# A prompt with the numbers of the requests that share it.
Group = tuple[tuple[int, ...], list[int]]
# What is tried: two prompts of six tokens, and answers of four and of two.
TRIAL = "the cat sat on a mat and then it ran to the old house by the river where all of the others had been"
TRIAL_LENGTHS = (6, 6, 4, 2)
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
        """Wrap a model for lm-eval.

        Args:
            model: Any decoder-only model, on its device; it is put into evaluation mode.
            tokenizer: The model's; lm-eval gives it a padding token if it has none.
            batch_size: Answers (rows) per forward pass.
            add_bos_token: Whether every prompt starts with BOS (if the tokenizer has one).
            progress: Show one progress bar.
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

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Token ids of a text; BOS in front if `add_bos_token`, unless `add_special_tokens` is False."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if self.add_bos_token and add_special_tokens is not False and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # Silences the bar of the tokenisation; the scoring has its own.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its answer, and whether greedy decoding gives it."""
        requests = self._cut(requests)
        if self._shares_prompts:
            return self._shared(requests, override_bs or int(self.batch_size), self._progress)
        return super()._loglikelihood_tokens(requests, disable_tqdm=not self._progress, override_bs=override_bs)

    def _cut(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with at least one token of prompt, and with what fits into the model."""
        cut: list[Request] = []
        longer = 0
        for text, prompt, answer in requests:
            if not answer:
                raise BadInput(f"eval.tasks: an answer has no token ({reprlib.repr(text)})")
            longer += len(answer) > self.max_length
            kept = answer[-self.max_length :]
            whole = [*(prompt or [self.prefix_token_id]), *answer][-(self.max_length + 1) :]
            cut.append((text, whole[: -len(kept)], kept))
        if longer:
            logger.warning(
                "%d of %d answers are longer than the model (%d tokens): their last tokens are scored",
                *(longer, len(requests), self.max_length),
            )
        return cut

    def _try_sharing(self) -> bool:
        """Whether the answers can share their prompts, on a few words; the log says why not.

        Raises:
            Exception: What the model raises when it is scored the stock way.
        """
        words = itertools.cycle(self.tok_encode(TRIAL, add_special_tokens=False) or [0])
        *prompts, longer, shorter = (list(itertools.islice(words, length)) for length in TRIAL_LENGTHS)
        trial = self._cut([(None, prompt, answer) for prompt in prompts for answer in (longer, shorter)])
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
        answers = [answer for _, _, answer in requests]
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc="score", unit="answer", disable=not progress) as bar:
            for batch in _batches(groups, size):
                prompts, shared = zip(*batch, strict=True)
                numbers = [number for group in shared for number in group]
                scores = self._score(prompts, [len(group) for group in shared], [answers[n] for n in numbers])
                for number, score in zip(numbers, scores, strict=True):
                    results[number] = score
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                bar.update(len(numbers))
        return results

    @torch.no_grad()
    def _score(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], answers: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score R answers to P prompts of T tokens; counts[i] of them, in order, belong to prompt i."""
        last_only = {"logits_to_keep": 1} if self._keeps_last_logits else {}
        output = self.model(torch.tensor(prompts, device=self.device), use_cache=True, **last_only)
        rows = torch.repeat_interleave(torch.tensor(counts)).to(self.device)  # R: the prompt of each answer
        first = output.logits[:, -1].float().log_softmax(-1)[rows]  # R x V
        length = max(map(len, answers))
        padded = [answer + [0] * (length - len(answer)) for answer in answers]
        tokens = torch.tensor(padded, device=self.device)  # R x L
        log_probabilities = first[:, None]  # R x 1 x V
        if length > 1:
            past = output.past_key_values
            past.batch_select_indices(rows)
            logits = self.model(tokens[:, :-1], past_key_values=past, use_cache=True).logits
            later = logits.float().log_softmax(-1)  # R x L - 1 x V
            log_probabilities = torch.cat([log_probabilities, later], dim=1)
        lengths = torch.tensor([len(answer) for answer in answers], device=self.device)
        return _sums(log_probabilities, tokens, lengths)


def _sums(log_probabilities: Tensor, tokens: Tensor, lengths: Tensor) -> list[tuple[float, bool]]:
    """Sum of R x L x V over each answer's own tokens (R x L), and whether each of them is the likeliest."""
    counted = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # R x L
    chosen = log_probabilities.gather(-1, tokens[..., None])[..., 0]  # R x L
    greedy = (log_probabilities.argmax(-1) == tokens) | ~counted
    return list(zip((chosen * counted).sum(-1).tolist(), greedy.all(-1).tolist(), strict=True))


def _batches(groups: dict[tuple[int, ...], list[int]], size: int) -> Iterator[list[Group]]:
    """Batches of prompts of one length, longest first, of at most `size` answers or one prompt."""
    by_length = sorted(groups.items(), key=lambda group: len(group[0]), reverse=True)
    for _, same_length in itertools.groupby(by_length, key=lambda group: len(group[0])):
        batch: list[Group] = []
        answers = 0
        for group in same_length:
            if batch and answers + len(group[1]) > size:
                yield batch
                batch, answers = [], 0
            batch.append(group)
            answers += len(group[1])
        yield batch


@cache
def _say_once(message: str) -> None:
    """A warning that one process gives once, however many models it scores."""
    logger.warning(message)
