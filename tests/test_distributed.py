"""Two processes: an integrator step and the start of LoRS are those of one, and what fails in one fails in all.

One pair of processes runs all checks of ``distributed_worker``, in a minute; a test here judges what one has returned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import distributed_worker as worker
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import lors

pytestmark = pytest.mark.dist

TIMEOUT = 600  # seconds for all checks, on a busy machine
Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the results of the only pair of processes, whatever files and workers of pytest ask for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "pair"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_pair(folder)
    return folder


@pytest.fixture
def results(pair: Path) -> Results:
    """Function that returns what a check has returned in process 0 and in process 1."""

    def of(check: str) -> list[dict[str, Any]]:
        found = []
        for rank in range(worker.WORLD):
            file, output = pair / f"rank{rank}.json", (pair / f"rank{rank}.log").read_text()
            outcomes = json.loads(file.read_text()) if file.exists() else {}
            assert check in outcomes, f"process {rank} did not get to this check:\n{output[-2000:]}"
            assert "exception" not in outcomes[check], f"in process {rank}:\n{outcomes[check]['exception']}"
            found.append(outcomes[check])
        return found

    return of


def run_pair(folder: Path) -> None:
    """Run the worker in two processes; both are gone afterwards."""
    processes = []
    for rank in range(worker.WORLD):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(worker.WORLD)}
        place |= {"LOCAL_WORLD_SIZE": str(worker.WORLD), "PYTHONPATH": str(Path(__file__).parents[1])}
        with (folder / f"rank{rank}.log").open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, worker.__file__, str(folder)],
                    env={**os.environ, **place, "OMP_NUM_THREADS": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    end = monotonic() + TIMEOUT
    try:
        for process in processes:
            process.wait(max(0, end - monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the checks that are missing say so
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_an_integrator_step_of_geolora_is_that_of_the_mean_gradient(results: Results) -> None:
    """A layer that only one process has used, or none, does not keep the other one waiting."""
    for found in results("integrator of geolora"):
        assert found["difference"] == 0
        assert found["from_the_formula"] < 1e-12


# lors.initialize


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    return all((A.float() - other[name].float()).abs().max() < tolerance for name, A in one.items())


def alone(*batches: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What one process makes of batches."""
    return worker.factors(lors.initialize(worker.lors_model(dtype), batches))


@pytest.mark.parametrize(
    ("check", "dtype", "tolerance"),
    [("initialize", torch.float32, 1e-3), ("initialize in bfloat16", torch.bfloat16, 0.05)],
)
def test_the_start_of_lors_is_that_of_one_process_with_all_batches(
    results: Results, pair: Path, check: str, dtype: torch.dtype, tolerance: float
) -> None:
    one, _ = results(check)
    assert one["difference"] == 0, "the processes start from different factors"
    assert one["distance_from_orthonormal"] < (1e-5 if dtype == torch.float32 else 0.01), "as gathered from all shards"
    found = torch.load(pair / f"factors-{dtype}-0.pt")
    batches = worker.batches_of(0), worker.batches_of(1)
    assert close(found, alone(*batches[0], *batches[1], dtype=dtype), tolerance)
    assert not close(found, alone(*batches[0], dtype=dtype), tolerance)


def test_a_process_without_labels_leaves_the_start_to_the_others(results: Results, pair: Path) -> None:
    for found in results("initialize without labels"):
        assert found["message"].startswith("ValueError: batches: no batch has a label")
    expected = alone(*worker.batches_of(0))
    for case in ("without-labels", "without-batches"):
        for rank in range(worker.WORLD):
            assert close(torch.load(pair / f"{case}-{rank}.pt"), expected, 1e-5)


def test_an_error_in_one_process_is_an_error_in_all_and_changes_nothing(results: Results) -> None:
    one, other = results("initialize failing in one process")
    assert one["message"] == "OtherProcessError: process 1 of 2 has failed in lors.initialize, see there"
    assert other["message"].startswith("ValueError: batches: batch 1 has no 'labels'")
    for found in (one, other):
        assert not found["changed"]
        assert found["difference"] == 0, "and the next call works"


def test_an_expert_that_only_one_process_has_used_gets_its_start_in_all(results: Results) -> None:
    for found in results("initialize with idle experts"):
        assert found["difference"] == 0
        first, second, idle = found["distance_from_orthonormal"]
        assert max(first, second) < 1e-5
        assert idle > 0.1, "which nobody has used, and which keeps its A"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_of_a_sharded_model_is_that_of_a_whole_one(results: Results, pair: Path, dtype: torch.dtype) -> None:
    """Of processes that have unequally many batches."""
    batches = worker.batches_of(0), worker.batches_of(1)
    expected = alone(*batches[0], *batches[1], dtype=dtype)
    for rank, found in enumerate(results(f"initialize after sharding in {dtype}")):
        assert found["sharded"] and not found["gradients"]
        assert found["share_of_the_sums"] == pytest.approx(0.5, abs=0.01)
        tolerance = 1e-3 if dtype == torch.float32 else 0.05
        assert close(torch.load(pair / f"sharded-factors-{dtype}-{rank}.pt"), expected, tolerance)


def test_a_compressed_model_that_is_sharded_is_refused_and_stays_as_it_is(results: Results) -> None:
    for found in results("initialize after sharding a compressed model"):
        assert found["message"].startswith("ValueError: the weight of ")
        assert "is compressed and sharded (FSDP2): call lors.initialize before that" in found["message"]
        assert not found["changed"]


def test_an_error_in_one_process_is_an_error_in_all_of_a_sharded_model(results: Results) -> None:
    one, other = results("initialize after sharding failing in one process")
    assert one["message"] == "OtherProcessError: process 1 of 2 has failed in lors.initialize, see there"
    assert other["message"].startswith("ValueError: batches: batch 0 has no 'labels'")
