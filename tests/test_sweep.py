"""Sweeps: which jobs, in which state, and what a kill or a second sweep beside the first leaves behind.

What one process does is tested in this one, with jobs that are functions. The real thing (processes, signals, locks
between them, joblib) is slow.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from test_pipeline import NO_SCORES, numbers, tiny_overrides

from hydra_plugins.block_sweeper import expand
from lors.harness import sweep
from lors.harness.device_lock import device_lock
from lors.harness.store import read_json
from lors.harness.sweep import BUSY, FAILED, OK, Job, begin, look, plan
from lors.harness.validate import BadInput, build_method, resolve

ROOT = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))


def hydra(*overrides: str) -> tuple[OverridesParser, DictConfig]:
    """Hydra's parser, which knows the groups of ``conf``, and the config of a preset with Hydra's own part."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()), cfg


@pytest.fixture(scope="module")
def parser() -> OverridesParser:
    return hydra()[0]


def jobs_of(experiment: str, *overrides: str) -> list[list[str]]:
    """The overrides of the jobs of ``run.py -m experiment=<experiment>``."""
    parser, cfg = hydra(f"experiment={experiment}", *overrides)
    assert cfg.name == experiment, "results of different experiments do not mix"
    return expand(parser, cfg.hydra.sweeper.params, cfg.hydra.sweeper.blocks, [f"experiment={experiment}"])


# ---- which jobs


def test_without_blocks_a_sweep_is_the_product_of_the_command_line(parser) -> None:
    jobs = expand(parser, {}, {}, ["method=lors,lora", "seed=0", "sparsity=0.5,0.7"])
    assert jobs == [
        [f"method={method}", "seed=0", f"sparsity={sparsity}"] for method in ("lors", "lora") for sparsity in (0.5, 0.7)
    ]


def test_a_sweep_is_the_products_of_its_blocks(parser) -> None:
    blocks = {
        "tuned": {"method": "lors,lora"},
        "dense": {"method": "lors", "prune": "none", "seed": 0},
        "without": None,
    }
    assert expand(parser, {"seed": "0,1"}, blocks, ["adapter.r=8"]) == [
        ["seed=0", "method=lors", "adapter.r=8"],
        ["seed=0", "method=lora", "adapter.r=8"],
        ["seed=1", "method=lors", "adapter.r=8"],
        ["seed=1", "method=lora", "adapter.r=8"],
        ["seed=0", "method=lors", "prune=none", "adapter.r=8"],
    ]


