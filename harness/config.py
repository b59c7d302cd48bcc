"""A composed config, checked before any work and made final.

`resolve` holds it against `config_schema.Config` and returns the config that the run uses. Two values that leave one of
them without effect are refused too, unless a sweep over methods or pruners needs them beside each other.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config_schema import Config, needs_calibration
from harness.errors import BadInput, one_line
from harness.identity import idle_options
from harness.launch import CHILD
from harness.processes import count
from harness.refusals import as_written, check_keys, refusal, unresolved
from harness.sources import locate
from lors.pruning.layerwise import check_layerwise
from lors.sparsity import parse_pattern, resolve_sparsity

__all__ = ["resolve"]

# In ``prune``.
QUANTIZATION = ("quantize", "bits", "group_size")
LAYERWISE = ("layerwise", "outlier_threshold", "sparsity_range")


def resolve(cfg: DictConfig, *, places: bool = True) -> DictConfig:
    """Check every value and return the config of the run: no interpolation, no open default, nothing ignored.

    What is decided here: the sparsity that the pattern implies, where something is pruned; ``train.epochs`` replaces
    ``train.steps``; nothing is pruned at sparsity 0, at random for a mere step; calibration text is that of
    the microworld for its own model and C4 for any other; a model without a name is called after its path; the cache is
    the user's own, ``lors`` below ``XDG_CACHE_HOME``; what has a snapshot is read from there (`sources.locate`).

    Args:
        cfg: A config as Hydra composes it.
        places: False leaves names on the Hub as they are, whether there is a snapshot or not.

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
        check_keys(Config, OmegaConf.to_container(cfg), resolved=False)
        raise unresolved(cfg, error) from error
    if missing:
        raise BadInput(f"{missing[0]}: must be given, as in {missing[0]}=VALUE")
    check_keys(Config, config)
    config["sparsity"] = _requested_sparsity(config)
    _check_together(config)
    if config["mode"] != "run":
        config["train"]["checkpoint_every"] = None
    if config["mode"] == "profile" or (config["mode"] == "simulate" and config["method"].get("trains", True)):
        config["prune"] = {"name": "random"} | _quantization(config)
    elif config["sparsity"] == 0 or config["prune"]["name"] == "none":
        config["prune"] = {"name": "none"}
    elif needs_calibration(config["prune"]["name"]) and config["prune"]["text"] is None:
        config["prune"]["text"] = "microworld" if config["model"]["path"] == "microworld" else "c4"
    if not _quantization(config):
        for name in QUANTIZATION:
            config["prune"].pop(name, None)
    if config["mode"] != "run" or config["prune"].get("layerwise", "none") == "none":
        for name in LAYERWISE:
            config["prune"].pop(name, None)
    elif config["prune"]["layerwise"] == "rmi":  # which knows no outliers
        config["prune"].pop("outlier_threshold", None)
    for name in idle_options(config["method"].get("peft") or {}):
        config["method"]["peft"].pop(name, None)
    if config["train"]["epochs"] is not None:
        config["train"]["steps"] = None
    if config["model"]["name"] is None:
        config["model"]["name"] = config["model"]["path"].rstrip("/").rpartition("/")[2]
    config["cache_root"] = str(Path(config["cache_root"] or _user_cache()).expanduser().absolute())
    config = {"data_root": None} | config
    config["model"] = {"wheel": None} | config["model"]
    if places:
        locate(config)
    return OmegaConf.create(config)


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
    formats = {"float32": ("float32",), "bf16_mixed": ("bfloat16", "float32"), "bf16": ("bfloat16",)}
    if model.get("dtype") not in (None, *formats[train["precision"]]):
        fitting = " or ".join(formats[train["precision"]])
        raise BadInput(f"model.dtype={model['dtype']}: must be {fitting} with train.precision={train['precision']}")
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
    _check_trackers(mode, train.get("report_to") or [])
    _check_storage(config)
    _check_quantization(config)
    _check_layerwise(config)
    _check_processes(config)


def _check_trackers(mode: str, names: list[str]) -> None:
    """Trackers that are not installed, or that would disturb what is measured."""
    given = f"train.report_to={as_written(names)}"
    if names and mode != "run":
        raise BadInput(f"{given}: must be null in mode={mode}; only mode=run has a training to report")
    for name in names:
        specification = find_spec(name)
        if specification is None or specification.origin is None:  # a folder wandb/ is no package
            raise BadInput(f"{given}: must be installed; {name} is not (pip install -e '.[bench,trackers]')")


