"""A method built from its config: every argument checked by name and type before anything is made.

``method._target_`` names a class, ``method.peft._target_`` that of its PEFT config, and the other keys are the
arguments of the two (Hydra's instantiate). A misspelt one is refused with the name that is nearest, one of another type
with the type that the class itself declares. What a class says of an argument is passed on with the key that the
argument has in the config.
"""

from __future__ import annotations

import inspect
import pydoc
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from harness.errors import BadInput, one_line
from harness.method import Method
from harness.quantized import quantized_layout
from harness.refusals import allowed, refusal, unknown

__all__ = ["build_method", "method_refusal"]

TYPES = ConfigDict(strict=True, allow_inf_nan=False)
# What a config can hold.
PLAIN = (int, float, bool, str, list, dict, type(None), Any)
# Arguments that every method takes from ``adapter``, and their keys there.
SHARED = {"r": "r", "lora_alpha": "alpha", "target_modules": "targets"}
LARGEST = 2**32 - 1  # of whole numbers: a seed
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def build_method(cfg: DictConfig) -> Method:
    """The method of a resolved config.

    Raises:
        BadInput: It has no such argument, one of another type, or a value that its class does not accept.
    """
    method = OmegaConf.to_container(cfg.method)
    for key, node, kind in (("method", method, Method), ("method.peft", method.get("peft"), PeftConfig)):
        if node is None:
            continue
        name = node.pop("_target_")
        target = _class(key, name)
        known = _arguments(target) if target is not None and issubclass(target, kind) else None
        if known is None:
            raise refusal(
                f"{key}._target_", name, f"the name of a class derived from {kind.__module__}.{kind.__name__}"
            )
        _check_options(key, node, known)
    try:
        built = instantiate(cfg.method, _convert_="all")
    except Exception as error:  # whatever a class raises at such a value
        reason = error.__cause__ or error if isinstance(error, InstantiationException) else error
        raise method_refusal(cfg, reason) from error
    built.quantized_base = bool(quantized_layout(cfg))
    if built.quantized_base and built.trains and not getattr(built.peft, "grid", ""):
        built.merges = ("adapter",)  # whatever it merges would leave the grid
    return built


def _class(key: str, name: Any) -> type | None:
    """The class of a dotted name, None if there is none.

    Raises:
        BadInput: Its module cannot be imported.
    """
    try:
        found = pydoc.locate(name) if isinstance(name, str) else None
    except pydoc.ErrorDuringImport as error:
        raise BadInput(f"{key}._target_={name}: cannot be imported ({one_line(error)})") from error
    return found if inspect.isclass(found) else None


def _arguments(target: type) -> dict[str, Any]:
    """The arguments of a class with their types; ``**common`` stands for those of its base class."""
    if is_dataclass(target):
        hints = _hints(target)
        return {field.name: hints.get(field.name, Any) for field in fields(target) if field.init}
    known: dict[str, Any] = {}
    for base in target.__mro__:
        hints, parameters = _hints(base.__init__), list(inspect.signature(base.__init__).parameters.values())[1:]
        names = [parameter.name for parameter in parameters if parameter.kind not in VARIABLE]
        known = {name: hints.get(name, Any) for name in names} | known
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return known


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target)
    except (NameError, TypeError):  # a type that exists for type checkers only
        return {}


def _check_options(key: str, options: dict[str, Any], known: dict[str, Any]) -> None:
    """Hold the options of a class against the types of its arguments.

    Args:
        key: Where the options are in the config.
        options: Names and values.
        known: Names and types.

    Raises:
        BadInput: The first that is unknown or of another type.
    """
    for name, value in options.items():
        if name not in known:
            raise unknown(
                f"{key}.{name}", known, shown=[other for other in known if other in options] or ["no options"]
            )
        if not _fits(value, known[name]):
            raise refusal(f"{key}.{name}", value, allowed(known[name]))


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


def method_refusal(cfg: DictConfig, error: BaseException) -> BadInput:
    """The error for what a class of a method has raised; ``argument=value: ...`` gets its full key."""
    reason = one_line(error)
    if reason.startswith("method."):
        return BadInput(reason)
    named = re.match(r"(\w+)=", reason)
    for key, node in _method_parts(cfg).items() if named else ():
        if named[1] in node:
            shared = SHARED.get(named[1])
            of_all = shared is not None and node[named[1]] == cfg.adapter[shared]
            where = f"adapter.{shared}" if of_all else f"{key}.{named[1]}"
            return BadInput(f"{where}{reason[len(named[1]) :]} (method={cfg.method.name})")
    return BadInput(f"method={cfg.method.name}: {reason}")


def _method_parts(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The mappings that something is built from, with their keys: the method, and its PEFT config if it has one."""
    method = OmegaConf.to_container(cfg.method)
    peft = method.get("peft")
    return {"method": method} if peft is None else {"method": method, "method.peft": peft}
