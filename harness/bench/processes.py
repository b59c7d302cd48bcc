"""One process, two that train replicas (DDP) and two that share the weights (FSDP2): the same steps, side by side.

Each is a run of ``mode=profile`` in the same config: random weights, the same rows in every step. ``processes.csv`` has
a row for each: time of a step (median) and tokens per second, of all processes; the scaling efficiency, which is their
share of what as many would do that never wait for each other; the largest peak of a process; the losses, which
are the same but for rounding. Cores are shared out, so on a CPU all have the same machine.

    python -m harness.bench.processes
    python -m harness.bench.processes model=llama2_7b model.layers=null train.precision=bf16
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.bench.cases import CONF
from harness.store import read_result

__all__ = ["main"]

SETTING = ["mode=profile", "sparsity=0.5", "train.batch_size=4", "train.sequence_length=128"]
SETTING += ["train.steps=6", "train.timing_warmup=2", "model=tinyllama_1b", "model.layers=8", "method=lors"]
TWO = ["launch=torchrun", "launch.processes=2"]
CASES = {"one process": [], "two, replicas": TWO, "two, shared weights": [*TWO, "launch.shard=true"]}
COLUMNS = ["processes", "step (ms)", "tokens/s", "scaling efficiency", "peak of each (MiB)"]
COLUMNS += ["loss of the first step", "loss of the last step"]
MEBIBYTE = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the three; exit code 0, or that of a run that failed."""
    parser = argparse.ArgumentParser(prog="python -m harness.bench.processes", description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="of the config, as for run.py")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for what is written")
    options = parser.parse_args(arguments)
    given = {override.partition("=")[0] for override in options.overrides}
    setting = [override for override in SETTING if override.partition("=")[0] not in given] + options.overrides
    options.output.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    for name, launch in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(CONF.parent / "run.py"), *setting, *launch]
            threads = {"OMP_NUM_THREADS": str(cores // 2 if launch else cores)}
            run = subprocess.run([*command, f"runs_root={folder}", f"cache_root={folder}"], env=os.environ | threads)
            if run.returncode:
                return run.returncode
            result = read_result(next(Path(folder).rglob("result.json")))
        rows.append(_row(name, result))
        rows[-1]["scaling efficiency"] = _efficiency(result, rows[0]["tokens/s"])
        pd.DataFrame(rows).to_csv(options.output / "processes.csv", index=False)
    print(pd.DataFrame(rows)[COLUMNS].to_string(index=False))
    return 0


def _row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    time, memory, machine = result["time"], result["memory"], result["environment"]
    peaks = [one["train_peak"] for one in memory["by_process"] or [memory]]
    return {
        "processes": name,
        "step (ms)": time["step_ms"]["p50"],
        "tokens/s": time["tokens_per_second"],
        "peak of each (MiB)": max(peaks) / MEBIBYTE,
        "loss of the first step": result["loss"]["first"],
        "loss of the last step": result["loss"]["last"],
        **{key: result[key] for key in ("method", "model")},
        **{key: machine[key] for key in ("device", "threads", "torch", "git_commit", "git_dirty")},
    }


def _efficiency(result: dict[str, Any], alone: float) -> float:
    """Tokens per second over those of as many that never wait: each has a GPU, or on a CPU its share of the cores.

    Args:
        result: Of a run.
        alone: Tokens per second of one process.
    """
    machine = result["environment"]
    devices = machine["processes"] if machine["cuda"] else 1
    return result["time"]["tokens_per_second"] / (devices * alone)


if __name__ == "__main__":
    sys.exit(main())
