"""Whether a config fits the shape of a model and the memory of the machine, found without weights.

The model is built on the meta device and wrapped by the method there. A step that a CPU could only be killed by is
simulated first.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM, PretrainedConfig

from lors.blocks import decoder_linears
from lors.harness.errors import BadInput, one_line
from lors.harness.method import Method, tuner_config
from lors.harness.simulate import simulate
from lors.injection import check_names
from lors.sparsity import check_width

__all__ = ["available_memory", "check_fit", "check_memory"]

log = logging.getLogger(__name__)

# A step is simulated if its logits alone, in float32 with their gradients, take this share of the memory.
WORTH_A_LOOK = 0.1
GIBIBYTE = 2**30


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
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
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
    except Exception as error:  # whatever a tuner raises at such a model
        raise BadInput(f"method={cfg.method.name}: {one_line(error)}") from error


def check_memory(cfg: DictConfig, method: Method, shape: PretrainedConfig, rows: int) -> None:
    """Refuse a training step on a CPU that needs more memory than there is: the system would kill the process.

    Args:
        cfg: A resolved config.
        method: Its method.
        shape: The config of the model.
        rows: Rows of the training data; no batch has more.

    Raises:
        BadInput: The simulated peak is above what is free.
    """
    train, free = cfg.train, available_memory()
    batch = min(train.batch_size, rows)
    logits = batch * train.sequence_length * shape.get_text_config().vocab_size * 8
    if not method.trains or logits < WORTH_A_LOOK * free:
        return
    settings = {"train": {"batch_size": batch}, "simulate": {"device": "cpu", "shards": 1}}
    try:
        peak = simulate(OmegaConf.merge(cfg, settings), method, shape)["memory"]["train_peak"]
    except Exception as error:  # a method whose step needs values: the logits alone are a lower bound
        log.info("the step cannot be simulated (%s)", one_line(error))
        peak = logits
    if peak > free:
        raise BadInput(
            f"train.batch_size={train.batch_size}: must be smaller; a step of {batch} x {train.sequence_length} tokens "
            f"needs {peak / GIBIBYTE:,.0f} GiB, and {free / GIBIBYTE:,.0f} GiB are free"
        )


def available_memory() -> int:
    """Bytes that this process can still get: of the machine, or of its control group if that has less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _check_lengths(cfg: DictConfig, shape: PretrainedConfig) -> None:
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    for key in ("train.sequence_length", "prune.sequence_length", "eval.perplexity.window"):
        length = OmegaConf.select(cfg, key)
        if positions is not None and length is not None and length > positions:
            raise BadInput(f"{key}={length}: must be at most {positions}, the positions of model={cfg.model.name}")
