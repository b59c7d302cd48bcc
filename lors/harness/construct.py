"""A method built from its config: every argument checked by name and type before anything is made.

``_target_`` names a class or a function, and the other keys are its arguments (Hydra's instantiate). A misspelt one is
refused with the name that is nearest, one of another type with the type that the class itself declares.
"""

from __future__ import annotations

import inspect
import pydoc
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lors.harness.config import allowed, refusal, unknown
from lors.harness.errors import BadInput, one_line
from lors.harness.method import Method

__all__ = ["build_method"]

TYPES = ConfigDict(strict=True, allow_inf_nan=False)
# What a config can hold.
PLAIN = (int, float, bool, str, list, dict, type(None), Any)


def build_method(cfg: DictConfig) -> Method:
    """The method of a resolved config.

    Raises:
        BadInput: It has no such argument, one of another type, or a value that its class does not accept.
    """
    try:
        for key, node in _built(OmegaConf.to_container(cfg.method), "method"):
            _check_arguments(key, node)
        return instantiate(cfg.method, _convert_="all")
    except BadInput:
        raise
    except Exception as error:  # whatever a class of a method raises at such a value
        reason = error.__cause__ or error if isinstance(error, InstantiationException) else error
        raise BadInput(f"method={cfg.method.name}: {one_line(reason)}") from error


def _built(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a ``_target_``, with its dotted key."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, item in node.items():
            yield from _built(item, f"{key}.{name}")
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from _built(item, f"{key}[{number}]")


def _check_arguments(key: str, node: dict[str, Any]) -> None:
    target = pydoc.locate(node["_target_"])
    if target is None:
        raise refusal(f"{key}._target_", node["_target_"], "the name of a class or function that can be imported")
    parameters = inspect.signature(target).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in node.items() if name not in ("_target_", "_partial_", "_convert_")}
    hints = _hints(target)
    for name, value in given.items():
        if name not in parameters and not open_ended:
            raise unknown(f"{key}.{name}", parameters, shown=[known for known in given if known != name])
        built = isinstance(value, dict | list) and any(_built(value, ""))
        if name in hints and not built and not _fits(value, hints[name]):
            raise refusal(f"{key}.{name}", value, allowed(hints[name]))


def _hints(target: Callable) -> dict[str, Any]:
    try:
        return get_type_hints(target if is_dataclass(target) or not inspect.isclass(target) else target.__init__)
    except (NameError, TypeError):  # a type that exists for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; where a type has objects that no config can hold, only its class can judge."""
    if not all(kind in PLAIN or get_origin(kind) is Literal for kind in _parts(hint)):
        return True
    try:
        TypeAdapter(hint, config=TYPES).validate_python(value)
    except ValidationError:
        return False
    return True


def _parts(hint: Any) -> Iterator[Any]:
    """The types that a hint is made of."""
    if get_origin(hint) in (Union, types.UnionType, list, dict, Sequence):
        for part in get_args(hint):
            yield from _parts(part)
    else:
        yield hint
