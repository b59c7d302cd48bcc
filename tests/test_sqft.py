"""SQFT: the forms of SparsePEFT against the formula, their dropout, several adapters; the search of ranks (NLS)."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from callback_loop import train_with
from contract import batch, method_of, pruned, trainable
from peft import PeftModel
from single_layers import adapted as adapted_blocks
from single_layers import assert_same, assert_same_dropout, draw, layers
from torch import Tensor, nn
from torch.nn.functional import linear

from baselines.sqft import SqftConfig, SqftLinear, extract_ranks, set_ranks
from baselines.sqft_nls import ElasticRanks, draw_ranks, hill_climb
from harness.method import adapt
from harness.recipe import enable_activation_checkpointing

IN, OUT, R, ALPHA = 10, 7, 3, 4.5
FORMS = [
    pytest.param({"form": form, "checkpoint": checkpoint}, id=form + ("-checkpoint" if checkpoint else ""))
    for form in ("two_products", "fused")
    for checkpoint in (False, True)
]


def adapted(**fields: object) -> SqftLinear:
    """A half-sparse layer with an adapter whose factors are both away from zero."""
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    base.bias.copy_(draw(OUT, seed=3))
    layer = SqftLinear(base, "default", SqftConfig(r=R, lora_alpha=ALPHA, **fields), R, ALPHA / R)
    layer.sqft_A["default"].data.copy_(draw(R, IN, seed=4))
    layer.sqft_B["default"].data.copy_(draw(OUT, R, seed=5))
    return layer


def effective_weight(layer: SqftLinear, name: str = "default") -> Tensor:
    """W + M (.) (s B A)."""
    M = (layer.weight != 0).to(layer.weight.dtype)
    return layer.weight + M * (layer.scaling[name] * layer.sqft_B[name] @ layer.sqft_A[name])


def factors(layer: SqftLinear) -> tuple[Tensor, Tensor]:
    return layer.sqft_A["default"], layer.sqft_B["default"]


@pytest.mark.parametrize("fields", FORMS)
def test_output_and_gradients_are_those_of_the_formula(fields):
    layer, x = adapted(**fields), draw(5, IN).requires_grad_()
    assert_same(layer(x), linear(x, effective_weight(layer), layer.bias), x, *factors(layer))


def test_dropout_acts_on_the_update_alone_and_is_the_same_when_computed_again():
    assert_same_dropout([adapted(dropout=0.4, checkpoint=again) for again in (False, True)], effective_weight)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_several_adapters_add_up_whatever_their_forms(first, second):
    layer, x = adapted(**first), draw(5, IN)
    layer.update_layer("second", SqftConfig(r=2, lora_alpha=1, **second), 2, 0.5)
    layer.sqft_B["second"].data.copy_(draw(OUT, 2, seed=7))
    both = effective_weight(layer) + effective_weight(layer, "second") - layer.weight
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), linear(x, both, layer.bias))
    layer.merge(adapter_names=["second"])
    layer.merge(adapter_names=["default"])  # starts from the original weight
    torch.testing.assert_close(layer.weight.data, both)


SHARES = [1, 0.75, 0.5]


def elastic(blocks: int = 3, **fields: object) -> PeftModel:
    """Blocks of one layer, whose factors are both away from zero, with ranks 4, 3 and 2."""
    shape = (OUT, IN)
    model = adapted_blocks(SqftConfig(r=4, lora_alpha=ALPHA, rank_shares=SHARES, **fields), *[shape] * blocks)
    for number, layer in enumerate(layers(model)):
        layer.sqft_B["default"].data.copy_(draw(OUT, 4, seed=number))
    return model


def ranks_of(model: nn.Module) -> list[int]:
    return [layer.active_rank["default"] for layer in layers(model)]


@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize("rho", [1, 2, 3])
def test_a_rank_of_the_space_is_a_lora_of_that_rank_at_the_scale_of_the_largest(fields, rho):
    layer, x = adapted(**fields), draw(5, IN).requires_grad_()
    layer.active_rank["default"] = rho
    A, B = factors(layer)
    M = (layer.weight != 0).double()
    expected = linear(x, layer.weight + M * (ALPHA / R * B[:, :rho] @ A[:rho]), layer.bias)
    assert_same(layer(x), expected, x, A, B)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(
    ("extract", "length", "index"),
    [
        *(("maximal", 3, 0), ("heuristic", 3, 1), ("minimal", 3, 2), ("heuristic", 4, 1), ("minimal", 4, 3)),
        *(("heuristic", 5, 2), ("heuristic", 1, 0), ("search", 5, 2)),
    ],
)
def test_what_is_extracted_of_spaces_of_odd_and_even_length(extract, length, index):
    config = SqftConfig(r=32, rank_shares=[1, 0.875, 0.75, 0.625, 0.5][:length], extract=extract)
    assert config.ranks(32) == [32, 28, 24, 20, 16][:length]
    config.target_modules, config.r = {"proj"}, 7
    model = adapted_blocks(config, (8, 8), (8, 8))
    assert extract_ranks(model, "default") == [index, index]
    assert ranks_of(model) == [config.ranks(7)[index]] * 2


def test_all_layers_of_a_block_have_one_rank_drawn_by_seed_and_step_alone():
    method, drawn = method_of("sqft_nls"), []
    for _ in range(2):
        model = adapt(method, pruned())
        torch.rand(3)  # whatever the generator of the process does
        drawn.append([draw_ranks(model, "default", step) for step in range(40)])
        blocks = [
            {layer.active_rank["default"] for layer in layers(block)} for block in model.get_base_model().model.layers
        ]
        assert blocks == [{method.peft.ranks(4)[entry]} for entry in drawn[-1][-1]]
    assert drawn[0] == drawn[1]
    assert {entry for choice in drawn[0] for entry in choice} == {0, 1, 2}
    other = adapt(method_of("sqft_nls", "seed=1", "method.peft.seed=1"), pruned())
    assert [draw_ranks(other, "default", step) for step in range(40)] != drawn[0]


def test_a_step_has_one_sub_network_in_all_micro_batches_and_the_extracted_one_follows():
    model, seen = elastic(), []
    x = draw(5, IN)

    def loss() -> Tensor:
        seen.append(ranks_of(model))
        return sum(layer(x).square().mean() for layer in layers(model))

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    train_with(ElasticRanks(), model, optimizer, loss, range(5), of=5, micro_batches=3)
    steps = [seen[start : start + 3] for start in range(0, 15, 3)]
    assert all(step[0] == step[1] == step[2] for step in steps)
    assert len({tuple(step[0]) for step in steps}) > 1
    assert ranks_of(model) == [3, 3, 3]


def test_the_recomputation_of_a_checkpoint_has_the_ranks_of_its_forward_pass(monkeypatch):
    """And so the gradients of the training without checkpointing; the log has the ranks of every forward pass."""
    gradients, logs = [], []
    original = SqftLinear.factors
    for checkpointing in (False, True):
        model, log = adapt(method_of("sqft_nls"), pruned()).train(), []
        logs.append(log)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainable(model).items():
            if ".sqft_B." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        if checkpointing:
            enable_activation_checkpointing(model)

        def factors(layer: SqftLinear, name: str, log: list = log) -> tuple[Tensor, Tensor]:
            A, B = original(layer, name)
            log.append((id(layer), len(A)))
            return A, B

        monkeypatch.setattr(SqftLinear, "factors", factors)
        ElasticRanks().on_step_begin(None, SimpleNamespace(global_step=3), None, model=model)
        model(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in trainable(model).values()])
    assert len(logs[1]) > len(logs[0]) and len(set(logs[1])) == len(set(logs[0])) == len(
        {layer for layer, _ in logs[1]}
    )
    assert len({rank for _, rank in logs[1]}) > 1
    torch.testing.assert_close(gradients[0], gradients[1])


def test_hill_climbing_finds_a_maximum_without_a_neighbour_that_is_better(tmp_path):
    model, asked = elastic(extract="search"), []

    def score() -> float:
        asked.append(ranks_of(model))
        return -abs(asked[-1][0] - 4) - abs(asked[-1][1] - 2) - 0.1 * asked[-1][2]

    best = hill_climb(model, "default", score)
    assert ranks_of(model) == [4, 2, 2] and best == [0, 2, 2]
    everything = {}
    for choice in product(range(3), repeat=3):
        set_ranks(model, "default", choice)
        everything[choice] = score()
    assert everything[tuple(best)] == max(everything.values())
    assert extract_ranks(model, "default") == best  # from the config, so that it is saved
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(elastic().unload(), tmp_path)
    assert ranks_of(loaded) == [4, 2, 2]


def test_the_harness_searches_by_rows_that_are_not_trained_on(monkeypatch):
    method = method_of("sqft_nls", "method.peft.extract=search")
    assert method.reads_rows and method.holds_out
    model = adapt(method, pruned(), [batch()])
    (callback,) = method.callbacks()
    callback.on_train_end(None, None, None, model=model)
    found = model.peft_config["default"].subnetwork
    assert found is not None and extract_ranks(model, "default") == found
    assert method.counts(model)["extracted"] < sum(parameter.numel() for parameter in trainable(model).values())


@pytest.mark.parametrize("shares", [[], [0.5], [1, 1], [1, 0.5, 0.75], [1, 0], [1, "a"], 0.5])
def test_shares_that_do_not_fall_from_1_are_refused(shares):
    with pytest.raises(ValueError, match=r"rank_shares=.*must be falling shares"):
        SqftConfig(rank_shares=shares)


def test_a_sub_network_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"subnetwork=\[0\]: must be 3 whole numbers from 0 to 2"):
        elastic(subnetwork=[0])
