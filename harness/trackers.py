"""``train.report_to``: TensorBoard, Weights & Biases and MLflow, by the callbacks of transformers.

A tracker gets each line of ``steps.jsonl`` after it is written, outside of the timed step, at the number of the step: a
resumed run goes on where its checkpoint was. Its files go into the run folder, and nothing into the network, unless
its own environment variables say otherwise. No number of a run comes from there. A tracker that fails is left out,
with one line of warning.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from harness.errors import one_line
from lors.randomness import random_state_kept

__all__ = ["reporting"]

log = logging.getLogger("lors")

# Of a line of steps.jsonl: what is no curve.
NO_CURVES = ("step", "warmup")


@contextmanager
def reporting(names: Sequence[str] | None, folder: Path, run: str, cfg: DictConfig) -> Iterator[list[TrainerCallback]]:
    """Callbacks for the one training that takes place inside.

    Args:
        names: Of tensorboard, wandb, mlflow; None for none of them.
        folder: Where they write, as far as their environment variables are not set.
        run: The name of the run.
        cfg: Its config, which they show.
    """
    if not names:
        yield []
        return
    folder = folder.absolute()
    variables = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_FLATTEN_PARAMS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    trackers = [_Tracker(name, folder, run, OmegaConf.to_container(cfg)) for name in dict.fromkeys(names)]
    os.environ |= ours
    well = False
    try:
        yield [_Steps(trackers)]
        well = True
    finally:
        for tracker in trackers:
            tracker.end(well)
        for name in ours:
            os.environ.pop(name, None)


class _Steps(TrainerCallback):
    """Tells each tracker of each step."""

    def __init__(self, trackers: Sequence[_Tracker]) -> None:
        self._trackers = trackers

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **others: Any
    ) -> None:
        curves = {name: value for name, value in logs.items() if name not in NO_CURVES and value is not None}
        for tracker in self._trackers:
            tracker.report(args, state, control, logs=curves, model=others["model"])


class _Tracker:
    """One tracker; it starts with the first step, so that a training with no step left leaves no empty run."""

    def __init__(self, name: str, folder: Path, run: str, config: Mapping[str, Any]) -> None:
        self._name, self._folder, self._run, self._config = name, folder, run, config
        self._callback: TrainerCallback | None = None
        self._failed = False

    def report(self, args: TrainingArguments, *others: Any, logs: dict[str, float], model: Any) -> None:
        """Log one step, with the arguments of `TrainerCallback.on_log`."""

        def tell() -> None:
            if self._callback is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                [callback] = get_reporting_integration_callbacks([self._name])
                self._callback = callback()
                self._callback.on_train_begin(self._shown(args), *others, model=model)
            self._callback.on_log(args, *others, logs=logs, model=model)

        self._try(tell)

    def end(self, well: bool) -> None:
        """End its run, if one has begun; `well` says whether the training did."""
        package = sys.modules.get(self._name)
        ends = {
            "tensorboard": lambda: self._callback.on_train_end(None, None, None),
            "wandb": lambda: package.finish(exit_code=0 if well else 1),
            "mlflow": lambda: package.end_run("FINISHED" if well else "FAILED"),
        }
        if self._callback is not None:
            self._try(ends[self._name])

    def _shown(self, args: TrainingArguments) -> TrainingArguments:
        """Arguments that show name and config of the run; those of the Trainer have another learning rate."""
        args = copy.copy(args)
        args.run_name = self._run
        args.to_dict = lambda: dict(self._config)
        args.to_json_string = lambda: json.dumps(self._config, indent=2)
        return args

    def _try(self, tell: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            with random_state_kept():
                tell()
        except Exception as error:  # whatever these packages raise
            self._failed = True
            log.warning("train.report_to: %s failed and gets no more of this run (%s)", self._name, one_line(error))
