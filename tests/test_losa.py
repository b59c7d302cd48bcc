"""LoSA: its layer and its rounds against their definitions, and runs that make their own zeros."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from callback_loop import with_callbacks
from conftest import make_tiny_llama, recipe
from contract import ROWS, batch, method_of, prune
from hypothesis import given
from hypothesis import strategies as st
from pruning_problems import REPEATABLE
from single_layers import assert_same, draw
from test_harness_run import SHORT, folder_of, tiny  # noqa: F401
from test_methods_in_the_harness import Kill
from test_train import assert_same_weights, fit, without_times
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

import lors
from baselines.losa import LosaConfig, LosaLinear, LosaMethod, allot_ranks, block_errors, round_of
from harness.errors import BadInput
from harness.method import adapt, finish
from harness.run import execute
from lors.blocks import decoder_linears
from lors.sparse_layer import adapted_layers
from lors.sparsity import sparsity_of

TOKENS = torch.tensor([row["input_ids"] for row in ROWS])
DEPTH = 3


def dense() -> PreTrainedModel:
    return make_tiny_llama(num_hidden_layers=DEPTH, initializer_range=0.3)


def method(*overrides: str) -> LosaMethod:
    made = copy.copy(method_of("losa", "sparsity=0.6", *overrides))
    made.dense = dense()
    return made


def test_output_gradients_and_merge_are_those_of_the_rank_in_use():
    base = nn.Linear(10, 12, dtype=torch.float64).requires_grad_(False)
    base.weight.mul_(draw(12, 10) > 0)
    layer = LosaLinear(base, "default", LosaConfig(r=4), 4, 1.5)
    A, B = layer.losa_A["default"], layer.losa_B["default"]
    A.data, B.data = draw(4, 10, seed=1), draw(12, 4, seed=2)
    layer.ranks["default"] = 3
    W = layer.weight + 1.5 * (layer.weight != 0) * (B[:, :3] @ A[:3])
    x = draw(2, 5, 10, seed=3).requires_grad_()
    assert_same(layer(x), linear(x, W, layer.bias), x, A, B)
    layer(x).sum().backward()
    assert not A.grad[3].any() and not B.grad[:, 3].any()
    layer.settle("default")
    del layer.ranks["default"]
    torch.testing.assert_close(layer(x), linear(x, W, layer.bias))
    layer.merge()
    torch.testing.assert_close(layer.weight.data, W.detach())


def test_sparsities_and_rounds_are_those_of_the_schedule():
    losa = method_of("losa", "sparsity=0.7")
    assert [losa.sparsity_in(t) for t in range(1, 6)] == pytest.approx([0.3416, 0.5488, 0.6552, 0.6944, 0.7])
    first = {number: next(step for step in range(200) if round_of(step, 200, 5) == number) for number in range(1, 6)}
    assert first == {1: 0, 2: 20, 3: 40, 4: 60, 5: 80}
    assert [round_of(step, 4, 5) for step in range(5)] == [1, 3, 5, 5, 5]
    assert round_of(0, 1, 5) == 5


def test_ranks_follow_the_errors():
    assert allot_ranks([1, 1, 2], 4, 16) == [3, 3, 6]
    assert allot_ranks([1, 1, 1, 97], 6, 16) == [2, 3, 3, 16]  # what the largest cannot take goes to the others
    assert allot_ranks([0, 0], 6, 16) == [6, 6]
    assert allot_ranks([5, 1], 1, 16) == [1, 1]


@REPEATABLE
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(1, 16), st.integers(1, 16))
def test_ranks_have_the_sum_and_the_limits_that_are_asked_for(errors, mean, largest):
    ranks = allot_ranks(errors, mean, largest)
    assert min(ranks) >= 1 and max(ranks) <= largest
    assert sum(ranks) == min(mean, largest) * len(ranks)
    by_error = [rank for _, rank in sorted(zip(errors, ranks, strict=True))]
    assert all(later >= earlier - 1 for earlier, later in pairwise(by_error))


@torch.no_grad()
def test_the_error_of_a_block_is_that_of_its_outputs_in_runs_of_the_whole_models():
    outputs = {"dense": [], "sparse": []}
    models = {"dense": dense().double(), "sparse": prune(dense()).double()}
    for name, model in models.items():
        hooks = [
            block.register_forward_hook(lambda _, __, out, of=outputs[name]: of.append(out))
            for block in model.model.layers
        ]
        model(input_ids=TOKENS)
        for hook in hooks:
            hook.remove()
    expected = []
    for D, S in zip(*outputs.values(), strict=True):
        units = range(D.shape[-1])
        parts = [((D[..., j] - S[..., j]) ** 2).sum() / (D[..., j] ** 2).sum() for j in units]
        expected.append(sum(parts).item() / len(parts))
    assert block_errors(*models.values(), TOKENS) == pytest.approx(expected)


class Watch(TrainerCallback):
    """The zeros and ranks of every step, and the model that was pruned."""

    def __init__(self) -> None:
        self.zeros, self.ranks, self.sparsity = [], [], []

    def on_step_end(self, args, state, control, model, **_) -> None:
        linears = decoder_linears(model.get_base_model())
        self.zeros.append({name: part.weight == 0 for name, part in linears.items()})
        self.ranks.append([layer.ranks["default"] for layer in adapted_layers(model, "default").values()])
        self.sparsity.append(sparsity_of(model.get_base_model()))


def test_a_training_starts_dense_and_its_zeros_grow_and_stay(tmp_path):
    losa, watch = method(), Watch()
    start = decoder_linears(dense())
    model = adapt(losa, prune(dense()), [batch()])
    for name, part in decoder_linears(model.get_base_model()).items():
        assert torch.equal(part.weight, start[name].weight)
    fit(with_callbacks(losa, watch), tmp_path, recipe(steps=20, gradient_accumulation=1), model)
    sparsities = [watch.sparsity[step] for step in (0, 2, 4, 6, 8)]
    assert sparsities == pytest.approx([losa.sparsity_in(t) for t in range(1, 6)], abs=0.03)
    assert watch.sparsity[1::2] == watch.sparsity[0::2] and watch.sparsity[8:] == 12 * [sparsities[-1]]
    for before, after in pairwise(watch.zeros):
        assert all((after[name] | ~M).all() for name, M in before.items())
    for ranks, mean in ((watch.ranks[0], 4), (watch.ranks[-1], 4)):  # r is below the mean of the paper
        assert sum(ranks) == mean * len(ranks)
    merged = finish(losa, model, {}, "merged")
    for name, part in decoder_linears(merged).items():
        W = decoder_linears(model.get_base_model())[name].weight
        assert torch.equal(part.weight != 0, W != 0) and not torch.equal(part.weight, W)


def test_a_killed_run_goes_on_with_its_zeros_and_ranks(tmp_path):
    losa, cfg = method(), recipe()  # checkpoint 2 lies in the third round, of which a fifth follows

    def run(folder, of):
        return fit(of, tmp_path / folder, cfg, adapt(losa, prune(dense()), [batch()]))

    whole, expected = run("whole", losa)
    with pytest.raises(KeyboardInterrupt):
        run("killed", with_callbacks(losa, Kill(3)))
    resumed, outcome = run("killed", losa)
    assert_same_weights(whole, resumed)
    assert without_times(outcome.history) == without_times(expected.history)
    assert losa.counts(whole) == losa.counts(resumed)


def test_what_a_round_prunes_is_the_merged_model():
    """By Wanda, and its zeros are put on the base: an update that undoes a weight makes it a zero."""
    losa = method()
    model = adapt(losa, prune(dense()), [batch()])
    layer = next(iter(adapted_layers(model, "default").values()))
    with torch.no_grad():
        for part in adapted_layers(model, "default").values():
            part.losa_B["default"].normal_(std=0.3)
    expected = finish(losa, model, {}, "merged")
    before = layer.get_base_layer().weight.clone()
    lors.prune(
        expected,
        "wanda",
        sparsity=losa.sparsity_in(2),
        calibration=batch()["input_ids"],
        layerwise="rmi",
        sparsity_range=0.01,
    )
    losa.begin_round(model, 2)
    for name, part in decoder_linears(model.get_base_model()).items():
        assert torch.equal(part.weight == 0, decoder_linears(expected)[name].weight == 0)
    now = layer.get_base_layer().weight
    assert torch.equal(now, before * (now != 0)) and 0.4 < (now == 0).float().mean() < 0.55


def test_a_run_has_zeros_of_its_own_and_leaves_the_merged_model(tiny):  # noqa: F811
    cfg = tiny("method=losa", "save_merged=true", *SHORT)
    result = execute(cfg)
    assert result["status"] == "ok", result["error"]
    zeros = result["zeros"]
    assert zeros["lost"] == 0 and zeros["mergeable"] and zeros["pruned_by"] == "losa"
    assert zeros["after_merge"] == pytest.approx(0.5, abs=0.03) and len(set(zeros["blocks"])) > 1
    other = execute(tiny("method=lora", *SHORT))
    assert result["support"]["sha256"] != other["support"]["sha256"]
    folder = folder_of(result, cfg)
    assert not (folder / "adapter").exists()
    assert "losa, during the fine-tuning" in (folder / "merged" / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert lors.check(merged)["sparsity"] == pytest.approx(zeros["after_merge"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("pattern=2:4",), "layerwise='rmi': allowed is none with pattern='2:4'"),
        (("sparsity=0.01",), "sparsity_range=0.01: allowed is a number above 0 by which sparsity="),
        (("save_base=true",), "save_base=true: must be false for method=losa"),
        (("prune=none", "sparsity=0"), "method=losa: needs the dense model beside the pruned one"),
        (("method.rounds=0",), "rounds=0: must be a whole number >= 1"),
    ],
)
def test_what_it_cannot_do_is_refused(tiny, overrides, said):  # noqa: F811
    with pytest.raises(BadInput, match=said):
        execute(tiny("method=losa", *overrides, *SHORT))
