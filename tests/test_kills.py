"""Runs that are killed, each method at four moments, and end as a run that never was: every number, bit for bit."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import compose_config
from contract import FILES, TRAINED, method_of
from peft import PeftModel
from test_harness_run import numbers

from harness import store, train
from harness.run import execute

FORK = multiprocessing.get_context("fork")
STEPS = 4
RUN = (
    f"train.steps={STEPS} train.checkpoint_every=2 train.batch_size=2 train.sequence_length=32 train.init_rows=4 "
    "train.timing_warmup=1 data.limit=24 prune=magnitude adapter.r=2 adapter.targets=[q_proj,down_proj] "
    "eval.tasks=[microworld_boolq] eval.limit=4 eval.perplexity=null eval.baselines=false"
).split()
# What a method does every tenth step or so has to happen within four.
OWN = {
    "gelora": ["method.init_rows=24"],
    "geolora": ["method.peft.coefficient_steps=1", "method.peft.skipped_steps=0"],
    "sora": ["method.shrinkage=[1,30]", "method.stage_steps=2"],
}


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_a_step_after_a_checkpoint() -> None:
    """In the middle: the step is made and not yet written down."""
    log = train.MeasuredTrainer.log
    train.MeasuredTrainer.log = lambda self, logs, *rest: (
        die() if self.state.global_step == 3 else log(self, logs, *rest)
    )


def at_the_last_checkpoint() -> None:
    """All steps are made, the last checkpoint is sealed, nothing has happened since."""
    seal = train.seal
    train.seal = lambda checkpoint: (seal(checkpoint), checkpoint.name == f"checkpoint-{STEPS}" and die())


def while_the_adapter_is_written() -> None:
    """Half of its weights are there, and no config."""
    save = PeftModel.save_pretrained

    def half(model: PeftModel, folder: Path) -> None:
        save(model, folder)
        (folder / "adapter_config.json").unlink()
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        die()

    PeftModel.save_pretrained = half


def while_the_result_is_written() -> None:
    """It is in a file that does not have its name yet."""
    write = store.RunStore.write

    def begin(run: store.RunStore, result: dict) -> None:
        os.fsync = die
        write(run, result)

    store.RunStore.write = begin


MOMENTS = (
    at_a_step_after_a_checkpoint,
    at_the_last_checkpoint,
    while_the_adapter_is_written,
    while_the_result_is_written,
)


def moments(name: str) -> Iterator[Callable[[], None]]:
    """Those that a run of the method has."""
    for moment in MOMENTS:
        if moment is while_the_result_is_written or (
            name in TRAINED and (moment is not while_the_adapter_is_written or method_of(name).peft is not None)
        ):
            yield moment


def command(name: str, folder: Path, *more: str) -> list[str]:
    own = [f"runs_root={folder}/runs", f"cache_root={folder.parent}/cache"]
    return [f"method={name}", *RUN, *OWN.get(name, []), *own, *more]


def run(overrides: list[str]) -> dict:
    result = execute(compose_config(*overrides))
    assert result["status"] == "ok", result["error"]
    return result


def kill(moment: Callable[[], None], overrides: list[str]) -> None:
    """Make the run in a process that is killed at a moment."""

    def victim() -> None:
        moment()
        execute(compose_config(*overrides))

    process = FORK.Process(target=victim)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the moment did not come"


def files(folder: Path) -> dict[str, object]:
    """What a run has left, by name: content, for numbers without the times."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_dir():
            name = file.relative_to(folder).as_posix()
            found[name] = file.read_bytes() if name.startswith("adapter/") else None
    steps = folder / "steps.jsonl"
    if steps.exists():
        lines = [json.loads(line) for line in steps.read_text().splitlines()]
        found["steps.jsonl"] = [
            [line[part] for part in ("step", "loss", "lr", "grad_norm", "tokens")] for line in lines
        ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_killed_run_ends_as_one_that_never_was(name: str, tmp_path: Path) -> None:
    gc.freeze()  # what has been imported is not looked through in every run
    whole = run(command(name, tmp_path / "whole"))
    kept = files(next((tmp_path / "whole" / "runs").glob("*/*")))
    for moment in moments(name):
        overrides = command(name, tmp_path / moment.__name__)
        kill(moment, overrides)
        folder = next((tmp_path / moment.__name__ / "runs").glob("*/*"))
        assert not (folder / "result.json").exists()
        assert numbers(run(overrides)) == numbers(whole), moment.__name__
        assert files(folder) == kept, moment.__name__
