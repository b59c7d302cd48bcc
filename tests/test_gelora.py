"""GeLoRA: the estimator on clouds of known dimension, the rank rule, the captured states, and ranks that stay."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from conftest import make_tiny_llama
from contract import batch, logits, method_of, prune, pruned, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from baselines.gelora import (
    ESTIMATORS,
    GeLoraConfig,
    GeLoraLinear,
    block_ranks,
    block_states,
    intrinsic_dimension,
    match_budget,
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
    mean, spread, count = intrinsic_dimension(cloud(dimension), estimator=estimator)
    assert mean == pytest.approx(dimension, rel=0.1)
    assert 0 < spread < 0.5 and count == 1000


def test_the_estimate_knows_neither_scale_nor_rotation_nor_order_nor_duplicates():
    points = cloud(5, count=600, width=40)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q

    def of_all(points: Tensor) -> float:
        points = points.unique(dim=0)
        return two_nn(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist"))

    assert of_all(3 * points @ Q + 7) == pytest.approx(of_all(points), rel=1e-4)
    expected = intrinsic_dimension(points)
    shuffled = points[torch.randperm(600, generator=torch.Generator().manual_seed(2))]
    assert intrinsic_dimension(shuffled) == expected
    assert intrinsic_dimension(torch.cat([points, points[:200]])) == expected
    assert intrinsic_dimension(points, seed=1) != expected


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


def test_the_rank_rule():
    d = [3.2, 5.9, 5.1, 5.1, 9.0]
    assert block_ranks(d) == [3, 1, 1, 4]
    assert block_ranks([2.4, 3.6, 4.4, 4.4, 40.0], round_dimensions=True, cap=9) == [3, 1, 1, 9]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 60), min_size=2, max_size=12))
def test_every_rank_is_above_the_growth_of_the_dimension(d):
    ranks = block_ranks(d)
    assert len(ranks) == len(d) - 1
    for r, before, after in zip(ranks, d, d[1:], strict=False):
        assert r >= 1 and r > after - before


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(10, 99)), min_size=1, max_size=8), st.integers(1, 16))
def test_scaled_ranks_fit_the_budget_and_one_more_step_would_not(blocks, rank):
    ranks, widths = [r for r, _ in blocks], [width for _, width in blocks]
    scaled = match_budget(ranks, widths, rank)
    cost = sum(r * width for r, width in zip(scaled, widths, strict=True))
    assert min(scaled) >= 1 and cost <= rank * sum(widths)
    if len(set(ranks)) == 1:
        assert scaled == [rank] * len(ranks)


def by_hand(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Input of the first block and output of each, with every block called by hand."""
    base = model.model
    x = base.embed_tokens(inputs["input_ids"])
    embeddings = base.rotary_emb(x, torch.arange(x.shape[1])[None])
    T = x.shape[1]
    causal = torch.full((T, T), float("-inf")).triu(1)[None, None]
    states = [x]
    for block in base.layers:
        y = block(states[-1], position_embeddings=embeddings, attention_mask=causal)
        states.append(y[0] if isinstance(y, tuple) else y)
    return states


@torch.no_grad()
def test_states_are_the_inputs_and_outputs_of_the_blocks():
    model, inputs = make_tiny_llama(), batch()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, :5] = -100  # the prompt ends at position 4
    found = block_states(model, [inputs])
    for state, expected in zip(found, by_hand(model, inputs), strict=True):
        torch.testing.assert_close(state, expected[:, 4])
    normed = model(**inputs, output_hidden_states=True).hidden_states[-1][:, 4]
    assert not torch.allclose(found[-1], normed, atol=1e-2)  # that is behind the final norm


@pytest.mark.parametrize("position", ["prompt_end", "random", "mean"])
def test_padding_order_and_adapters_do_not_change_the_states(position):
    inputs = batch()
    expected = block_states(pruned(), [inputs], position=position)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {name: torch.nn.functional.pad(value, (0, 3), value=pad[name]) for name, value in inputs.items()}
    backwards = [{name: value[i : i + 1] for name, value in padded.items()} for i in (3, 2, 1, 0)]
    model = adapt(method_of("gelora"), pruned(), [batch()]).train()
    for parameter in trainable(model).values():
        parameter.data.add_(1.0)
    for state, wanted in zip(block_states(model, backwards, position=position), expected, strict=True):
        torch.testing.assert_close(state.flip(0), wanted, rtol=1e-4, atol=1e-5)
    assert model.training and not torch.equal(logits(model), logits(pruned()))


