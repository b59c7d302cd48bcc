"""The contract of a method, gradients: exact ones in float64, for every file of ``conf/method``.

A method is held against finite differences, which need to know nothing about it, and against plain autograd of its
formula if the table below has one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from contract import ADAPTERS, PARTIAL, TRAINED, batch, method_of, prune, trainable, trained
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from baselines.spp import scaled_weight
from lors.blocks import decoder_linears

# Methods whose training gradient is an estimate by design, and the option that makes it the exact one.
SURROGATE = {"lors": ["method.peft.exact_gradient=true"]}

# The effective weight of each PEFT type from W (out x in) and a wrapped layer, as its paper has it; and the bias, where
# it is changed too.
FORMULAS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "LORS": lambda W, L: W + (W != 0) * scaled_product(L, L.lors_A, L.lors_B),
    "LORA": lambda W, L: W + scaled_product(L, {"default": L.lora_A["default"].weight}, L.lora_B),
    "SPP": lambda W, L: W + L.scaling["default"] * scaled_weight(W, L.spp_w["default"], L.spp_c["default"]),
    "SQFT": lambda W, L: W + (W != 0) * scaled_product(L, L.sqft_A, L.sqft_B),
    "HIRA": lambda W, L: W * (1 + L.hira_B["default"] @ L.hira_A["default"]),
    "IA3": lambda W, L: W * L.ia3_l["default"],
    "SHIRA": lambda W, L: W.index_put(tuple(L.shira_indices["default"].long()), L.shira_weight["default"], True),
}
BIAS_FORMULAS = {"IA3": lambda b, L: b if L.is_feedforward else b * L.ia3_l["default"].flatten()}


def scaled_product(layer: nn.Module, A: nn.ParameterDict, B: nn.ParameterDict) -> Tensor:
    B = B["default"] if isinstance(B["default"], Tensor) else B["default"].weight
    return layer.scaling["default"] * B @ A["default"]


EXACT = [name for name in ADAPTERS if method_of(name).peft.peft_type.value in FORMULAS]


def float64_model(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A trained model in float64, with its exact gradient, and the pruned one that it came from.

    An OPT, because a Llama computes its norms in float32 whatever its type, and because OPT has biases.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    smooth = {"activation_function": "gelu", "dropout": 0.0}  # finite differences dislike a kink
    base = prune(OPTForCausalLM(OPTConfig(**shape, **smooth, vocab_size=64, word_embed_proj_dim=32)))
    for layer in decoder_linears(base).values():
        layer.bias.data.normal_(std=0.1)
    targets = "adapter.targets=[q_proj,k_proj,v_proj,out_proj,fc1,fc2]"
    method = method_of(name, targets, *SURROGATE.get(name.split()[0], []))
    return trained(method, copy.deepcopy(base)).double(), base.double()


def float64_loss(output: ModelOutput) -> Tensor:
    """The models' own losses cast to float32."""
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten())


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_agree_with_finite_differences_in_float64(name):
    """Of the whole model's loss, along a random direction among the changes that the method can make."""
    model, _ = float64_model(name)
    float64_loss(model(**batch())).backward()
    generator = torch.Generator().manual_seed(1)
    directions, slope = {}, 0.0
    for key, parameter in trainable(model).items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.grad is None and name in PARTIAL:
            continue
        directions[key] = direction * (parameter.grad != 0)  # full: a pruned weight cannot move
        slope += (directions[key] * parameter.grad).sum().item()

    @torch.no_grad()
    def loss_at(step: float) -> float:
        moved = {key: value + step * directions.get(key, 0) for key, value in trainable(model).items()}
        return float64_loss(functional_call(model, moved, kwargs=batch())).item()

    step = 1e-6
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_plain_autograd_of_the_formula_in_float64(name):
    """The pruned model with every weight replaced by its formula in the adapter's own parameters."""
    model, base = float64_model(name)
    kind = method_of(name).peft.peft_type.value
    layers = {key: layer for key, layer in model.get_base_model().named_modules() if isinstance(layer, BaseTunerLayer)}
    effective = {f"{key}.weight": FORMULAS[kind](layer.weight, layer) for key, layer in layers.items()}
    if kind in BIAS_FORMULAS:
        effective |= {f"{key}.bias": BIAS_FORMULAS[kind](layer.bias, layer) for key, layer in layers.items()}
    reference = functional_call(base, effective, kwargs=batch())

    parameters = list(trainable(model).values())
    expected = torch.autograd.grad(float64_loss(reference), parameters)
    output = model(**batch())
    torch.testing.assert_close(output.logits, reference.logits)
    for gradient, wanted in zip(torch.autograd.grad(float64_loss(output), parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
