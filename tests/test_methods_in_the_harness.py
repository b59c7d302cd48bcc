"""Methods that do something beside the optimizer's step, in the harness's training: a killed run goes on bit for bit,
with gradient accumulation, in every precision, and activation checkpointing changes no number."""

from __future__ import annotations

import copy

import pytest
import torch
from callback_loop import with_callbacks
from conftest import make_tiny_llama, recipe
from contract import method_of
from test_train import assert_same_weights, fit, kill_at_the_last_checkpoint, without_times
from transformers import TrainerCallback

from baselines.flat_lora import FlatLoraLinear
from baselines.geolora import GeoLoraLinear
from baselines.xgblora import XgbLoraLinear
from harness.method import Method


def with_dense(*of: str) -> Method:
    """The method on its own, with a model to learn from that is not the one of `fit`."""
    method = copy.copy(method_of(*of))
    method.dense = make_tiny_llama(seed=1)
    return method


# The recipe has 7 steps of two micro-batches and a checkpoint after every second one.
METHODS = {
    "rm_lora": method_of("rm_lora"),
    "flat_lora": method_of("flat_lora", "method.peft.sigma=0.5"),
    # Boosters of 4 steps, on another block each: checkpoint 4 lies between them, checkpoint 6 within the second.
    "xgblora": method_of("xgblora", "method.peft.boosters=2", "method.peft.seed=1"),
    # Integrator steps 0, 3, 6 and truncations 2, 5: checkpoint 4 has enlarged ranks, checkpoint 6 cut ones.
    "geolora": method_of("geolora", "method.peft.coefficient_steps=2", "method.peft.skipped_steps=0"),
    "sherl": method_of("sherl"),
    "sqft_nls": method_of("sqft_nls"),
    # Block 1 from step 4 on: checkpoint 4 lies between the blocks, checkpoint 6 within the second.
    "reconstruct": with_dense("reconstruct", "method.inputs=parallel"),
    "reconstruct_lors": with_dense("reconstruct_lors"),
}


class Kill(TrainerCallback):
    """Dies in the middle of the step numbered ``step``, once all other callbacks have begun it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("killed", "precision"), [pytest.param(5, "float32", marks=pytest.mark.slow), (6, "bf16_mixed")]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_as_an_uninterrupted_one(name, killed, precision, tmp_path):
    method, cfg = METHODS[name], recipe(precision=precision)
    whole, expected = fit(method, tmp_path / "whole", cfg)
    dying = with_callbacks(method, Kill(killed))
    with pytest.raises(KeyboardInterrupt):
        fit(dying, tmp_path / "killed", cfg)
    resumed, outcome = fit(method, tmp_path / "killed", cfg)
    assert_same_weights(whole, resumed)
    assert without_times(outcome.history) == without_times(expected.history)


def boosters(model):
    """Everything about boosters that is not in the weights."""
    layers = [part for part in model.modules() if isinstance(part, XgbLoraLinear)]
    return METHODS["xgblora"].counts(model), [layer.at_work["default"] for layer in layers]


def test_xgblora_killed_at_its_last_checkpoint_has_merged_its_last_booster(tmp_path, monkeypatch):
    cfg = recipe(steps=4, gradient_accumulation=1)
    whole, expected = fit(METHODS["xgblora"], tmp_path / "whole", cfg)
    kill_at_the_last_checkpoint(METHODS["xgblora"], tmp_path / "killed", monkeypatch, cfg)
    loaded, outcome = fit(METHODS["xgblora"], tmp_path / "killed", cfg)
    assert_same_weights(whole, loaded)
    assert boosters(loaded) == boosters(whole)
    assert outcome.last_loss == expected.last_loss


def test_sora_killed_at_its_last_checkpoint_still_says_its_ranks(tmp_path, monkeypatch, caplog):
    method, cfg = method_of("sora"), recipe(steps=2)
    kill_at_the_last_checkpoint(method, tmp_path, monkeypatch, cfg)
    with caplog.at_level("INFO", logger="lors"):
        fit(method, tmp_path, cfg)
    assert [record.getMessage()[:5] for record in caplog.records if record.name == "lors"] == ["SoRA:"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_second_run_with_the_same_method_object_is_the_first_one(name, tmp_path):
    """Callbacks are shared by all runs of a method; none may carry anything over, from a run that died either."""
    method = METHODS[name]
    dying = with_callbacks(method, Kill(3))
    with pytest.raises(KeyboardInterrupt):
        fit(dying, tmp_path / "dead")
    one, other = (fit(method, tmp_path / run)[0] for run in ("one", "other"))
    assert_same_weights(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_activation_checkpointing_and_the_split_in_micro_batches_change_nothing(name, tmp_path):
    method, losses = METHODS[name], []
    for number, fields in enumerate(
        ({}, {"activation_checkpointing": True}, {"batch_size": 4, "gradient_accumulation": 1})
    ):
        cfg = recipe(steps=4, checkpoint_every=None, **fields)
        _, outcome = fit(method, tmp_path / str(number), cfg)
        losses.append([line["loss"] for line in outcome.history])
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_what_a_step_needs_has_been_at_work(tmp_path):
    """Otherwise the tests above would compare plain LoRAs."""
    cfg = recipe(checkpoint_every=None)
    model, _ = fit(METHODS["geolora"], tmp_path / "geolora", cfg)
    ranks = {int(layer.geolora_rank["default"]) for layer in model.modules() if isinstance(layer, GeoLoraLinear)}
    assert ranks != {4}
    model, _ = fit(METHODS["xgblora"], tmp_path / "xgblora", cfg)
    layers = [layer for layer in model.modules() if isinstance(layer, XgbLoraLinear)]
    for layer in layers:
        assert bool(layer.xgblora_merged_B["default"].any()) != layer.at_work["default"]
    quiet = method_of("flat_lora", "method.peft.sigma=0.0")
    noisy, still = (fit(m, tmp_path / str(i), cfg)[0] for i, m in enumerate((METHODS["flat_lora"], quiet)))
    one, other = (
        next(part for part in model.modules() if isinstance(part, FlatLoraLinear)) for model in (noisy, still)
    )
    assert not torch.equal(one.flat_lora_B["default"], other.flat_lora_B["default"])
