"""The one line that says what is wrong with a config: the key, the value, what is allowed."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from harness.config_schema import MOST, PRUNERS, UNWRITABLE, Config, Section
from harness.errors import BadInput

__all__ = ["allowed", "as_written", "check_keys", "refusal", "unknown", "unresolved"]

SHOWN = 200  # characters of a value in a message
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
LENGTHS = ("min_length", "max_length")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
         dict: "a mapping"}  # fmt: skip


def check_keys(schema: type[Section], config: dict[str, Any], resolved: bool = True) -> None:
    """Raise `BadInput` for the first wrong value; of a config that is not `resolved`, of those without a reference."""
    try:
        schema.model_validate(config)
    except ValidationError as invalid:
        # Unknown keys first: what is missing may only be misspelt.
        order = ["extra_forbidden", None, "missing"]
        errors = sorted(
            invalid.errors(), key=lambda error: order.index(error["type"] if error["type"] in order else None)
        )
        for error in errors:
            if resolved or not any(mark in str(error["input"]) for mark in ("${", "???")):
                raise _explained(schema, config, error) from None


def refusal(key: str, value: Any, expected: str) -> BadInput:
    """The error for a value of a key."""
    hint = ""
    if isinstance(value, float) and not math.isfinite(value) and expected.startswith("a number"):
        hint = "; infinity and NaN are none"
    elif isinstance(value, int) and abs(value) > MOST and expected.startswith("a whole number"):
        hint = "; this one is too large"
    elif isinstance(value, int | float) and expected.startswith("a text"):
        hint = f"; what looks like a number or a flag needs quotes inside quotes: \"{key}='...'\""
    return BadInput(f"{key}={as_written(value)}: must be {expected}{hint}")


def unknown(key: str, names: Iterable[str], shown: Iterable[str] | None = None) -> BadInput:
    """The error for a key that does not exist beside `names`, with the one that is nearest to it, else all `shown`."""
    prefix, _, last = key.rpartition(".")
    names = list(names)
    near = difflib.get_close_matches(last, names, n=1)
    near = near or [name for name in names if "".join(word[:1] for word in name.split("_")) == last]
    near = [f"{prefix}.{name}" if prefix else name for name in near]
    near = near or [name for name in _keys(Config) if name.endswith(f".{last}") and name != key]
    if near:
        return BadInput(f"{key}: no such key; did you mean {near[0]}?")
    return BadInput(f"{key}: no such key; {prefix or 'the config'} has {', '.join(shown or names)}")


def unresolved(cfg: DictConfig, error: OmegaConfBaseException) -> BadInput:
    """One line for a reference to something that is not there."""
    key, value = str(error.full_key), OmegaConf.to_container(cfg)
    for name in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, dict | list):  # a text refers to what holds the key
            value = value[int(name)] if isinstance(value, list) else value.get(name)
    reason = str(error).partition("\n")[0].partition("raised while resolving interpolation: ")
    return BadInput(f"{key}={as_written(value)}: must refer to something that exists ({reason[2] or reason[0]})")


def as_written(value: Any) -> str:
    """A value as a command line has it, cut if it is long."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {as_written(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(as_written, value)) + "]"
    elif value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    else:
        text = UNWRITABLE.sub(lambda found: repr(found[0])[1:-1], str(value))
    return f"{text[:SHOWN]}..." if len(text) > SHOWN else text


def allowed(annotation: Any, bounds: tuple = ()) -> str:
    """What a field takes, in words.

    Args:
        annotation: Its type.
        bounds: What `Field` says of it.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [entry for field in inner[1:] for entry in getattr(field, "metadata", [field])]
        return allowed(inner[0], (*bounds, *extra))
    if origin in (Union, types.UnionType):
        return ", or ".join(allowed(part) for part in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner)) if len(inner) > 1 else str(inner[0])
    limits = " and ".join(f"{sign} {getattr(bound, name):.10g}" for bound in bounds for name, sign in BOUNDS.items()
                          if getattr(bound, name, MOST) != MOST)  # fmt: skip
    if origin is list or annotation is list:
        lengths = {name: getattr(bound, name) for bound in bounds for name in LENGTHS if hasattr(bound, name)}
        size = f"a list of {lengths['max_length']}" if "max_length" in lengths else "a list"
        size = "a non-empty list" if list(lengths) == ["min_length"] else size
        return f"{size}, each entry {allowed(inner[0])}" if inner else size
    for kind, name in KINDS.items():
        if annotation is kind or origin is kind:
            return f"{name} {limits}".rstrip()
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return KINDS[dict]
    return "null" if annotation in (None, type(None)) else getattr(annotation, "__name__", str(annotation))


def _explained(schema: type[Section], config: Any, error: ErrorDetails) -> BadInput:
    """One line for the first error of pydantic: the key down to the field, its value, what it takes."""
    path: list[str] = []
    field = None
    for name in error["loc"]:
        if schema is None or not isinstance(config, dict):
            break
        if name not in config:
            kind = next((kind for kind in PRUNERS if name in get_args(kind.model_fields["name"].annotation)), None)
            if kind is not None and issubclass(kind, schema):  # the tag of the pruner stands between group and key
                schema = kind
                continue
            return BadInput(f"{'.'.join([*path, str(name)])}: must be given; it is missing in the config")
        path.append(str(name))
        fields = {entry.alias or known: entry for known, entry in schema.model_fields.items()}
        if name not in fields:
            return unknown(".".join(path), [known for known in fields if not known.startswith("_")])
        field, config = fields[name], config[name]
        schema = next(_sections(field.annotation), None)
    if path == ["prune"] and isinstance(config, dict):
        return refusal("prune.name", config.get("name"), "one of " + ", ".join(_names()))
    if error["type"] == "value_error":  # of the checks above, which say what is allowed
        return refusal(".".join(path), config, str(error["ctx"]["error"]))
    return refusal(".".join(path), config, allowed(field.annotation, tuple(field.metadata)))


def _keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        for section in _sections(field.annotation):
            yield from _keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _names() -> list[str]:
    return [name for kind in PRUNERS for name in get_args(kind.model_fields["name"].annotation)]
