"""Time of the parts of the pipeline, each beside what it stands in for, on one model in one process.

=====  =======================================  ==================================================================
part   ours                                     theirs
=====  =======================================  ==================================================================
prune  `lors.pruning.prune_model`, Wanda        the walk of Wanda's authors, as their paper and code describe it
score  `harness.evaluate.evaluate`              the same with the stock model class of lm-eval, on the same tokens
train  `harness.train.train`, LoRA              a plain Trainer with PEFT's LoRA: same rows, batches and optimizer
init   `harness.method.adapt`, LoRS             its forward and backward passes alone: the same batches, a
                                                gradient for every weight of the decoder's linear layers
=====  =======================================  ==================================================================

The two take turns; a ratio (time of ours over theirs) is that of one round. ``pipeline.csv`` has a row for each part.

    python -m harness.bench.pipeline microworld
    python -m harness.bench.pipeline smollm2_135m --limit 20 prune.samples=16 train.steps=8
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from harness.bench.cases import CONF
from harness.bench.measure import timed
from harness.bench.wanda_by_sample import prune_by_sample
from harness.bfloat16_products import bfloat16_products
from harness.config import resolve
from harness.deferred_head import deferred_by
from harness.environment import default_device, environment
from harness.evaluate import evaluate
from harness.inputs import Inputs, read_inputs
from harness.log_likelihood import PromptSharingLM
from harness.meter import Meter
from harness.method import PRECISIONS, adapt, tuner_config
from harness.method_from_config import build_method
from harness.recipe import cosine_with_floor
from harness.train import train
from harness.weights import load_weights
from lors.blocks import decoder_linears
from lors.pruning import prune_model

__all__ = ["main"]

PROFILED = 12  # operators
SPARSITY, BF16 = 0.5, "train.precision=bf16_mixed"
QUICK = ["train.steps=12", "train.timing_warmup=4", "train.checkpoint_every=null", "eval.perplexity=null"]
# Of any other model than the embedded one: what the tables of a real model are made with.
REAL = ["prune.samples=64", "prune.sequence_length=512", "eval=zeroshot", "data=alpaca", "train=alpaca_60"]


class Measured(NamedTuple):
    """One run of one side.

    Attributes:
        amount: What was done in the time: samples, items, tokens or rows.
        result: What the two sides are compared by.
    """

    seconds: float
    amount: int
    result: dict[str, Any]


class Setting(NamedTuple):
    """One part: its config, its inputs, and the model, of which each run takes a copy."""

    cfg: DictConfig
    inputs: Inputs
    model: PreTrainedModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; exit code 0, or 2 after one line about bad input."""
    parser = argparse.ArgumentParser(prog="python -m harness.bench.pipeline", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name of conf/model, or a model folder")
    parser.add_argument("overrides", nargs="*", help="of the config, as for run.py: prune.samples=16 train.steps=8")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is timed")
    parser.add_argument("--limit", type=int, default=20, help="items of each task")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each side")
    parser.add_argument("--profile", action="store_true", help="also write profile.csv, the share of each operator")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for what is written")
    options = parser.parse_intermixed_args(arguments)
    set_verbosity_error()
    disable_progress_bar()
    try:
        if options.rounds < 1:
            raise ValueError(f"--rounds {options.rounds}: must be a whole number >= 1")
        options.output.mkdir(parents=True, exist_ok=True)
        rows, profiles = [], []
        for part in options.parts:
            with bfloat16_products(default_device()):
                rows.append(measure(part, options))
            table = pd.DataFrame(rows)
            table.to_csv(options.output / "pipeline.csv", index=False)  # a part is not lost with the next one
            if options.profile:
                profiles += profile(part, options)
                pd.DataFrame(profiles).to_csv(options.output / "profile.csv", index=False)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = ["part", "unit", "amount", "ours", "theirs", "ratio", "ratio_min", "ratio_max", "rounds", "difference"]
    print(table[shown].to_string(index=False, float_format="{:.4g}".format))
    return 0


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds of both sides (median), their ratio (median, least and greatest of the rounds), what was done.

    ``difference`` is, of prune, the part of the weights that only one side keeps; of score, the largest difference of
    a log-likelihood; of train, that of the mean loss.
    """
    sides, unit, overrides = PARTS[part]
    setting = _setting(options, overrides)
    times: list[list[float]] = [[], []]
    results: list[Measured] = [None, None]
    for i in tqdm(range(options.rounds), desc=part, unit="round"):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            results[side] = sides[side](setting)
            times[side].append(results[side].seconds)
    ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
    ours, theirs = (side.result for side in results)
    cfg, machine = setting.cfg, environment(default_device())
    return {
        **{"part": part, "unit": unit, "amount": results[0].amount},
        **{"ours": statistics.median(times[0]), "theirs": statistics.median(times[1])},
        **{"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)},
        **{"rounds": options.rounds, "difference": max((_apart(ours[key], theirs[key]) for key in ours), default=0.0)},
        **{"model": cfg.model.name, "precision": cfg.train.precision, "batch_size": cfg.train.batch_size},
        **{"samples": cfg.prune.samples, "sample_tokens": cfg.prune.sequence_length, "limit": cfg.eval.limit},
        **{"eval_batch_size": cfg.eval.batch_size, "overrides": " ".join(options.overrides)},
        **{name: machine[name] for name in ("device", "threads", "torch", "transformers", "peft", "lm_eval")},
        **{name: machine[name] for name in ("git_commit", "git_dirty", "platform")},
    }


def profile(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The operators that take most of the time of ours in one more run: a row each, with its share and its calls."""
    sides, _, overrides = PARTS[part]
    setting = _setting(options, overrides)
    with torch.profiler.profile() as profiler:
        sides[0](setting)
    time = "self_device_time_total" if default_device().type == "cuda" else "self_cpu_time_total"
    # Not the kernels of a GPU, whose time is that of the operators too.
    operators = [o for o in profiler.key_averages() if o.device_type == torch.autograd.DeviceType.CPU]
    times = {operator.key: getattr(operator, time) for operator in operators}
    total = sum(times.values())
    most = sorted(operators, key=lambda operator: -times[operator.key])[:PROFILED]
    return [{"part": part, "operator": o.key, "share": times[o.key] / total, "calls": o.count} for o in most]


def _setting(options: argparse.Namespace, overrides: Sequence[str]) -> Setting:
    known = (CONF / "model" / f"{options.model}.yaml").exists()
    model = [f"model={options.model}"] if known else ["model=hf", f"model.path={options.model}"]
    data = [] if options.model == "microworld" else REAL
    limit = f"eval.limit={options.limit}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(
            "config", [*model, *data, *QUICK, limit, f"sparsity={SPARSITY}", *overrides, *options.overrides]
        )
    cfg = resolve(composed)
    warmup, steps = cfg.train.timing_warmup, cfg.train.steps
    if steps is None or not 1 <= warmup < steps:
        raise ValueError(f"train.timing_warmup={warmup}: must be at least 1 and less than train.steps={steps}")
    method = build_method(cfg)
    inputs = read_inputs(cfg, method)
    source, dtype = inputs.source, PRECISIONS[cfg.train.precision].base
    model = load_weights(source.path, source.revision, shown=source.shown, dtype=dtype)
    if method.trains:
        prune_model(model, "magnitude", sparsity=SPARSITY, pattern="unstructured", calibration=None)
    return Setting(cfg, inputs, model)


