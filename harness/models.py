"""The models that a run starts from, dense and pruned, and their scores: what many runs share and only one
computes.

Pruned models lie in ``<cache>/pruned/<key>/``, scores of dense and pruned models in
``<cache>/scores/<key>.json``. The keys are hashes of what determines the content: of the weights themselves,
the calibration tokens, the tasks, and so on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from harness.bfloat16_products import bfloat16_products
from harness.environment import default_device
from harness.evaluate import commits_of_tasks, evaluate
from harness.identity import digest, version_of
from harness.inputs import Inputs, Source
from harness.processes import from_first
from harness.quantized import quantized_layout
from harness.sealed_file import computed_once
from harness.sealed_folder import sealed_once
from harness.shards import home, placed
from harness.sources import provenance
from harness.weights import base_format, load_weights
from lors.pruning import prune_model, quantize_model
from lors.quantized_file import save_quantized

__all__ = ["Models", "pruner_options"]

log = logging.getLogger("lors")


def pruner_options(cfg: DictConfig) -> dict[str, Any]:
    """The pruner's own options; the other fields of the group say what the calibration tokens are, and what follows."""
    others = ("name", "samples", "sequence_length", "seed", "text", "when", "quantize", "bits", "group_size")
    return {key: value for key, value in OmegaConf.to_container(cfg.prune).items() if key not in others}


class Models:
    """The dense and the pruned model of one run, and their cached scores.

    Args:
        cfg: A resolved config, mode=run.
        inputs: What ``read_inputs`` made of it.
    """

    def __init__(self, cfg: DictConfig, inputs: Inputs) -> None:
        self.cfg = cfg
        self.inputs = inputs
        self.dtype = base_format(cfg)
        self.home = home(cfg)
        self.cache = Path(cfg.cache_root)

    def pruned(self) -> Source:
        """Where the model to fine-tune is: the dense one, or the pruned one, made unless it is in the cache."""
        log.info("the model is %s", json.dumps(provenance(self.cfg)["model.path"]))
        if not self._prunes_first:
            return self.inputs.source
        folder = from_first(lambda: sealed_once(self.cache / "pruned", self.pruned_key, self._pruned, save_quantized))
        return Source(str(folder), None, str(folder), folder, self.inputs.source.options)

    def dense(self, dtype: torch.dtype | str, device: torch.device | None = None) -> PreTrainedModel:
        """The model as it comes, on a device, by default that of the run; ``"auto"`` keeps the format of the file."""
        source = self.inputs.source
        options = {"dtype": dtype, "device": device or self.home, **source.options}
        return load_weights(source.path, source.revision, shown=source.shown, **options)

    def _pruned(self) -> PreTrainedModel:
        # One block at a time is on the device, which may be too small for the model.
        model = self.dense("auto", torch.device("cpu"))
        with bfloat16_products(default_device(), model.dtype is torch.bfloat16):  # whatever the fine-tuning is in
            self.prune(model)
            if quantized_layout(self.cfg):
                prune, tokens = self.cfg.prune, self.inputs.calibration
                quantize_model(
                    model,
                    prune.quantize,
                    bits=prune.bits,
                    group=prune.group_size,
                    calibration=None if tokens is None else tokens.to(model.device),
                    device=default_device(),
                )
        return model

    def baselines(self, model: PreTrainedModel, sparsity: float) -> dict[str, Any]:
        """Scores of the pruned model and of what it was made from, which of one that comes sparse nobody knows; of one
        that is pruned after its fine-tuning there is no pruned model.

        Args:
            model: The pruned model.
            sparsity: Its share of zeros.

        Returns:
            ``pruned`` and ``dense``: see `evaluate.evaluate`; either may be None.
        """
        dense = partial(self.dense, self.dtype) if self._prunes_first else lambda: model
        loaders = {"dense": dense, "pruned": lambda: model}
        if self.cfg.prune.name != "none":
            scored = ["dense", "pruned"] if self._prunes_first else ["dense"]
        else:
            scored = ["dense", "pruned"] if sparsity == 0 else ["pruned"]
        return dict.fromkeys(loaders) | {which: self._scores(which, loaders[which]) for which in scored}

    def _scores(self, which: str, load: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """Scores of the ``dense`` or the ``pruned`` model, from the cache if they were ever computed with this
        config."""
        fingerprinted = self.inputs.fingerprinted["eval"]
        settings = {key: value for key, value in fingerprinted.items() if key not in ("name", "baselines")}
        commits = commits_of_tasks(self.cfg.eval.tasks)
        text = provenance(self.cfg).get("eval.perplexity.text", {})
        commits |= {"text": text["revision"]} if text.get("source") == "wikitext" and text.get("revision") else {}
        key = digest(
            {
                "stages": {stage: version_of(stage) for stage in ("evaluate", "microworld")},
                "model": self.dense_key if which == "dense" else self.pruned_key,
                "eval": settings | ({"held_out": digest(self.inputs.held_out)} if self.inputs.held_out else {}),
                "dtype": str(self.dtype),
                **({"commits": commits} if commits else {}),
                "device": default_device().type,
                "versions": [version(name) for name in ("torch", "transformers", "lm_eval")],
            }
        )

        def compute() -> dict[str, Any]:
            log.info("scores of the %s model: not in the cache, computed now", which)
            model = placed(load(), self.cfg)
            return evaluate(model, self.inputs.tokenizer, self.cfg.eval, self.inputs.windows, self.inputs.held_out)

        return computed_once(self.cache / "scores" / f"{key}.sealed", compute)

    @cached_property
    def dense_key(self) -> str:
        model, attention = self.inputs.fingerprinted["model"], self.inputs.source.options.get("attn_implementation")
        return digest([model["path"], model["revision"]] + ([attention] if attention else []))

    @cached_property
    def pruned_key(self) -> str:
        """Key of the pruned model: the dense one, the pruner and its options, how much, the calibration, the bits."""
        if self.cfg.prune.name == "none":
            return self.dense_key
        tokens = self.inputs.calibration
        content = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        pruner = self.cfg.prune.name
        asked = [pruner, version_of(f"prune.{pruner}"), pruner_options(self.cfg), self.cfg.sparsity, self.cfg.pattern]
        layout, layerwise = quantized_layout(self.cfg), OmegaConf.select(self.cfg, "prune.layerwise")
        if layerwise:
            asked += [version_of(f"layerwise.{layerwise}")]
        if layout:
            asked += [self.cfg.prune.quantize, version_of(f"quantize.{self.cfg.prune.quantize}"), layout]
        return digest([self.dense_key, *asked, content])

    @property
    def _prunes_first(self) -> bool:
        return self.cfg.prune.name != "none" and self.cfg.prune.when == "before"

    def prune(self, model: PreTrainedModel) -> PreTrainedModel:
        """Prune a model in place."""
        calibration = self.inputs.calibration
        prune_model(
            model,
            self.cfg.prune.name,
            sparsity=self.cfg.sparsity,
            pattern=self.cfg.pattern,
            calibration=None if calibration is None else calibration.to(model.device),
            device=default_device(),
            **pruner_options(self.cfg),
        )
        return model
