"""A pytest plugin that turns PEFT's own test files into tests of ``lors.LorsConfig``; loaded by ``test_peft_suite``.

PEFT's files give each test one list with the configs of all methods. Before pytest reads a list of that kind, LoRS's
entries take its place. All other tests are deselected: most are about one method each, what it alone has or the inside
of its layers. No line of PEFT's files is changed or copied.

What differs from a run by PEFT itself:

- The config is ``LorsConfig`` with the switch by which PEFT's tests start with an update that is not zero.
- The models are pruned to a half, or the masks would have nothing to do.
- The models of the Hub are those that ``write_models`` makes: the same architectures, tiny and random.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

# PEFT's files import diffusers for the tests of images, which are not among ours.
if importlib.util.find_spec("diffusers") is None:
    stand_in = types.ModuleType("diffusers")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stand_in

import pytest
import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

import lors

# Beyond the defaults of LorsConfig, each with custom models and decoder models.
OWN_FIELDS = ({"exact_gradient": True, "scaling": "alpha_over_r"}, {"storage": "bitmap"})
# Custom models of PEFT's tests, and the fields of the config for them.
CUSTOM = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    *(("MLP", {"target_modules": ["lin0", "lin1"]} | fields) for fields in OWN_FIELDS),
    ("Conv2d", {"target_modules": ["lin0"]}),
    ("MHA", {"target_modules": ["lin0"]}),
]
# A list with so many methods is one of all methods; a shorter one is of those with something that LoRS does not have.
MANY_METHODS = 5

# These have the list of many methods and look at LoRA alone, by the names of its parameters.
ABOUT_LORA = {"test_add_weighted_adapter_cat_with_rank_pattern"}

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, PretrainedConfig] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(
        **SMALL, **SPECIAL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(**GPT, **SPECIAL),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": GPTJConfig(**GPT, **SPECIAL, rotary_dim=4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**GROUPED, **SPECIAL),
    "peft-internal-testing/tiny-dummy-qwen2": Qwen2Config(**GROUPED, **SPECIAL),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(**GROUPED, **SPECIAL, head_dim=8),
}


@dataclass
class LorsConfig(lors.LorsConfig):
    """LoRS as PEFT's tests want a method."""

    r: int = 2  # not LoRA's 8: the smallest layer of the models has two outputs
    lora_alpha: float = 4
    init_weights: bool = True
    target_parameters: ClassVar[None] = None  # read by tests of LoRA


class StartedLinear(lors.LorsLinear):
    """A LoRS layer that knows ``init_weights``."""

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """As LoRA's where it is not to start with nothing: B uniform in +- 1 / sqrt(r), as of any linear layer."""
        A, B = super().initial_factors(name)
        config = self.options[name]
        if isinstance(config, LorsConfig) and not config.init_weights:
            nn.init.uniform_(B, -(self.r[name] ** -0.5), self.r[name] ** -0.5)
        return A, B


def prune(model: nn.Module) -> nn.Module:
    """Set the smaller half of the weights of every linear layer, but the head, to zero."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for part in model.modules():
        if type(part) is nn.Linear and part is not head:
            magnitude = part.weight.detach().abs().float()
            part.weight.data[magnitude < magnitude.median()] = 0
    return model


def write_models(folder: Path) -> None:
    """Write ``MODELS`` into ``folder`` as a cache of the Hub, from which they load offline and by name."""
    revision = "0" * 40
    for seed, (name, config) in enumerate(MODELS.items()):
        entry = folder / f"models--{name.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(revision)
        torch.manual_seed(seed)
        prune(AutoModelForCausalLM.from_config(config)).save_pretrained(entry / "snapshots" / revision)


def lors_cases(values: list) -> list:
    """LoRS's entries in place of those of other methods: a list of classes, of decoder models or of custom models."""
    match next(value for value in values if LoraConfig in _methods([value])):
        case type():
            return [LorsConfig]
        case (_, dict()):
            return [(LorsConfig, {"task_type": "CAUSAL_LM"} | fields) for fields in ({}, *OWN_FIELDS)]
        case (_, _, _, dict()):
            return [(f"{model_id} {fields}", model_id, LorsConfig, fields) for model_id, fields in CUSTOM]
    return []


def _methods(values: Any) -> set[type]:
    """The config classes that a list of parameters has."""
    found: set[type] = set()
    for value in values if isinstance(values, list) else []:
        for part in value if isinstance(value, tuple) else (value,):
            kind = part if isinstance(part, type) else type(part)
            if issubclass(kind, PeftConfig):
                found.add(kind)
    return found


def cannot_apply(item: pytest.Function) -> str | None:
    """Why a test says nothing about LoRS."""
    parameters = item.callspec.params
    if "GPT2" in str(parameters.get("model_id")):
        return "the layers of GPT-2 are Conv1D, LoRS adapts linear layers"
    if parameters.get("mixed") is True:
        return "PEFT's model of mixed methods takes a fixed list of its own methods"
    return None


class _AlwaysSeen(defaultdict):
    """PEFT's record of the models that it has fetched before, after which it stays offline."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_configure(config: pytest.Config) -> None:
    write_models(Path(os.environ["HF_HUB_CACHE"]))
    PEFT_TYPE_TO_CONFIG_MAPPING["LORS"] = LorsConfig
    lors.LorsModel.tuner_layer_cls = StartedLinear


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put LoRS's entries into the very lists that the marks of PEFT's tests point to."""
    module, name = metafunc.module, metafunc.function.__name__
    if not hasattr(module, "_lors"):
        module._lors = True
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _AlwaysSeen(int)
        if hasattr(module, "MockTransformerWrapper"):
            load = module.MockTransformerWrapper.from_pretrained
            module.MockTransformerWrapper.from_pretrained = lambda *args, **kwargs: prune(load(*args, **kwargs))
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1]
        methods = _methods(values)
        if LoraConfig in methods and len(methods) >= MANY_METHODS and name not in ABOUT_LORA:
            values[:] = lors_cases(values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    items[:] = [
        item for item in items if hasattr(item, "callspec") and LorsConfig in _methods([*item.callspec.params.values()])
    ]
    for item in items:
        reason = cannot_apply(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
