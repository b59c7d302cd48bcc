"""Local reconstruction: its optimum in closed form, what enters and leaves a block, the walk from block to block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from callback_loop import with_callbacks
from conftest import make_tiny_llama, recipe
from contract import method_of, prune
from peft.tuners.tuners_utils import BaseTunerLayer
from single_layers import draw
from test_train import TOKENIZER, fit, rows
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from baselines.full import mask_gradient
from baselines.reconstruct import block_error
from harness.config import resolve
from harness.data import collator
from harness.errors import BadInput
from harness.inputs import read_inputs
from harness.method import Method, adapt, finish, round_at
from harness.method_from_config import build_method
from lors.sparsity import supports, zero_report

DEPTH = 3
NO_CALL = ((), {})


def dense() -> PreTrainedModel:
    return make_tiny_llama(num_hidden_layers=DEPTH, initializer_range=0.3)


def sparse() -> PreTrainedModel:
    return prune(dense())


def method(name: str = "reconstruct", *overrides: str) -> Method:
    """The method on its own, with the dense model."""
    made = copy.copy(method_of(name, *overrides))
    made.dense = dense()
    return made


def padded() -> dict[str, Tensor]:
    tokens = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = mask[2, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def test_the_optimum_of_one_linear_is_least_squares_on_the_support_of_each_row():
    hidden, W0 = draw(1, 40, 8), draw(5, 8, seed=1)
    M = draw(5, 8, seed=2) > 0
    teacher, block = (nn.Linear(8, 5, bias=False, dtype=torch.float64) for _ in range(2))
    teacher.weight.data.copy_(W0)
    block.weight.data.copy_(W0 * M)
    block.weight.register_post_accumulate_grad_hook(mask_gradient)
    optimizer = torch.optim.LBFGS([block.weight], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = block_error(block, teacher, hidden, NO_CALL)
        error.backward()
        return error

    before = optimizer.step(closure)
    X = hidden[0]
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for row, kept in enumerate(M):
        expected[row, kept] = torch.linalg.lstsq(X[:, kept], X @ W0[row]).solution
    torch.testing.assert_close(block.weight.data, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(before, (X @ (W0 * ~M).t()).square().mean())
    torch.testing.assert_close(closure(), (X @ (expected - W0).t()).square().mean())


@pytest.mark.parametrize("inputs", ["sequential", "parallel"])
@pytest.mark.parametrize("number", range(DEPTH))
def test_the_error_is_the_mean_over_tokens_of_what_the_block_does_otherwise(inputs, number):
    """Models put together of dense and pruned blocks, run as a whole, give both outputs."""
    batch = padded()

    def states(before: PreTrainedModel, at: PreTrainedModel) -> Tensor:
        mixed = sparse()
        for i in range(number + 1):
            mixed.model.layers[i] = (at if i == number else before).model.layers[i]
        given = []
        hook = mixed.model.layers[number].register_forward_hook(lambda block, args, output: given.append(output))
        mixed(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
        return given[0]

    before = dense() if inputs == "parallel" else sparse()
    difference = (states(before, sparse()) - states(before, dense()))[batch["attention_mask"].bool()]
    chosen = method("reconstruct", f"method.inputs={inputs}")
    model = adapt(chosen, sparse())
    model.teacher.go_to(number, model)
    torch.testing.assert_close(chosen.objective(model, batch), difference.square().mean())


def test_the_gradient_stays_in_the_block_and_off_its_zeros():
    chosen = method()
    model = adapt(chosen, sparse())
    model.teacher.go_to(1, model)
    chosen.objective(model, padded()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("model.layers.1."), name
        if parameter.grad is not None:
            assert parameter.grad.any() and not parameter.grad[parameter == 0].any(), name


class Watch(TrainerCallback):
    """Notes the parameters with optimizer state after each step."""

    def __init__(self) -> None:
        self.with_state: list[set[str]] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        held = getattr(optimizer, "optimizer", optimizer).state
        self.with_state.append({names[parameter] for parameter in held})


@pytest.mark.parametrize("name", ["reconstruct", "reconstruct_lors"])
def test_every_block_has_its_share_of_the_steps_with_a_schedule_and_a_state_of_its_own(name, tmp_path):
    chosen, watch, steps = method(name, "method.inputs=parallel"), Watch(), 24  # each block has one input for good
    errors, batch = {}, collator(TOKENIZER, "longest", 10)(rows())
    for moment in ("before", "after"):
        model = adapt(chosen, sparse())
        if moment == "after":
            cfg = recipe(steps=steps, learning_rate=1e-2, minimum_learning_rate=1e-3, warmup_steps=0)
            model, outcome = fit(with_callbacks(chosen, watch), tmp_path, cfg, model=model)
        plain = model if name == "reconstruct" else model.get_base_model()
        errors[moment] = []
        for number in range(DEPTH):
            plain.teacher.go_to(number, plain)
            errors[moment].append(chosen.objective(model, batch).item())
    assert all(after < 0.95 * before for before, after in zip(errors["before"], errors["after"], strict=True))
    rates = torch.tensor([line["lr"] for line in outcome.history]).view(DEPTH, -1)
    assert torch.equal(rates[0], rates[1]) and torch.equal(rates[0], rates[2])
    assert rates[0, 0] == pytest.approx(1e-2) and rates[0, -1] == pytest.approx(1e-3)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    for step, held in enumerate(watch.with_state):
        assert held == {key for key in trained if f".layers.{step * DEPTH // steps}." in key}, step
    merged, M = finish(chosen, model, supports(sparse()), "merged"), supports(sparse())
    assert zero_report(M, merged, "unstructured")["lost"] == 0
    assert torch.equal(merged.model.embed_tokens.weight, sparse().model.embed_tokens.weight)
    assert torch.equal(merged.model.norm.weight, sparse().model.norm.weight)


def test_without_a_dense_model_the_blocks_without_their_adapters_stand_in_for_it():
    chosen = method("reconstruct_lors")
    chosen.dense = None
    model = adapt(chosen, sparse())
    plain = model.get_base_model()
    (block,) = plain.teacher.held.values()
    assert not any(isinstance(part, BaseTunerLayer) for part in block.modules())
    assert chosen.objective(model, padded()) == 0
    for name, parameter in model.named_parameters():
        if "lors_B" in name:
            parameter.data.normal_()
    assert chosen.objective(model, padded()) > 0


@pytest.mark.parametrize(("steps", "rounds"), [(9, 3), (10, 4), (7, 2), (2, 5), (1, 1)])
def test_rounds_follow_each_other_and_are_nearly_equal(steps, rounds):
    found = [round_at(step, steps, rounds) for step in range(steps)]
    lengths = [end - start for _, start, end in dict.fromkeys(found)]
    assert sum(lengths) == steps and max(lengths) - min(lengths) <= 1
    assert all(start <= step < end for step, (_, start, end) in enumerate(found))
    assert [number for number, _, _ in found] == sorted(number for number, _, _ in found)
    assert found[-1][2] == steps and round_at(steps, steps, rounds) == found[-1]


def test_fewer_steps_than_blocks_are_told(tmp_path, caplog):
    chosen = method()
    with caplog.at_level("WARNING", "lors"):
        fit(chosen, tmp_path, recipe(steps=2), model=adapt(chosen, sparse()))
    assert "2 steps for 3 blocks: not every block is reconstructed" in caplog.messages


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune=none"], "method=reconstruct: needs the dense model beside the pruned one"),
        (["prune.when=after"], "method=reconstruct: needs the dense model beside the pruned one"),
        (["launch.processes=2"], "launch.processes=2: must be 1 for method=reconstruct"),
    ],
)
def test_what_has_no_dense_model_or_several_processes_is_refused(composed, overrides, message, monkeypatch, tmp_path):
    monkeypatch.setenv("LORS_JOB", "")
    monkeypatch.setattr("harness.config.count", lambda: 2 if "launch.processes=2" in overrides else 1)
    cfg = resolve(composed("method=reconstruct", "sparsity=0.5", f"cache_root={tmp_path}", *overrides))
    with pytest.raises(BadInput, match=message):
        read_inputs(cfg, build_method(cfg))


def test_a_block_without_an_adapter_is_refused():
    chosen = method("reconstruct_lors", "adapter.targets=[q_proj]")
    chosen.peft = copy.deepcopy(chosen.peft)
    chosen.peft.layers_to_transform = [0, 1]
    with pytest.raises(ValueError, match=r"^target_modules=.*: model.layers.2 has nothing to train$"):
        adapt(chosen, sparse())
