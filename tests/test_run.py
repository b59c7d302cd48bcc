"""``run.py``: which process runs a job, with which command line, and what its exit code says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from harness import run as harness_run
from harness.store import Busy
from hydra_plugins.block_sweeper import SINCE

RUN_PY = Path(__file__).parents[1] / "run.py"


@pytest.fixture
def run(monkeypatch, tmp_path) -> ModuleType:
    """The module, freshly loaded, in an empty working directory and outside of any job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORS_JOB", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    specification = importlib.util.spec_from_file_location("run", RUN_PY)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "run", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def started(run, monkeypatch) -> Callable[..., tuple[int, list[SimpleNamespace]]]:
    """Function from arguments to the exit code and the processes that would have been started."""

    def main(*arguments: str, exit_codes: tuple[int, ...] = (0,) * 9) -> tuple[int, list[SimpleNamespace]]:
        calls: list[SimpleNamespace] = []

        def start(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
            calls.append(SimpleNamespace(command=command, env=env))
            return SimpleNamespace(returncode=exit_codes[len(calls) - 1], stdout=b"what it\nsaid")

        monkeypatch.setattr(subprocess, "run", start)
        monkeypatch.setattr(run, "run_launcher", lambda command, env: start(command, env).returncode)
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        try:
            return run.main(), calls
        except SystemExit as end:
            return end.code, calls

    return main


def test_a_launcher_that_gives_up_is_one_line(started, monkeypatch, capsys) -> None:
    def launch(*_: object, **__: object) -> None:
        raise RuntimeError("Job 7 has not produced any output\nits log")

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: SimpleNamespace(launch=launch))
    assert started("-m", "method=lors,lora")[0] == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the launcher gave up (RuntimeError: Job 7 has not produced any output); ")
    assert line.endswith("the same command continues")


def test_a_sweep_starts_one_process_per_job_and_hands_on_its_overrides(started) -> None:
    code, calls = started("-m", "method=lors,lora", "adapter.targets=[q_proj,v_proj]", "pattern=2:4")
    assert code == 0
    parser = OverridesParser.create()
    for call, method in zip(calls, ("lors", "lora"), strict=True):
        assert call.command[:2] == [sys.executable, str(RUN_PY)]
        # Parsed, because Hydra quotes as it likes.
        handed_on = {override.key_or_group: override.value() for override in parser.parse_overrides(call.command[2:])}
        assert handed_on == {"method": method, "adapter.targets": ["q_proj", "v_proj"], "pattern": "2:4"}
        assert call.env["LORS_JOB"] == "1", "the job must not start another process"
        assert int(call.env[SINCE]) > 0, "the job must not wait for another sweep"
    assert SINCE not in os.environ


def test_one_failed_job_leaves_the_others_running_and_the_sweep_exits_with_1(started, capsys) -> None:
    code, calls = started("-m", "seed=0,1,2", exit_codes=(0, 2, -9))
    assert len(calls) == 3 and code == 1
    errors = capsys.readouterr().err
    assert "job 1 has no result: exit code 2\n  what it\n  said" in errors
    assert "job 2 has no result: ended by signal 9" in errors
    assert "the sweep is over, but 2 of 3 jobs did not end well" in errors


def test_a_folder_that_takes_no_file_stops_the_sweep_with_one_line(started, capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert started("-m", "seed=0,1", f"runs_root={tmp_path}/file") == (2, [])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"error: runs_root: cannot write to {tmp_path}/file/default (")


@pytest.mark.parametrize(
    ("launch", "module"), [("torchrun", "torch.distributed.run"), ("accelerate", "accelerate.commands.launch")]
)
def test_a_launcher_stands_between_the_interpreter_and_the_job(started, launch: str, module: str) -> None:
    code, [call] = started(f"launch={launch}", "seed=3", exit_codes=(1,))
    assert code == 1
    assert call.command[:3] == [sys.executable, "-m", module]
    assert call.command[-3:] == [str(RUN_PY), f"launch={launch}", "seed=3"]


def test_a_folder_of_own_groups_reaches_the_jobs(started, tmp_path) -> None:
    (tmp_path / "method").mkdir()
    mine = "_target_: harness.method.Method\nname: mine\ntrains: false\n"
    (tmp_path / "method" / "mine.yaml").write_text(mine)
    code, [call] = started("--config-dir", str(tmp_path), "-m", "method=glob(mi*)")
    assert code == 0 and {f"--config-dir={tmp_path}", "method=mine"} <= set(call.command)


def test_a_job_runs_here_and_its_status_becomes_the_exit_code(started, monkeypatch) -> None:
    monkeypatch.setenv("LORS_JOB", "1")
    for status, expected in (("ok", 0), ("failed", 1), ("oom", 1)):
        monkeypatch.setattr(harness_run, "execute", lambda cfg, since, status=status: {"status": status})
        code, calls = started("launch=torchrun")
        assert (code, calls) == (expected, [])


def test_a_job_of_a_sweep_leaves_a_run_to_the_process_that_is_at_it(started, run, monkeypatch) -> None:
    told = []

    def busy(cfg: object, since: int | None) -> None:
        told.append(since)
        raise Busy

    monkeypatch.setattr(harness_run, "execute", busy)
    monkeypatch.setattr(run, "end_with_the_sweep", lambda: None)
    monkeypatch.setenv("LORS_JOB", "1")
    monkeypatch.setenv(SINCE, "5")
    assert started() == (75, []) and told == [5]


def test_a_job_ends_when_its_sweep_is_gone() -> None:
    """The sweep holds the writing end of a pipe; no code of it has to run for the job to notice its end."""
    watch = "import run, threading, time; threading.Thread(target=run.end_with_the_sweep).start(); time.sleep(60)"
    job = subprocess.Popen([sys.executable, "-c", watch], cwd=RUN_PY.parent, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(timeout=1)
    job.stdin.close()
    assert job.wait(timeout=30) == 1


def test_an_interrupt_is_no_failure(started, monkeypatch, capsys) -> None:
    def interrupt(cfg: object, since: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness_run, "execute", interrupt)
    assert started() == (130, [])
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "local"),
    [
        ((), True),
        (("mode=profile", "model=llama2_7b", "eval=zeroshot"), True),
        (("model=llama2_7b",), False),
        (("model=hf", "model.path={here}"), False),  # calibrated on C4
        (("model=hf", "model.path={here}", "prune.text={here}"), True),
        (("model=hf", "model.path={here}", "prune=magnitude"), True),
        (("data=alpaca",), False),
        (("data=alpaca", "data.path={here}"), True),
        (("eval=zeroshot",), False),
        (("eval=zeroshot", "eval.data_root={here}"), True),
        (("eval=perplexity",), False),
        (("eval.tasks=[rte]",), False),
        (("eval.tasks=7",), True),  # refused later, but it must not crash here
    ],
)
def test_only_a_run_that_needs_nothing_from_the_hub_is_kept_off_it(run, composed, tmp_path, overrides, local) -> None:
    cfg = composed(*(override.format(here=tmp_path) for override in overrides))
    assert run.is_local(cfg) == local
