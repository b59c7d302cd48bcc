"""GeLoRA: the estimator on clouds of known dimension, the rank rule, the captured states, and ranks that stay."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from conftest import make_tiny_llama
from contract import batch, logits, method_of, pruned, trainable
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad

from baselines.gelora import (
    ESTIMATORS,
    GeLoraConfig,
    GeLoraLinear,
    block_ranks,
    block_states,
    intrinsic_dimension,
    two_nn,
)
from harness.method import adapt


def cloud(dimension: int, count: int = 1000, width: int = 256) -> Tensor:
    """Gaussian points of a known dimension, linearly embedded."""
    generator = torch.Generator().manual_seed(dimension)
    points = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return points @ torch.randn(dimension, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_the_estimate_is_within_a_tenth_of_a_known_dimension(dimension, estimator):
    mean, spread, count = intrinsic_dimension(cloud(dimension), estimator)
    assert mean == pytest.approx(dimension, rel=0.1)
    assert 0 < spread < 0.5 and count == 1000


def test_the_estimate_knows_neither_the_order_of_the_points_nor_duplicates():
    points = cloud(5, count=600, width=40)
    expected = intrinsic_dimension(points)
    shuffled = points[torch.randperm(600, generator=torch.Generator().manual_seed(2))]
    assert intrinsic_dimension(shuffled) == expected
    assert intrinsic_dimension(torch.cat([points, points[:200]])) == expected


def test_the_two_estimators_are_their_formulas():
    points = cloud(3, count=50, width=6)
    distances = torch.cdist(points, points)
    near = distances.sort(dim=1).values
    x = sorted((near[:, 2] / near[:, 1]).log().tolist())
    pairs = [(x[k - 1], -torch.log(torch.tensor(1 - k / 50)).item()) for k in range(1, 46)]
    fit = sum(a * b for a, b in pairs) / sum(a * a for a, _ in pairs)
    assert two_nn(distances) == pytest.approx(fit, rel=1e-5)
    assert two_nn(distances, "likelihood") == pytest.approx(49 / sum(x), rel=1e-9)


def test_degenerate_clouds():
    assert two_nn(torch.zeros(1, 1)) == two_nn(torch.zeros(2, 2)) == 0.0
    assert intrinsic_dimension(torch.ones(100, 4))[0] == 0.0  # every example begins with the same token
    with pytest.raises(ValueError, match="equally far from its two nearest others"):
        two_nn(1 - torch.eye(5))


def test_a_rank_is_the_smallest_whole_number_above_the_growth():
    assert block_ranks([3.2, 5.9, 5.1, 5.1, 9.0, 11.0]) == [3, 1, 1, 4, 3]
    assert block_ranks([0.0, 200.0]) == [64]


def with_prompt(length: int) -> dict[str, Tensor]:
    inputs = batch()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, :length] = -100
    return inputs


@torch.no_grad()
def test_states_are_the_inputs_and_outputs_of_the_blocks_at_the_end_of_the_prompt():
    model, inputs = make_tiny_llama(), with_prompt(5)
    found = block_states(model, [inputs])
    hidden = model(**inputs, output_hidden_states=True).hidden_states  # the last one is behind the final norm
    for state, expected in zip([*found[:-1], model.model.norm(found[-1])], hidden, strict=True):
        torch.testing.assert_close(state, expected[:, 4])
    assert not torch.allclose(found[-1], hidden[-1][:, 4], atol=1e-2)


@pytest.mark.parametrize("prompt", [5, 0])
def test_padding_order_and_adapters_do_not_change_the_states(prompt):
    inputs = with_prompt(prompt)
    expected = block_states(pruned(), [inputs])
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {name: pad(value, (0, 3), value=values[name]) for name, value in inputs.items()}
    backwards = [{name: value[i : i + 1] for name, value in padded.items()} for i in (3, 2, 1, 0)]
    model = adapt(method_of("gelora"), pruned(), [batch()]).train()
    for parameter in trainable(model).values():
        parameter.data.add_(1.0)
    for state, wanted in zip(block_states(model, backwards), expected, strict=True):
        torch.testing.assert_close(state.flip(0), wanted, rtol=1e-4, atol=1e-5)
    assert model.training and not torch.equal(logits(model), logits(pruned()))


def test_a_random_token_behind_the_first_ones_stands_for_an_example_without_a_prompt():
    ids = torch.stack([torch.arange(40).roll(k) for k in range(30)])
    model, inputs = make_tiny_llama(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    embedded = model.model.embed_tokens.weight.detach()[ids]
    states = block_states(model, [inputs])[0]
    tokens = [(row == state).all(dim=1).nonzero().item() for row, state in zip(embedded, states, strict=True)]
    assert min(tokens) >= 17 and len(set(tokens)) > 10


def ranks_of(model: PeftModel) -> list[set[int]]:
    blocks = model.get_base_model().model.layers
    return [{m.r["default"] for m in block.modules() if isinstance(m, GeLoraLinear)} for block in blocks]


def test_the_measured_ranks_are_in_layers_config_and_parameter_count(caplog, tmp_path):
    with caplog.at_level(logging.INFO, "lors"):
        model = adapt(method_of("gelora"), pruned(), [batch(8)])
    config = model.peft_config["default"]
    ranks = [min(r, 16) for r in block_ranks(config.dimensions)]  # the narrowest side
    assert ranks_of(model) == [{r} for r in ranks]
    assert list(config.rank_pattern.values()) == ranks
    widths = [sum(part.weight.shape) for part in model.modules() if isinstance(part, GeLoraLinear)]
    assert sum(p.numel() for p in trainable(model).values()) == sum(ranks) * sum(widths) // 2
    assert any(f"GeLoRA: dimensions {config.dimensions}" in message for message in caplog.messages)
    assert "ranks may be noise: 8 different examples" in caplog.messages[0]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["dimensions"] == config.dimensions
    assert ranks_of(PeftModel.from_pretrained(pruned(), tmp_path)) == ranks_of(model)
    other = adapt(method_of("gelora"), pruned(), [batch(8)], seed=3)
    assert ranks_of(other) == ranks_of(model), "ranks follow from the data alone"


def test_enough_examples_with_little_spread_are_no_noise(caplog, monkeypatch):
    dimensions = iter([1.0, 4.2, 44.5])
    monkeypatch.setattr("baselines.gelora.intrinsic_dimension", lambda *_: (next(dimensions), 0.1, 2000))
    assert ranks_of(adapt(method_of("gelora"), pruned(), [batch()])) == [{4}, {16}]  # at most the narrowest side
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("scaling", "expected"), [("constant", 2.0), ("alpha_over_r", 4.0), ("rank_stabilized", 8.0)])
def test_the_scale_of_a_block(scaling, expected):
    config = GeLoraConfig(r=8, lora_alpha=16, scaling=scaling, rank_pattern={r"model\.layers\.1\..*": 4})
    assert config.layer_settings("model.layers.1.mlp.up_proj") == (4, expected)
    assert config.layer_settings("model.layers.11.mlp.up_proj")[0] == 8
