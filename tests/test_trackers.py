"""``train.report_to``: what the trackers get, where they write, and that a run needs none of them."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from test_harness_run import NO_SCORES, numbers, tiny_overrides
from test_train import RECIPE, TOKENIZER, Kill, adapted, lora, rows, with_callbacks, without_times
from transformers import TrainerCallback

from harness import config, trackers
from harness.config import resolve
from harness.data import collator
from harness.errors import BadInput
from harness.meter import Meter
from harness.run import execute
from harness.trackers import reporting
from harness.train import train

CFG = OmegaConf.create({"seed": 3, "train": {"learning_rate": 0.125}})
VARIABLES = ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "WANDB_MODE", "MLFLOW_TRACKING_URI")


class StandIn(TrainerCallback):
    """A tracker that writes down what it is told; `fails_at` is the step at which it raises."""

    fails_at = None

    def __init__(self) -> None:
        self.places = {name: os.environ.get(name) for name in VARIABLES}
        self.steps, self.lines, self.args = [], [], None
        self.started.append(self)

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.args = args
        assert model is not None

    def on_log(self, args, state, control, logs=None, model=None, **_) -> None:
        if state.global_step == self.fails_at:
            raise RuntimeError("the\nserver is gone")
        torch.rand(3)
        self.steps.append(state.global_step)
        self.lines.append(logs)


@pytest.fixture
def stand_ins(monkeypatch) -> SimpleNamespace:
    """`started`: the stand-ins for wandb and mlflow in the order of their start; `ended`: how they were told to end."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    seen = SimpleNamespace(started=[], ended=[])
    kinds = {name: type(name, (StandIn,), {"started": seen.started}) for name in ("wandb", "mlflow")}
    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [kinds[name] for name in names])
    monkeypatch.setattr(config, "find_spec", lambda _: SimpleNamespace(origin="a file"))
    packages = {
        "wandb": {"finish": lambda exit_code: seen.ended.append(exit_code)},
        "mlflow": {"end_run": seen.ended.append},
    }
    for name, functions in packages.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
    seen.kinds = kinds
    return seen


def fit(folder: Path, names: list[str] | None, *callbacks: TrainerCallback) -> list[dict]:
    """Train the small model for seven steps, and return its history."""
    method, pad = with_callbacks(lora(), *callbacks), collator(TOKENIZER, "longest", RECIPE.sequence_length)
    with reporting(names, folder / "trackers", "a1b2", CFG) as told:
        return train(adapted(method), rows(), pad, RECIPE, method, Meter(1), folder, 0, told).history


def test_a_tracker_gets_every_line_of_the_steps_and_the_run_as_it_is(stand_ins, tmp_path) -> None:
    history = fit(tmp_path, ["wandb", "mlflow", "wandb"])
    assert [type(tracker).__name__ for tracker in stand_ins.started] == ["wandb", "mlflow"], "each of them once"
    for tracker in stand_ins.started:
        assert tracker.steps == [1, 2, 3, 4, 5, 6, 7]
        for line, logs in zip(history, tracker.lines, strict=True):
            assert {"loss", "lr", "ms", "tokens"} < logs.keys()
            assert logs.items() - {("epoch", logs["epoch"])} == {
                (name, line[name]) for name in line if name not in ("step", "warmup")
            }
        assert tracker.args.run_name == "a1b2"
        assert tracker.args.to_dict() == json.loads(tracker.args.to_json_string()) == OmegaConf.to_container(CFG)
    assert stand_ins.ended == [0, "FINISHED"]
    untold = fit(tmp_path / "untold", None)
    assert without_times(untold) == without_times(history), "a tracker draws from generators of its own"


