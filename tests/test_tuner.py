"""LoRS as a PEFT tuner: configuration, targets and the forward pass."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.utils import PeftType
from pruned_models import adapted_model, logits, lors_layers, pruned_model

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


# The forward pass


def test_kaiming_start_has_the_bound_of_lora() -> None:
    model = get_peft_model(pruned_model(), lors.LorsConfig(r=16))
    layer = model.base_model.adapted_layers("default")["model.layers.0.mlp.up_proj"]
    bound = 32**-0.5
    assert not layer.lors_B["default"].any()
    assert 0.9 * bound < layer.lors_A["default"].abs().max() <= bound


def test_adapter_dtype_follows_peft() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(pruned_model(torch.bfloat16), lors.LorsConfig(r=4), autocast_adapter_dtype=autocast)
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}
        assert logits(model).dtype is torch.bfloat16
