"""Runs of several processes: the numbers of one process, whatever is shared out, and whoever of them dies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import process_checks
import pytest
from conftest import compose_config
from contract import TRAINED, R, method_of
from test_distributed import Results, pair, results  # noqa: F401  (fixtures)

from harness.bench import processes
from harness.checkpoints import newest_intact
from harness.config import resolve
from harness.launch import verdict
from harness.method_from_config import build_method
from harness.run import execute
from harness.simulate import simulate
from harness.store import read_result

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[1]
EXACT = ("step", "lr", "tokens")


def assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]], sampled: bool = False) -> None:
    assert [[line[name] for name in EXACT] for line in found] == [[line[name] for name in EXACT] for line in expected]
    for name, rel in (("loss", 1e-2 if sampled else 2e-3), ("grad_norm", 0.5 if sampled else 2e-3)):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=rel, abs=1e-5)


def is_sampled(name: str) -> bool:
    """Whether tokens are drawn for the gradients: then each process draws among its own, and no two numbers agree."""
    return getattr(method_of(name).peft, "gradient", None) == "sampled"


# ---- a training


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_as_one(results: Results, name: str, tmp_path: Path) -> None:  # noqa: F811
    """Over epochs that end within a batch, with micro-batches of unequal numbers of targets."""
    alone, sampled = process_checks.training(name, tmp_path), is_sampled(name)
    for found in results(f"training of {name}"):
        assert_same_steps(found["history"], alone["history"], sampled)
        assert found["weights"] == pytest.approx(alone["weights"], rel=1e-2 if sampled else 1e-4)


def test_a_training_of_two_processes_is_continued_by_one(results: Results, pair: Path, tmp_path: Path) -> None:  # noqa: F811
    found, _ = results("training of lors")
    folder = tmp_path / "trainings" / "lors"
    shutil.copytree(pair / "trainings" / "lors", folder)
    shutil.rmtree(newest_intact(folder))
    assert newest_intact(folder).name == "checkpoint-4"
    continued = process_checks.training("lors", tmp_path)
    assert_same_steps(continued["history"], found["history"])
    assert continued["weights"] == pytest.approx(found["weights"], rel=1e-5)


@pytest.mark.parametrize("name", process_checks.SHARDED)
def test_two_processes_that_share_the_weights_train_as_one(results: Results, name: str, tmp_path: Path) -> None:  # noqa: F811
    """FSDP2, and again from a checkpoint, in whose place one process would go on too."""
    alone, sampled = process_checks.training(name, tmp_path), is_sampled(name)
    for rank, found in enumerate(results(f"sharded training of {name}")):
        # Of a bare model only the first process has a use for the trained weights.
        weights = found["before"] if rank and method_of(name).peft is None else alone["weights"]
        assert found["sharded"] and found["untouched"]
        assert found["share"] == pytest.approx(0.5, abs=0.05)
        for attempt in ("at once", "continued"):
            assert_same_steps(found[attempt]["history"], alone["history"], sampled)
            assert found[attempt]["weights"] == pytest.approx(weights, rel=1e-2 if sampled else 1e-4)


def test_these_methods_can_be_sharded() -> None:
    assert {"lors", "lors storage=bitmap", "lora", "spp", "sqft", "full", "hira"} <= set(process_checks.SHARDED)
    assert not {"geolora", "xgblora", "flat_lora", "lora_rite"} & set(process_checks.SHARDED)


@pytest.mark.parametrize(("name", "fields"), process_checks.COSTS)
def test_the_memory_of_a_share_is_as_simulated(results: Results, name: str, fields: dict[str, Any]) -> None:  # noqa: F811
    train = process_checks.COST_RECIPE | fields
    words = [f"train.{key}={value}" for key, value in train.items()]
    method, *peft = name.split()
    words += [f"method={method}", *(f"method.peft.{field}" for field in peft), f"adapter.r={R}"]
    cfg = resolve(compose_config("mode=simulate", "simulate.device=cpu", "simulate.shards=2", "sparsity=0.5", *words))
    simulated = simulate(cfg, build_method(cfg), process_checks.SHAPE)["memory"]
    for found in results(f"sharded cost of {name} {fields}"):
        measured = found["sharded"]["memory"]
        assert simulated["train_peak"] == pytest.approx(measured["train_peak"], rel=0.03)
        assert simulated["breakdown"]["weights"] == pytest.approx(measured["breakdown"]["weights"], rel=0.01)
        assert measured["train_peak"] < 0.97 * found["whole"]["memory"]["train_peak"]
        assert found["sharded"]["flops"] == found["whole"]["flops"]


# ---- what is shared out, and what is compared


@pytest.mark.parametrize("check", ["scores", "scores of shards"])
def test_scores_do_not_depend_on_how_many_compute_them(results: Results, check: str, tmp_path: Path) -> None:  # noqa: F811
    alone = process_checks.scores(tmp_path)
    for found in results(check):
        assert found.pop("sharded") == (check == "scores of shards")
        for part, scores in found.items():
            assert scores.pop("losses") == pytest.approx(alone[part]["losses"], abs=2e-6)
            for about in ("value", "loss", "loss_stderr"):
                scores.pop(about, None)
            assert scores.items() <= alone[part].items()


def test_a_process_that_sees_something_else_is_refused_by_all(results: Results) -> None:  # noqa: F811
    message = "launch.processes=2: must all work on the same; process 1 has another model than process 0"
    assert [found["message"] for found in results("agreement")] == [message] * 2


def test_what_fails_in_the_first_process_fails_in_all(results: Results) -> None:  # noqa: F811
    first, second = results("failing first")
    assert first["refused"] == second["refused"] == "BadInput: name=value: must be other"
    assert first["failed"] == "OSError: name=value: must be other"
    assert second["failed"] == "RuntimeError: process 0 has failed: name=value: must be other"
    assert first["nested"] == second["nested"] == 8
    assert (first["later"], second["later"], first["all"], second["all"]) == (0, 0, [0, 1], [0, 1])


# ---- a run

RUN = [
    "method=lors", "train.steps=4", "train.checkpoint_every=2", "train.batch_size=4", "train.sequence_length=32",
    "train.init_rows=6", "train.timing_warmup=1", "data.limit=11", "prune=magnitude", "sparsity=0.5",
    "eval.tasks=[microworld_boolq,microworld_arc_easy]", "eval.limit=5", "eval.perplexity=null", "save_merged=true",
]  # fmt: skip
# Put before run.py, which is then its argument; patches a process.
WRAPPER = """
import os, runpy, signal, sys
from harness import train
log = train.MeasuredTrainer.log

