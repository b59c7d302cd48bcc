"""What a run says: all of it into the log file of its folder, what the suite itself says to the console too."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from harness import processes
from harness.processes import is_first

__all__ = ["logged"]


class _LogFile(logging.FileHandler):
    """On a full disk the run ends at what it saves, with one line; lines of the log are lost in silence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        pass


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """The log file of the process gets everything; the console only what the suite itself says, of other processes than
    the first one their failure."""
    to_file = _LogFile(folder / ("log.txt" if is_first() else f"log-{processes.rank()}.txt"), encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_console = logging.StreamHandler(sys.stdout)
    if not is_first():
        to_console.setLevel(logging.ERROR)
    to_console.setFormatter(
        logging.Formatter("%(message)s" if is_first() else f"process {processes.rank()}: %(message)s")
    )
    root, ours, theirs = logging.getLogger(), logging.getLogger("lors"), logging.getLogger("transformers")
    level = ours.level
    root.addHandler(to_file)
    ours.addHandler(to_console)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # It hands nothing to the root, but to a handler of its own, which prints.
    transformers.logging.disable_default_handler()
    transformers.logging.set_verbosity_warning()
    theirs.addHandler(to_file)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        ours.setLevel(level)
        root.removeHandler(to_file)
        theirs.removeHandler(to_file)
        transformers.logging.enable_default_handler()
        transformers.logging.set_verbosity_error()
        ours.removeHandler(to_console)
        to_file.close()