def _check_storage(config: dict[str, Any]) -> None:
    """Compressed forms that only weights of an n:m pattern have."""
    peft, pattern = config["method"].get("peft") or {}, config["pattern"]
    if peft.get("storage") == "n:m" and parse_pattern(pattern) is None:
        raise BadInput(f"method.peft.storage=n:m: must be dense, bitmap or auto with pattern={pattern}")
    if peft.get("forward_product") == "2:4" and pattern != "2:4":
        raise BadInput(f"method.peft.forward_product=2:4: must be dense or auto with pattern={pattern}")


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """What ``prune`` says of quantised weights, if it asks for them."""
    prune = config["prune"]
    asked = prune.get("quantize", "none") != "none"
    return {name: prune[name] for name in QUANTIZATION if asked and name in prune}


def _check_quantization(config: dict[str, Any]) -> None:
    """Quantised weights where there are no pruned ones to make them of, or no method that can use them."""
    prune, mode, method = config["prune"], config["mode"], config["method"]
    if not _quantization(config):
        return
    given = f"prune.quantize={prune['quantize']}: must be"
    trains = method.get("trains", True)
    if mode == "run" and (prune["name"] == "none" or config["sparsity"] == 0):
        raise BadInput(f"{given} none where nothing is pruned (prune={prune['name']}, sparsity={config['sparsity']})")
    if prune.get("when") == "after":
        raise BadInput(f"{given} none with prune.when=after")
    if mode == "simulate" and not trains:
        raise BadInput(f"{given} none with mode=simulate method={method['name']}, which simulates the pruning alone")
    if mode == "run" and prune["quantize"] == "gptq" and not needs_calibration(prune["name"]):
        raise BadInput(f"{given} none, rtn or nf4 with prune={prune['name']}, which has no calibration text")
    if prune["quantize"] == "nf4" and prune["bits"] != 4:
        raise BadInput(f"prune.bits={prune['bits']}: must be 4 with prune.quantize=nf4")
    if prune["quantize"] == "nf4" and (method.get("peft") or {}).get("bits") is not None:
        raise BadInput(f"{given} rtn or gptq with method.peft.bits, whose grid is one of whole numbers")
    if trains and method.get("peft") is None:
        raise BadInput(f"{given} none with method={method['name']}, which trains the weights themselves")


def _check_layerwise(config: dict[str, Any]) -> None:
    """A sparsity of each block that cannot be had; where nothing is pruned, or at random, there is none."""
    prune, sparsity = config["prune"], config["sparsity"]
    if config["mode"] == "run" and sparsity and "layerwise" in prune:
        limits = {name: prune[name] for name in LAYERWISE[1:]}
        try:
            check_layerwise(prune["layerwise"], sparsity, config["pattern"], **limits)
        except ValueError as error:
            raise BadInput(f"prune.{one_line(error)}") from error


def _check_processes(config: dict[str, Any]) -> None:
    """How many processes there are to be, and what they can share out."""
    asked, rows = config["launch"]["processes"], config["train"]["batch_size"]
    if asked > 1 and config["mode"] == "simulate":
        raise BadInput(
            f"launch.processes={asked}: must be 1 in mode=simulate; simulate.shards says of how many it is one"
        )
    if rows % asked:
        raise BadInput(f"train.batch_size={rows}: must be a multiple of launch.processes={asked}, which share its rows")
    if config["launch"]["shard"] and asked == 1:
        raise BadInput("launch.shard=true: must be false for one process (launch.processes=1)")
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise BadInput("launch.arguments: must not ask Accelerate for FSDP or DeepSpeed; launch.shard=true shards")
    started = CHILD in os.environ or "WORLD_SIZE" in os.environ or not config["launch"]["arguments"]
    if started and asked != count():
        raise BadInput(f"launch.processes={asked}: must be {count()}, the processes that there are (WORLD_SIZE)")
    gpus = torch.cuda.device_count()
    if 0 < gpus < int(os.environ.get("LOCAL_WORLD_SIZE", asked)):
        raise BadInput(
            f"launch.processes={asked}: must be at most {gpus}, the GPUs of this machine; CUDA_VISIBLE_DEVICES= hides "
            "them"
        )


def _user_cache() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lors")


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