def test_the_command_line_replaces_axes_and_what_a_block_is_about_stays(parser) -> None:
    blocks = {"tuned": {"method": "lors,lora"}, "dense": {"method": "lors", "sparsity": 0}}
    assert expand(parser, {"seed": "0,1", "sparsity": 0.5}, blocks, ["seed=7", "method=spp", "sparsity=0.6,0.7"]) == [
        ["seed=7", "sparsity=0.6", "method=spp"],
        ["seed=7", "sparsity=0.7", "method=spp"],
        ["seed=7", "sparsity=0", "method=lors"],
    ]
    with pytest.raises(HydraException, match="method=spp: every block of the sweep sets method itself"):
        expand(parser, {}, {"dense": {"method": "lors"}}, ["method=spp"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_jobs_of_every_experiment_are_valid(composed, experiment: str) -> None:
    """Every value of every axis is in a job that resolves and builds; test_config builds the methods one by one."""
    jobs = jobs_of(experiment)
    assert len(jobs) > 1, "a complete command, without axes to add"
    seen = {f"method={option}" for option in METHODS}
    for job in jobs:
        if not set(job) <= seen:
            seen |= set(job)
            build_method(resolve(composed(*job)))


@pytest.mark.parametrize("experiment", ["zero_shot", "sparsity_sweep", "rank_sweep", "ablation_lors", "all_methods"])
def test_quality_tables_carry_their_controls(experiment: str) -> None:
    jobs = [set(job) for job in jobs_of(experiment)]
    dense = [job for job in jobs if {"prune=none", "sparsity=0"} <= job]
    assert sum("method=none" in job for job in dense) == 1
    assert {tuple(job & {"seed=0", "seed=1", "seed=2"}) for job in dense if "method=lors" in job} == {
        ("seed=0",), ("seed=1",), ("seed=2",)
    }  # fmt: skip
    settings = [{o for o in job if o.startswith(("prune=", "sparsity=", "pattern="))} for job in jobs]
    pruned = [setting for job, setting in zip(jobs, settings, strict=True) if "method=none" in job]
    assert all(setting in pruned for setting in settings), "pruned only, for every pruned model"


def test_all_methods_lets_the_zeros_go_where_a_method_can() -> None:
    able = {
        option
        for option in METHODS
        if "keep_zeros" in yaml.safe_load((ROOT / "conf" / "method" / f"{option}.yaml").read_text()).get("peft", {})
    }
    lost = [job for job in map(set, jobs_of("all_methods")) if "method.peft.keep_zeros=False" in job]
    assert {override for job in lost for override in job if override.startswith("method=")} == {
        f"method={name}" for name in able
    }


# ---- one sweep, with jobs that are functions


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
        """Runs jobs one by one, as ``run.py`` does: only where ``look`` finds nothing."""
        by_overrides = {tuple(job.overrides): job for job in jobs}

        def launch(overrides: Sequence[Sequence[str]]) -> list[int]:
            codes = []
            for one in overrides:
                job = by_overrides[tuple(one)]
                code = look(job.cfg, since)
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
    assert look(job.cfg, since) is None
    with job.store.lock(waiting=lambda: None):
        assert look(job.cfg, since) == BUSY
    table.outcomes = {0: "failed"}
    table.work(job)
    assert look(job.cfg, since) == FAILED, "another sweep has just tried"
    os.utime(job.store.result_file, ns=(since - 1, since - 1))
    assert look(job.cfg, since) is None, "it failed before this sweep began"
    table.outcomes = {}
    table.work(job)
    os.utime(job.store.result_file, ns=(since - 1, since - 1))
    assert look(job.cfg, since) == OK


# ---- the device


def test_a_profile_has_the_device_alone_and_the_others_share_it(tmp_path) -> None:
    import torch

    cpu, order = torch.device("cpu"), []
    alone, shared = ({"alone": flag, "waiting": lambda: order.append("waits")} for flag in (True, False))
    with device_lock(tmp_path, cpu, **shared), device_lock(tmp_path, cpu, **shared):
        profile = threading.Thread(target=lambda: _enter(device_lock(tmp_path, cpu, **alone), order, "profile"))
        profile.start()
        _wait_for(lambda: order)
        order.append("shared ends")
    profile.join(timeout=60)
    assert order == ["waits", "shared ends", "profile"]
    with device_lock(tmp_path, cpu, **alone):
        other = threading.Thread(target=lambda: _enter(device_lock(tmp_path, cpu, **shared), order, "other"))
        other.start()
        _wait_for(lambda: len(order) > 3)
        order.append("profile ends")
    other.join(timeout=60)
    assert order[3:] == ["waits", "profile ends", "other"]


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def _enter(lock: object, order: list[str], name: str) -> None:
    with lock:
        order.append(name)


# ---- the real thing


def run_py(arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "run.py", "-m", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def results_in(folder: Path) -> dict[str, dict]:
    return {file.parent.name: read_json(file) for file in folder.rglob("result.json")}


@pytest.mark.slow
def test_killed_sweeps_end_with_the_numbers_of_an_undisturbed_one(tiny_checkpoint, tiny_sources, tmp_path) -> None:
    """SIGKILL of the sweep, of everything, and Ctrl-C, at random moments; a finished run is never made again."""
    settings = ["method=lora,lors", "eval.tasks=[rte]", "train.steps=6"]
    undisturbed = tmp_path / "undisturbed"
    start = time.monotonic()
    assert run_py([*tiny_overrides(tiny_checkpoint, tiny_sources, undisturbed), *settings]).wait() == 0
    whole_sweep = time.monotonic() - start
    arguments = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path / "killed"), *settings]
    draw = random.Random(0)
    finished: dict[str, int] = {}
    for way in ("parent", "group", "interrupt") * 2:
        process = run_py(arguments)
        try:
            process.wait(timeout=draw.uniform(0.2, 0.9) * whole_sweep)
        except subprocess.TimeoutExpired:
            if way == "parent":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL if way == "group" else signal.SIGINT)
        code, output = process.wait(), process.stdout.read()  # read to the end: no child of it is left
        if way == "interrupt" and code:
            assert code == 130 and "the same command continues" in output
        for file in (tmp_path / "killed").rglob("result.json"):
            written = file.stat().st_mtime_ns
            assert finished.setdefault(file.parent.name, written) == written, "made again"
    process = run_py(arguments)
    assert process.wait() == 0, process.stdout.read()
    killed, whole = results_in(tmp_path / "killed"), results_in(undisturbed)
    assert set(killed) == set(whole) and len(whole) == 2
    for key, result in killed.items():
        assert numbers(result) == numbers(whole[key])
    for key, written in finished.items():
        [file] = (tmp_path / "killed").rglob(f"{key}/result.json")
        assert file.stat().st_mtime_ns == written


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_jobs(tiny_checkpoint, tiny_sources, tmp_path) -> None:
    arguments = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path), *NO_SCORES, "seed=0,1,2,3"]
    both = [run_py(arguments) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    results = results_in(tmp_path)
    assert len(results) == 4 and all(result["status"] == "ok" for result in results.values())
    # A run that was made twice would have been logged twice.
    logs = [file.read_text() for file in tmp_path.rglob("log.txt")]
    assert [log.count("train ...") for log in logs] == [1] * 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason="needs .[parallel]")
def test_jobs_in_parallel_share_what_is_computed_once(tiny_checkpoint, tiny_sources, tmp_path) -> None:
    """The numbers are those of a run on its own; pruned model, tokens and scores exist once and were made once."""
    overrides = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path), "eval.tasks=[rte]", "train.steps=2"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "method=lora,lors"]
    process = run_py([*overrides, *launcher])
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "[2/2] method=" in output
    results = results_in(tmp_path)
    assert len(results) == 2 and all(result["status"] == "ok" for result in results.values())
    logs = "".join(file.read_text() for file in tmp_path.rglob("log.txt"))
    assert logs.count("not in the cache, computed now") == 2, "dense and pruned, once each"
    assert len(list(tmp_path.glob("cache/tokens/*.npz"))) == 2
    alone = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path / "alone"), "eval.tasks=[rte]", "train.steps=2"]
    assert run_py([*alone, "method=lors"]).wait() == 0
    [(key, result)] = results_in(tmp_path / "alone").items()
    assert numbers(result) == numbers(results[key])
