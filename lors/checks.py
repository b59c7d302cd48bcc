"""Checks of the values of options, each with one clear line: ``name=value: must be ...``.

A check is a function of the name and the value of an option that raises ``ValueError``. The config of a method holds
one with the field, ``option(default, help, check)``; other code calls it, ``number("> 0")("rate", rate)``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

__all__ = ["Check", "check_fields", "each", "flag", "number", "one_of", "option", "whole"]

Check = Callable[[str, Any], None]

COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def option(default: Any, text: str, check: Check | None = None) -> Any:
    """A field of a config: its default (of a dict, the type ``dict``), its help text and the check of its value."""
    made = {"default_factory": dict} if default is dict else {"default": default}
    return field(**made, metadata={"help": text, "check": check})


def check_fields(config: Any) -> None:
    """Raise ``ValueError`` for the first field of a dataclass whose value its check refuses."""
    for part in fields(config):
        check = part.metadata.get("check")
        if check is not None:
            check(part.name, getattr(config, part.name))


def one_of(*allowed: Any) -> Check:
    """A value out of ``allowed``."""

    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, allowed))}")

    return check


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def whole(*limits: str, optional: bool = False) -> Check:
    """A whole number within all ``limits``, each a comparison such as ``>= 1``; also None if ``optional``."""
    return _number("a whole number", int, limits, optional)


def number(*limits: str, optional: bool = False) -> Check:
    """A finite number within all ``limits``, each a comparison such as ``> 0``; also None if ``optional``."""
    return _number("a number", int | float, limits, optional)


def each(check: Check) -> Check:
    """A dict whose values all pass ``check``."""

    def check_all(name: str, values: dict) -> None:
        for key, value in (values or {}).items():
            check(f"{name}[{key!r}]", value)

    return check_all


def _number(kind: str, types: Any, limits: tuple[str, ...], optional: bool) -> Check:
    comparisons = [(COMPARISONS[sign], float(bound)) for sign, bound in map(str.split, limits)]
    wanted = f"{kind} {' and '.join(limits)}".rstrip() + (", or None" if optional else "")

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        fits = isinstance(value, types) and not isinstance(value, bool) and -math.inf < value < math.inf
        if not fits or not all(holds(value, bound) for holds, bound in comparisons):
            raise ValueError(f"{name}={value!r}: must be {wanted}")

    return check
