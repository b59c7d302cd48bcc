"""One sweep, with jobs that are functions: which are left to do, in which state, and beside other sweeps and profiles.

The real thing (processes, signals, joblib) is in ``test_sweep_processes.py``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from harness import sweep
from harness.device_lock import device_lock
from harness.errors import BadInput
from harness.sweep import BUSY, FAILED, OK, Job, begin, exit_code_without_run, plan


class Table:
    """A sweep over seeds in a folder; ``did`` lists the seeds that were run, in order."""

    def __init__(self, composed: Callable[..., DictConfig], folder: Path) -> None:
        self.composed, self.folder = composed, folder
        self.did: list[int] = []
        self.outcomes: dict[int, str] = {}

    def jobs(self, *overrides: str, seeds: Sequence[int] = (0, 1, 2)) -> list[Job]:
        common = [f"runs_root={self.folder}", "method=none", *overrides]
        cfg = self.composed(*common)
        return plan([([*common, f"seed={seed}"], OmegaConf.merge(cfg, {"seed": seed})) for seed in seeds])

    def begin(self) -> int:
        return begin(self.folder / "default", "command")

    def work(self, job: Job) -> int:
        """A run: its outcome is ok unless something else was asked for."""
        seed = job.cfg.seed
        self.did.append(seed)
        status = self.outcomes.get(seed, "ok")
        error = None if status == "ok" else {"type": "NonFiniteLoss", "message": "at step\n3"}
        times = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:03:35+00:00"}
        scores = {"average": {"value": 0.786}}
        job.store.write(
            {"status": status, "error": error, "eval": scores, "environment": times, "artifacts": {"merged": None}}
        )
        return OK if status == "ok" else FAILED

    def sweep(self, *overrides: str, seeds: Sequence[int] = (0, 1, 2)) -> list[int]:
        since, jobs = self.begin(), self.jobs(*overrides, seeds=seeds)
        return sweep.run(jobs, self.launcher(jobs, since), since)

    def launcher(self, jobs: Sequence[Job], since: int) -> sweep.Launch:
        """Runs jobs one by one, as ``run.py`` does: only where ``exit_code_without_run`` finds nothing."""
        by_overrides = {tuple(job.overrides): job for job in jobs}

        def launch(overrides: Sequence[Sequence[str]]) -> list[int]:
            codes = []
            for one in overrides:
                job = by_overrides[tuple(one)]
                code = exit_code_without_run(job.cfg, since)
                codes.append(self.work(job) if code is None else code)
            return codes

        return launch


@pytest.fixture
def table(composed, tmp_path, monkeypatch) -> Table:
    monkeypatch.setattr(sweep, "INTERVAL", 0.01)
    return Table(composed, tmp_path / "runs")


def test_a_run_that_is_asked_for_twice_is_one_job(table) -> None:
    jobs = table.jobs("sparsity=0", seeds=(0, 0, 1)) + table.jobs("sparsity=0", "prune=none", seeds=(0,))
    assert [job.cfg.seed for job in jobs[:2]] == [0, 1] and len(jobs) == 3
    assert jobs[2].store.directory == jobs[0].store.directory


def test_a_bad_value_is_refused_with_the_job_that_has_it(table) -> None:
    with pytest.raises(BadInput, match=r"seed=-1: must be .* \(in the job runs_root=.* seed=-1\)"):
        table.jobs(seeds=(0, -1))


def test_what_is_finished_is_not_run_again_and_what_failed_is(table) -> None:
    table.outcomes = {1: "failed"}
    assert table.sweep() == [OK, FAILED, OK]
    table.outcomes = {}
    assert table.sweep(seeds=(0, 1, 2, 3)) == [OK, OK]
    assert table.did == [0, 1, 2, 1, 3]
    assert table.sweep() == []
    assert table.sweep("force=true", seeds=(0,)) == [OK] and table.did[-1] == 0


def test_only_chooses_the_failed_or_the_missing(table) -> None:
    table.outcomes = {1: "oom"}
    table.sweep(seeds=(0, 1))
    table.did.clear()
    table.sweep("only=missing")
    assert table.did == [2]
    table.sweep("only=failed")
    assert table.did == [2, 1]


def test_one_line_per_job_says_what_came_out_and_how_much_is_left(table, capsys, monkeypatch) -> None:
    table.sweep(seeds=(0,))
    table.outcomes = {1: "failed"}
    work = table.work

    def slow_work(job: Job) -> int:
        time.sleep(0.2)  # longer than the interval between two looks
        code = work(job)
        time.sleep(0.2)
        return code

    monkeypatch.setattr(table, "work", slow_work)
    capsys.readouterr()
    table.sweep()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 jobs, 1 of them finished before or not asked for"
    assert lines[1] == "[2/3] seed=1: failed (NonFiniteLoss: at step 3); about 00:00 left"
    assert lines[2] == "[3/3] seed=2: ok, average 78.6, 03:35"


def test_a_second_sweep_takes_other_jobs_and_repeats_none_of_the_first(table, composed, monkeypatch) -> None:
    """The first sweep is at its job 0, and later fails in it, while the second one goes through all the others."""
    first, second = table, Table(composed, table.folder)
    first.outcomes = second.outcomes = {0: "failed"}
    jobs = first.jobs()
    at_it, go_on = threading.Event(), threading.Event()

    def first_sweep() -> None:
        with jobs[0].store.lock(waiting=lambda: pytest.fail("the first one waits for nobody")):
            at_it.set()
            go_on.wait(timeout=60)
            first.work(jobs[0])

    thread = threading.Thread(target=first_sweep)
    thread.start()
    at_it.wait(timeout=60)
    monkeypatch.setattr(sweep, "_wait_until_one_is_free", lambda busy: busy and (go_on.set(), thread.join()))
    assert second.sweep() == [FAILED, OK, OK]
    assert first.did == [0] and second.did == [1, 2]


def test_a_job_that_others_are_at_or_have_done_needs_no_process(table) -> None:
    [job] = table.jobs(seeds=(0,))
    since = table.begin()
    assert exit_code_without_run(job.cfg, since) is None
    with job.store.lock(waiting=lambda: None):
        assert exit_code_without_run(job.cfg, since) == BUSY
    table.outcomes = {0: "failed"}
    table.work(job)
    assert exit_code_without_run(job.cfg, since) == FAILED, "another sweep has just tried"
    os.utime(job.store.result_file, ns=(since - 1, since - 1))
    assert exit_code_without_run(job.cfg, since) is None, "it failed before this sweep began"
    table.outcomes = {}
    table.work(job)
    os.utime(job.store.result_file, ns=(since - 1, since - 1))
    assert exit_code_without_run(job.cfg, since) == OK


# ---- the device


def test_a_profile_has_the_device_alone_and_the_others_share_it(tmp_path, capsys) -> None:
    import torch

    cpu, order = torch.device("cpu"), []

    def enter(alone: bool, name: str) -> threading.Thread:
        """Ask for the device in a thread, and wait until it says why it waits."""
        thread = threading.Thread(target=lambda: _enter(device_lock(tmp_path, cpu, alone=alone), order, name))
        thread.start()
        said = []
        _wait_for(lambda: said.append(capsys.readouterr().out) or "".join(said))
        reason = "timings want the device alone" if alone else "a profile has the device for itself"
        assert "".join(said) == f"cpu: used by another run; waiting, because {reason}\n"
        return thread

    with device_lock(tmp_path, cpu, alone=False), device_lock(tmp_path, cpu, alone=False):
        profile = enter(True, "profile")
        order.append("shared ends")
    profile.join(timeout=60)
    with device_lock(tmp_path, cpu, alone=True):
        other = enter(False, "other")
        order.append("profile ends")
    other.join(timeout=60)
    assert order == ["shared ends", "profile", "profile ends", "other"]


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def _enter(lock: object, order: list[str], name: str) -> None:
    with lock:
        order.append(name)