def test_which_token_stands_for_an_example():
    ids = torch.arange(40)[None]
    labels = ids.clone()
    labels[:, :20] = -100
    model = make_tiny_llama()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    embedded = model.model.embed_tokens.weight.detach()
    assert torch.equal(block_states(model, [inputs])[0][0], embedded[19])
    torch.testing.assert_close(block_states(model, [inputs], position="mean")[0][0], embedded[1:40].mean(0))
    inputs["labels"] = ids  # no prompt
    drawn = {block_states(model, [inputs], seed=seed)[0][0].norm().item() for seed in range(30)}
    allowed = {row.norm().item() for row in embedded[17:40]}
    assert drawn <= allowed and len(drawn) > 5


def adapted(count: int = 8, **options: object) -> PeftModel:
    overrides = [f"method.prepare.{name}={value}" for name, value in options.items()]
    return adapt(method_of("gelora", *overrides), pruned(), [batch(count)])


def ranks_of(model: PeftModel) -> list[set[int]]:
    blocks = model.get_base_model().model.layers
    return [{m.r["default"] for m in block.modules() if isinstance(m, GeLoraLinear)} for block in blocks]


@pytest.fixture
def known_dimensions(monkeypatch):
    """The three clouds of the small model have these dimensions, whatever is in them."""
    dimensions = iter([1.0, 4.2, 4.5] * 8)
    monkeypatch.setattr("baselines.gelora.intrinsic_dimension", lambda *_, **__: (next(dimensions), 0.1, 2000))


def test_the_measured_ranks_are_in_layers_config_and_parameter_count(caplog):
    with caplog.at_level(logging.INFO, "lors"):
        model = adapted()
    config = model.peft_config["default"]
    ranks = block_ranks(config.dimensions)
    assert ranks_of(model) == [{min(r, 16)} for r in ranks]
    assert list(config.rank_pattern.values()) == [min(r, 16) for r in ranks]
    block = make_tiny_llama().model.layers[0]
    width = sum(sum(part.weight.shape) for part in block.modules() if isinstance(part, torch.nn.Linear))
    assert sum(p.numel() for p in trainable(model).values()) == sum(min(r, 16) * width for r in ranks)
    assert any(f"GeLoRA: dimensions {config.dimensions}" in message for message in caplog.messages)
    assert "ranks may be noise: 8 different examples" in caplog.messages[0]
    assert torch.equal(logits(model.eval()), logits(pruned()))


def test_ranks_are_the_same_for_every_seed_of_a_run_and_come_back_on_loading(tmp_path):
    first = adapt(method_of("gelora"), pruned(), [batch(8)])
    second = adapt(method_of("gelora"), pruned(), [batch(8)], seed=3)
    assert ranks_of(first) == ranks_of(second)
    name = next(iter(trainable(first)))
    assert not torch.equal(trainable(first)[name], trainable(second)[name])
    first.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["dimensions"] == first.peft_config["default"].dimensions
    assert ranks_of(PeftModel.from_pretrained(pruned(), tmp_path)) == ranks_of(first)


@pytest.mark.usefixtures("known_dimensions")
def test_options_scale_cap_and_permute_the_ranks(caplog):
    assert ranks_of(adapted()) == [{4}, {1}]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert ranks_of(adapted(cap=3)) == [{3}, {1}]
    assert ranks_of(adapted(round_dimensions=True)) == [{4}, {1}]
    orders = [ranks_of(adapted(permutation=seed)) for seed in range(3)]
    assert [{4}, {1}] in orders and [{1}, {4}] in orders
    uniform = sum(p.numel() for p in trainable(adapt(method_of("lora_rite"), pruned(), [batch()])).values())
    model = adapted(match_rank=4)  # 8 matrices' worth of rank for the ratio 4 to 1
    assert ranks_of(model) == [{6}, {2}]
    assert sum(p.numel() for p in trainable(model).values()) == uniform


@pytest.mark.parametrize(("scaling", "expected"), [("constant", 2.0), ("alpha_over_r", 4.0), ("rank_stabilized", 8.0)])
def test_the_scale_of_a_block(scaling, expected):
    config = GeLoraConfig(r=8, lora_alpha=16, scaling=scaling, rank_pattern={r"model\.layers\.1\..*": 4})
    assert config.layer_settings("model.layers.1.mlp.up_proj") == (4, expected)
    assert config.layer_settings("model.layers.11.mlp.up_proj")[0] == 8


def test_new_factors_have_the_precision_of_the_training():
    model = prune(make_tiny_llama().to(torch.bfloat16))
    model = adapt(method_of("gelora"), model, [batch(8)], precision="bf16_mixed")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_unknown_choices_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^scaling='fixed': must be one of constant, alpha_over_r, rank_stabilized$"):
        GeLoraConfig(scaling="fixed")
    with pytest.raises(ValueError, match=r"^position='last': must be one of prompt_end, random, mean$"):
        adapted(position="last")
    with pytest.raises(ValueError, match=r"^estimator='mean': must be one of fit, likelihood$"):
        adapted(estimator="mean")
