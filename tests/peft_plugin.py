"""A pytest plugin that turns PEFT's own test files into tests of ``lors.LorsConfig``; loaded by ``peft_suite``.

PEFT's files give each test one list with the configs of all methods. Before pytest reads a list of that kind, LoRS's
entries take its place: those of LoRA and the other methods with what they say about the model (targets, modules to
save, scale), and without the options of a method that LoRS does not have. ``WRITTEN_WITH_LORA`` are tests of what every
method can do, in which LoRS takes LoRA's place. All other tests are deselected: they are about one method each, what it
alone has or the inside of its layers. No line of PEFT's files is changed or copied.

What differs from a run by PEFT itself:

- The config is ``LorsConfig`` with the switches by which PEFT's tests start with an update that is not zero, and with
  rank 2 instead of LoRA's 8: the smallest layer of the models has two outputs.
- The models are pruned to a half, or the masks would have nothing to do.
- The models of the Hub are those that ``write_models`` makes: the same architectures, tiny and random.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable
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

RANK, LORA_RANK = 2, LoraConfig().r
# Fields that mean the same in the config of every method.
SHARED_FIELDS = ("target_modules", "modules_to_save", "task_type", "bias")
# One case of the custom models, and one of each decoder model, is repeated with each of these.
OWN_FIELDS = ({"exact_gradient": True, "scaling": "alpha_over_r"}, {"storage": "bitmap"})
# A list with so many methods is one of all methods; a shorter one is of those with something that LoRS does not have.
MANY_METHODS = 5

# Tests that are written with LoRA, or run for LoRA only, and hold for LoRS as well.
WRITTEN_WITH_LORA = {
    # custom models
    "test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_adding_multiple_adapters_with_bias_raises",
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_delete_adapter_with_multiple_adapters_works",
    "test_existing_model_card",
    "test_multiple_adapters_mixed_modules_to_save_merging_adapters",
    "test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    "test_non_existing_model_card",
    "test_weight_bias_attributes",
    "test_mixed_adapter_batches_different_target_layers",
    "test_mixed_adapter_batches_disabled",
    "test_mixed_adapter_batches_length_mismatch_raises",
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "test_mixed_adapter_batches_merged_raises",
    "test_mixed_adapter_batches_mlp",
    "test_mixed_adapter_batches_multiple_modules_to_save",
    "test_mixed_adapter_batches_partly_overlapping_target_layers",
    "test_mixed_adapter_batches_training_mode_raises",
    "test_mixed_adapter_batches_unsupported_layer_raises",
    # decoder models
    "test_generate_with_mixed_adapter_batches",
    "test_mixed_adapter_batches",
}
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

    r: int = RANK
    lora_alpha: float = 4
    init_weights: bool = True
    init_lora_weights: bool = True
    target_parameters: ClassVar[None] = None  # read by tests of LoRA


class StartedLinear(lors.LorsLinear):
    """A LoRS layer that knows ``init_weights``."""

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """As LoRA's with ``init_lora_weights=False``: B uniform in +- 1 / sqrt(r), the start of any linear layer."""
        A, B = super().initial_factors(name)
        config = self.options[name]
        if isinstance(config, LorsConfig) and not (config.init_weights and config.init_lora_weights):
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


def lors_cases(values: list, module: types.ModuleType) -> list:
    """The entries of LoRS in place of those of other methods, each once."""
    linear_layers = functools.cache(lambda model_id: _linear_layers(module, model_id))
    cases: list = []
    for value in values:
        cases += [case for case in _lors_cases(value, linear_layers) if not any(_same(case, other) for other in cases)]
    return cases


def _lors_cases(value: Any, linear_layers: Callable[[str], set[str]]) -> list:
    """What becomes of one entry; nothing if there is nothing in it that LoRS can adapt."""
    match value:
        case type():
            return [LorsConfig]
        case LoraConfig():
            return [_lors_config(value)]
        case (name, *configs) if configs and all(isinstance(config, LoraConfig) for config in configs):
            return [(name, *map(_lors_config, configs))]
        case (method, dict() as options) if method is LoraConfig:  # a decoder model
            fields = _fields(options) | {name: options[name] for name in ("r", "lora_alpha")}
            return [(LorsConfig, fields), *((LorsConfig, fields | own) for own in OWN_FIELDS)]
        case (_, model_id, method, dict() as options):  # a custom model
            fields = _fields(options)
            targets = fields.get("target_modules") or []
            names = [targets] if isinstance(targets, str) else targets
            found = [name for name in names if name in linear_layers(model_id)]
            if not found:
                return []
            fields["target_modules"] = found[0] if isinstance(targets, str) else found
            if method is LoraConfig and "lora_alpha" in options:
                fields["lora_alpha"] = options["lora_alpha"] * RANK / LORA_RANK
            own = OWN_FIELDS if fields == {"target_modules": ["lin0", "lin1"]} else ()
            every = [fields, *(fields | each for each in own)]
            return [(_name(model_id, each), model_id, LorsConfig, each) for each in every]
        case (name, "lora", method, dict() as first, dict() as second) if method is LoraConfig:  # two on one MLP
            both = [_fields(options) | {"init_weights": False} for options in (first, second)]
            return [(name, "lora", LorsConfig, *both)] if all("target_modules" in each for each in both) else []
    return []


