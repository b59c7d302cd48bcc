"""The methods of ``conf/method`` as the contract tests see them: built, adapted to a small pruned model and trained."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import compose_config, make_tiny_llama
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.method import Method, adapt
from lors.blocks import decoder_linears
from lors.sparse_tuner import SparseTunerModel
from lors.sparsity import random_support

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
# Every way to keep the frozen weights counts as a method: a file and a field of its PEFT config.
STORED = ["lors storage=bitmap", "lors storage=n:m"]
NAMES = FILES + STORED
R, ALPHA = 4, 6  # alpha / r is not 1, so a scale that is forgotten anywhere shows


@functools.cache
def composed(name: str) -> DictConfig:
    """The config of a job as run.py composes it."""
    return compose_config(f"method={name.split()[0]}", f"adapter.r={R}", f"adapter.alpha={ALPHA}")


@functools.cache
def method_of(name: str, *overrides: str) -> Method:
    """The method of a file under overrides as on a command line. Shared: a test must not change it."""
    config = composed(name).copy()
    fields = [f"method.peft.{field}" for field in name.split()[1:]]
    config.merge_with_dotlist([*fields, *overrides])  # refuses a key that the file does not have
    return instantiate(config.method, _convert_="all")


def having(wanted: Callable[[Method], bool]) -> list[str]:
    """Names of the methods of a kind; instantiating a method needs no model."""
    return [name for name in NAMES if wanted(method_of(name))]


TRAINED = having(lambda method: method.trains)
ADAPTERS = having(lambda method: method.peft is not None)
# Adapters of single linear layers, which all but a side network are.
LAYERWISE = having(lambda method: method.peft is not None and method.merges != ("adapter",))
# Our own tuners over linear layers, which promise more than PEFT's.
OWN = having(
    lambda method: (
        method.peft is not None and issubclass(PEFT_TYPE_TO_TUNER_MAPPING[method.peft.peft_type], SparseTunerModel)
    )
)
# And these without the mask as well: another forward pass.
FORMS = [*OWN, *(f"{name} keep_zeros=false" for name in OWN if "keep_zeros" in composed(name).method.peft)]
# Methods that start from another function than the pruned model, as published.
ELSEWHERE = {"sherl"}
# Methods that train a part of their layers at a time: a factor may have no gradient for a while.
PARTIAL = {"xgblora", "reconstruct_lors"}
# Methods to which adapter.r and adapter.alpha do not apply: a booster is of rank 1, at a scale of its own.
OWN_RANK, OWN_ALPHA = {"xgblora": 1}, {"xgblora": 2}


def pruned(pattern: str = "unstructured", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small Llama with half of its decoder weights zero, the same at every call; so are random numbers after it."""
    model, state = _pruned(pattern, dtype)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _pruned(pattern: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    model = make_tiny_llama().to(dtype)
    model.config.dtype = dtype
    return prune(model, pattern), torch.get_rng_state()


def prune(model: PreTrainedModel, pattern: str = "unstructured") -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for layer in decoder_linears(model).values():
        layer.weight.data.mul_(random_support(tuple(layer.weight.shape), 0.5, pattern, generator))
    return model


ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
]


def batch(count: int = 4) -> dict[str, Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in ROWS[:count]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(method: Method, model: PreTrainedModel, precision: str = "float32") -> nn.Module:
    """Adapt and take two large steps; at the first one the factor opposite a zero factor does not move yet."""
    adapted = adapt(method, model, [batch()], precision=precision).train()
    if method.trains:
        optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=3e-2, weight_decay=0.01)
        for _ in range(2):
            adapted(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return adapted.eval()


def ready(name: str, dtype: torch.dtype = torch.float32, pattern: str = "unstructured") -> nn.Module:
    """The small pruned model after two steps of a method, the same at every call; so are random numbers after it."""
    model, state = _ready(name, dtype, pattern)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _ready(name: str, dtype: torch.dtype, pattern: str) -> tuple[nn.Module, Tensor]:
    precision = "bf16" if dtype == torch.bfloat16 else "float32"
    return trained(method_of(name), pruned(pattern, dtype), precision), torch.get_rng_state()


def adapted_layer(name: str, linear: nn.Linear, *overrides: str) -> nn.Module:
    """A linear layer with an adapter whose parameters are not those of its start."""
    config = copy.deepcopy(method_of(name, "adapter.targets=[q_proj]", *overrides).peft)
    config.task_type = None  # one layer is not a language model
    layer = get_peft_model(nn.ModuleDict({"q_proj": linear}), config).base_model.model["q_proj"]
    for parameter in trainable(layer).values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return layer


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=batch()["input_ids"]).logits
