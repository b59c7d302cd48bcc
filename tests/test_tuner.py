"""LoRS as a PEFT tuner: configuration, targets and the forward pass."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from pruned_models import IDS, adapted_model, logits, lors_layers, pruned_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lors

# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scaling", "alpha"),
        ("init", "pissa"),
        ("bias", "lora_only"),
        ("exact_gradient", "yes"),
        ("r", 0),
        ("r", 4.0),
        ("r", True),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": None}),
        ("layers_pattern", "layers"),
    ],
)
def test_bad_values_are_one_clear_line(field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        lors.LorsConfig(**{field: value})
    assert "\n" not in str(error.value)
    assert field in str(error.value)
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    assert repr(shown) in str(error.value)


def test_config_survives_saving(tmp_path: Path) -> None:
    config = lors.LorsConfig(r=3, lora_alpha=5, scaling="alpha_over_r", init="kaiming", exact_gradient=True, bias="all")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is lors.LorsConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded.peft_type is PeftType.LORS
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize(("scaling", "scale"), [("rank_stabilized", 3 / 2), ("alpha_over_r", 3 / 4)])
def test_scale(scaling: str, scale: float) -> None:
    """The output is that of the base with W + s * M (.) (B A), computed here from the parts."""
    model = adapted_model(scaling=scaling)
    expected = pruned_model()
    with torch.no_grad():
        for name, layer in lors_layers(model).items():
            weight = expected.get_submodule(name.removeprefix("base_model.model.")).weight
            update = scale * (layer.lors_B["default"] @ layer.lors_A["default"]) * (weight != 0)
            torch.testing.assert_close(layer.delta_weight(weight, "default"), update)
            weight.add_(update)
    torch.testing.assert_close(logits(model), logits(expected))


def test_rank_and_alpha_patterns() -> None:
    model = adapted_model(rank_pattern={"q_proj": 2, r"layers\.1\..*down_proj": 9}, alpha_pattern={"q_proj": 7})
    for name, layer in lors_layers(model).items():
        r = 2 if name.endswith("q_proj") else 9 if name.endswith("1.mlp.down_proj") else 4
        assert layer.lors_A["default"].shape == (r, layer.in_features)
        assert layer.lors_B["default"].shape == (layer.out_features, r)
        assert layer.scaling["default"] == (7 if name.endswith("q_proj") else 3) / r**0.5
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize(
    ("options", "count", "sample"),
    [
        ({}, 14, "layers.0.mlp.up_proj"),
        ({"target_modules": "all-linear"}, 14, "layers.1.self_attn.o_proj"),
        ({"target_modules": None}, 14, "layers.0.mlp.up_proj"),
        ({"target_modules": ["q_proj", "down_proj"]}, 4, "layers.1.mlp.down_proj"),
        ({"target_modules": r".*\.1\..*(up|gate)_proj"}, 2, "layers.1.mlp.gate_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1, "layers.1.self_attn.q_proj"),
        ({"layers_to_transform": [1]}, 7, "layers.1.mlp.up_proj"),
        ({"exclude_modules": ["q_proj", "k_proj"]}, 10, "layers.0.self_attn.v_proj"),
        ({"target_modules": ["lm_head"]}, 1, "lm_head"),
    ],
)
def test_targets(options: dict, count: int, sample: str) -> None:
    """The default is every linear layer but the output head; only the targets' adapters are trainable."""
    model = adapted_model(**options)
    layers = lors_layers(model)
    assert len(layers) == count
    assert any(name.endswith(sample) for name in layers)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lors_{factor}.default" for name in layers for factor in "AB"}


def test_targets_that_cannot_be_adapted_are_named_and_leave_the_model_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = pruned_model()
    model.model.layers[0].mlp.up_proj = Doubled(32, 40)
    model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(torch.ones(40, 32, dtype=torch.int8), requires_grad=False)
    before = [type(module) for module in model.modules()]
    for target, message in {
        "embed_tokens": "'model.embed_tokens' is of type Embedding",
        "input_layernorm": "LlamaRMSNorm",
        "up_proj": "Doubled",
        "gate_proj": "int8",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            get_peft_model(model, lors.LorsConfig(r=4, target_modules=["q_proj", target]))
        assert "\n" not in str(error.value)
        assert [type(module) for module in model.modules()] == before


def test_convolutional_linear_of_gpt2_is_refused() -> None:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, **ends))
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn' is of type Conv1D"):
        get_peft_model(model, lors.LorsConfig(r=4))


def test_layer_of_another_method_is_refused() -> None:
    model = get_peft_model(pruned_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match=r"has an adapter of another method, peft\.tuners\.lora"),
    ):
        get_peft_model(model.base_model.model, lors.LorsConfig(r=4, target_modules=["q_proj"]))


def test_rank_above_a_side_names_rank_and_layer() -> None:
    """k_proj is 32 -> 16."""
    model = pruned_model()
    for options in ({"r": 17}, {"r": 4, "rank_pattern": {"k_proj": 17}}):
        with pytest.raises(ValueError, match=r"r=17: larger than a side of '.*k_proj' \(32 -> 16\)"):
            get_peft_model(model, lors.LorsConfig(target_modules=["q_proj", "k_proj"], **options))
    assert not lors_layers(model)
    assert lors_layers(get_peft_model(model, lors.LorsConfig(r=16)))


# The forward pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_pruned_model_bit_for_bit(dtype: torch.dtype) -> None:
    before = logits(pruned_model(dtype))
    model = get_peft_model(pruned_model(dtype), lors.LorsConfig(r=4), autocast_adapter_dtype=False)
    assert torch.equal(logits(model), before)


def test_kaiming_start_has_the_bound_of_lora() -> None:
    layer = lors_layers(get_peft_model(pruned_model(), lors.LorsConfig(r=16)))[
        "base_model.model.model.layers.0.mlp.up_proj"
    ]
    bound = 32**-0.5
    assert not layer.lors_B["default"].any()
    assert 0.9 * bound < layer.lors_A["default"].abs().max() <= bound


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype_follows_peft(autocast: bool) -> None:
    model = get_peft_model(pruned_model(torch.bfloat16), lors.LorsConfig(r=4), autocast_adapter_dtype=autocast)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert logits(model).dtype is torch.bfloat16


def test_disabled_adapter_is_the_base_bit_for_bit() -> None:
    model, base = adapted_model(), logits(pruned_model())
    adapted = logits(model)
    assert not torch.allclose(adapted, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapted_model().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_exact_gradient_reaches_the_layer() -> None:
    """With the mask kept, the gradients are those of the merged weight's formula; by default they are not."""

    def gradient(model: PeftModel) -> Tensor:
        (name,) = lors_layers(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return lors_layers(model)[name].lors_A["default"].grad

    target = {"target_modules": ["model.layers.0.mlp.up_proj"]}
    model = adapted_model(**target)
    (layer,) = lors_layers(model).values()
    A = layer.lors_A["default"].detach().requires_grad_()
    T = layer.weight + 1.5 * (layer.lors_B["default"].detach() @ A) * (layer.weight != 0)
    base = pruned_model()
    torch.func.functional_call(
        base, {"model.layers.0.mlp.up_proj.weight": T}, kwargs={"input_ids": IDS, "labels": IDS}
    ).loss.backward()
    torch.testing.assert_close(gradient(adapted_model(exact_gradient=True, **target)), A.grad, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient(model), A.grad, rtol=1e-1)
