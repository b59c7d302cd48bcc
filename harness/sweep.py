"""A sweep that cannot lose work: many runs, each in a process of its own, none of which is made twice.

A sweep has no state of its own. What is finished is what has a result file, what is under way is what is locked, and
both outlive any process; so the same command after Ctrl-C, a crash or ``kill -9`` goes on where the last one stopped,
and so does a second sweep beside the first: it takes the jobs that nobody is at. Around one job:

    `exit_code_without_run`  nothing to do if the result is there; another one first if somebody is at this run
    a process                of its own (run.py), which takes the lock of the run, and looks again
    `Progress`               sees the result file appear, whoever made it and wherever

Jobs that somebody else was at are looked at again when all others are through.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from harness.config import resolve
from harness.errors import BadInput
from harness.files import check_writable, write_text
from harness.method_from_config import build_method
from harness.store import RunStore

__all__ = ["BUSY", "FAILED", "OK", "Job", "begin", "exit_code_without_run", "plan", "run"]

# Exit codes of a job; that of a busy one is EX_TEMPFAIL of sysexits.h.
OK, FAILED, BUSY = 0, 1, 75
# Seconds between two looks at the result files.
INTERVAL = 1.0

Launch = Callable[[Sequence[Sequence[str]]], Sequence[int]]


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        overrides: What makes its config.
        cfg: The resolved config.
        store: Its folder.
    """

    overrides: Sequence[str]
    cfg: DictConfig
    store: RunStore


def plan(configs: Iterable[tuple[Sequence[str], DictConfig]]) -> list[Job]:
    """The jobs of a sweep, in order; a run that is asked for twice is there once.

    Args:
        configs: Overrides and composed config of each job.

    Raises:
        BadInput: A value that is not allowed; the message names the job.
    """
    jobs: dict[Path, Job] = {}
    for overrides, composed in configs:
        try:
            cfg = resolve(composed)
            build_method(cfg)
        except BadInput as error:
            raise BadInput(f"{error} (in the job {' '.join(overrides)})") from error
        store = RunStore.of(cfg)
        jobs.setdefault(store.directory, Job(overrides, cfg, store))
    return list(jobs.values())


def begin(folder: Path, description: str) -> int:
    """Write ``multirun.yaml``, and return when that was: nanoseconds, on the clock of the folder's file system.

    Raises:
        BadInput: The folder takes no file.
    """
    check_writable("runs_root", folder)
    write_text(folder / "multirun.yaml", description)
    return (folder / "multirun.yaml").stat().st_mtime_ns


def run(jobs: Sequence[Job], launch: Launch, since: int) -> list[int]:
    """Run the jobs that are to be run, and return the exit code of each of them.

    Args:
        jobs: All jobs of the sweep.
        launch: Runs jobs, given by their overrides, and returns their exit codes.
        since: When the sweep began.
    """
    pending = [job for job in jobs if _is_wanted(job)]
    codes: dict[Path, int] = {}
    print(f"{len(jobs)} jobs, {len(jobs) - len(pending)} of them finished before or not asked for", flush=True)
    with Progress(jobs, pending, since):
        while pending:
            for job, code in zip(pending, launch([job.overrides for job in pending]), strict=True):
                codes[job.store.directory] = code
            pending = [job for job in pending if codes[job.store.directory] == BUSY]
            _wait_until_one_is_free(pending)
    return list(codes.values())


def exit_code_without_run(cfg: DictConfig, since: int | None) -> int | None:
    """Exit code of a job that needs no process: its result is there, or another process is at it (`BUSY`).

    None: it is to be run.

    Args:
        cfg: The composed config.
        since: When the sweep began; None on a machine that was not told.

    Raises:
        BadInput: The folder of the sweep takes no file.
    """
    cfg = resolve(cfg)
    store = RunStore.of(cfg)
    result = store.finished(cfg, since)
    if result is not None:
        return OK if result["status"] == "ok" else FAILED
    check_writable("runs_root", store.directory.parent)
    return BUSY if store.busy() else None


def _is_wanted(job: Job) -> bool:
    """What ``only`` says."""
    if job.cfg.only is None:
        return job.store.finished(job.cfg) is None
    result = job.store.result()
    return result is None if job.cfg.only == "missing" else result is not None and result["status"] != "ok"


def _wait_until_one_is_free(jobs: Sequence[Job]) -> None:
    if jobs:
        print(f"{len(jobs)} jobs are left, all under way in other processes; waiting for them", flush=True)
    while jobs and all(job.store.busy() for job in jobs):
        time.sleep(INTERVAL)


class Progress:
    """One line for every job that has a new result, with the time that is left; on a terminal a bar, too.

    It watches the result files, so it does not matter which process on which machine makes them.
    """

    def __init__(self, jobs: Sequence[Job], pending: Sequence[Job], since: int) -> None:
        self._left = list(pending)
        self._total = len(jobs)
        self._since = since
        self._labels = dict(zip((job.store.directory for job in jobs), _labels(jobs), strict=True))
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._start, self._todo, self._output = time.monotonic(), len(self._left), sys.stdout
        # disable=None: only on a terminal.
        self._bar = tqdm(total=self._total, initial=self._total - self._todo, unit="job", desc="sweep", disable=None)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._bar.close()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._report()
        self._report()

    def _report(self) -> None:
        for job in [job for job in self._left if job.store.written_since(self._since)]:
            self._left.remove(job)
            self._bar.update()
            line = f"[{self._total - len(self._left)}/{self._total}] {self._labels[job.store.directory]}: "
            self._bar.write(line + _outcome(job.store.result()) + self._time_left(), file=self._output)
            self._output.flush()
        self._bar.refresh()

    def _time_left(self) -> str:
        """The jobs that are left take as long as those of this sweep did on average, at the same parallelism."""
        if not self._left:
            return ""
        each = (time.monotonic() - self._start) / (self._todo - len(self._left))
        return f"; about {tqdm.format_interval(each * len(self._left))} left"


def _labels(jobs: Sequence[Job]) -> list[str]:
    """What tells the jobs apart: the overrides that not all of them have."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(override for override in job.overrides if override not in common) for job in jobs]


def _outcome(result: dict[str, Any] | None) -> str:
    """Status, the number that the table is about, and how long it took."""
    if result is None:
        return "its result file is damaged"
    if result["status"] != "ok":
        error = result["error"]
        return f"{result['status']} ({error['type']}: {' '.join(error['message'].split())})"
    words = ["ok"]
    if (result["eval"] or {}).get("average"):
        words.append(f"average {100 * result['eval']['average']['value']:.1f}")
    elif result["time"]["step_ms"]:
        words.append(f"step {result['time']['step_ms']['p50']:.0f} ms")
    start, end = (datetime.fromisoformat(result["environment"][name]) for name in ("start", "end"))
    return ", ".join([*words, tqdm.format_interval((end - start) / timedelta(seconds=1))])
