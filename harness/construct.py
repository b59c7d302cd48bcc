"""A method built from its config: every argument checked by name and type before anything is made.

``_target_`` names a class or a function, and the other keys are its arguments (Hydra's instantiate). A misspelt one is
refused with the name that is nearest, one of another type with the type that the class itself declares. What a class
or function says of an argument is passed on with the key that the argument has in the config.
"""

from __future__ import annotations

import inspect
import pydoc
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from harness.config import allowed, refusal, unknown
from harness.errors import BadInput, one_line
from harness.method import Method

__all__ = ["build_method", "method_refusal"]

TYPES = ConfigDict(strict=True, allow_inf_nan=False)
# What a config can hold.
PLAIN = (int, float, bool, str, list, dict, type(None), Any)
# How Hydra builds an object.
CONSTRUCTION = ("_target_", "_partial_", "_convert_")
# Arguments that every method takes from ``adapter``, and their keys there.
SHARED = {"r": "r", "lora_alpha": "alpha", "target_modules": "targets"}
LARGEST = 2**32 - 1  # of whole numbers: a seed
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def build_method(cfg: DictConfig) -> Method:
    """The method of a resolved config.

    Raises:
        BadInput: It has no such argument, one of another type, or a value that its class does not accept.
    """
    try:
        for key, node in _built(OmegaConf.to_container(cfg.method), "method"):
            _check_arguments(key, node)
        method = instantiate(cfg.method, _convert_="all")
    except BadInput:
        raise
    except Exception as error:  # whatever a class of a method raises at such a value
        reason = error.__cause__ or error if isinstance(error, InstantiationException) else error
        raise method_refusal(cfg, reason) from error
    if not isinstance(method, Method):
        raise refusal("method._target_", cfg.method._target_, "harness.method.Method, or a class of its kind")
    return method


def method_refusal(cfg: DictConfig, error: BaseException) -> BadInput:
    """The error for what a class or function of a method has raised; ``argument=value: ...`` gets its full key."""
    reason = one_line(error)
    if reason.startswith("method."):
        return BadInput(reason)
    named = re.match(r"(\w+)=", reason)
    for key, node in _built(OmegaConf.to_container(cfg.method), "method") if named else ():
        if named[1] in node and key != "method":
            shared = SHARED.get(named[1])
            of_all = key == "method.peft" and shared is not None and node[named[1]] == cfg.adapter[shared]
            where = f"adapter.{shared}" if of_all else f"{key}.{named[1]}"
            return BadInput(f"{where}{reason[len(named[1]) :]} (method={cfg.method.name})")
    return BadInput(f"method={cfg.method.name}: {reason}")


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
    target = _target(key, node)
    if not isinstance(node.get("_partial_", False), bool):
        raise refusal(f"{key}._partial_", node["_partial_"], allowed(bool))
    known, open_ended = _arguments(target)
    given = {name: value for name, value in node.items() if name not in CONSTRUCTION}
    for name, value in given.items():
        if name not in known and not open_ended:
            raise unknown(f"{key}.{name}", known, shown=[other for other in known if other in given] or ["no options"])
        built = isinstance(value, dict | list) and any(_built(value, ""))
        if name in known and not built and not _fits(value, known[name]):
            raise refusal(f"{key}.{name}", value, allowed(known[name]))


def _target(key: str, node: dict[str, Any]) -> Callable:
    """The class or function that a mapping names."""
    name = node["_target_"]
    try:
        target = pydoc.locate(name) if isinstance(name, str) else None
    except pydoc.ErrorDuringImport as error:
        raise BadInput(f"{key}._target_={name}: cannot be imported ({one_line(error)})") from error
    if not callable(target):
        raise refusal(f"{key}._target_", name, "the name of a class or function that can be imported")
    return target


def _arguments(target: Callable) -> tuple[dict[str, Any], bool]:
    """The arguments of a class or function with their types, and whether it takes any others.

    Those that a function does not name itself (``**options``) are those of the class that it returns.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin one
        return {}, True
    try:
        hints = get_type_hints(target if is_dataclass(target) or not inspect.isclass(target) else target.__init__)
    except (NameError, TypeError):  # a type that exists for type checkers only
        hints = {}
    named = {name: hints.get(name, Any) for name, parameter in parameters.items() if parameter.kind not in VARIABLE}
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if open_ended and inspect.isclass(hints.get("return")) and not inspect.isclass(target):
        others, open_ended = _arguments(hints["return"])
        named = {**others, **named}
    return named, open_ended


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; where a type has objects that no config can hold, only its class can judge."""
    if isinstance(value, int) and abs(value) > LARGEST and float not in _parts(hint):
        return False
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
