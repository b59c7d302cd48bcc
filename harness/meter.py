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

Memory. On a GPU the allocator's peak, reset per phase (`cuda_peak`); on a CPU exact live bytes
(`live_tensors`) of one separate step (`training_memory`). FLOPs are counted, not estimated (`count_flops`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.live_step import live_tensor_step, state_kept
from harness.loss import batch_loss
from harness.method import PRECISIONS, Method
from harness.recipe import enable_activation_checkpointing, gradient_clipping, make_optimizer

__all__ = [
    "CudaPeak",
    "Meter",
    "StepTime",
    "count_flops",
    "count_inference_flops",
    "cuda_peak",
    "flop_formulas",
    "process_rss_peak",
    "training_memory",
    "with_the_rest",
]


@dataclass(frozen=True)
class StepTime:
    """Wall time of one optimizer step in milliseconds, and the tokens in it that are not padding."""

    ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    tokens: int
    warmup: bool


class Meter(TrainerCallback):
    """Measures every step of a training; see the module's text.

    Attributes:
        steps: One entry per step, those of earlier processes of a resumed run included.
    """

    def __init__(self, warmup_steps: int = 10) -> None:
        """Drop the first `warmup_steps` steps of this process; at least one step is always left to report."""
        self.warmup_steps = warmup_steps
        self.steps: list[StepTime] = []
        self._warmup_left = warmup_steps
        self._device = torch.device("cpu")
        self._marks: list[tuple[str, Any]] = []
        self._tokens: list[Tensor] = []
        self._begin = 0.0
        self._peak_before = CudaPeak()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._device = args.device
        self._warmup_left = max(0, min(self.warmup_steps, state.max_steps - state.global_step - 1))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._tokens = []
        self._synchronise()
        self._begin = time.perf_counter()
        self._marks = [("", self._now())]

    def mark(self, span: str) -> None:
        """The span of this name (forward, backward) ends now; an empty name marks a beginning."""
        self._marks.append((span, self._now()))

    def count_tokens(self, attention_mask: Tensor) -> None:
        """Count one micro-batch; read only after the step, because reading a GPU waits for it."""
        self._tokens.append(attention_mask.sum())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark("optimizer")
        self._synchronise()
        ms = (time.perf_counter() - self._begin) * 1e3
        spans = self._spans()
        self.steps.append(
            StepTime(
                ms=ms,
                forward_ms=spans["forward"],
                backward_ms=spans["backward"],
                optimizer_ms=spans["optimizer"],
                tokens=sum(int(count) for count in self._tokens),
                warmup=self._warmup_left > 0,
            )
        )
        self._warmup_left = max(0, self._warmup_left - 1)

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
        """Take over what earlier processes of the same run have measured."""
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
            "forward_ms": float(np.median([step.forward_ms for step in timed])),
            "backward_ms": float(np.median([step.backward_ms for step in timed])),
            "optimizer_ms": float(np.median([step.optimizer_ms for step in timed])),
            "tokens_per_second": sum(step.tokens for step in timed) / sum(step.ms for step in timed) * 1e3,
        }

    def _synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _spans(self) -> dict[str, float]:
        """Milliseconds by name of span, summed over the micro-batches."""
        sums = {"": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for (_, begin), (span, end) in zip(self._marks, self._marks[1:], strict=False):
            on_gpu = self._device.type == "cuda"
            sums[span] += begin.elapsed_time(end) if on_gpu else (end - begin) * 1e3
        return sums


@dataclass
class CudaPeak:
    """Peaks of the CUDA allocator in bytes; None on a device without one, and until the phase is over."""

    allocated: int | None = None
    reserved: int | None = None


@contextmanager
def cuda_peak(device: torch.device) -> Iterator[CudaPeak]:
    """Measure the peak of one phase: statistics are reset when it begins and read when it ends."""
    peak = CudaPeak()
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield peak
    finally:
        torch.cuda.synchronize(device)
        peak.allocated = torch.cuda.max_memory_allocated(device)
        peak.reserved = torch.cuda.max_memory_reserved(device)


def training_memory(model: nn.Module, batch: Mapping[str, Tensor], train_cfg: Any, method: Method) -> dict[str, Any]:
    """Exact memory of one training step of `method`, by category; see `live_step.live_tensor_step`.

    Args:
        model: The adapted model; as it was afterwards, except that activation checkpointing is on if the
            recipe asks.
        batch: One batch of the training, see `data.Collator`.
        train_cfg: The recipe: precision, accumulation, clipping, activation checkpointing, optimizer.
        method: The method.
    """
    if train_cfg.activation_checkpointing:
        enable_activation_checkpointing(model)
    with nullcontext() if method.costliest is None else method.costliest(model):
        return live_tensor_step(
            model,
            batch,
            lambda model: make_optimizer(model, train_cfg, method),
            penalty=method.penalty,
            accumulation=train_cfg.gradient_accumulation,
            max_grad_norm=gradient_clipping(train_cfg, method),
            autocast=PRECISIONS[train_cfg.precision].autocast,
        )


def with_the_rest(breakdown: Mapping[str, int] | None, peak: int) -> dict[str, int] | None:
    """The parts of a peak that an allocator reports: those of the counted step, and what they do not account for.

    Args:
        breakdown: Bytes by category of one step of full rows, see `training_memory`.
        peak: Bytes of the allocator. Below the sum of the parts, as where no batch had full rows, nothing is known of
            them: None.
    """
    rest = peak - sum((breakdown or {}).values())
    return {**breakdown, "allocator": rest} if breakdown and rest >= 0 else None


def count_flops(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    autocast: bool = False,
) -> int:
    """FLOPs of the forward and backward pass of one micro-batch; a multiply-add is two.

    Counted: matrix products and attention, wherever they run (custom autograd functions and recomputation
        included);
    attention counts in full although half of it is masked. Not counted: elementwise work, clipping and the
    optimizer. The model is afterwards what it was.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with state_kept(model):
        model.train()
        with _flop_counter() as counter:
            batch_loss(model, batch, penalty=penalty, autocast=autocast).backward()
    return counter.get_total_flops()


def flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """FLOPs of an operation from its arguments and its result ``out_val``; operations not listed count nothing."""
    return _flop_counter().flop_registry


def count_inference_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass without gradients, counted as in ``count_flops``."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    with state_kept(model), torch.no_grad():
        model.eval()
        with _flop_counter() as counter:
            model(**inputs, use_cache=False)
    return counter.get_total_flops()


def process_rss_peak() -> int:
    """Highest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum survives exec, so that a job would report the peak of the sweep that
        # started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and their product with the values: query B x H x n x d, key and value with H or fewer heads."""
    return _scores_flops(query, key, query[-1]) + _scores_flops(query, key, value[-1])


def _attention_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores again, then the gradients of queries and keys, of scores and values."""
    return 3 * _scores_flops(query, key, query[-1]) + 2 * _scores_flops(query, key, value[-1])


def _scores_flops(query: Any, key: Any, width: int) -> int:
    """One product between every query and every key, of inner size `width`, in each of the query's heads."""
    batch, heads, queries, _ = query
    return 2 * batch * heads * queries * key[-2] * width


# torch has no formula for the attention kernel of CPUs, and 2.11 fails where keys have fewer heads than queries.
_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_ATTENTION = {
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): _attention_flops for kernel in _KERNELS},
    **{
        getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward_flops
        for kernel in _KERNELS
    },
}
