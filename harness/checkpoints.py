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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.errors import one_line
from harness.files import remove
from harness.processes import from_first, gathered
from harness.sealed_folder import damage, seal

__all__ = ["Seal", "checkpoint_after", "drop_older", "newest_intact", "whole_or_gone"]

logger = logging.getLogger("lors")

KEPT_CHECKPOINTS = 2  # the newest may be damaged by the kill that makes it needed
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


def checkpoint_after(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the checkpoint after the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class Seal(TrainerCallback):
    """Seals every checkpoint once all of its files are written; only then do older ones go."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        gathered(None)  # every process has written its random state
        from_first(partial(self._seal, checkpoint_after(args, state)))

    def _seal(self, checkpoint: Path) -> None:
        with whole_or_gone(checkpoint):
            seal(checkpoint)
        drop_older(checkpoint.parent, KEPT_CHECKPOINTS)
