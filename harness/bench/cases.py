"""What the benchmark runs: one linear, one decoder block and one whole step of each variant, on the same weights.

A variant is a method of ``conf/method`` and, for LoRS, how the merged weight T = W + M (.) (s B A) is made:

===============  ============================================================================================
frozen           the pruned model without adapter: the floor
lora             W and its adapter apart, the zeros are lost
lors_three_pass  the formula as published: a product into T, a comparison, a product with the mask
lors             one pass over W (``lors.kernels``)
lors_compressed  the same, W kept packed (``lors.storage``)
lors_exact       lors with the mask in the gradients of A and B
lors_quarter     the same, sampled from a quarter of the tokens (``lors.gradients``)
lors_eighth      from an eighth
lors_2_4         lors with the faster forward product, dense or 2:4; only on a GPU and with --pattern 2:4
sqft, sqft_gc    SparsePEFT, plain and checkpointed
spp, spp_gc      SPP, plain and checkpointed
===============  ============================================================================================

All variants share one set of frozen weights, except the packed ones. What is trained is filled with small random
numbers, because zeros could be faster than they are in a training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import lors.functional
from harness.live_memory import LiveTensors, training_step
from harness.method import PRECISIONS, Method, adapt
from harness.recipe import batch_loss
from harness.weights import random_model
from lors.blocks import decoder_blocks
from lors.kernels import AUTO, SEMI_STRUCTURED, PackedWeight, decode
from lors.storage import CompressedLinear

__all__ = ["LEVELS", "VARIANTS", "Case", "Setting", "build", "shape_of", "three_pass_merge"]

CONF = Path(__file__).resolve().parents[2] / "conf"
FROZEN = "frozen"
# Variant -> method, fields of its PEFT config.
VARIANTS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    FROZEN: ("none", {}),
    "lora": ("lora", {}),
    "lors_three_pass": ("lors", {}),
    "lors": ("lors", {}),
    "lors_compressed": ("lors", {"storage": "auto"}),
    "lors_exact": ("lors", {"gradient": "exact"}),
    "lors_quarter": ("lors", {"gradient": "sampled", "gradient_share": 0.25}),
    "lors_eighth": ("lors", {"gradient": "sampled", "gradient_share": 0.125}),
    "lors_2_4": ("lors", {"forward_product": AUTO}),
    "sqft": ("sqft", {}),
    "sqft_gc": ("sqft_gc", {}),
    "spp": ("spp", {}),
    "spp_gc": ("spp_gc", {}),
}
LEVELS = ("merge", "linear", "block", "step")
# The merge alone exists only where one weight is made out of W, A and B.
MERGES = ("lors_three_pass", "lors", "lors_compressed")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Llama-2's feed-forward width over its width, 11008 / 4096, and the width of its heads.
FEED_FORWARD, HEAD = 2.6875, 128


@dataclass(frozen=True)
class Setting:
    """What all variants have in common.

    Attributes:
        shape: Config of the model; its ``num_hidden_layers`` are those of the whole step.
        tokens: Rows of the input of a linear, length of the one sequence of a block and of a step.
        r: Rank of every adapter.
        precision: A key of ``PRECISIONS``.
        sparsity: Fraction of zeros.
    """

    shape: PretrainedConfig
    tokens: int
    r: int
    precision: str
    pattern: str
    sparsity: float
    device: torch.device

    @property
    def autocast(self) -> bool:
        """Whether matrix products run in bfloat16 autocast."""
        return PRECISIONS[self.precision].autocast


@dataclass(frozen=True)
class Case:
    """Something to time: ``run()`` is one call, forward and backward (a merge: forward alone)."""

    level: str
    variant: str
    run: Callable[[], None]


def shape_of(width: int, layers: int, vocabulary: int, model: str | None = None) -> PretrainedConfig:
    """A Llama of this width, or the shape of a model of ``conf/model``, with so many decoder blocks.

    Raises:
        ValueError: No such model, or a width that its heads do not divide.
    """
    if model is not None:
        loaded = {file.stem: OmegaConf.load(file) for file in sorted((CONF / "model").glob("*.yaml"))}
        shapes = {name: config.shape for name, config in loaded.items() if config.get("shape")}
        if model not in shapes:
            raise ValueError(f"--model {model}: must be one of {', '.join(shapes)}")
        config = AutoConfig.for_model(**OmegaConf.to_container(shapes[model]))
        config.num_hidden_layers = layers
        return config
    if width < HEAD or width % HEAD:
        raise ValueError(f"--width {width}: must be a multiple of {HEAD}, the width of a head")
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=int(width * FEED_FORWARD),
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        vocab_size=vocabulary,
        max_position_embeddings=2**17,
    )


def build(setting: Setting, levels: list[str], variants: list[str], seed: int = 0) -> list[Case]:
    """All cases, level by level; without those that the setting does not have."""
    if setting.device.type != "cuda" or setting.pattern != SEMI_STRUCTURED:
        variants = [variant for variant in variants if variant != "lors_2_4"]
    dtype = PRECISIONS[setting.precision].base
    base = random_model(setting.shape, dtype, setting.sparsity, setting.pattern, seed).to(setting.device)
    adapted = {variant: _adapted(base, setting, variant) for variant in variants}
    makers = {"merge": _merge, "linear": _linear, "block": _block, "step": _step}
    cases = []
    for level in levels:
        for variant in variants if level != "merge" else [variant for variant in variants if variant in MERGES]:
            run = makers[level](*adapted[variant], setting)
            if variant == "lors_three_pass":
                run = mock.patch.object(lors.functional, "merge", three_pass_merge)(run)
            cases.append(Case(level, variant, run))
    return cases


def three_pass_merge(weight: PackedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """T as the published code makes it: write T, write M, read both to write T again. Arguments as `kernels.merge`."""
    W = decode(weight)
    T = torch.addmm(W.to(dtype), B.to(dtype), A.to(dtype), alpha=scaling)
    return T.mul_(W != 0)


def _adapted(base: nn.Module, setting: Setting, variant: str) -> tuple[Method, nn.Module]:
    """The method of a variant and a copy of the model that shares its weights, wrapped."""
    name, options = VARIANTS[variant]
    config = OmegaConf.create({"seed": 0, "adapter": {"r": setting.r, "alpha": setting.r, "targets": TARGETS}})
    config.method = OmegaConf.load(CONF / "method" / f"{name}.yaml")
    for field, value in options.items():
        config.method.peft[field] = value
    method = instantiate(config.method, _convert_="all")
    shared = {id(weight): weight for weight in base.parameters()}
    model = adapt(method, copy.deepcopy(base, shared), precision=setting.precision)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 100)
    return method, model.train()


def _merge(method: Method, model: nn.Module, setting: Setting) -> Callable[[], None]:
    """T of the output projection of attention, in the compute type."""
    layer = _projection(model)
    base = layer.get_base_layer()
    W = base.packed if isinstance(base, CompressedLinear) else base.weight
    A, B, scaling = layer.lors_A["default"], layer.lors_B["default"], layer.scaling["default"]
    dtype = torch.bfloat16 if setting.autocast else None
    return lambda: lors.functional.merged_weight(W, A, B, scaling, dtype)


def _linear(method: Method, model: nn.Module, setting: Setting) -> Callable[[], None]:
    """The output projection of attention, width x width."""
    return _forward_and_backward(model, _projection(model), _hidden(setting), setting)


def _block(method: Method, model: nn.Module, setting: Setting) -> Callable[[], None]:
    """The first decoder block."""
    x = _hidden(setting).unsqueeze(0)
    inner = (model.get_base_model() if isinstance(model, PeftModel) else model).model
    angles = inner.rotary_emb(x, torch.arange(setting.tokens, device=setting.device).unsqueeze(0))
    return _forward_and_backward(model, partial(_first_block(model), position_embeddings=angles), x, setting)


def _step(method: Method, model: nn.Module, setting: Setting) -> Callable[[], None]:
    """A whole training step: embedding to loss and back, clipping, optimizer."""
    tokens = torch.randint(setting.shape.vocab_size, (1, setting.tokens), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(setting.device)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if method.trains:
        adamw = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0}
        recipe = SimpleNamespace(**adamw, max_grad_norm=1.0, gradient_accumulation=1, precision=setting.precision)
        optimizer = method.optimizer(model, recipe)
        # A ledger that is not entered counts nothing.
        return lambda: training_step(model, batch, optimizer, method, recipe, LiveTensors())
    # What every adapter needs: the gradients of the first projections, not that of the embedding.
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = _first_block(model).self_attn.get_submodule(name)
        projection.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return lambda: batch_loss(model, batch, autocast=setting.autocast).backward()


def _forward_and_backward(
    model: nn.Module, layer: Callable[[Tensor], Tensor], x: Tensor, setting: Setting
) -> Callable[[], None]:
    """One pass forward and one back, with a given gradient of the output and that of the input."""
    cleared = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    G = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)

    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=setting.autocast):
            y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(G.to(y.dtype))
        for tensor in cleared:
            tensor.grad = None

    return run


def _hidden(setting: Setting) -> Tensor:
    """Input of a linear, tokens x width; asks for its gradient, as inside of a network."""
    x = torch.randn(setting.tokens, setting.shape.hidden_size, generator=torch.Generator().manual_seed(2))
    dtype = torch.bfloat16 if setting.autocast else PRECISIONS[setting.precision].base
    return x.to(setting.device, dtype).requires_grad_()


def _projection(model: nn.Module) -> nn.Module:
    return _first_block(model).self_attn.o_proj


def _first_block(model: nn.Module) -> nn.Module:
    return decoder_blocks(model)[1][0]
