"""Names under which other modules still look."""

from lors.harness.config import needs_calibration, resolve
from lors.harness.construct import build_method
from lors.harness.errors import BadInput, one_line

__all__ = ["BadInput", "build_method", "needs_calibration", "one_line", "resolve"]
