"""Runs command lines, each in a fork of a process that has imported the bench: the seconds of imports pass once."""

from __future__ import annotations

import json
import os
import sys
from tempfile import TemporaryFile

import datasets  # noqa: F401 - so that no fork has to import it, as below
import lm_eval.tasks  # noqa: F401

import harness.run  # noqa: F401
import run
from harness import snapshot


def execute(arguments: list[str]) -> int:
    """The exit code of ``python run.py <arguments>``, or of ``python -m harness.snapshot`` where that word is first."""
    if arguments[0] == "snapshot":
        return snapshot.main(arguments[1:])
    sys.argv = ["run.py", *arguments]
    try:
        return run.main()
    except SystemExit as end:
        return int(end.code or 0)


for line in sys.stdin:
    with TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            code = 99  # of an exception that nobody has caught
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = execute(json.loads(line))
                sys.stdout.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        print(json.dumps([os.waitstatus_to_exitcode(status), output.read()]), flush=True)