def _lors_config(config: LoraConfig) -> LorsConfig:
    fields = _fields({name: getattr(config, name) for name in SHARED_FIELDS})
    return LorsConfig(**fields, r=config.r * RANK // LORA_RANK, init_lora_weights=config.init_lora_weights)


def _fields(options: dict) -> dict:
    return {name: options[name] for name in SHARED_FIELDS if name in options}


def _name(model_id: str, fields: dict) -> str:
    return " ".join([model_id, *(f"{name}={value}" for name, value in fields.items())])


def _linear_layers(module: types.ModuleType, model_id: str) -> set[str]:
    model = module.MockTransformerWrapper.from_pretrained(model_id)
    return {name for name, layer in model.named_modules() if type(layer) is nn.Linear}


def _same(case: Any, other: Any) -> bool:
    """Whether two entries differ in nothing but their names."""
    named = isinstance(case, tuple) and isinstance(case[0], str)
    return case[1:] == other[1:] if named else case == other


def _methods(values: Any) -> set[type]:
    """The config classes that a list of parameters has."""
    found: set[type] = set()
    for value in values if isinstance(values, list) else []:
        for part in value if isinstance(value, tuple) else (value,):
            kind = part if isinstance(part, type) else type(part)
            if issubclass(kind, PeftConfig):
                found.add(kind)
    return found


def _is_ours(item: pytest.Function) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    of_a_method = _methods(list(parameters.values()))
    return LorsConfig in of_a_method or (not of_a_method and item.originalname in WRITTEN_WITH_LORA)


def cannot_apply(item: pytest.Function) -> str | None:
    """Why a test says nothing about LoRS."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "GPT2" in str(parameters.get("model_id")):
        return "the layers of GPT-2 are Conv1D, LoRS adapts linear layers"
    if "OPT" in str(parameters.get("model_id")) and "mixed_adapter_batches" in item.originalname:
        return "OPT puts all rows of a batch together before fc1; PEFT's LoRA refuses them there as well"
    if parameters.get("mixed") is True:
        return "PEFT's model of mixed methods takes a fixed list of its own methods"
    return None


class _AlwaysSeen(defaultdict):
    """PEFT's record of the models that it has fetched before, after which it stays offline."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="JSON file for the outcome of each test")


def pytest_configure(config: pytest.Config) -> None:
    PEFT_TYPE_TO_CONFIG_MAPPING["LORS"] = LorsConfig
    lors.LorsModel.tuner_layer_cls = StartedLinear
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


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
        ours = len(methods) >= MANY_METHODS or name in WRITTEN_WITH_LORA
        if LoraConfig in methods and ours and name not in ABOUT_LORA:
            values[:] = lors_cases(values, module)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = [item for item in items if _is_ours(item)]
    for item in items:
        reason = cannot_apply(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def lors_in_the_place_of_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests that ask whether the method is LoRA, or make a config of LoRA themselves."""
    if request.node.originalname in WRITTEN_WITH_LORA:
        for module in (request.module, sys.modules["tests.testing_common"]):
            monkeypatch.setattr(module, "LoraConfig", LorsConfig)


class Outcomes:
    """Writes the outcome of every test, with the reason of a skip and the traceback of a failure."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.reasons[report.nodeid] = report.longreprtext
        elif report.skipped:
            self.outcomes[report.nodeid] = "skipped"
            self.reasons[report.nodeid] = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
        elif report.when == "call":
            self.outcomes[report.nodeid] = "passed"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.pytest_runtest_logreport(report)

    def pytest_sessionfinish(self) -> None:
        if self.file:
            content = {**Counter(self.outcomes.values()), "outcomes": self.outcomes, "reasons": self.reasons}
            self.file.write_text(json.dumps(content, indent=1))
