"""Checks of the config, before any model is loaded: one clear line with the key, the value and what is
allowed.

``resolve`` checks the values and returns the config that the run uses; ``check_fit`` holds the method and the
pattern against the shape of the model, which it builds on the meta device, without memory and without
weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from transformers import AutoModelForCausalLM, PretrainedConfig

from lors.blocks import decoder_linears
from lors.harness.method import PRECISIONS, Method, tuner_config
from lors.injection import check_names
from lors.prune import PRUNERS
from lors.sparsity import check_width, parse_pattern, resolve_sparsity

__all__ = ["BadInput", "build_method", "check_fit", "needs_calibration", "one_line", "resolve"]


class BadInput(ValueError):  # noqa: N818 - named for what happened
    """A value that the user has to change; the message is one line that names it and says what is allowed."""


@dataclass(frozen=True)
class Rule:
    """What is allowed for a key: in words, and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
    return Rule("one of " + ", ".join(choices), lambda value: value in choices)


def whole(minimum: int) -> Rule:
    return Rule(f"a whole number >= {minimum}", lambda value: _is_whole(value) and value >= minimum)


def number(text: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(f"a number {text}", lambda value: _is_number(value) and holds(value))


def or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or null", lambda value: value is None or rule.holds(value))


def either(first: Rule, second: Rule) -> Rule:
    return Rule(f"{first.allowed}, or {second.allowed}", lambda value: first.holds(value) or second.holds(value))


def list_of(rule: Rule, minimum: int = 0) -> Rule:
    size = "a list" if minimum == 0 else "a non-empty list"
    return Rule(
        f"{size}, each entry {rule.allowed}",
        lambda value: isinstance(value, list) and len(value) >= minimum and all(map(rule.holds, value)),
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and value != "")
MAPPING = Rule("a mapping", lambda value: isinstance(value, dict))
POSITIVE = number("> 0", lambda value: value > 0)
NOT_NEGATIVE = number(">= 0", lambda value: value >= 0)

# Sparsity and pattern are checked by lors.sparsity, the fields of method.peft by the method's own config. A
# key that the chosen option of its group does not have is not checked.
RULES: dict[str, Rule] = {
    "mode": one_of("run", "profile", "simulate"),
    "seed": whole(0),
    "force": FLAG,
    "only": or_null(one_of("failed", "missing")),
    "name": TEXT,
    "runs_root": TEXT,
    "cache_root": or_null(TEXT),
    "save_merged": FLAG,
    "adapter.r": whole(1),
    "adapter.alpha": POSITIVE,
    "adapter.targets": either(one_of(INCLUDE_LINEAR_LAYERS_SHORTHAND), list_of(TEXT, minimum=1)),
    "method.init_rows": or_null(whole(1)),
    "method.max_grad_norm": or_null(NOT_NEGATIVE),
    "model.name": or_null(TEXT),
    "model.path": TEXT,
    "model.revision": or_null(TEXT),
    "model.layers": or_null(whole(1)),
    "model.shape": or_null(MAPPING),
    "prune.name": one_of("none", *PRUNERS),
    "prune.samples": whole(0),
    "prune.sequence_length": whole(0),
    "prune.seed": whole(0),
    "prune.text": or_null(TEXT),
    "data.kind": one_of("microworld", "instruction", "text"),
    "data.path": or_null(TEXT),
    "data.split": TEXT,
    "data.loss_on": one_of("all", "answer"),
    "data.template": or_null(one_of("alpaca")),
    "data.limit": or_null(whole(1)),
    "train.steps": whole(1),
    "train.epochs": or_null(POSITIVE),
    "train.batch_size": whole(1),
    "train.gradient_accumulation": whole(1),
    "train.sequence_length": whole(2),
    "train.pad": one_of("longest", "fixed"),
    "train.learning_rate": POSITIVE,
    "train.minimum_learning_rate": NOT_NEGATIVE,
    "train.warmup_steps": whole(0),
    "train.weight_decay": NOT_NEGATIVE,
    "train.betas": list_of(number("with 0 <= x < 1", lambda value: 0 <= value < 1), minimum=1),
    "train.max_grad_norm": or_null(POSITIVE),
    "train.precision": one_of(*PRECISIONS),
    "train.activation_checkpointing": FLAG,
    "train.init_rows": whole(1),
    "train.timing_warmup": whole(0),
    "train.checkpoint_every": or_null(whole(1)),
    "eval.tasks": list_of(TEXT),
    "eval.data_root": or_null(TEXT),
    "eval.limit": or_null(whole(1)),
    "eval.batch_size": whole(1),
    "eval.add_bos_token": FLAG,
    "eval.baselines": FLAG,
    "eval.split": one_of("test", "validation"),
    "eval.perplexity": or_null(MAPPING),
    "eval.perplexity.text": TEXT,
    "eval.perplexity.window": whole(2),
    "launch.arguments": list_of(TEXT),
    "simulate.device": one_of("cuda", "cpu"),
    "simulate.shards": whole(1),
}


def resolve(cfg: DictConfig) -> DictConfig:
    """Check every value and return the config of the run: no interpolation, no open default, nothing ignored.

    What is decided here: the sparsity that the pattern implies; ``train.epochs`` replaces ``train.steps``;
    nothing is pruned at sparsity 0, and at random outside of mode=run; calibration text is that of the microworld
    for its own model and C4 for any other; a model without a name is called after its path.

    Raises:
        BadInput: The first value that is not allowed.
    """
    _check("mode", cfg.mode)
    if cfg.mode == "simulate":
        cfg = OmegaConf.merge(cfg, {"train": {"steps": 1, "epochs": None}})  # all steps cost the same
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise BadInput(one_line(error)) from error
    if missing:
        raise BadInput(f"{missing[0]}: must be given, as in {missing[0]}=VALUE")
    for key, value in _flat(config):
        if key in RULES:
            _check(key, value)
    _check_together(config)
    config["sparsity"] = _requested_sparsity(config)
    if config["mode"] != "run":
        config["prune"] = {"name": "random"}
    elif config["sparsity"] == 0:
        config["prune"] = {"name": "none"}
    elif needs_calibration(config["prune"]["name"]) and config["prune"]["text"] is None:
        config["prune"]["text"] = "microworld" if config["model"]["path"] == "microworld" else "c4"
    if config["train"]["epochs"] is not None:
        config["train"]["steps"] = None
    if config["mode"] != "run":
        config["train"]["checkpoint_every"] = None
    if config["model"]["name"] is None:
        config["model"]["name"] = config["model"]["path"].rstrip("/").rpartition("/")[2]
    return OmegaConf.create(config)


def needs_calibration(pruner: str) -> bool:
    """Whether a pruner looks at activations, hence at calibration tokens."""
    return pruner in PRUNERS and PRUNERS[pruner][1] is not None


def build_method(cfg: DictConfig) -> Method:
    """The method of a resolved config.

    Raises:
        BadInput: Its config does not accept one of the values.
    """
    try:
        return instantiate(cfg.method, _convert_="all")
    except (InstantiationException, ValueError, TypeError) as error:
        reason = error.__cause__ or error
        raise BadInput(f"method={cfg.method.name}: {one_line(reason)}") from error


def check_fit(cfg: DictConfig, method: Method, shape: PretrainedConfig) -> None:
    """Hold pattern, rank, targets and lengths against the shape of the model.

    Args:
        cfg: A resolved config.
        method: Its method.
        shape: The config of the model.

    Raises:
        BadInput: Groups that do not divide a width, a rank above a layer's, targets that the model does not
            have, rows longer than its positions, or whatever else the method's tuner refuses.
    """
    _check_lengths(cfg, shape)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
        linears = decoder_linears(model)
    except ValueError as error:
        raise BadInput(f"model={cfg.model.name}: {one_line(error)}") from error
    for name, linear in linears.items():
        try:
            check_width(cfg.pattern, linear.in_features)
        except ValueError as error:
            raise BadInput(f"{one_line(error)} of {name}") from error
    if method.peft is None:
        return
    rank, config = getattr(method.peft, "r", None), tuner_config(method, model)
    for name, linear in linears.items():
        smaller = min(linear.in_features, linear.out_features)
        if rank is not None and rank > smaller and check_target_module_exists(config, name):
            shape_text = f"{linear.out_features} x {linear.in_features}"
            raise BadInput(f"adapter.r={rank}: must be at most {smaller}, because {name} is {shape_text}")
    try:
        if config.target_modules is not None:
            check_names(config, model)  # PEFT's own tuners are content with one that matches
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the wrapping; the wrapping that counts comes later
            get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except ValueError as error:
        raise BadInput(f"method={cfg.method.name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, mappings themselves included."""
    for name, value in config.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def _check(key: str, value: Any) -> None:
    rule = RULES[key]
    if not rule.holds(value):
        raise BadInput(f"{key}={'null' if value is None else value}: must be {rule.allowed}")


def _check_together(config: dict[str, Any]) -> None:
    """Values that are allowed one by one and contradict each other."""
    train, data, model = config["train"], config["data"], config["model"]
    rate, floor = train["learning_rate"], train["minimum_learning_rate"]
    if floor > rate:
        raise BadInput(f"train.minimum_learning_rate={floor}: must be at most train.learning_rate={rate}")
    if len(train["betas"]) != 2:
        raise BadInput(f"train.betas={train['betas']}: must be two numbers")
    if config["mode"] == "profile" and train["epochs"] is not None:
        raise BadInput(
            f"train.epochs={train['epochs']}: must be null in mode=profile, which has no data; use train.steps"
        )
    if config["mode"] == "run" and model["layers"] is not None:
        raise BadInput(f"model.layers={model['layers']}: must be null in mode=run")
    if config["mode"] == "run" and data["kind"] != "microworld" and data["path"] is None:
        raise BadInput(f"data.path=null: must be a file or a name on the Hub for data.kind={data['kind']}")
    if needs_calibration(config["prune"]["name"]) and config["mode"] == "run":
        for key, minimum in (("samples", 1), ("sequence_length", 2)):
            value = config["prune"][key]
            if value < minimum:
                pruner = config["prune"]["name"]
                raise BadInput(f"prune.{key}={value}: must be a whole number >= {minimum} for prune={pruner}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1:
        raise BadInput(f"launch.arguments={config['launch']['arguments']}: must start one process, not {processes}")


def _requested_sparsity(config: dict[str, Any]) -> float:
    """The sparsity that is asked for: that of the pattern, the given one, or 0 without a pruner."""
    sparsity, pattern, pruner = config["sparsity"], config["pattern"], config["prune"]["name"]
    try:
        if sparsity == 0 and parse_pattern(pattern) is None:
            return 0.0
        if pruner == "none" and sparsity is None:
            return 0.0
        requested = resolve_sparsity(sparsity, pattern)
    except ValueError as error:
        raise BadInput(one_line(error)) from error
    if pruner == "none" and requested and config["mode"] == "run":
        raise BadInput(f"sparsity={sparsity}: must be 0 or left out with prune=none")
    return requested


def _check_lengths(cfg: DictConfig, shape: PretrainedConfig) -> None:
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    for key in ("train.sequence_length", "prune.sequence_length", "eval.perplexity.window"):
        length = OmegaConf.select(cfg, key)
        if positions is not None and length is not None and length > positions:
            raise BadInput(f"{key}={length}: must be at most {positions}, the positions of model={cfg.model.name}")
