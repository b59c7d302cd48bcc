"""Weights that are spread over two processes: what ``sharding_checks`` found in the pair of ``test_distributed``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharding_checks import FORMS
from test_distributed import Results, pair, results  # noqa: F401  (fixtures)

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("form", FORMS)
def test_merge_unmerge_and_unload_of_a_sharded_model(results: Results, form: str) -> None:  # noqa: F811
    """As one process does it, bit for bit: the same operations on the same, gathered, weights."""
    for found in results(f"FSDP2 {form}"):
        assert found.pop("sharded")
        assert found.pop("changed") > 0, "the merge must be seen"
        assert found.pop("keys") == []
        assert found.pop("kinds") == ["Linear"]
        for what, difference in found.items():
            exact = "weights" in what
            assert difference == 0 if exact else difference < 1e-5, what


def test_the_fingerprint_does_not_depend_on_shards(results: Results) -> None:  # noqa: F811
    for found in results("FSDP2 support"):
        assert found["found"] == found["expected"]


@pytest.mark.parametrize("storage", ["dense", "bitmap"])
def test_a_step_and_a_merge_under_fsdp1(results: Results, storage: str) -> None:  # noqa: F811
    for found in results(f"FSDP1 {storage}"):
        assert found["packed"] == (storage != "dense")
        assert not found["whole numbers"]
        assert found["values"] == (14 if found["packed"] else 0)
        assert found["forward"] < 1e-5
        assert found["merged"] < 1e-5


def test_ddp_does_not_send_the_places_of_compressed_values(results: Results) -> None:  # noqa: F811
    for found in results("DDP compressed"):
        assert found == {"places": 28, "sent": 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the Trainer's FSDP2 trains replicas")
def test_the_fsdp2_of_the_trainer_shards_a_lors_training(tmp_path: Path) -> None:
    """On as many GPUs as there are, at most two; the losses are those of a training without it."""
    processes = min(2, torch.cuda.device_count())
    script = Path(__file__).with_name("trainer_fsdp2.py")
    sharded, alone = tmp_path / "sharded.json", tmp_path / "alone.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    subprocess.run([*torchrun, script, sharded, str(processes)], check=True, env=environment)
    subprocess.run([sys.executable, script, alone, "0"], check=True, env=environment)
    found, expected = (json.loads(file.read_text()) for file in (sharded, alone))
    assert found["sharded"] == found["of"]
    assert found["share"] < 1.1 / processes
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
