"""Which checkpoint of a killed run can be trusted.

The Trainer writes a checkpoint file by file into its final place, so a kill leaves a folder that looks like
one. A checkpoint counts here only with its seal, see `sealed_folder`.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.errors import one_line
from harness.files import remove
from harness.sealed_folder import damage

__all__ = ["drop_older", "newest_intact", "whole_or_gone"]

logger = logging.getLogger("lors")

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def newest_intact(directory: Path) -> Path | None:
    """The newest checkpoint (``checkpoint-<step>``) in `directory` that is as it was sealed; None if there is
    none.

    What is newer, whatever it is, is in the way of the checkpoints to come and is deleted; what has another name is
    left alone. One line of warning each.
    """
    for path in sorted(directory.glob("checkpoint-*")):
        if NAME.fullmatch(path.name) is None:
            logger.warning("%s is no checkpoint of this run: left alone", path)
    for path in _newest_first(directory):
        if damage(path) is None:
            return path
        logger.warning("%s is damaged or unfinished: going back to the checkpoint before it", path)
        remove(path)
    return None


def drop_older(directory: Path, keep: int) -> None:
    """Delete all checkpoints in `directory` but the newest `keep`."""
    for path in _newest_first(directory)[keep:]:
        remove(path)


@contextmanager
def whole_or_gone(checkpoint: Path) -> Iterator[None]:
    """Write into `checkpoint`. If that fails the folder goes, so that a full disk has room for what tells of it.

    Raises:
        OSError: One line with the folder, the reason and the space that was left. PyTorch's writer says of a full disk
            only that a position was unexpected.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        remove(checkpoint)
        raise OSError(f"{checkpoint}: cannot be written ({one_line(error)}); {free:.1f} MiB were free") from error


def _newest_first(directory: Path) -> list[Path]:
    """Everything that has the name of a checkpoint."""
    steps = {path: NAME.fullmatch(path.name) for path in directory.glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)
