"""The models that a run starts from, dense and pruned, and their scores: what many runs share and only one
computes.

Pruned models lie in ``<cache>/pruned/<key>/``, scores of dense and pruned models in
``<cache>/scores/<key>.json``. The keys are hashes of what determines the content: of the weights themselves,
the calibration tokens, the tasks, and so on.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from harness.evaluate import evaluate
from harness.identity import digest, version_of, with_fingerprints
from harness.inputs import Inputs, model_source
from harness.method import PRECISIONS
from harness.pruned_cache import pruned_checkpoint
from harness.shared import made_once
from harness.store import cache_directory
from harness.weights import load_weights
from lors.blocks import decoder_linears
from lors.pruning import prune_model
from lors.sparsity import random_support

__all__ = ["Models", "default_device", "random_model"]

NO_ZERO = 1e-3

log = logging.getLogger("lors")


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU; CUDA_VISIBLE_DEVICES="" hides a GPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Models:
    """The dense and the pruned model of one run, and their cached scores.

    Args:
        cfg: A resolved config, mode=run.
        inputs: What ``read_inputs`` made of it.
    """

    def __init__(self, cfg: DictConfig, inputs: Inputs) -> None:
        self.cfg = cfg
        self.inputs = inputs
        self.dtype = PRECISIONS[cfg.train.precision].base
        self.cache = cache_directory(cfg)
        self.pruned_folder: Path | None = None  # None as long as nothing is pruned

    def dense(self, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """The model as it comes, on the device of the run; ``"auto"`` keeps the format of the file."""
        path, revision = model_source(self.cfg)
        return _load(path, dtype or self.dtype, revision)

    def prune(self) -> None:
        """Make sure that the pruned model is in the cache."""
        if self.cfg.prune.name != "none":
            self.pruned_folder = pruned_checkpoint(self.cache / "pruned", self.pruned_key, self._prune)

    def pruned(self) -> PreTrainedModel:
        """The model to fine-tune, in the ``base`` format of the precision; call ``prune`` first."""
        return self.dense() if self.pruned_folder is None else _load(str(self.pruned_folder), self.dtype)

    def scores(self, which: str, model: PreTrainedModel | None = None) -> dict[str, Any]:
        """Scores of the ``dense`` or the ``pruned`` model, from the cache if they were ever computed with
        this config.

        Args:
            which: dense or pruned.
            model: That model, if it is loaded already.
        """
        settings = {key: value for key, value in self.sources["eval"].items() if key not in ("name", "baselines")}
        key = digest(
            {
                "stages": {stage: version_of(stage) for stage in ("evaluate", "microworld")},
                "model": self.dense_key if which == "dense" else self.pruned_key,
                "eval": settings,
                "dtype": str(self.dtype),
                "device": default_device().type,
                "versions": [version(name) for name in ("torch", "transformers", "lm_eval")],
            }
        )

        def compute() -> dict[str, Any]:
            log.info("scores of the %s model: not in the cache, computed now", which)
            loaded = model if model is not None else self.dense() if which == "dense" else self.pruned()
            return evaluate(loaded, self.inputs.tokenizer, self.cfg.eval)

        return made_once(self.cache / "scores" / f"{key}.sealed", compute)

    @cached_property
    def sources(self) -> dict[str, Any]:
        """The config with fingerprints in place of paths; once, because it reads every byte of a local model."""
        return with_fingerprints(self.cfg)

    @cached_property
    def dense_key(self) -> str:
        return digest([self.sources["model"]["path"], self.sources["model"]["revision"]])

    @cached_property
    def pruned_key(self) -> str:
        """Key of the pruned model: the dense one, the pruner and its options, how much, the calibration."""
        if self.cfg.prune.name == "none":
            return self.dense_key
        tokens = self.inputs.calibration
        content = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        pruner = self.cfg.prune.name
        asked = [pruner, version_of(f"prune.{pruner}"), self._options(), self.cfg.sparsity, self.cfg.pattern]
        return digest([self.dense_key, *asked, content])

    def _options(self) -> dict[str, Any]:
        """The pruner's own options; the other fields of the group say what the calibration tokens are."""
        return {
            key: value
            for key, value in OmegaConf.to_container(self.cfg.prune).items()
            if key not in ("name", "samples", "sequence_length", "seed", "text")
        }

    def _prune(self) -> PreTrainedModel:
        model = self.dense("auto")
        calibration = self.inputs.calibration
        prune_model(
            model,
            self.cfg.prune.name,
            sparsity=self.cfg.sparsity,
            pattern=self.cfg.pattern,
            calibration=None if calibration is None else calibration.to(model.device),
            **self._options(),
        )
        return model


def random_model(
    shape: PretrainedConfig, dtype: torch.dtype, sparsity: float, pattern: str, seed: int
) -> PreTrainedModel:
    """A model with random weights and exactly this sparsity in its decoder linears, on the device of the run.

    It is made on the CPU, so that a seed means the same weights everywhere.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False).eval()
    if sparsity > 0:
        generator = torch.Generator().manual_seed(seed)
        for linear in tqdm(decoder_linears(model).values(), desc="random sparsity", unit="layer"):
            M = random_support(tuple(linear.weight.shape), sparsity, pattern, generator)  # out x in
            # A weight that was drawn as zero, as half precision does now and then, would count as pruned.
            linear.weight.data.masked_fill_(linear.weight == 0, NO_ZERO).mul_(M)
    return model.to(default_device())


def _load(path: str, dtype: torch.dtype | str, revision: str | None = None) -> PreTrainedModel:
    return load_weights(path, revision, shown=path, dtype=dtype).to(default_device()).eval()
