"""What may be asked of a run: every key of ``conf`` with its type, checked before any work.

`resolve` holds a composed config against `Config` and returns the config that the run uses. Whatever is not a field
below is refused, also behind Hydra's ``+``; so is a value of another type, for nothing is converted. The config of a
method is the business of its own class, see `construct`.
"""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lors.harness.errors import BadInput, one_line
from lors.sparsity import parse_pattern, resolve_sparsity

__all__ = ["Config", "allowed", "needs_calibration", "refusal", "resolve", "unknown"]

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no larger ones
SHOWN = 200  # characters of a value in a message


class Section(BaseModel):
    """Some keys; no others, nothing converted, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=False)


class Simulate(Section):
    """``simulate``."""

    device: Literal["cuda", "cpu"]
    shards: Count


class Adapter(Section):
    """``adapter``."""

    r: Count
    alpha: Positive
    targets: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)]


class Model(Section):
    """``model``."""

    name: Text | None
    path: Text
    revision: Text | None
    layers: Count | None
    shape: dict[str, Any] | None


class Unpruned(Section):
    """``prune=none``."""

    name: Literal["none"]
    samples: Annotated[int, Field(ge=0)]
    sequence_length: Annotated[int, Field(ge=0)]
    seed: Seed
    text: Text | None


class Magnitude(Unpruned):
    """``prune=magnitude``."""

    name: Literal["magnitude"]
    group: Literal["layer", "row"]


class Wanda(Unpruned):
    """``prune=wanda``."""

    name: Literal["wanda"]
    samples: Count
    sequence_length: Annotated[int, Field(ge=2)]


class SparseGpt(Wanda):
    """``prune=sparsegpt``."""

    name: Literal["sparsegpt"]
    block_size: Count
    damping: NotNegative


class MethodKeys(Section):
    """``method``; what is in the mappings is checked against what they build."""

    target: str = Field(alias="_target_")
    name: Text
    version: Count = 1
    peft: dict[str, Any] | None = None
    keeps_zeros: bool | None = None
    trains: bool = True
    prepare: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    callbacks: list[dict[str, Any]] = []
    penalty: dict[str, Any] | None = None
    merges: list[Text] | None = None
    init_rows: Count | None = None
    max_grad_norm: NotNegative | None = None
    counts: dict[str, Any] | None = None
    costliest: dict[str, Any] | None = None


class Data(Section):
    """``data``."""

    name: Text
    kind: Literal["microworld", "instruction", "text"]
    path: Text | None
    split: Text
    loss_on: Literal["all", "answer"]
    template: Literal["alpaca"] | None
    limit: Count | None


class Train(Section):
    """``train``."""

    steps: Count | None
    steps_by_mode: dict[str, Count]
    epochs: Positive | None
    batch_size: Count
    gradient_accumulation: Count
    sequence_length: Annotated[int, Field(ge=2)]
    pad: Literal["longest", "fixed"]
    learning_rate: Positive
    minimum_learning_rate: NotNegative
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: NotNegative
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    max_grad_norm: Positive | None
    precision: Literal["float32", "bf16_mixed", "bf16"]
    activation_checkpointing: bool
    init_rows: Count
    timing_warmup: Annotated[int, Field(ge=0)]
    checkpoint_every: Count | None
    tuned: dict[str, Positive] | None = None


class Perplexity(Section):
    """``eval.perplexity``."""

    text: Text
    window: Annotated[int, Field(ge=2)]


class Eval(Section):
    """``eval``."""

    name: Text
    tasks: list[Text]
    data_root: Text | None
    limit: Count | None
    batch_size: Count
    add_bos_token: bool
    perplexity: Perplexity | None
    baselines: bool
    split: Literal["test", "validation"] = "test"


class Launch(Section):
    """``launch``."""

    name: Text
    arguments: list[Text]


class Config(Section):
    """The whole config. ``sparsity`` and ``pattern`` are checked by `lors.sparsity`."""

    sparsity: Any
    pattern: Any
    seed: Seed
    mode: Literal["run", "profile", "simulate"]
    force: bool
    only: Literal["failed", "missing"] | None
    name: Text
    runs_root: Text
    cache_root: Text | None
    save_merged: bool
    simulate: Simulate
    adapter: Adapter
    model: Model
    prune: Annotated[Unpruned | Magnitude | Wanda | SparseGpt, Field(discriminator="name")]
    method: MethodKeys
    data: Data
    train: Train
    eval: Eval
    launch: Launch


def resolve(cfg: DictConfig) -> DictConfig:
    """Check every value and return the config of the run: no interpolation, no open default, nothing ignored.

    What is decided here: the sparsity that the pattern implies, where something is pruned; ``train.epochs`` replaces
    ``train.steps``; nothing is pruned at sparsity 0, and at random outside of mode=run; calibration text is that of the
    microworld for its own model and C4 for any other; a model without a name is called after its path.

    Raises:
        BadInput: The first value that is not allowed.
    """
    if OmegaConf.select(cfg, "mode") == "simulate":
        cfg = OmegaConf.merge(cfg, {"train": {"steps": 1, "epochs": None}})  # all steps cost the same
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        # An unknown mode leaves train.steps without a value; the mode is what is wrong.
        _check(Config, {"mode": OmegaConf.select(cfg, "mode")}, only="mode")
        raise BadInput(one_line(error)) from error
    if missing:
        raise BadInput(f"{missing[0]}: must be given, as in {missing[0]}=VALUE")
    _check(Config, config)
    config["sparsity"] = _requested_sparsity(config)
    _check_together(config)
    if config["mode"] != "run":
        config["prune"] = {"name": "random"}
        config["train"]["checkpoint_every"] = None
    elif config["sparsity"] == 0 or config["prune"]["name"] == "none":
        config["prune"] = {"name": "none"}
    elif needs_calibration(config["prune"]["name"]) and config["prune"]["text"] is None:
        config["prune"]["text"] = "microworld" if config["model"]["path"] == "microworld" else "c4"
    if config["train"]["epochs"] is not None:
        config["train"]["steps"] = None
    if config["model"]["name"] is None:
        config["model"]["name"] = config["model"]["path"].rstrip("/").rpartition("/")[2]
    return OmegaConf.create(config)


def needs_calibration(pruner: str) -> bool:
    """Whether a pruner looks at activations, hence at calibration tokens."""
    return any(issubclass(kind, Wanda) and pruner in get_args(kind.model_fields["name"].annotation) for kind in PRUNERS)


PRUNERS = (Unpruned, Magnitude, Wanda, SparseGpt)


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
    words = {getattr(bound, name): f"{sign} {getattr(bound, name):.10g}" for bound in bounds
             for name, sign in BOUNDS.items() if hasattr(bound, name)}  # fmt: skip
    limits = " and ".join(words.values())
    if origin is list or annotation is list:
        lengths = {name: getattr(bound, name) for bound in bounds for name in LENGTHS if hasattr(bound, name)}
        size = f"a list of {lengths['max_length']}" if "max_length" in lengths else "a list"
        size = "a non-empty list" if list(lengths) == ["min_length"] else size
        return f"{size}, each entry {allowed(inner[0])}" if inner else size
    for kind, name in KINDS.items():
        if annotation is kind or origin is kind:
            return f"{name} {limits}".rstrip()
    return "null" if annotation in (None, type(None)) else getattr(annotation, "__name__", str(annotation))


BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
LENGTHS = ("min_length", "max_length")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text that is not empty",
         dict: "a mapping"}  # fmt: skip


def refusal(key: str, value: Any, expected: str) -> BadInput:
    """The error for a value of a key."""
    shown = "null" if value is None else str(value)
    shown = f"{shown[:SHOWN]}..." if len(shown) > SHOWN else shown
    hint = ""
    if isinstance(value, float) and not math.isfinite(value) and expected.startswith("a number"):
        hint = "; infinity and NaN are none"
    elif isinstance(value, int | float) and expected.startswith("a text"):
        hint = f"; what looks like a number or a flag needs quotes inside quotes: \"{key}='...'\""
    return BadInput(f"{key}={shown}: must be {expected}{hint}")


def unknown(key: str, names: Iterable[str], shown: Iterable[str] | None = None) -> BadInput:
    """The error for a key that does not exist beside `names`, with the one that is nearest to it, else all `shown`."""
    prefix, _, last = key.rpartition(".")
    names = list(names)
    near = difflib.get_close_matches(last, names, n=1)
    near = near or [name for name in names if "".join(word[:1] for word in name.split("_")) == last]
    if near:
        return BadInput(f"{key}: no such key; did you mean {f'{prefix}.' if prefix else ''}{near[0]}?")
    return BadInput(f"{key}: no such key; {prefix or 'the config'} has {', '.join(shown or names)}")


def _check(schema: type[Section], config: dict[str, Any], only: str | None = None) -> None:
    try:
        schema.model_validate(config)
    except ValidationError as invalid:
        errors = [error for error in invalid.errors() if only in (None, error["loc"][0]) and error["type"] != "missing"]
        # Unknown keys first: what is missing may only be misspelt.
        errors.sort(key=lambda error: error["type"] != "extra_forbidden")
        for error in errors or ([] if only else invalid.errors()):
            raise _explained(schema, config, error) from None


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
    if path == ["prune"]:
        return refusal("prune.name", config.get("name"), "one of " + ", ".join(_names()))
    return refusal(".".join(path), config, allowed(field.annotation, tuple(field.metadata)))


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _names() -> list[str]:
    return [name for kind in PRUNERS for name in get_args(kind.model_fields["name"].annotation)]


def _check_together(config: dict[str, Any]) -> None:
    """Values that are allowed one by one and contradict each other."""
    mode, train, data, model = config["mode"], config["train"], config["data"], config["model"]
    name = PurePosixPath(config["name"])
    if name.is_absolute() or ".." in name.parts or config["name"] != str(name) or not name.parts:
        raise refusal("name", config["name"], "a folder below runs_root, as in name=mine or name=mine/first")
    rate, floor = train["learning_rate"], train["minimum_learning_rate"]
    if floor > rate:
        raise BadInput(f"train.minimum_learning_rate={floor}: must be at most train.learning_rate={rate}")
    if train["steps"] is None and train["epochs"] is None:
        raise BadInput("train.steps=null: must be a whole number >= 1 where train.epochs is null")
    if mode == "profile" and train["epochs"] is not None:
        raise BadInput(
            f"train.epochs={train['epochs']}: must be null in mode=profile, which has no data; use train.steps"
        )
    if mode == "run" and model["layers"] is not None:
        raise BadInput(f"model.layers={model['layers']}: must be null in mode=run")
    if mode == "run" and data["kind"] != "microworld" and data["path"] is None:
        raise BadInput(f"data.path=null: must be a file or a name on the Hub for data.kind={data['kind']}")
    twice = [task for number, task in enumerate(config["eval"]["tasks"]) if task in config["eval"]["tasks"][:number]]
    if twice:
        raise BadInput(f"eval.tasks={config['eval']['tasks']}: must have each task once; {twice[0]} is there twice")
    _check_storage(config)
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        arguments = config["launch"]["arguments"]
        raise BadInput(f"launch.arguments={arguments}: must start one process, not WORLD_SIZE={processes}")


def _check_storage(config: dict[str, Any]) -> None:
    """Compressed forms that only weights of an n:m pattern have."""
    peft, pattern = config["method"].get("peft") or {}, config["pattern"]
    if peft.get("storage") == "n:m" and parse_pattern(pattern) is None:
        raise BadInput(f"method.peft.storage=n:m: must be dense, bitmap or auto with pattern={pattern}")
    if peft.get("forward_product") == "2:4" and pattern != "2:4":
        raise BadInput(f"method.peft.forward_product=2:4: must be dense or auto with pattern={pattern}")


def _requested_sparsity(config: dict[str, Any]) -> float | None:
    """The sparsity that is asked for: the given one or that of the pattern; None for a model that is taken as it is."""
    sparsity, pattern = config["sparsity"], config["pattern"]
    try:
        unstructured = parse_pattern(pattern) is None
        if sparsity == 0 and unstructured:
            return 0.0
        if config["prune"]["name"] == "none" and sparsity is None and unstructured:
            return None if config["mode"] == "run" else 0.0
        return resolve_sparsity(sparsity, pattern)
    except ValueError as error:
        raise BadInput(one_line(error)) from error
