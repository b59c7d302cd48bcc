"""Whether a config fits the shape of a model and the memory of the machine, found without weights.

The model is built on the meta device and wrapped by the method there. A step that a CPU could only be killed by is
simulated first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from harness.config_schema import needs_calibration
from harness.errors import BadInput, one_line
from harness.method import Method, tuner_config
from harness.method_from_config import method_refusal
from harness.quantized import hold_empty, quantized_layout
from harness.simulate import simulate
from harness.weights import base_format
from lors.blocks import decoder_linears
from lors.experts import expert_names, experts_as_linears
from lors.injection import check_names
from lors.sparsity import check_width

__all__ = ["available_memory", "check_fit", "check_memory", "reason"]

log = logging.getLogger("lors")

# A step is simulated if its logits alone, in float32 with their gradients, take this share of the memory.
SIMULATED_FROM = 0.1
GIBIBYTE = 2**30
ROW_BYTES = 40  # of a token in a row that is made up: in a tensor, and as a number in a list
REASON = 200  # characters of what a library says
# PEFT type -> why its step cannot be run without values.
NEEDS_VALUES = {
    "SHIRA": "torch has no backward pass of sparse tensors without them",
}
Need = tuple[str, int, str]  # a key with its value, bytes, and what the bytes are of


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
            layer's, targets that the model does not have, rows longer than its positions, more calibration samples than
            the memory takes, a method that cannot be simulated, or whatever else the method's tuner or its ``prepare``
            refuses.
    """
    if OmegaConf.select(cfg, "prune.when") == "after" and method.merges[0] != "merged":
        raise BadInput(
            f"prune.when=after: method={method.name} leaves its adapter beside the weights; must be one that merges"
        )
    if cfg.mode == "run" and method.reads_dense and OmegaConf.select(cfg, "prune.when") != "before":
        raise BadInput(
            f"method={method.name}: needs the dense model beside the pruned one: must have a pruner, prune.when=before"
        )
    if cfg.save_base and method.prunes:
        raise BadInput(f"save_base=true: must be false for method={method.name}, whose zeros are made in the training")
    shown = f"model.path={cfg.model.path}" if cfg.mode == "run" else f"model={cfg.model.name}"
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    for key in ("train.sequence_length", "prune.sequence_length", "eval.perplexity.window"):
        length = OmegaConf.select(cfg, key)
        if positions is not None and length is not None and length > positions:
            raise BadInput(f"{key}={length}: must be at most {positions}, the positions of model={cfg.model.name}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
        linears = decoder_linears(model)
    except Exception as error:  # whatever a model raises at such a config
        raise BadInput(f"{shown}: its config makes no model that can be used here ({reason(error)})") from error
    layout = quantized_layout(cfg)
    if layout:
        try:
            hold_empty(model, layout)
        except ValueError as error:
            raise BadInput(f"prune.quantize={cfg.prune.quantize}: {one_line(error)}") from error
    if not linears:
        raise BadInput(f"{shown}: its config makes a model without linear layers in decoder blocks")
    if cfg.mode == "simulate":
        _check_simulated(cfg, method)
        if not method.trains and any(expert_names(part) for part in model.modules()):
            raise BadInput(
                f"{shown}: must be a model without experts if its pruning is simulated (method={method.name})"
            )
    if cfg.mode == "run" and needs_calibration(cfg.prune.name) and not torch.cuda.is_available():
        width = shape.get_text_config().hidden_size * base_format(cfg).itemsize
        states = cfg.prune.samples * cfg.prune.sequence_length * width
        _refuse_above_free([(f"prune.samples={cfg.prune.samples}", states, "what they are at one layer")])
    if method.trains:
        try:
            with experts_as_linears(model):
                _check_adapter(method, model, linears)
        except Exception as error:  # whatever a tuner or a method raises at such a model
            raise method_refusal(cfg, error) from error
    for name, linear in linears.items():
        try:
            check_width(cfg.pattern, linear.in_features)
        except ValueError as error:
            raise BadInput(f"{one_line(error)} of {name}") from error


def _check_simulated(cfg: DictConfig, method: Method) -> None:
    """Refuse what cannot run on fake tensors.

    Raises:
        BadInput: Nothing is trained or pruned, or the step of the method needs values.
    """
    if not method.trains and cfg.prune.name == "none":
        raise BadInput(f"method={method.name}: must be one that trains in mode=simulate if nothing is pruned")
    reason = None if method.peft is None else NEEDS_VALUES.get(method.peft.peft_type.value)
    if reason is not None:
        raise BadInput(f"method={method.name}: must be one whose step needs no values in mode=simulate; {reason}")


def _check_adapter(method: Method, model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Wrap the model, on the meta device, and let the method set itself up.

    Raises:
        ValueError: Rank, targets or end states do not fit; or whatever the tuner or the method raises.
    """
    if method.peft is None:
        method.prepare(model, None, 0)
        return
    rank, config = getattr(method.peft, "r", None), tuner_config(method, model)
    for name, linear in linears.items():
        smaller = min(linear.in_features, linear.out_features)
        if rank is not None and rank > smaller and check_target_module_exists(config, name):
            shape_text = f"{linear.out_features} x {linear.in_features}"
            raise ValueError(f"r={rank}: must be at most {smaller}; {name} is {shape_text}")
    if config.target_modules is not None:
        check_names(config, model)  # PEFT's own tuners are content with one that matches
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the wrapping; the wrapping that counts comes later
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    bases = [module.get_base_layer() for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    other = next((type(base).__name__ for base in bases if not hasattr(base, "weight")), None)
    if other is not None and set(method.merges) != {"adapter"}:
        merges = ", ".join(method.merges)
        raise ValueError(f"method.merges=[{merges}]: must be [adapter]; {other} has no weight to merge into")
    method.prepare(adapted, None, 0)


def check_memory(cfg: DictConfig, method: Method, shape: PretrainedConfig, rows: int) -> None:
    """Refuse what needs more memory than the machine has: the system would kill the process.

    What would lie on a GPU does not count; it says itself that it has no memory left.

    Args:
        cfg: A resolved config.
        method: Its method.
        shape: The config of the model.
        rows: Rows of the training data; no batch has more.

    Raises:
        BadInput: Random rows, or the simulated peak of a step, are above what is free.
    """
    _refuse_above_free(_needs(cfg, method, shape, rows))


def _refuse_above_free(needs: Iterable[Need]) -> None:
    free = available_memory()
    for shown, needed, what in needs:
        if needed > free:
            wanted, has = (f"{amount / GIBIBYTE:,.1f} GiB" for amount in (needed, free))
            raise BadInput(f"{shown}: must be smaller; {what} would need {wanted}, and {has} are free")


def _needs(cfg: DictConfig, method: Method, shape: PretrainedConfig, rows: int) -> Iterator[Need]:
    """What needs memory, the cheapest to find first."""
    train, text = cfg.train, shape.get_text_config()
    if cfg.mode == "profile":
        memory = rows * train.sequence_length * ROW_BYTES
        yield f"train.batch_size={train.batch_size}", memory // train.steps, "the rows of a step"
        yield f"train.steps={train.steps}", memory, "the rows of all steps"
    if torch.cuda.is_available():
        return
    batch = min(train.batch_size, rows)
    logits = batch * train.sequence_length * text.vocab_size * 8
    if not method.trains or logits < SIMULATED_FROM * available_memory():
        return
    settings = {"train": {"batch_size": batch}, "simulate": {"device": "cpu", "shards": 1}}
    try:
        peak = simulate(OmegaConf.merge(cfg, settings), method, shape)["memory"]["train_peak"]
    except Exception as error:  # a method whose step needs values: the logits alone are a lower bound
        log.info("the step cannot be simulated (%s)", one_line(error))
        peak = logits
    yield f"train.batch_size={train.batch_size}", peak, f"a step of {batch} x {train.sequence_length} tokens"


def available_memory() -> int:
    """Bytes that this process can still get: of the machine, or of its control group if that has less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
