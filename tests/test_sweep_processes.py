"""Sweeps and launchers as processes: failed jobs, joblib and submitit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_harness_run import NO_SCORES, numbers, tiny_overrides

from harness.store import read_result

ROOT = Path(__file__).parents[1]


def run_py(arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "run.py", "-m", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def results_in(folder: Path) -> dict[str, dict]:
    return {file.parent.name: read_result(file) for file in folder.rglob("result.json")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "launcher"),
    [("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]), ("submitit", ["hydra/launcher=submitit_local"])],
)
def test_jobs_in_parallel_share_what_is_computed_once(
    tiny_checkpoint, tiny_sources, tmp_path, package, launcher
) -> None:
    """The numbers are those of a run on its own; pruned model, tokens and scores exist once and were made once."""
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    overrides = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path), "eval.tasks=[rte]", "train.steps=2"]
    process = run_py([*overrides, *launcher, "method=lora,lors"])
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "[2/2] method=" in output
    results = results_in(tmp_path)
    assert len(results) == 2 and all(result["status"] == "ok" for result in results.values())
    logs = "".join(file.read_text() for file in tmp_path.rglob("log.txt"))
    assert logs.count("not in the cache, computed now") == 2, "dense and pruned, once each"
    assert len(list(tmp_path.glob("cache/tokens/*.sealed"))) == 2
    alone = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path / "alone"), "eval.tasks=[rte]", "train.steps=2"]
    assert run_py([*alone, "method=lors"]).wait() == 0
    [(key, result)] = results_in(tmp_path / "alone").items()
    assert numbers(result) == numbers(results[key])


@pytest.mark.dist
def test_a_sweep_runs_each_job_in_its_own_process_and_survives_a_failed_one(
    tiny_checkpoint, tiny_sources, tmp_path
) -> None:
    """Two jobs, of which one diverges: the other is finished, and the exit code says that not all went well."""
    overrides = [*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path), *NO_SCORES, "train.max_grad_norm=null"]
    process = run_py([*overrides, "method=lora", "train.steps=2", "train.learning_rate=1e30,1e-3"])
    output = process.communicate()[0]
    assert process.returncode == 1, output
    results = results_in(tmp_path).values()
    statuses = {result["config"]["train"]["learning_rate"]: result["status"] for result in results}
    assert statuses == {1e30: "failed", 1e-3: "ok"}
    assert "NonFiniteLoss" in output and "the sweep is over" in output


@pytest.mark.dist
@pytest.mark.parametrize("launch", ["torchrun", "accelerate"])
def test_a_run_through_a_launcher(tiny_checkpoint, tiny_sources, tmp_path, launch) -> None:
    overrides = tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path)
    command = [sys.executable, "run.py", *overrides, *NO_SCORES, "train.steps=1", f"launch={launch}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    [result] = results_in(tmp_path).values()
    assert result["status"] == "ok"
