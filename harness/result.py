"""The fields of ``result.json``, and the numbers in it that are read off a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from harness.environment import environment
from harness.identity import raised_versions
from harness.method import Method
from lors.blocks import decoder_linears
from lors.sparse_tuner import SparseLinear
from lors.sparsity import zero_report
from lors.storage import count_weights

__all__ = ["blank_result", "check_zeros", "count_parameters", "held_out_loss"]

SCHEMA = 1


def blank_result(cfg: DictConfig, key: str, device: torch.device) -> dict[str, Any]:
    """The result of a run that has just begun: every field is there, what is not known yet is None."""
    memory = ("kind", "init_peak", "train_peak", "eval_peak", "reserved_peak", "breakdown", "process_rss_peak")
    stages = raised_versions(cfg.mode, cfg.prune.name)  # in tables too, results of two versions do not mix
    spans = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")
    return {
        "schema": SCHEMA,
        "key": key,
        "status": None,
        "error": None,
        "mode": cfg.mode,
        "method": cfg.method.name,
        "model": cfg.model.name,
        "pruner": cfg.prune.name,
        "pattern": cfg.pattern,
        "sparsity": cfg.sparsity or 0.0,
        "support": None,
        "seed": cfg.seed,
        "config": OmegaConf.to_container(cfg, resolve=True) | ({"stages": stages} if stages else {}),
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
        "artifacts": {
            "config": "config.yaml",
            "log": "log.txt",
            "steps": None,
            "adapter": None,
            "merged": None,
        },
    }


def check_zeros(
    result: Mapping[str, Any], method: Method, variant: str, model: nn.Module, supports: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Zeros before and after the fine-tuning.

    Args:
        result: ``sparsity`` and ``pattern`` of the run.
        method: The method.
        variant: The end state that ``model`` is in.
        model: The fine-tuned model.
        supports: M of every decoder linear before the fine-tuning.

    Returns:
        ``requested`` and what ``lors.sparsity.zero_report`` returns; ``mergeable`` says that the model is merged and
        every zero is kept. Beside an unmerged adapter there is nothing to count after the merge: None.

    Raises:
        RuntimeError: The merge of a method that keeps zeros has lost some.
    """
    report = zero_report(supports, model, result["pattern"])
    if variant == "adapter":
        report |= {"after_merge": None, "lost": None, "gained": None}
    kept = report["lost"] == 0
    if variant == "merged" and method.keeps_zeros and not kept:
        raise RuntimeError(f"method {method.name} has keeps_zeros: true and lost {report['lost']} zeros in its merge")
    return {"requested": result["sparsity"], **report, "mergeable": kept}


def count_parameters(model: nn.Module) -> dict[str, int | float | None]:
    """Numbers in the model and trainable ones, the bytes of the trainable ones as they are saved, and the share of the
    weights of the decoder's linear layers that adapters of such layers are on; None without any."""
    idle = {id(factor) for factor in _idle_factors(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in idle]
    return {
        "total": count_weights(model),
        "trainable": sum(parameter.numel() for parameter in trainable),
        "adapter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trainable),
        "adapted_share": _adapted_share(model),
    }


def _idle_factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Factors of layers that a method does not train now, though they may ask for a gradient."""
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            for name in layer.r:
                if not layer.expects_gradient(name):
                    yield from (getattr(layer, part)[name] for part in layer.adapter_layer_names)


def _adapted_share(model: nn.Module) -> float | None:
    layers = [part.get_base_layer() for part in model.modules() if isinstance(part, BaseTunerLayer)]
    adapted = {id(layer) for layer in layers if isinstance(layer, nn.Linear)}
    sizes = {id(layer): layer.in_features * layer.out_features for layer in decoder_linears(model).values()}
    return sum(sizes[key] for key in adapted & sizes.keys()) / sum(sizes.values()) if adapted else None


def held_out_loss(scores: Mapping[str, Any] | None) -> float | None:
    """Mean negative log-likelihood per token of the held-out text, in nats."""
    return scores["perplexity"]["loss"] if scores and scores["perplexity"] else None
