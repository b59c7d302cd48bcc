"""The fields of ``result.json``, and the numbers in it that are read off a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from harness.environment import environment
from harness.quantized import quantized_layout
from harness.sources import provenance, recorded
from lors.blocks import decoder_linears
from lors.sparse_layer import SparseLinear
from lors.storage import count_weights

__all__ = ["blank_result", "count_parameters", "held_out_loss"]

SCHEMA = 1


def blank_result(cfg: DictConfig, key: str, stages: Mapping[str, int], device: torch.device) -> dict[str, Any]:
    """The result of a run that has just begun: every field is there, what is not known yet is None."""
    memory = ("kind", "init_peak", "train_peak", "eval_peak", "reserved_peak", "breakdown", "process_rss_peak",
              "by_process")  # fmt: skip
    spans = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")
    return {
        "schema": SCHEMA,
        "key": key,
        "status": None,
        "error": None,
        "mode": cfg.mode,
        "method": cfg.method.name,
        "model": cfg.model.name,
        "pruner": _pruner(cfg),
        "pattern": cfg.pattern,
        "sparsity": cfg.sparsity or 0.0,
        "support": None,
        "seed": cfg.seed,
        # In tables too, results of two versions do not mix.
        "config": recorded(cfg) | ({"stages": dict(stages)} if stages else {}),
        "provenance": provenance(cfg),
        "environment": environment(device),
        "parameters": None,
        "end_state": None,
        "zeros": None,
        "memory": dict.fromkeys(memory),
        "time": {**dict.fromkeys(("warmup_steps", "steps", *spans, "tokens_per_second")), "phases": {}},
        "flops": dict.fromkeys(("per_step", "inference")),
        "loss": dict.fromkeys(("first", "last", "eval_before", "eval_after")),
        "eval": None,
        "baselines": {"dense": None, "pruned": None},
        "variants": {},
        "artifacts": {"config": "config.yaml", "log": "log.txt"}
        | dict.fromkeys(("steps", "base", "adapter", "merged")),
    }


def _pruner(cfg: DictConfig) -> str:
    """Name of the pruner, of what gave the blocks their sparsities, and of what has quantised the weights:
    ``wanda-owl-int4g64-gptq``, ``wanda-nf4g64``."""
    layout, quantizer = quantized_layout(cfg).replace("/", "g"), OmegaConf.select(cfg, "prune.quantize")
    parts = [cfg.prune.name, OmegaConf.select(cfg, "prune.layerwise"), layout]
    return "-".join(part for part in (*parts, quantizer if layout and quantizer != "nf4" else "") if part)


def count_parameters(model: nn.Module) -> dict[str, int | float | None]:
    """Parameters in all and trainable, the bytes of the trainable ones as they are saved, and the share of the weights
    of the decoder's linear layers that adapters of such layers are on; None without any."""
    # Factors of layers that a method does not train now, though they may ask for a gradient.
    idle = {
        id(getattr(layer, part)[name])
        for layer in model.modules()
        if isinstance(layer, SparseLinear)
        for name in layer.r
        if not layer.expects_gradient(name)
        for part in layer.adapter_layer_names
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in idle]
    layers = [part.get_base_layer() for part in model.modules() if isinstance(part, BaseTunerLayer)]
    adapted = {id(layer) for layer in layers if isinstance(layer, nn.Linear)}
    sizes = {id(layer): layer.in_features * layer.out_features for layer in decoder_linears(model).values()}
    return {
        "total": count_weights(model),
        "trainable": sum(parameter.numel() for parameter in trainable),
        "adapter_bytes": sum(parameter.nbytes for parameter in trainable),
        "adapted_share": sum(sizes[key] for key in adapted & sizes.keys()) / sum(sizes.values()) if adapted else None,
    }


def held_out_loss(scores: Mapping[str, Any] | None) -> float | None:
    """Mean negative log-likelihood per token of the held-out text, in nats."""
    return scores["perplexity"]["loss"] if scores and scores["perplexity"] else None