def happen(self, logs, *rest):
    if self.state.global_step == 3 and os.environ["RANK"] == "1":
        {}
    log(self, logs, *rest)

train.MeasuredTrainer.log = happen
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def overrides(folder: Path, *more: str) -> list[str]:
    return [*RUN, f"runs_root={folder}/runs", f"cache_root={folder}/cache", *more]


def in_two(folder: Path, *more: str, wrapper: Path | None = None) -> subprocess.CompletedProcess:
    """Run the job in two processes by torchrun."""
    launch = ["launch=torchrun", "launch.processes=2"]
    if wrapper is not None:
        launch.append(f"launch.arguments=[-m,torch.distributed.run,--standalone,'--nproc-per-node=2','{wrapper}']")
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *overrides(folder, *launch, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def result_in(folder: Path) -> dict[str, Any] | None:
    (run,) = (folder / "runs" / "default").iterdir()
    return read_result(run / "result.json")


def assert_same_result(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["key"] == alone["key"]
    for part in ("first", "last"):
        assert found["loss"][part] == pytest.approx(alone["loss"][part], rel=1e-5)
    for scores, expected in (
        (found["eval"], alone["eval"]),
        (found["baselines"]["dense"], alone["baselines"]["dense"]),
    ):
        for task, score in expected["tasks"].items():
            assert scores["tasks"][task]["margins"] == pytest.approx(score["margins"], abs=1e-3)
    for same in ("support", "zeros", "parameters", "artifacts"):
        assert found[same] == alone[same], same


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in one process."""
    result = execute(compose_config(*overrides(tmp_path_factory.mktemp("alone"))))
    assert result["status"] == "ok", result["error"]
    return result


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_of_two_processes_is_that_of_one(alone: dict[str, Any], shard: bool, tmp_path: Path) -> None:
    done = in_two(tmp_path, f"launch.shard={shard}", "force=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("evaluate ...") == 1 and done.stdout.count("· ok") == 1, "only the first process speaks"
    result = result_in(tmp_path)
    assert_same_result(result, alone)
    assert (result["environment"]["processes"], alone["environment"]["processes"]) == (2, 1)
    assert alone["memory"]["by_process"] is None
    peaks = [one["train_peak"] for one in result["memory"]["by_process"]]
    limit = 0.9 if shard else 0.8  # half of the rows each; of shards a block is whole, and beside it what arrives
    assert len(peaks) == 2 and max(peaks) < limit * alone["memory"]["train_peak"]
    again = in_two(tmp_path, f"launch.shard={shard}")
    assert again.stdout.count("has finished before") == 1 and again.returncode == 0


def test_a_killed_process_ends_the_run_in_one_line_and_one_process_continues_it(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format("os.kill(os.getpid(), signal.SIGKILL)"))
    done = in_two(tmp_path, wrapper=wrapper)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line == "error: process 1 was ended by signal 9; the same command continues where it stopped"
    assert "Traceback" not in done.stderr and "torch/distributed" not in done.stderr
    left = [pid for pid in Path("/proc").glob("[0-9]*") if str(tmp_path) in read(pid / "cmdline")]
    assert not left
    assert result_in(tmp_path) is None
    continued = execute(compose_config(*overrides(tmp_path)))
    assert continued["status"] == "ok"
    assert_same_result(continued, alone)
    (steps,) = tmp_path.rglob("steps.jsonl")
    assert [json.loads(line)["step"] for line in steps.read_text().splitlines()] == [1, 2, 3, 4]


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # it has ended meanwhile
        return ""


def test_an_error_in_one_process_is_the_result(tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format('raise RuntimeError("a broken cable")'))
    done = in_two(tmp_path, wrapper=wrapper)
    assert done.returncode == 1
    assert "process 1: failed: a broken cable" in done.stdout
    assert "Traceback" not in done.stderr
    result = result_in(tmp_path)
    assert (result["status"], result["error"]["message"]) == ("failed", "a broken cable")


def test_the_bench_compares_them(tmp_path: Path) -> None:
    small = ["model=microworld", "model.layers=2", "train.steps=3", "train.timing_warmup=1", "train.sequence_length=16"]
    assert processes.main([*small, "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "processes.csv", index_col=0)
    assert list(table.index) == list(processes.CASES)
    one, replicas, shared = table["loss of the last step"]
    assert [replicas, shared] == pytest.approx([one] * 2, rel=1e-5)
    peaks = table["peak of each (MiB)"]
    assert peaks.iloc[1] < peaks.iloc[0], "half of the rows each"


# ---- the launcher

AGENT = (
    b"E1129 23:20:01.123000 4567 torch/distributed/elastic/multiprocessing/api.py:1010] "
    b"failed (exitcode: %d) local_rank: 1 (pid: 9) of binary: python\nTraceback (most recent call last):\n"
)
TRACEBACK = (
    b'Traceback (most recent call last):\n  File "<frozen runpy>", line 198\n'
    b"subprocess.CalledProcessError: Command '[]' returned non-zero exit status 2.\n"
)


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        (b"a\nb\n", 0, (b"a\nb\n", 0, None)),
        (b"error: no\n", 2, (b"error: no\n", 2, None)),
        (b"error: no\n" + AGENT % 2, 1, (b"error: no\n", 2, None)),
        (b"error: no\n" + TRACEBACK, 1, (b"error: no\n", 2, None)),
        (b"a\n" + TRACEBACK[:35], 0, (b"a\n", 0, None)),
        (TRACEBACK.replace(b"<frozen runpy>", b"x"), 0, (TRACEBACK.replace(b"<frozen runpy>", b"x"), 2, None)),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed(output: bytes, code: int, expected: tuple) -> None:
    assert verdict(output, code) == expected
