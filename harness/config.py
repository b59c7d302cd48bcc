"""What may be asked of a run: every key of ``conf`` with its type, checked before any work.

`resolve` holds a composed config against `Config` and returns the config that the run uses. Whatever is not a field
below is refused, also behind Hydra's ``+``; so is a value of another type, for nothing is converted. The config of a
method is the business of its own class, see `construct`. Two values that leave one of them without effect are refused
too, unless a sweep over methods or pruners needs them beside each other.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from harness.errors import BadInput, one_line
from lors.sparsity import parse_pattern, resolve_sparsity

__all__ = ["MOST", "Config", "allowed", "as_written", "needs_calibration", "refusal", "resolve", "unknown"]

MOST = 10**9  # of anything that is counted; what counts with 64 bits has room for products of two
PART_LENGTH, PATH_LENGTH = 200, 2000  # bytes; a file system takes 255 and 4096, and names are added to these
SHOWN = 200  # characters of a value in a message
# Line breaks and the like, and bytes that are no UTF-8, which Python reads as halves of surrogate pairs.
UNWRITABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def _writable(text: str) -> str:
    if UNWRITABLE.search(text) or not text.strip():
        raise ValueError("a text that is not blank, without line breaks and other control characters")
    return text


def _place(path: str) -> str:
    parts = path.encode().split(b"/")
    if len(path.encode()) > PATH_LENGTH or max(map(len, parts)) > PART_LENGTH:
        raise ValueError(f"a folder whose names have at most {PART_LENGTH} bytes each, {PATH_LENGTH} together")
    if os.path.expanduser(path).startswith("~"):
        raise ValueError("a folder of a user that exists, where it begins with ~")
    return path


def _buildable(part: dict[str, Any]) -> dict[str, Any]:
    if "_target_" not in part:
        raise ValueError("a mapping with a _target_, which names what it builds")
    return part


Text = Annotated[str, AfterValidator(_writable)]
Place = Annotated[Text, AfterValidator(_place)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Length = Annotated[int, Field(ge=2, le=MOST)]  # in tokens: one to read and one to predict
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no larger ones
Part = Annotated[dict[str, Any], AfterValidator(_buildable)]


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
    samples: Whole
    sequence_length: Whole
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
    sequence_length: Length


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
    peft: Part | None = None
    keeps_zeros: bool | None = None
    trains: bool = True
    prepare: Part | None = None
    optimizer: Part | None = None
    callbacks: list[Part] = []
    penalty: Part | None = None
    merges: list[Text] | None = None
    init_rows: Count | None = None
    max_grad_norm: NotNegative | None = None
    counts: Part | None = None
    costliest: Part | None = None


class Data(Section):
    """``data``."""

    name: Text
    kind: Literal["microworld", "instruction", "text"]
    path: Text | None
    split: Text
    loss_on: Literal["all", "answer"]
    template: Literal["alpaca"] | None
    limit: Count | None


class StepsByMode(Section):
    """``train.steps_by_mode``; a simulation has one step."""

    run: Count
    profile: Count


class Train(Section):
    """``train``."""

    steps: Count | None
    steps_by_mode: StepsByMode
    epochs: Annotated[float, Field(gt=0, le=MOST)] | None
    batch_size: Count
    gradient_accumulation: Count
    sequence_length: Length
    pad: Literal["longest", "fixed"]
    learning_rate: Positive
    minimum_learning_rate: NotNegative
    warmup_steps: Whole
    weight_decay: NotNegative
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    max_grad_norm: Positive | None
    precision: Literal["float32", "bf16_mixed", "bf16"]
    activation_checkpointing: bool
    init_rows: Count
    timing_warmup: Whole
    checkpoint_every: Count | None
    tuned: dict[str, Positive] | None = None


class Perplexity(Section):
    """``eval.perplexity``."""

    text: Text
    window: Length


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
    name: Place
    runs_root: Place
    cache_root: Place | None
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
        # A reference may fail because of another value: without adapter, or with an unknown mode.
        _check(Config, OmegaConf.to_container(cfg), resolved=False)
        raise _unresolved(cfg, error) from error
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


BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
LENGTHS = ("min_length", "max_length")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
         dict: "a mapping"}  # fmt: skip


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


def _check(schema: type[Section], config: dict[str, Any], resolved: bool = True) -> None:
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


def _unresolved(cfg: DictConfig, error: OmegaConfBaseException) -> BadInput:
    """One line for a reference to something that is not there."""
    key, value = str(error.full_key), OmegaConf.to_container(cfg)
    for name in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, dict | list):  # a text refers to what holds the key
            value = value[int(name)] if isinstance(value, list) else value.get(name)
    reason = str(error).partition("\n")[0].partition("raised while resolving interpolation: ")
    return BadInput(f"{key}={as_written(value)}: must refer to something that exists ({reason[2] or reason[0]})")


def _keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        for section in _sections(field.annotation):
            yield from _keys(section, f"{prefix}{name}.")


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
    if mode != "simulate" and train["epochs"] is None and train["steps"] <= train["warmup_steps"]:
        raise BadInput(f"train.warmup_steps={train['warmup_steps']}: must be below train.steps={train['steps']}")
    if model["name"] == "microworld" != model["path"]:
        raise BadInput(f"model.path={model['path']}: must be microworld here; model=hf takes the path of a model")
    if mode == "run" and model["layers"] is not None:
        raise BadInput(f"model.layers={model['layers']}: must be null in mode=run")
    if mode == "run" and data["kind"] != "microworld" and data["path"] is None:
        raise BadInput(f"data.path=null: must be a file or a name on the Hub for data.kind={data['kind']}")
    if mode == "run" and data["kind"] == "microworld" and data["path"] is not None:
        raise BadInput(
            f"data.path={data['path']}: must be null for data.kind=microworld; data=alpaca and data=text read it"
        )
    if data["kind"] == "text" and data["loss_on"] != "all":
        raise BadInput(f"data.loss_on={data['loss_on']}: must be all for data.kind=text, which has no answers")
    tasks, split = config["eval"]["tasks"], config["eval"].get("split", "test")
    twice = [task for number, task in enumerate(tasks) if task in tasks[:number]]
    if twice:
        raise BadInput(f"eval.tasks={as_written(tasks)}: must have each task once; {twice[0]} is there twice")
    foreign = [task for task in tasks if not task.startswith("microworld_")]
    if foreign and split != "test":
        raise BadInput(
            f"eval.split={split}: must be test for {foreign[0]}; only the tasks of the microworld have others"
        )
    _check_storage(config)
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        arguments = as_written(config["launch"]["arguments"])
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