def _apart(value: Any, other: Any) -> float:
    """Of numbers how far, of supports which part."""
    return (value != other).float().mean().item() if isinstance(value, Tensor) else abs(value - other)


# ---- prune


def _prune(walk: Callable[[nn.Module, Tensor, float], None], setting: Setting) -> Measured:
    model = copy.deepcopy(setting.model)
    calibration = setting.inputs.calibration.to(model.device)
    seconds = timed(lambda: walk(model, calibration, SPARSITY), 1)
    kept = torch.cat([(linear.weight != 0).flatten() for linear in decoder_linears(model).values()])
    return Measured(seconds, len(calibration), {"support": kept})


def _prune_ours(model: nn.Module, calibration: Tensor, sparsity: float) -> None:
    prune_model(model, "wanda", sparsity=sparsity, pattern="unstructured", calibration=calibration)


# ---- score


class StockLM(PromptSharingLM):
    """lm-eval's model class, on the tokens that ours sees."""

    def _try_sharing(self) -> bool:
        return False


def _score(kind: type[PromptSharingLM], setting: Setting) -> Measured:
    """The time is that of the model class: wrapping the model, encoding and running; not that of loading the tasks."""
    seconds: list[float] = []
    found: dict[Any, float] = {}

    class Watched(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(timed(lambda: super(Watched, self).__init__(*args, **kwargs), 1))

        def loglikelihood(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = []
            run = super().loglikelihood
            seconds.append(timed(lambda: answers.extend(run(requests, disable_tqdm=True)), 1))
            found.update({request.args: answer[0] for request, answer in zip(requests, answers, strict=True)})
            return answers

    with mock.patch("harness.log_likelihood.PromptSharingLM", Watched):
        scores = evaluate(setting.model, setting.inputs.tokenizer, setting.cfg.eval, None, progress=False)
    return Measured(sum(seconds), sum(task["n"] for task in scores["tasks"].values()), found)


# ---- train


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(perf_counter())


def _train(run: Callable[..., None], setting: Setting) -> Measured:
    """The time is that of the steps after the warm-up, with reading and padding between them."""
    clock, tokens = _Clock(), []

    def pad(rows: list) -> dict[str, Tensor]:
        batch = setting.inputs.pad(rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    model = copy.deepcopy(setting.model)
    set_seed(setting.cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        loss = run(setting, model, pad, clock, Path(folder))
    cfg = setting.cfg.train
    counted = slice(cfg.timing_warmup * cfg.gradient_accumulation, cfg.steps * cfg.gradient_accumulation)
    return Measured(clock.ends[-1] - clock.ends[cfg.timing_warmup - 1], sum(tokens[counted]), {"loss": loss})


def _train_ours(setting: Setting, model: nn.Module, pad: Callable, clock: _Clock, folder: Path) -> float:
    cfg, method = setting.cfg, build_method(setting.cfg)
    model = adapt(method, model, seed=cfg.seed, precision=cfg.train.precision)
    with mock.patch.object(method, "callbacks", lambda: [clock]):
        outcome = train(model, setting.inputs.rows, pad, cfg.train, method, Meter(0), folder, cfg.seed)
    return statistics.fmean(step["loss"] for step in outcome.history)


def _train_theirs(setting: Setting, model: nn.Module, pad: Callable, clock: _Clock, folder: Path) -> float:
    cfg, method = setting.cfg.train, build_method(setting.cfg)
    torch.manual_seed(setting.cfg.seed)
    model = get_peft_model(model, tuner_config(method, model))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=cfg.steps,
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation,
        max_grad_norm=cfg.max_grad_norm,
        bf16=PRECISIONS[cfg.precision].autocast,
        use_cpu=default_device().type == "cpu",
        seed=setting.cfg.seed,
        data_seed=setting.cfg.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    optimizer = method.optimizer(model, cfg)
    optimizers = (optimizer, cosine_with_floor(optimizer, cfg, cfg.steps))
    trainer = Trainer(model, arguments, pad, setting.inputs.rows, optimizers=optimizers, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer.train().training_loss


# ---- init


def _init(run: Callable[[Setting, nn.Module, list], None], setting: Setting) -> Measured:
    rows, size = setting.inputs.rows[: setting.cfg.train.init_rows], setting.cfg.train.batch_size
    model = copy.deepcopy(setting.model)
    batches = [setting.inputs.pad(rows[start : start + size]) for start in range(0, len(rows), size)]
    batches = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    return Measured(timed(lambda: run(setting, model, batches), 1), len(rows), {})


def _init_ours(setting: Setting, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    with deferred_by(model, setting.cfg.train):
        adapt(build_method(setting.cfg), model, batches, setting.cfg.seed, precision=setting.cfg.train.precision)


def _init_theirs(setting: Setting, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    model.train().requires_grad_(False)
    for linear in decoder_linears(model).values():
        linear.weight.requires_grad_(True)
    autocast = PRECISIONS[setting.cfg.train.precision].autocast
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch, use_cache=False).loss
        loss.backward()


# Part -> ours and theirs, the unit of the amount, what its config says.
PARTS: dict[str, tuple[tuple[Callable[[Setting], Measured], ...], str, tuple[str, ...]]] = {
    "prune": ((partial(_prune, _prune_ours), partial(_prune, prune_by_sample)), "sample", ("method=none",)),
    "score": ((partial(_score, PromptSharingLM), partial(_score, StockLM)), "item", ("method=none",)),
    "train": ((partial(_train, _train_ours), partial(_train, _train_theirs)), "token", ("method=lora", BF16)),
    "init": ((partial(_init, _init_ours), partial(_init, _init_theirs)), "row", ("method=lors",)),
}

if __name__ == "__main__":
    sys.exit(main())
