"""Time, memory and FLOPs of training, measured so that methods can be compared.

Time. A step is everything between the Trainer's `on_step_begin` and `on_step_end`: all micro-batches,
clipping, update and schedule; reading and padding the batch, logging and checkpoints are outside. The device
is synchronised at both ends. The first steps of a process are dropped (allocation, compilation, caches).
Inside a step three spans are told apart, in the order in which they run; `train.MeasuredTrainer` marks their
ends:

    forward     the batch to the device, forward pass, loss and penalty
    backward    the backward pass
    optimizer   from the last backward pass to the end of the step: clipping, update, schedule, gradients set
    to None

On a CPU the marks are clock readings; on a GPU they are events in its own queue, read after the step, so that
telling the spans apart makes no step slower.

Memory. On a GPU the allocator's peak, reset per phase (`Phases`); on a CPU exact live bytes
(`live_memory`) of one separate step. FLOPs are counted, not estimated (`flops`).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.deferred_head import deferred_by
from harness.flops import CountFlops
from harness.live_memory import LiveTensors, step_counted, training_step
from harness.method import Method, adapt
from harness.processes import gathered
from harness.recipe import enable_activation_checkpointing, state_kept

__all__ = [
    "CudaPeak",
    "Meter",
    "Phases",
    "StepTime",
    "initialization_memory",
    "parts_of_peak",
    "process_rss_peak",
    "training_cost",
]

log = logging.getLogger("lors")


@dataclass(frozen=True)
class StepTime:
    """Wall time of one optimizer step in milliseconds, and the tokens in it, of all processes, that are not padding."""

    ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    tokens: int
    warmup: bool


@dataclass
class CudaPeak:
    """Peaks of the CUDA allocator in bytes; None on a device without one, and until the phase is over."""

    allocated: int | None = None
    reserved: int | None = None


class Meter(TrainerCallback):
    """Measures every step of a training; see the module's text.

    Attributes:
        steps: One entry per step, those of earlier processes of a resumed run included.
    """

    def __init__(self, warmup_steps: int = 10) -> None:
        """Drop the first `warmup_steps` steps of this process; at least one step is always left to report."""
        self.warmup_steps = warmup_steps
        self.steps: list[StepTime] = []
        self._first_timed = warmup_steps
        self._device = torch.device("cpu")
        self._marks: list[tuple[str, Any]] = []
        self._tokens: list[Tensor] = []
        self._begin = 0.0
        self._peak_before = CudaPeak()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._device = args.device
        self._first_timed = len(self.steps) + min(self.warmup_steps, state.max_steps - state.global_step - 1)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._tokens = []
        self._synchronise()
        self._begin = time.perf_counter()
        self._marks = [("", self._now())]

    def mark(self, span: str) -> None:
        """The span of this name (forward, backward) ends now; an empty name marks a beginning."""
        self._marks.append((span, self._now()))

    def count_tokens(self, attention_mask: Tensor) -> None:
        """Count one micro-batch, but for rows of one token, which make a batch whole (`recipe.filled_up`); read only
        after the step, because reading a GPU waits for it."""
        lengths = attention_mask.sum(1)
        self._tokens.append((lengths * (lengths > 1)).sum())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark("optimizer")
        self._synchronise()
        ms = (time.perf_counter() - self._begin) * 1e3
        spans = dict.fromkeys(("", "forward", "backward", "optimizer"), 0.0)
        for (_, begin), (span, end) in pairwise(self._marks):
            spans[span] += begin.elapsed_time(end) if self._device.type == "cuda" else (end - begin) * 1e3
        tokens = sum(gathered(sum(int(count) for count in self._tokens)))
        warmup = len(self.steps) < self._first_timed
        self.steps.append(StepTime(ms, spans["forward"], spans["backward"], spans["optimizer"], tokens, warmup))

    def peak(self) -> CudaPeak:
        """Peaks of the allocator over all processes of the run, in this one since its statistics were reset."""
        if self._device.type != "cuda":
            return CudaPeak()
        here = torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        before = self._peak_before.allocated or 0, self._peak_before.reserved or 0
        return CudaPeak(*map(max, here, before))

    def state_dict(self) -> dict[str, Any]:
        """What this process and those before it have measured."""
        return {"steps": [asdict(step) for step in self.steps], "peak": asdict(self.peak())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what earlier processes of the same run have measured; before the training begins."""
        self.steps = [StepTime(**step) for step in state["steps"]]
        self._peak_before = CudaPeak(**state["peak"])

    def last(self) -> dict[str, Any]:
        """The last step as a plain dict."""
        return asdict(self.steps[-1])

    def time_report(self) -> dict[str, Any]:
        """Times of the steps after the warm-up, for the result file.

        Returns:
            ``warmup_steps`` (dropped), ``steps`` (reported), ``step_ms`` {p10, p50, p90}, ``forward_ms``,
            ``backward_ms`` and ``optimizer_ms`` (medians), ``tokens_per_second`` (all tokens over all time).

        Raises:
            ValueError: No step was measured.
        """
        timed = [step for step in self.steps if not step.warmup]
        if not timed:
            raise ValueError(f"no step to report: {len(self.steps)} measured, all of them warm-up")
        p10, p50, p90 = np.percentile([step.ms for step in timed], (10, 50, 90))
        return {
            "warmup_steps": len(self.steps) - len(timed),
            "steps": len(timed),
            "step_ms": {"p10": float(p10), "p50": float(p50), "p90": float(p90)},
            **{
                name: float(np.median([getattr(step, name) for step in timed]))
                for name in ("forward_ms", "backward_ms", "optimizer_ms")
            },
            "tokens_per_second": sum(step.tokens for step in timed) / sum(step.ms for step in timed) * 1e3,
        }

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Phases:
    """Time and peaks of the phases of a run.

    Attributes:
        seconds: By name of the phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[CudaPeak]:
        """Time a phase, which may come in several parts; the peak is that of this part."""
        log.info("%s ...", name)
        start = time.perf_counter()
        peak, device = CudaPeak(), self._device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # what earlier phases have left there counts as reserved
            torch.cuda.reset_peak_memory_stats(device)
        yield peak
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak.allocated = torch.cuda.max_memory_allocated(device)
            peak.reserved = torch.cuda.max_memory_reserved(device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def initialization_memory(
    method: Method, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], seed: int, train_cfg: Any
) -> int:
    """Peak of live bytes while the method sets itself up, on a copy of the pruned model.

    Args:
        batches: Training batches; two are read, a third one would not raise the peak.
    """
    trial = copy.deepcopy(model)
    live = LiveTensors()
    live.count([*trial.parameters(), *trial.buffers()], "weights")
    with deferred_by(trial, train_cfg), live:
        adapt(method, trial, batches[:2], seed, precision=train_cfg.precision)
    return live.peak


def training_cost(
    model: nn.Module, batch: Mapping[str, Tensor], train_cfg: Any, method: Method
) -> dict[str, dict[str, Any]]:
    """Exact memory and FLOPs of one training step of `method`.

    The memory is that of its largest step, once the optimizer holds its state, as it does from the second step of a
    training on; the FLOPs are those of an ordinary step.

    Args:
        model: The adapted model; as it was afterwards, except that activation checkpointing is on if the
            recipe asks. A copy of what is trained exists, uncounted, for the time of the call.
        batch: One batch of the training, see `data.collator`.
        train_cfg: The recipe: precision, accumulation, clipping, activation checkpointing, optimizer.
        method: The method.

    Returns:
        ``memory``: ``kind`` (live_tensors), ``train_peak`` (bytes), ``breakdown`` (bytes by category at that peak),
        ``peak_phase`` (forward, backward, optimizer) and ``saved_for_backward`` (bytes of activations alive between
        the last forward and its backward); ``flops``: ``per_step``.
    """
    if train_cfg.activation_checkpointing:
        enable_activation_checkpointing(model)
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    live, counted = LiveTensors(), CountFlops()
    with deferred_by(model, train_cfg), state_kept(model):
        optimizer = method.optimizer(model.train(), train_cfg)
        step = partial(training_step, model, batch, optimizer, method, train_cfg)
        step(LiveTensors(), counted)  # a ledger that is not entered counts nothing
        with method.largest_step(model) or nullcontext():
            step(LiveTensors())  # what optimizer and layers keep is there from now on
            with step_counted(live, model, batch, optimizer):
                saved = step(live)
    peak = live.at_peak()
    memory = {
        "kind": "live_tensors",
        "train_peak": peak.bytes,
        "breakdown": peak.by_category(),
        "peak_phase": peak.phase,
        "saved_for_backward": saved,
    }
    return {"memory": memory, "flops": {"per_step": counted.flops}}


def parts_of_peak(breakdown: Mapping[str, int] | None, peak: int) -> dict[str, int] | None:
    """The parts of a peak that an allocator reports: those of the counted step, and what they do not account for.

    Args:
        breakdown: Bytes by category of one step of full rows, see `training_cost`.
        peak: Bytes of the allocator. Below the sum of the parts, as where no batch had full rows, nothing is known of
            them: None.
    """
    rest = peak - sum((breakdown or {}).values())
    return {**breakdown, "allocator": rest} if breakdown and rest >= 0 else None


def process_rss_peak() -> int:
    """Highest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not getrusage: on Linux its maximum survives exec, so that a job would report the peak of its sweep.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
