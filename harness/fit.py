"""Whether a config fits the shape of a model and the memory of the machine, found without weights.

The model is built on the meta device and wrapped by the method there. A step that a CPU could only be killed by is
simulated first.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from harness.config import as_written, needs_calibration
from harness.construct import method_refusal
from harness.errors import BadInput, one_line
from harness.method import PRECISIONS, Method, tuner_config
from harness.simulate import simulate
from lors.blocks import decoder_linears
from lors.injection import check_names
from lors.sparsity import check_width

__all__ = ["available_memory", "check_fit", "check_memory", "reason"]

log = logging.getLogger("lors")

# A step is simulated if its logits alone, in float32 with their gradients, take this share of the memory.
WORTH_A_LOOK = 0.1
GIBIBYTE = 2**30
# What Python says of an argument that a function has already, or lacks.
UNFIT = re.compile("multiple values for|missing .* required|takes .* positional")
ROW_BYTES = 40  # of a token in a row that is made up: in a tensor, and as a number in a list
REASON = 200  # characters of what a library says


def reason(error: BaseException) -> str:
    """What an error of a library says, with its type, cut to what fits into a line."""
    text = f"{type(error).__name__}: {one_line(error)}"
    return text if len(text) <= REASON else f"{text[:REASON]}..."


def check_fit(cfg: DictConfig, method: Method, shape: PretrainedConfig) -> None:
    """Hold pattern, rank, targets, lengths and the options of the method against the shape of the model.

    Args:
        cfg: A resolved config.
        method: Its method.
        shape: The config of the model.

    Raises:
        BadInput: A shape that makes no causal language model, groups that do not divide a width, a rank above a
            layer's, targets that the model does not have, rows longer than its positions, or whatever else the
            method's tuner, its ``prepare`` or its optimizer refuses.
    """
    shown = f"model.path={cfg.model.path}" if cfg.mode == "run" else f"model={cfg.model.name}"
    _check_lengths(cfg, shape)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
        linears = decoder_linears(model)
    except Exception as error:  # whatever a model raises at such a config
        raise BadInput(f"{shown}: its config makes no model that can be used here ({reason(error)})") from error
    if not linears:
        raise BadInput(f"{shown}: its config makes a model without linear layers in decoder blocks")
    for name, linear in linears.items():
        try:
            check_width(cfg.pattern, linear.in_features)
        except ValueError as error:
            raise BadInput(f"{one_line(error)} of {name}") from error
    if method.peft is not None:
        model = _wrapped(cfg, method, model)
        _check_merges(method, model)
    _try_parts(cfg, method, model)


def _wrapped(cfg: DictConfig, method: Method, model: nn.Module) -> nn.Module:
    """The model with the adapter of the method, on the meta device."""
    rank, config = getattr(method.peft, "r", None), tuner_config(method, model)
    for name, linear in decoder_linears(model).items():
        smaller = min(linear.in_features, linear.out_features)
        if rank is not None and rank > smaller and check_target_module_exists(config, name):
            shape_text = f"{linear.out_features} x {linear.in_features}"
            raise method_refusal(cfg, ValueError(f"r={rank}: must be at most {smaller}; {name} is {shape_text}"))
    try:
        if config.target_modules is not None:
            check_names(config, model)  # PEFT's own tuners are content with one that matches
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the wrapping; the wrapping that counts comes later
            return get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except Exception as error:  # whatever a tuner raises at such a model
        raise method_refusal(cfg, error) from error


def _check_merges(method: Method, model: nn.Module) -> None:
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        if set(method.merges) != {"adapter"} and not hasattr(base, "weight"):
            merges = as_written(list(method.merges))
            raise BadInput(
                f"method.merges={merges}: must be [adapter]; {type(base).__name__} has no weight to merge into"
            )


def _try_parts(cfg: DictConfig, method: Method, model: nn.Module) -> None:
    """Call ``prepare`` and the optimizer on a model without values, to hear what they say of their arguments.

    ``prepare`` gets no batch, and it may need values: whatever else it says does not count.
    """
    for name, others in (("prepare", ((), 0)), ("optimizer", (cfg.train,))):
        part = getattr(method, name)
        if part is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                part(model, *others)
        except (TypeError, ValueError) as error:
            unknown = re.search("unexpected keyword argument '(.*)'", str(error))
            if unknown:
                raise BadInput(f"method.{name}.{unknown[1]}: no such key ({one_line(error)})") from error
            refused = method_refusal(cfg, error)
            if name == "optimizer" or not str(refused).startswith("method=") or UNFIT.search(str(error)):
                raise refused from error
        except Exception as error:
            log.debug("%s cannot be tried (%s)", name, one_line(error))


def check_memory(cfg: DictConfig, method: Method, shape: PretrainedConfig, rows: int) -> None:
    """Refuse what needs more memory than the machine has: the system would kill the process.

    What would lie on a GPU does not count; it says itself that it has no memory left.

    Args:
        cfg: A resolved config.
        method: Its method.
        shape: The config of the model.
        rows: Rows of the training data; no batch has more.

    Raises:
        BadInput: Random rows, calibration samples, or the simulated peak of a step are above what is free.
    """
    train, prune, free = cfg.train, cfg.prune, available_memory()
    text = shape.get_text_config()
    if cfg.mode == "profile":
        memory = rows * train.sequence_length * ROW_BYTES
        _refuse_above(free, f"train.batch_size={train.batch_size}", memory // train.steps, "the rows of a step")
        _refuse_above(free, f"train.steps={train.steps}", memory, "the rows of all steps")
    if torch.cuda.is_available():
        return
    if needs_calibration(prune.name):
        width = text.hidden_size * PRECISIONS[train.precision].base.itemsize
        states = prune.samples * prune.sequence_length * width
        _refuse_above(free, f"prune.samples={prune.samples}", states, "what they are at one layer")
    batch = min(train.batch_size, rows)
    logits = batch * train.sequence_length * text.vocab_size * 8
    if not method.trains or logits < WORTH_A_LOOK * free:
        return
    settings = {"train": {"batch_size": batch}, "simulate": {"device": "cpu", "shards": 1}}
    try:
        peak = simulate(OmegaConf.merge(cfg, settings), method, shape)["memory"]["train_peak"]
    except Exception as error:  # a method whose step needs values: the logits alone are a lower bound
        log.info("the step cannot be simulated (%s)", one_line(error))
        peak = logits
    what = f"a step of {batch} x {train.sequence_length} tokens"
    _refuse_above(free, f"train.batch_size={train.batch_size}", peak, what)


def _refuse_above(free: int, shown: str, needed: int, what: str) -> None:
    if needed > free:
        needs, has = (f"{amount / GIBIBYTE:,.1f} GiB" for amount in (needed, free))
        raise BadInput(f"{shown}: must be smaller; {what} would need {needs}, and {has} are free")


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
