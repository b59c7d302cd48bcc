"""One run from its config to its result file.

load -> prune (cached) -> adapt -> train and measure -> merge -> check the zeros -> evaluate ->
``result.json``

What can be wrong with the input is found before a model is loaded (``BadInput``). A later failure still
leaves a result: its status, its error, and every number that was known by then. A killed run leaves no result
and is continued by the same command: training from its newest checkpoint, everything else from the parts that
were finished.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from omegaconf import DictConfig
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.config import resolve
from harness.construct import build_method
from harness.data import Collator
from harness.device_lock import device_lock
from harness.environment import now
from harness.errors import BadInput, one_line
from harness.evaluate import check_scoring, evaluate
from harness.inputs import Inputs, read_inputs
from harness.live_step import live_tensor_forward
from harness.live_tensors import LiveTensors
from harness.meter import (
    CudaPeak,
    Meter,
    count_flops,
    count_inference_flops,
    cuda_peak,
    process_rss_peak,
    training_memory,
    with_the_rest,
)
from harness.method import PRECISIONS, Method, adapt, finish
from harness.models import Models, default_device, random_model
from harness.result import blank_result, check_zeros, count_parameters, held_out_loss
from harness.simulate import simulate
from harness.store import RunStore, cache_directory, check_writable, remove
from harness.summary import summary
from harness.train import train
from lors.kernels import in_use
from lors.sparsity import UNSTRUCTURED, follows_pattern, supports
from lors.support import support_of

__all__ = ["execute", "seed_everything"]

log = logging.getLogger("lors")

# A model with a smaller share of zeros is dense: a few weights are exactly zero by chance, in half precision above all.
SURELY_SPARSE = 5e-3


def execute(cfg: DictConfig, since: int | None = None) -> dict[str, Any]:
    """Run one config, unless that has been done before, and print its summary.

    Args:
        cfg: A config as Hydra composes it from ``conf``.
        since: When the sweep began that this is a job of (`RunStore.written_since`); a sweep does not wait
            for a run that another process is at.

    Returns:
        The content of ``result.json``; its ``status`` is ok, failed or oom.

    Raises:
        BadInput: A value that the user has to change. Nothing has been computed, nothing is written.
        Busy: In a sweep, another process is at this run.
    """
    transformers.logging.set_verbosity_error()  # what it reports belongs into log.txt, see `_logging`
    cfg = resolve(cfg)
    method = build_method(cfg)
    store = RunStore.of(cfg)
    file = store.result_file
    result = store.finished(cfg, since)
    if result is None:
        check_writable("cache_root", cache_directory(cfg))
        inputs = read_inputs(cfg, method)
        check_writable("runs_root", store.directory)
        with store.lock(waiting=_say_waiting if since is None else None):
            store.settle()
            result = store.finished(cfg, since)
            if result is None:
                attempt = store.attempt(cfg.force)
                with _device(cfg):
                    result = _attempt(cfg, method, inputs, attempt)
                store.accept(attempt)
                file = store.result_file if result["status"] == "ok" else attempt.result_file
    else:
        print("This run has finished before and is not repeated; force=true repeats it.")
        if result["status"] == "ok" and store.parts.exists():  # it was killed between its result and the end
            with store.lock(waiting=_say_waiting):
                store.drop_progress()
    print(summary(result, file))
    if file != store.result_file:
        print(f"           the good result from before stays in {store.result_file}")
    return result


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _say_waiting() -> None:
    print("another process is at this run; waiting for it")


def _device(cfg: DictConfig) -> AbstractContextManager[None]:
    """The device, alone in mode=profile."""
    device, alone = default_device(), cfg.mode == "profile"
    reason = "timings want the device alone" if alone else "a profile has the device for itself"
    return device_lock(
        cache_directory(cfg) / "devices",
        device,
        alone=alone,
        waiting=lambda: print(f"{device}: used by another run; waiting, because {reason}"),
    )


def _attempt(cfg: DictConfig, method: Method, inputs: Inputs, store: RunStore) -> dict[str, Any]:
    """Run; whatever goes wrong on the way becomes the status of the result."""
    with _logging(store.directory / "log.txt"):
        run = Run(cfg, method, inputs, store)
        result = run.result
        try:
            run.run()
            result["status"] = "ok"
        except Exception as error:  # not KeyboardInterrupt: an interrupted run is continued
            if isinstance(error, BadInput) and result["support"] is None:
                raise  # it was found on the weights, before any work
            result["status"] = "oom" if _out_of_memory(error) else "failed"
            result["error"] = {
                "type": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
            log.error("%s: %s", result["status"], one_line(error))
        result["memory"]["process_rss_peak"] = process_rss_peak()
        result["environment"] |= {"kernels": in_use(), "end": now()}
        store.write(result)
        if result["status"] == "ok":
            store.drop_progress()
    return store.result()


class Run:
    """One run under way.

    Attributes:
        result: The content of ``result.json`` as far as it is known.
    """

    def __init__(self, cfg: DictConfig, method: Method, inputs: Inputs, store: RunStore) -> None:
        self.cfg = cfg
        self.method = method
        self.inputs = inputs
        self.store = store
        self.device = default_device()
        self.formats = PRECISIONS[cfg.train.precision]
        self.result = blank_result(cfg, store.key, self.device)

    def run(self) -> None:
        """All phases, in order."""
        self.store.write_config(self.cfg)
        if self.cfg.mode == "simulate":
            self._simulate()
            return
        model = self._start()
        M = supports(model)
        if self.cfg.mode == "run":
            self._note_support(M)
            check_scoring(model, self.inputs.tokenizer, self.cfg.eval)
            self._score_baselines(model)
        adapted = self._adapt(model)
        if self.method.trains:
            self._train(adapted)
        self._finish(adapted, M)

    def _simulate(self) -> None:
        """One training step without memory; all other phases would need values."""
        with self._phase("simulate"):
            for field, numbers in simulate(self.cfg, self.method, self.inputs.shape).items():
                self.result[field] = (self.result[field] or {}) | numbers

    def _start(self) -> PreTrainedModel:
        """The pruned model."""
        cfg = self.cfg
        if cfg.mode == "profile":
            with self._phase("load"):
                return random_model(self.inputs.shape, self.formats.base, cfg.sparsity, cfg.pattern, cfg.seed)
        self.models = Models(cfg, self.inputs)
        with self._phase("prune"):
            self.models.prune()
        with self._phase("load"):
            return self.models.pruned()

    def _note_support(self, M: Mapping[str, Tensor]) -> None:
        """Measure the zeros that the fine-tuning starts from; without a pruner they are the sparsity of the run.

        Raises:
            BadInput: The model, which was to be taken as it is, is not as sparse as the config says.
        """
        cfg, result = self.cfg, self.result
        support = support_of({name: partial(M.__getitem__, name) for name in M})
        if cfg.prune.name == "none":
            measured = support["sparsity"]
            follows = all(follows_pattern(of_one, cfg.pattern) for of_one in M.values())
            if cfg.sparsity is not None and (abs(cfg.sparsity - measured) > SURELY_SPARSE or not follows):
                wanted = f"sparsity={cfg.sparsity:g} pattern={cfg.pattern}"
                raise BadInput(
                    f"{wanted}: must be what the model has with prune=none, {measured:g} and {support['pattern']}; "
                    "or leave them out"
                )
            if measured > SURELY_SPARSE:
                result["sparsity"] = measured
                result["pattern"] = support["pattern"] if cfg.pattern == UNSTRUCTURED else cfg.pattern
                log.info("the model comes with %.2f %% zeros, pattern %s", 100 * measured, result["pattern"])
        result["support"] = support

    def _score_baselines(self, model: PreTrainedModel) -> None:
        """Scores of the pruned model and of what it was made from, which of one that comes sparse nobody knows."""
        cfg, baselines = self.cfg, self.result["baselines"]
        if not cfg.eval.baselines:
            return
        with self._phase("baselines"):
            if cfg.prune.name != "none" or self.result["sparsity"] == 0:
                baselines["dense"] = self.models.scores("dense", model if cfg.prune.name == "none" else None)
            baselines["pruned"] = self.models.scores("pruned", model)
        self.result["loss"]["eval_before"] = held_out_loss(baselines["pruned"])

    def _adapt(self, model: PreTrainedModel) -> nn.Module:
        cfg = self.cfg
        batches = self._first_batches() if self.method.prepare is not None else []
        if self.device.type == "cpu" and self.method.trains:
            self.result["memory"]["init_peak"] = self.store.once(
                "init_memory", lambda: _initial_peak(self.method, model, batches, cfg)
            )
        with self._phase("init") as peak:
            seed_everything(cfg.seed)
            adapted = adapt(self.method, model, batches, cfg.seed, precision=cfg.train.precision)
        if peak.allocated is not None:
            self.result["memory"]["init_peak"] = peak.allocated
        self.result["parameters"] = counts = count_parameters(adapted)
        if counts["adapted_share"] is not None and counts["adapted_share"] < 1:
            log.warning(
                "adapter.targets: %.0f %% of the weights in the decoder's linear layers have no adapter",
                100 * (1 - counts["adapted_share"]),
            )
        return adapted

    def _train(self, adapted: nn.Module) -> None:
        """Measure one step apart, then train; an interrupted training goes on from its newest checkpoint."""
        cfg, method, result = self.cfg, self.method, self.result
        collator = Collator(self.inputs.tokenizer, "fixed", cfg.train.sequence_length)
        batch = collator(self._rows(cfg.train.batch_size))
        result["memory"] |= self.store.once("memory", lambda: self._measure_memory(adapted, batch))
        result["flops"] |= self.store.once("flops", lambda: self._measure_flops(adapted, batch))
        meter = Meter(cfg.train.timing_warmup)
        if cfg.mode == "run":
            collator = Collator(self.inputs.tokenizer, cfg.train.pad, cfg.train.sequence_length)
        with self._phase("train") as peak:
            outcome = train(
                adapted, self.inputs.rows, collator, cfg.train, method, meter, self.store.directory, cfg.seed
            )
        if peak.allocated is not None:
            peak = meter.peak()  # that of a training that was only loaded here says nothing
            breakdown = with_the_rest(result["memory"]["breakdown"], peak.allocated)
            result["memory"] |= {"kind": "cuda", "train_peak": peak.allocated, "reserved_peak": peak.reserved}
            result["memory"]["breakdown"] = breakdown
        result["time"] |= meter.time_report()
        result["loss"] |= {"first": outcome.first_loss, "last": outcome.last_loss}
        if method.counts is not None:
            result["parameters"] |= method.counts(adapted)
        result["artifacts"]["steps"] = "steps.jsonl"
        if isinstance(adapted, PeftModel):
            adapted.save_pretrained(self._fresh_folder("adapter"))
            result["artifacts"]["adapter"] = "adapter"

    def _finish(self, adapted: nn.Module, M: Mapping[str, Tensor]) -> None:
        """Bring the model to each of its end states, check the zeros, score it."""
        variants = self.method.merges if self.cfg.mode == "run" else self.method.merges[:1]
        for variant in variants:
            # The first end state is the row itself.
            row = self.result if variant == variants[0] else self.result["variants"].setdefault(variant, {})
            with self._phase("merge"):
                model = finish(self.method, adapted, M, variant, in_place=variant == variants[-1])
                zeros = check_zeros(self.result, self.method, variant, model, M)
                row |= {"end_state": variant, "zeros": zeros, "eval": None}
            if self.cfg.save_merged and variant != "adapter" and self.result["artifacts"]["merged"] is None:
                self._save_merged(model)
            row["eval"] = self._score(variant, model)
            if variant == variants[0]:
                self.result["loss"]["eval_after"] = held_out_loss(row["eval"])

    def _score(self, variant: str, model: PreTrainedModel) -> dict[str, Any] | None:
        memory, flops = self.result["memory"], self.result["flops"]
        collator = Collator(self.inputs.tokenizer, "fixed", self.cfg.train.sequence_length)
        batch = collator(self._rows(self.cfg.train.batch_size))
        if flops["inference"] is None:
            # Of the first end state, the row itself: a side network or an adapter beside the weights costs more here.
            flops["inference"] = count_inference_flops(model, batch)
        if self.device.type == "cpu" and memory["eval_peak"] is None:
            memory["eval_peak"] = live_tensor_forward(model, batch)
        if self.cfg.mode == "profile" or not (self.cfg.eval.tasks or self.cfg.eval.perplexity):
            return None
        if not self.method.trains and self.result["baselines"]["pruned"] is not None:
            return self.result["baselines"]["pruned"]
        with self._phase("evaluate") as peak:
            scores = self.store.once(f"scores_{variant}", lambda: evaluate(model, self.inputs.tokenizer, self.cfg.eval))
        memory["eval_peak"] = memory["eval_peak"] or peak.allocated
        return scores

    def _save_merged(self, model: PreTrainedModel) -> None:
        folder = self._fresh_folder("merged")
        model.save_pretrained(folder)
        if self.inputs.tokenizer is not None:
            self.inputs.tokenizer.save_pretrained(folder)
        self.result["artifacts"]["merged"] = folder.name

    def _fresh_folder(self, name: str) -> Path:
        """Where an artifact goes, rid of what a kill has left there, or of a link that leads elsewhere."""
        folder = self.store.directory / name
        remove(folder)
        return folder

    def _measure_memory(self, adapted: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        return training_memory(adapted, batch, self.cfg.train, self.method)

    def _measure_flops(self, adapted: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
        autocast = self.formats.autocast
        per_batch = count_flops(adapted, batch, penalty=self.method.penalty, autocast=autocast)
        return {"per_step": per_batch * self.cfg.train.gradient_accumulation}

    def _rows(self, count: int) -> list[dict[str, list[int]]]:
        rows = self.inputs.rows
        return [rows[i] for i in range(min(count, len(rows)))]

    def _first_batches(self) -> list[dict[str, Tensor]]:
        """The first rows of the training data in the batches of the training."""
        size = self.cfg.train.batch_size
        count = self.method.init_rows or self.cfg.train.init_rows
        collator = Collator(self.inputs.tokenizer, self.cfg.train.pad, self.cfg.train.sequence_length)
        # In a profile only the memory counts, and the second batch reaches the peak.
        rows = self._rows(count if self.cfg.mode == "run" else 2 * size)
        return [collator(rows[start : start + size]) for start in range(0, len(rows), size)]

    @contextmanager
    def _phase(self, name: str) -> Iterator[CudaPeak]:
        """Time a phase, which may come in several parts, and measure its peak on a GPU."""
        log.info("%s ...", name)
        start = perf_counter()
        with cuda_peak(self.device) as peak:
            yield peak
        phases = self.result["time"]["phases"]
        phases[name] = phases.get(name, 0.0) + perf_counter() - start


def _initial_peak(method: Method, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], cfg: DictConfig) -> int:
    """Peak of live bytes while the method sets itself up, on a copy; a third batch would not raise it."""
    trial = copy.deepcopy(model)
    live = LiveTensors()
    live.count([*trial.parameters(), *trial.buffers()], "weights")
    with live:
        adapt(method, trial, batches[:2], cfg.seed, precision=cfg.train.precision)
    return live.peak


def _out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left; PyTorch has no error type of its own for the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class _LogFile(logging.FileHandler):
    """On a full disk the run ends at what it saves, with one line; lines of the log are lost in silence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        pass


@contextmanager
def _logging(file: Path) -> Iterator[None]:
    """The log file of the run gets everything, the console only what the suite itself says."""
    to_file = _LogFile(file, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_console = logging.StreamHandler(sys.stdout)
    to_console.setFormatter(logging.Formatter("%(message)s"))
    root, ours, theirs = logging.getLogger(), logging.getLogger("lors"), logging.getLogger("transformers")
    level = ours.level
    root.addHandler(to_file)
    ours.addHandler(to_console)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # It hands nothing to the root, but to a handler of its own, which prints.
    transformers.logging.disable_default_handler()
    transformers.logging.set_verbosity_warning()
    theirs.addHandler(to_file)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        ours.setLevel(level)
        root.removeHandler(to_file)
        theirs.removeHandler(to_file)
        transformers.logging.enable_default_handler()
        transformers.logging.set_verbosity_error()
        ours.removeHandler(to_console)
        to_file.close()