def test_trackers_write_into_the_run_folder_unless_the_user_says_where(stand_ins, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    fit(tmp_path, ["wandb"])
    assert stand_ins.started[0].places == {
        "TENSORBOARD_LOGGING_DIR": f"{tmp_path}/trackers/tensorboard",
        "WANDB_DIR": f"{tmp_path}/trackers",
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": "http://server",
    }
    assert (tmp_path / "trackers").is_dir()
    assert not os.environ.keys() & {*VARIABLES[:3]} and os.environ["MLFLOW_TRACKING_URI"] == "http://server"


def test_a_resumed_run_goes_on_at_its_step_and_an_earlier_checkpoint_needs_no_tracker(stand_ins, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, None, Kill(3))  # after the checkpoint of step 2
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, ["wandb"], Kill(5))
    fit(tmp_path, ["mlflow", "wandb"])
    assert [tracker.steps for tracker in stand_ins.started] == [[3, 4, 5], [5, 6, 7], [5, 6, 7]]
    assert stand_ins.ended == [1, "FINISHED", 0], "the killed one did not end well"


def test_a_training_without_a_step_left_leaves_no_empty_run(stand_ins, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(RECIPE, "steps", 6)  # the last step has a checkpoint
    fit(tmp_path, None)
    assert len(fit(tmp_path, ["wandb"])) == 6
    assert stand_ins.started == [] and stand_ins.ended == []


def test_a_tracker_that_fails_costs_no_result(
    stand_ins, composed, tiny_checkpoint, tiny_sources, tmp_path, monkeypatch
) -> None:
    def run(name: str, *more: str) -> dict:
        overrides = tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path)
        return execute(composed(*overrides, *NO_SCORES, "method=lora", f"name={name}", *more))

    monkeypatch.setattr(stand_ins.kinds["wandb"], "fails_at", 2)
    result = run("told", "train.report_to=[wandb,mlflow]")
    assert result["status"] == "ok", result["error"]
    wandb, mlflow = stand_ins.started
    assert wandb.steps == [1] and mlflow.steps == [1, 2, 3, 4]
    assert stand_ins.ended == ["FINISHED"], "what has failed is left alone"
    folder = tmp_path / "runs" / "told" / result["key"]
    assert mlflow.args.run_name == result["key"] and mlflow.args.to_dict()["method"]["name"] == "lora"
    warnings = [line for line in (folder / "log.txt").read_text().splitlines() if "report_to" in line]
    assert len(warnings) == 1 and warnings[0].endswith("wandb failed and gets no more of this run (the server is gone)")
    untold = run("untold")
    assert result["artifacts"].pop("trackers") == "trackers"
    assert numbers(untold) == numbers(result) and untold["key"] == result["key"]
    # A repeated run takes its place, and what the trackers have of it.
    (folder / "trackers" / "of the first").touch()
    run("told", "train.report_to=[mlflow]", "force=true")
    assert (folder / "trackers").is_dir() and not any(folder.glob("trackers/*"))


def test_a_tracker_that_is_not_installed_is_refused_and_one_that_would_disturb_a_profile(composed, monkeypatch) -> None:
    for missing in (None, SimpleNamespace(origin=None)):  # the second: a folder of that name
        found = {"tensorboard": SimpleNamespace(origin="a file"), "wandb": missing}
        monkeypatch.setattr(config, "find_spec", found.get)
        resolve(composed("train.report_to=[tensorboard]"))
        with pytest.raises(BadInput, match=r"train.report_to=\[tensorboard, wandb\]: must be installed; wandb is not"):
            resolve(composed("train.report_to=[tensorboard,wandb]"))
    with pytest.raises(BadInput, match=r"train.report_to=\[tensorboard\]: must be null in mode=profile"):
        resolve(composed("train.report_to=[tensorboard]", "mode=profile"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_the_real_ones(name: str, tmp_path, monkeypatch) -> None:
    """Killed and resumed; steps 1 to 7 are there, in one or two runs."""
    pytest.importorskip(name)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, [name], Kill(5))
    history = fit(tmp_path, [name])
    folder = tmp_path / "trackers"
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
        stored = {scalar.step: scalar.value for scalar in scalars}
    elif name == "mlflow":
        with sqlite3.connect(folder / "mlflow.db") as database:
            stored = dict(database.execute("select step, value from metrics where key = 'loss'"))
            runs = database.execute("select name, status from runs order by start_time").fetchall()
        assert runs == [("a1b2", "FAILED"), ("a1b2", "FINISHED")]
    else:
        assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 2
        return
    assert stored == {line["step"]: pytest.approx(line["loss"]) for line in history}
