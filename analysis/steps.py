"""The losses that a training wrote down, step by step: `steps.jsonl` beside a result."""

import json
import math
import sys
from functools import cache
from pathlib import Path

__all__ = ["losses_of"]


def losses_of(file: Path | None) -> list[tuple[int, float]]:
    """(step, loss) of every step, NaN where there is none; empty without a file.

    A last line that is torn, as a kill or a full disk leaves it, is left out, and said once.

    Raises:
        ValueError: Another line is damaged.
    """
    if file is None or not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    points = []
    for number, line in enumerate(lines, 1):
        try:
            points.append(_point(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{file}: line {number} is damaged") from None
            _say(f"warning: {file}: the last line is torn and left out")
    return points


def _point(step: dict[str, float | None]) -> tuple[int, float]:
    return int(step["step"]), math.nan if step["loss"] is None else float(step["loss"])


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
