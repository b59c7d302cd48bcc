"""The launcher of a job (``launch``: torchrun, Accelerate), told from what it launches.

When a process of a job fails, the launcher ends the others and says so in dozens of lines, and its own exit code is
always 1. Here those lines become the exit code of the process that failed, and one line if that could not speak.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["CHILD", "Verdict", "run_launcher", "verdict"]

# Set in the processes that run.py itself starts, so that they do not start another.
CHILD = "LORS_JOB"
# Where a launcher begins to speak: a line of PyTorch's log, or the traceback of a module that was started by its name.
AGENT = re.compile(
    rb"[WEI]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ torch/distributed/"
    rb'|Traceback \(most recent call last\):\n(?:  File "<frozen runpy>"|\Z)'
)
FAILED = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+)|returned non-zero exit status (\d+)")


class Verdict(NamedTuple):
    """What became of a job.

    Attributes:
        shown: What its processes have printed.
        code: The exit code of the process that failed first; negative: minus the signal that ended it.
        line: Of a process that was ended by a signal, what happened.
    """

    shown: bytes
    code: int
    line: str | None


def verdict(output: bytes, code: int) -> Verdict:
    """Read what a launcher and its processes have printed; `code` is the exit code of the launcher."""
    agent, failed = AGENT.search(output), FAILED.search(output)
    shown = output[: agent.start()] if agent else output
    if failed is None:
        return Verdict(shown, code, None)
    own, number = int(failed[1] or failed[3]), int(failed[2] or 0)
    line = f"error: process {number} was ended by signal {-own}; the same command continues where it stopped"
    return Verdict(shown, own, line if own < 0 else None)


def run_launcher(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a job, show what its processes print, and return its exit code (`Verdict`)."""
    output, shown = b"", 0
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while chunk := process.stderr.read1():
            output += chunk
            text = verdict(output, 0).shown
            os.write(sys.stderr.fileno(), text[shown:])
            shown = max(shown, len(text))
    result = verdict(output, process.returncode)
    if result.line:
        print(f"\n{result.line}", file=sys.stderr)
    return result.code
