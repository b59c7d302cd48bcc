"""One run from its config to its result file.

load -> prune (cached) -> adapt -> train and measure -> merge -> check the zeros -> evaluate ->
``result.json``

What can be wrong with the input is found before a model is loaded (``BadInput``). A later failure still
leaves a result: its status, its error, and what was known by then. A killed run leaves no result
and is continued by the same command: training from its newest checkpoint, everything else from the parts that
were finished.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness import processes
from harness.artifacts import Artifacts
from harness.bfloat16_products import bfloat16_products
from harness.config import resolve
from harness.deferred_head import deferred_by
from harness.device_lock import device_lock
from harness.environment import default_device, now
from harness.errors import BadInput, one_line
from harness.evaluate import check_scoring, evaluate
from harness.files import check_writable
from harness.flops import count_inference_flops
from harness.inputs import Inputs, read_inputs
from harness.live_memory import forward_memory
from harness.log_file import logged
from harness.meter import Meter, Phases, initialization_memory, parts_of_peak, process_rss_peak, training_cost
from harness.method import Method, finish, prepare, wrap
from harness.method_from_config import build_method
from harness.model_card import MERGED
from harness.models import Models
from harness.processes import from_first, gathered, in_first, is_first
from harness.quantized import quantized_layout
from harness.result import blank_result, count_parameters, held_out_loss
from harness.shards import collect, home, placed
from harness.simulate import simulate
from harness.simulate_pruning import simulate_pruning
from harness.store import RunStore
from harness.summary import summary
from harness.trackers import reporting
from harness.train import train
from harness.weights import base_format, checksum, load_weights, random_model
from harness.zeros import check_zeros, starting_sparsity
from lors.kernels import in_use
from lors.pruning import quantize_model
from lors.sparsity import supports

__all__ = ["execute"]

log = logging.getLogger("lors")

# The folder of a plain model that goes with the parts of a finished run.
UNSAVED = "parts/end_state"


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
    processes.begin()
    store = RunStore.of(cfg)
    file = store.result_file
    result = from_first(lambda: store.finished(cfg, since))
    if result is None:
        check_writable("cache_root", Path(cfg.cache_root))
        inputs = read_inputs(cfg, method)
        check_writable("runs_root", store.directory)
        with in_first(store.lock(waiting=_say_waiting if since is None else None)):
            result = from_first(lambda: store.settle() or store.finished(cfg, since))
            if result is None:
                attempt = from_first(lambda: store.attempt(cfg))
                device = default_device()
                used = device_lock(Path(cfg.cache_root, "devices"), device, alone=cfg.mode == "profile")
                with used if device.type == "cuda" else in_first(used):  # each its GPU, or all one CPU
                    result = blank_result(cfg, store.key, store.stages, device)
                    result = _attempt(cfg, method, inputs, attempt, result)
                if result["status"] == "ok":  # a process that has failed waits for nobody
                    from_first(lambda: store.accept(attempt))
                file = store.result_file if result["status"] == "ok" else attempt.result_file
    elif is_first():
        print("This run has finished before and is not repeated; force=true repeats it.")
        if result["status"] == "ok" and store.parts.exists():  # it was killed between its result and the end
            with store.lock(waiting=_say_waiting):
                store.drop_progress()
    if not is_first():
        return result
    print(summary(result, file))
    if file != store.result_file:
        print(f"           the good result from before stays in {store.result_file}")
    return result


def _say_waiting() -> None:
    print("another process is at this run; waiting for it")


def _attempt(
    cfg: DictConfig, method: Method, inputs: Inputs, store: RunStore, result: dict[str, Any]
) -> dict[str, Any]:
    """Run; whatever goes wrong on the way, in any of the processes, becomes the status of the result."""
    rounded = cfg.train.precision != "float32"
    with logged(store.directory), bfloat16_products(default_device(), rounded):
        job = Job(cfg, method, inputs, store, result)
        try:
            job.run()
            result["status"] = "ok"
        except Exception as error:  # not KeyboardInterrupt: an interrupted run is continued
            if isinstance(error, BadInput) and result["support"] is None:
                raise  # it was found on the weights, before any work
            processes.let_others_speak(error)
            result["status"] = "oom" if _out_of_memory(error) else "failed"
            result["error"] = {
                "type": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
            log.error("%s: %s", result["status"], one_line(error))
        result["memory"]["process_rss_peak"] = process_rss_peak()
        result["environment"] |= {"kernels": in_use(), "end": now()}
        if result["status"] != "ok":
            store.write(result)
            return store.result()
        from_first(lambda: (store.write(result), store.drop_progress()))
    return from_first(store.result)


class Job:
    """One run under way: `run`, then `_fine_tune` and `_end_states`.

    Attributes:
        result: The content of ``result.json`` as far as it is known.
        artifacts: The folders that the run leaves besides it.
    """

    def __init__(
        self, cfg: DictConfig, method: Method, inputs: Inputs, store: RunStore, result: dict[str, Any]
    ) -> None:
        self.cfg = cfg
        self.method = method
        self.inputs = inputs
        self.store = store
        self.result = result
        self.artifacts = Artifacts(cfg, store, inputs.tokenizer, result)
        self.phase = Phases(default_device())
        result["time"]["phases"] = self.phase.seconds

    def run(self) -> None:
        """Prune, score what is started from, fine-tune, bring to the end states and score."""
        cfg, inputs, result = self.cfg, self.inputs, self.result
        if cfg.mode == "simulate":  # one training step or the pruning, without memory
            with self.phase("simulate"):
                trains = self.method.trains
                found = simulate(cfg, self.method, inputs.shape) if trains else simulate_pruning(cfg, inputs.shape)
                for field, values in found.items():
                    result[field] = (result[field] or {}) | values
            return
        dtype = base_format(cfg)
        if cfg.mode == "profile":
            with self.phase("load"):
                model = random_model(inputs.shape, dtype, cfg.sparsity, cfg.pattern, cfg.seed, home(cfg))
                if quantized_layout(cfg):  # whatever finds the numbers, a step costs the same
                    cheapest = "nf4" if cfg.prune.quantize == "nf4" else "rtn"
                    quantize_model(model, cheapest, bits=cfg.prune.bits, group=cfg.prune.group_size)
        else:
            models = Models(cfg, inputs)
            with self.phase("prune"):
                pruned = models.pruned()
            with self.phase("load"):
                options = {"dtype": dtype, "device": home(cfg), **pruned.options}
                model = load_weights(pruned.path, pruned.revision, shown=pruned.shown, **options)
                if self.method.reads_dense:
                    self.method.dense = models.dense(dtype, torch.device("cpu"))
        M = supports(model)
        if cfg.mode == "run":
            result |= starting_sparsity(cfg, M)
        seen = {"config": self.store.key, "support": result["support"]}
        processes.agree(seen | {"model": checksum(model)} if processes.count() > 1 else {})
        if cfg.save_base:
            self.artifacts.add_base(model)
        if cfg.mode == "run":
            check_scoring(placed(model, cfg), inputs.tokenizer, cfg.eval)
            if cfg.eval.baselines:
                with self.phase("baselines"):
                    result["baselines"] = models.baselines(model, result["sparsity"])
                result["loss"]["eval_before"] = held_out_loss(
                    result["baselines"]["pruned"] or result["baselines"]["dense"]
                )
        adapted = self._fine_tune(model)
        after = OmegaConf.select(cfg, "prune.when") == "after"
        self._end_states(adapted, M, models.prune if after else None)
        if processes.count() > 1:
            peaks = {name: result["memory"][name] for name in ("init_peak", "train_peak", "eval_peak", "reserved_peak")}
            of_all = gathered(peaks | {"process_rss_peak": process_rss_peak()})
            result["memory"]["by_process"] = of_all
        from_first(self.artifacts.write_cards)

    def _fine_tune(self, model: PreTrainedModel) -> nn.Module:
        """Initialise the adapter, measure one step apart, train; gives the trained model, whole."""
        cfg, method, inputs, result = self.cfg, self.method, self.inputs, self.result
        size = cfg.train.batch_size
        # In a profile only the memory counts, and the second batch reaches the peak.
        count = (method.init_rows or cfg.train.init_rows) if cfg.mode == "run" else 2 * size
        chooses = method.holds_out and cfg.mode == "run"  # a profile has nothing to choose by
        rows = inputs.rows[: count if chooses or (method.reads_rows and not method.holds_out) else 0]
        batches = [inputs.pad(rows[start : start + size]) for start in range(0, len(rows), size)]
        data = inputs.rows[len(rows) :] if chooses else inputs.rows
        if chooses and not data:
            raise BadInput(f"train.init_rows={count}: must be below {len(inputs.rows)}, the rows of the training data")
        if default_device().type == "cpu" and method.trains and not cfg.launch.shard:
            with self.phase("measure"):
                result["memory"]["init_peak"] = self.store.once(
                    "init_memory", lambda: initialization_memory(method, model, batches, cfg.seed, cfg.train)
                )
        with self.phase("init") as peak:
            transformers.set_seed(cfg.seed)
            adapted = self._set_up(model, batches)
        if peak.allocated is not None:
            result["memory"]["init_peak"] = peak.allocated
        result["parameters"] = counts = count_parameters(adapted)
        if counts["adapted_share"] is not None and counts["adapted_share"] < 1:
            log.warning(
                "adapter.targets: %.0f %% of the weights in the decoder's linear layers have no adapter",
                100 * (1 - counts["adapted_share"]),
            )
        if not method.trains:
            return adapted
        meter = Meter(cfg.train.timing_warmup)
        trainee = placed(adapted, cfg)
        rows = size // processes.count()
        longest = {name: tensor[:rows] for name, tensor in inputs.longest.items()}
        part = "step" if processes.count() == 1 else f"step_of_{processes.count()}{'_shards' * cfg.launch.shard}"
        with self.phase("measure"):
            cost = self.store.once(part, partial(training_cost, trainee, longest, cfg.train, method))
        result["memory"] |= cost["memory"]
        result["flops"]["per_step"] = cost["flops"]["per_step"] * processes.count()
        folder = self.store.directory
        names = OmegaConf.select(cfg, "train.report_to") if is_first() else None
        reported = reporting(names, folder / "trackers", self.store.key, cfg)
        with self.phase("train") as peak, reported as trackers:
            outcome = train(trainee, data, inputs.pad, cfg.train, method, meter, folder, cfg.seed, trackers)
        if cfg.launch.shard:
            collect(trainee, adapted)
        if peak.allocated is not None:
            peak = meter.peak()  # that of a training that was only loaded here says nothing
            breakdown = parts_of_peak(result["memory"]["breakdown"], peak.allocated)
            result["memory"] |= {"kind": "cuda", "train_peak": peak.allocated, "reserved_peak": peak.reserved}
            result["memory"]["breakdown"] = breakdown
        result["time"] |= meter.time_report()
        result["loss"] |= {"first": outcome.first_loss, "last": outcome.last_loss}
        result["parameters"] |= method.counts(adapted)
        result["artifacts"]["steps"] = "steps.jsonl"
        if (folder / "trackers").exists():
            result["artifacts"]["trackers"] = "trackers"
        if isinstance(adapted, PeftModel) and not method.prunes:  # nobody has its base
            self.artifacts.add_adapter(adapted)
        return adapted

    def _set_up(self, model: PreTrainedModel, batches: list[Mapping[str, Tensor]]) -> nn.Module:
        """The adapted model, whole, with its initial values."""
        cfg, method = self.cfg, self.method
        precision = cfg.train.precision
        adapted = wrap(method, model, cfg.seed, precision=precision)
        if not method.trains:
            return adapted
        trainee = placed(adapted, cfg) if method.prepares_shards else adapted
        with deferred_by(trainee, cfg.train):
            prepared = prepare(method, trainee, batches, cfg.seed, precision=precision)
        if trainee is adapted:
            return prepared
        # FSDP2 settles in the first pass what it trains, so that these shards are not those of the training.
        collect(prepared, adapted)
        return adapted

    def _end_states(
        self, adapted: nn.Module, M: Mapping[str, Tensor], prune: Callable[[PreTrainedModel], Any] | None
    ) -> None:
        """Bring the model to each of its end states, or to the first one and prune it; check the zeros, score it."""
        cfg, method, inputs, result = self.cfg, self.method, self.inputs, self.result
        if method.prunes and cfg.mode == "run":
            M = supports(adapted.get_base_model())
            result |= starting_sparsity(cfg, M)
        variants = method.merges if cfg.mode == "run" and prune is None else method.merges[:1]
        for variant in variants:
            # The first end state is the row itself. A side network or an adapter beside the weights costs more here.
            first = variant == variants[0]
            row = result if first else result["variants"].setdefault(variant, {})
            saved = MERGED if cfg.save_merged and variant != "adapter" and not result["artifacts"]["merged"] else None
            finished = partial(self._finished, adapted, M, variant, prune, in_place=variant == variants[-1])
            # A plain model of sharded weights is made in one process.
            if cfg.launch.shard and method.trains and variant != "adapter":
                model, found = self._finished_by_first(finished, saved or UNSAVED)
            else:
                model, found = finished()
                if saved:
                    from_first(partial(self.artifacts.save, model, saved))
            model = placed(model, cfg)
            row |= {"end_state": variant, **found, "eval": None}
            if saved:
                self.artifacts.note_merged(variant)
            if first:
                result["flops"]["inference"] = count_inference_flops(model, inputs.longest)
                if model.device.type == "cpu":
                    result["memory"]["eval_peak"] = forward_memory(model, inputs.longest)
            if cfg.mode == "run" and (cfg.eval.tasks or cfg.eval.perplexity or cfg.eval.held_out):
                row["eval"] = result["baselines"]["pruned"] if not method.trains else None
                if row["eval"] is None:
                    with self.phase("evaluate") as peak:
                        scores = self.store.once(
                            f"scores_{variant}",
                            lambda model=model: evaluate(
                                model, inputs.tokenizer, cfg.eval, inputs.windows, inputs.held_out
                            ),
                        )
                    row["eval"] = scores
                    result["memory"]["eval_peak"] = result["memory"]["eval_peak"] or peak.allocated
        result["loss"]["eval_after"] = held_out_loss(result["eval"])

    def _finished(
        self,
        adapted: nn.Module,
        M: Mapping[str, Tensor],
        variant: str,
        prune: Callable[[PreTrainedModel], Any] | None,
        *,
        in_place: bool,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model in an end state, or pruned after it; what is known of its zeros."""
        found: dict[str, Any] = {}
        with self.phase("merge"):
            model = finish(self.method, adapted, M, variant, in_place=in_place)
        if prune is not None:
            with self.phase("prune"):
                prune(model)
            M = supports(model)
            found = starting_sparsity(self.cfg, M)
        with self.phase("merge"):
            found["zeros"] = check_zeros(self.result | found, self.method, variant, model, M)
        return model, found

    def _finished_by_first(
        self, finished: Callable[[], tuple[PreTrainedModel, dict[str, Any]]], name: str
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """What the first process makes; all have it from the file that it writes."""

        def make() -> tuple[str, dict[str, Any]]:
            model, found = finished()
            return str(self.artifacts.save(model, name)), found

        folder, found = from_first(make)
        options = {"dtype": base_format(self.cfg), "device": home(self.cfg), **self.inputs.source.options}
        return load_weights(folder, shown=folder, **options), found


def _out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left; PyTorch has no error type of its own for the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
