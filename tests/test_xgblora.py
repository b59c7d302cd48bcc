"""XGBLoRA: boosters that are merged without a trace, ranks that add up, and an accumulator that loses nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_train
import torch
from callback_loop import pruned_layers, train_with
from contract import batch, logits, method_of, pruned
from peft import PeftModel, get_peft_model
from test_contract_training import fit
from torch import Tensor, nn
from transformers import TrainerCallback

from baselines.xgblora import (
    Boosting,
    XgbLoraConfig,
    XgbLoraLinear,
    factor_penalty,
    first_booster,
    parameter_counts,
    select,
    steps_per_booster,
)
from harness.method import adapt, finish
from lors.sparsity import supports


def adapted(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    config = XgbLoraConfig(**({"lora_alpha": 2, "target_modules": ["proj"], "boosters": 4} | fields))
    return get_peft_model(pruned_layers(*shapes, dtype=dtype), config, autocast_adapter_dtype=False).train()


def layers(model: nn.Module) -> list[XgbLoraLinear]:
    return [part for part in model.modules() if isinstance(part, XgbLoraLinear)]


def adamw(model: nn.Module, weight_decay: float = 0.0) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-2, betas=(0.9, 0.99), weight_decay=weight_decay)


def working(model: nn.Module) -> list[XgbLoraLinear]:
    return [layer for layer in layers(model) if layer.at_work["default"]]


def updates(model: nn.Module) -> list[Tensor]:
    """delta W of every layer."""
    return [layer.delta_weight(layer.weight, "default").detach() for layer in layers(model)]


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- merging


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_a_merge_does_not_change_the_function_and_touches_nothing_else(keep_zeros):
    method = method_of("xgblora", f"method.peft.keep_zeros={str(keep_zeros).lower()}")
    model = adapt(method, pruned(), [batch()])
    optimizer = adamw(model)
    start = everything(model)

    def loss() -> Tensor:
        return model(**batch()).loss

    class BeforeTheMerge(Boosting):
        def on_step_end(self, *args: object, state: SimpleNamespace, **told: object) -> None:
            if state.global_step == 2:
                seen.append(logits(model.eval()))
                model.train()
            super().on_step_end(*args, state=state, **told)

    # Two of ten steps: the first booster.
    seen: list[Tensor] = []
    train_with(BeforeTheMerge(), model.train(), optimizer, loss, range(2), of=10)
    end = everything(model)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    chosen = {part for part in (f"layers.{index}." for index in range(2)) if any(part in name for name in changed)}
    assert len(chosen) == 1, "a third of two blocks, rounded up"
    assert all(".xgblora_" in name for name in changed)
    torch.testing.assert_close(logits(model.eval()), seen[0], rtol=0, atol=1e-5)
    assert not torch.equal(seen[0], logits(pruned()))
    assert all(layer.factors("default")[1].count_nonzero() == 0 for layer in layers(model))
    assert not working(model)


def test_every_booster_starts_with_fresh_factors_and_without_moments():
    model = adapted((6, 8), (6, 8), (6, 8), drawn=1)
    optimizer = adamw(model)
    x, callback = torch.randn(5, 8, dtype=torch.float64), Boosting()
    loss = lambda: sum(layer(x).square().sum() for layer in layers(model))  # noqa: E731
    starts = []
    for number in range(4):
        args = SimpleNamespace(seed=0)
        state = SimpleNamespace(global_step=3 * number, max_steps=12)
        callback.on_step_begin(args, state, None, model=model, optimizer=optimizer)
        assert not optimizer.state
        (layer,) = working(model)
        assert layer.factors("default")[1].count_nonzero() == 0
        starts.append(layer.factors("default")[0].detach().clone())
        train_with(callback, model, optimizer, loss, range(3 * number, 3 * number + 3), of=12)
        assert {id(factor) for factor in optimizer.state} == {id(factor) for factor in layer.factors("default")}
    assert all((A.abs() <= 8**-0.5).all() for A in starts)
    assert not any(torch.equal(starts[i], starts[j]) for i in range(4) for j in range(i))


def test_a_booster_starts_from_another_factor_in_every_layer():
    """Layers of one shape must not learn the same direction."""
    model = adapted((6, 8), (6, 8), (6, 8), drawn=3)
    Boosting().on_step_begin(None, SimpleNamespace(global_step=2, max_steps=8), None, model=model)
    starts = [layer.factors("default")[0] for layer in working(model)]
    assert len(starts) == 3
    assert not any(torch.equal(starts[i], starts[j]) for i in range(3) for j in range(i))


def squares(model: nn.Module) -> Tensor:
    """A loss of which every layer has a share."""
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sum(layer(x).square().sum() for layer in layers(model))


class Watched(Boosting):
    """Adds up s alpha_t M (.) (B A) by hand, from the factors at the end of every booster."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends, self.sums = ends, {}

    def on_step_end(self, args, state, control, model, **_):
        for layer in working(model) if state.global_step in self.ends else ():
            (A, B), s = layer.factors("default"), layer.scaling["default"]
            booster = s * layer.options["default"].boosting_rate * (layer.weight != 0) * (B @ A).detach()
            self.sums[layer] = self.sums.get(layer, 0) + booster
        super().on_step_end(args, state, control, model=model)


@pytest.mark.parametrize(
    ("made", "of", "ends"),
    [(6, 6, (2, 4, 6)), (7, 7, (3, 6, 7)), (4, 9, (3, 4)), (6, 9, (3, 6)), (1, 9, (1,))],
    ids=["whole boosters", "a shorter last one", "stopped within a booster", "stopped after one", "after one step"],
)
def test_the_boosting_rate_counts_for_every_booster_and_the_last_one(tmp_path, made, of, ends):
    model = adapted((6, 8), (6, 8), (6, 8), boosters=3, boosting_rate=0.5, drawn=2, dtype=torch.float64)
    callback = Watched(ends)
    train_with(callback, model, adamw(model), lambda: squares(model), range(made), of=of)
    expected = [callback.sums.get(layer, torch.zeros(6, 8)).double() for layer in layers(model)]
    assert any(sum_.any() for sum_ in expected)
    for update, wanted in zip(updates(model), expected, strict=True):
        torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-7)  # slots are float32
    for layer in layers(model):
        assert layer.taken_slots("default")[len(ends) :].count_nonzero() == 0
    # The adapter beside the weight, the merged weight and the saved adapter are the same function.
    output = squares(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pruned_layers((6, 8), (6, 8), (6, 8)), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(squares(loaded.double()), output)
    for layer, wanted in zip(layers(model), expected, strict=True):
        W = layer.weight.clone()
        layer.merge()
        torch.testing.assert_close(layer.weight, W + wanted, rtol=1e-5, atol=1e-7)


def test_the_best_model_that_is_loaded_at_the_end_stays_what_it_is():
    """Its booster is that of an earlier step, in other layers than those at work in the last one."""

    class Best(Boosting):
        def on_step_end(self, args, state, control, model, **_):
            super().on_step_end(args, state, control, model=model)
            if state.global_step == 2:
                self.state, self.working, self.loss = everything(model), working(model), squares(model)

        def on_train_end(self, args, state, control, model, **_):
            model.load_state_dict(self.state)
            super().on_train_end(args, state, control, model=model)

    model, best = adapted((6, 8), (6, 8), (6, 8), boosters=3, drawn=1), Best()
    train_with(best, model, adamw(model), lambda: squares(model), range(6), of=9)
    assert best.working != select(model, 1), "choose another seed"
    torch.testing.assert_close(squares(model), best.loss, rtol=1e-6, atol=0)
    assert all(layer.factors("default")[1].count_nonzero() == 0 for layer in layers(model))


def test_a_booster_is_merged_once():
    layer = layers(adapted((6, 8), boosting_rate=0.5))[0]
    layer.factors("default")[1].data.normal_()
    whole = layer.delta_weight(layer.weight, "default")
    layer.merge_booster("default", 0)
    half = layer.delta_weight(layer.weight, "default")
    torch.testing.assert_close(half, whole / 2, rtol=1e-6, atol=1e-7)
    for number in (0, 1):
        layer.merge_booster("default", number)
        assert torch.equal(layer.delta_weight(layer.weight, "default"), half)
        assert layer.taken_slots("default").tolist() == [True, False, False, False]


def test_a_rate_is_applied_in_float32_whatever_the_type_of_the_factors():
    layer = layers(adapted((6, 8), boosting_rate=0.3, dtype=torch.bfloat16))[0]
    B = layer.factors("default")[1]
    B.data.normal_()
    expected = 0.3 * B.detach().float()
    layer.merge_booster("default", 0)
    assert torch.equal(layer.xgblora_merged_B["default"][:, :1], expected)


# ---- the optimizer and the gradients


@pytest.mark.parametrize("set_to_none", [True, False])
def test_every_factor_is_a_parameter_and_only_those_at_work_are_touched(set_to_none):
    """Data-parallel training needs to know all parameters from the start; AdamW must not decay those at rest."""
    model = adapted((6, 8), (6, 8), (6, 8), drawn=1)
    optimizer, callback = adamw(model, weight_decay=0.5), Boosting()
    factors = [layer.factors("default") for layer in layers(model)]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(f) for pair in factors for f in pair}
    seen = set()
    for step in range(8):
        told = {"state": SimpleNamespace(global_step=step, max_steps=8), "control": None, "model": model}
        callback.on_step_begin(None, optimizer=optimizer, **told)
        before = [[factor.detach().clone() for factor in pair] for pair in factors]
        squares(model).backward()
        for layer, pair in zip(layers(model), factors, strict=True):
            assert all((factor.grad is not None) == layer.expects_gradient("default") for factor in pair)
            assert all(factor.requires_grad for factor in pair)
            seen |= {id(layer)} if layer.expects_gradient("default") else set()
        optimizer.step()
        for layer, pair, old in zip(layers(model), factors, before, strict=True):
            moved = [not torch.equal(*both) for both in zip(pair, old, strict=True)]
            assert any(moved) == layer.at_work["default"]
        optimizer.zero_grad(set_to_none=set_to_none)
        told["state"].global_step += 1
        callback.on_step_end(None, **told)
    assert len(seen) > 1


# ---- through the Trainer


class Stop(TrainerCallback):
    """Ends the training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.steps


def halved(*overrides: str):
    """XGBLoRA with boosters of two steps, on another block each, of which half is merged."""
    return method_of("xgblora", "method.peft.boosting_rate=0.5", "method.peft.seed=1", *overrides)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "xgblora" in name}


@pytest.mark.parametrize("saved", [3, 4, 5], ids=lambda saved: f"checkpoint-{saved}")
def test_a_training_with_a_rate_goes_on_where_it_was(tmp_path, saved):
    whole, resumed = (adapt(halved(), pruned(), [batch()], seed=seed) for seed in (0, 1))
    fit(whole, halved(), tmp_path, steps=6, save_steps=1)
    fit(resumed, halved(), tmp_path / "on", steps=6, resume=tmp_path / f"checkpoint-{saved}", save_strategy="no")
    for name, tensor in state_of(whole).items():
        assert torch.equal(tensor, state_of(resumed)[name]), name
    assert parameter_counts(whole) == parameter_counts(resumed)
    assert torch.equal(logits(whole.eval()), logits(resumed.eval()))


@pytest.mark.parametrize("steps", [4, 6])
def test_a_finished_training_that_is_resumed_stays_what_it_is(tmp_path, steps):
    """Without a step left, or with one too many, which the Trainer makes within an epoch (of 4 steps)."""
    whole, resumed = (adapt(halved(), pruned(), [batch()], seed=seed) for seed in (0, 1))
    fit(whole, halved(), tmp_path, steps=steps, save_steps=steps)
    trainer = fit(
        resumed, halved(), tmp_path / "on", steps=steps, resume=tmp_path / f"checkpoint-{steps}", save_strategy="no"
    )
    assert trainer.state.global_step == steps + (steps % 4 > 0)
    assert not working(whole) and not working(resumed)
    assert all(torch.equal(*both) for both in zip(updates(whole), updates(resumed), strict=True))
    assert parameter_counts(whole) == parameter_counts(resumed)


def test_a_finished_run_of_the_harness_that_is_only_loaded_has_the_same_numbers(tmp_path):
    cfg = test_train.recipe(steps=6)
    whole, _ = test_train.fit(halved(), tmp_path, cfg)
    loaded, _ = test_train.fit(halved(), tmp_path, cfg)
    test_train.assert_same_weights(whole, loaded)
    assert parameter_counts(whole) == parameter_counts(loaded)
    assert all(torch.equal(*both) for both in zip(updates(whole), updates(loaded), strict=True))


@pytest.mark.parametrize("stopped", [3, 4])
def test_a_training_that_is_stopped_merges_what_it_has(tmp_path, stopped):
    """Merged, the model is what it was beside the adapter, and every booster is in the slot of its number."""
    method = dataclasses.replace(halved(), callbacks=(*halved().callbacks, Stop(stopped)))
    model, before = adapt(method, pruned(), [batch()]), supports(pruned())
    fit(model, method, tmp_path, steps=20, save_strategy="no")
    slots = torch.stack([layer.taken_slots("default") for layer in layers(model)]).any(dim=0)
    assert slots.tolist() == [True, True] + [False] * 8
    counts = parameter_counts(model)
    assert counts["trained_over_run"] == 2 * counts["trainable"]
    expected = logits(model.eval())
    torch.testing.assert_close(logits(finish(method, model, before, "merged")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("again", "resume"), [(6, False), (12, True)], ids=["from the start", "with more steps"])
def test_boosters_are_not_written_over_those_of_another_training(tmp_path: Path, again: int, resume: bool):
    method = halved("method.peft.boosters=3")
    model = adapt(method, pruned(), [batch()])
    fit(model, method, tmp_path, steps=6, save_steps=6)
    before = everything(model)
    with pytest.raises(ValueError, match=r"'default': boosters of another training fill the slots from .* on"):
        checkpoint = tmp_path / "checkpoint-6" if resume else None
        fit(model, method, tmp_path / "again", steps=again, resume=checkpoint, save_strategy="no")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- rank and loss


def test_the_rank_grows_by_one_per_booster_and_goes_below_the_best_rank_one_loss():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    target = left @ right.t()
    sigma = torch.linalg.svdvals(target)
    floor = sigma[1:].square().sum().item()  # what a rank-1 update must leave

    model = adapted((12, 12), keep_zeros=False, lora_alpha=1)
    layer = layers(model)[0]
    optimizer = adamw(model)
    loss = lambda: (layer(torch.eye(12, dtype=torch.float64)).t() - layer.weight - target).square().sum()  # noqa: E731
    for number in range(4):
        steps = range(200 * number, 200 * (number + 1))
        last = train_with(Boosting(), model, optimizer, loss, steps, of=800)[-1]
        update = layer.delta_weight(layer.weight, "default").detach()
        assert torch.linalg.matrix_rank(update, rtol=1e-4) == number + 1
        if number == 0:
            assert last == pytest.approx(floor, rel=0.05)
    assert last < 1e-3 * floor


# ---- precision and zeros


def test_two_hundred_boosters_into_bfloat16_lose_nothing_and_keep_the_zeros():
    torch.manual_seed(0)
    config = XgbLoraConfig(lora_alpha=16, target_modules=["proj"], boosters=200)
    base = pruned_layers((64, 64), dtype=torch.bfloat16)
    W = base["layers"][0]["proj"].weight
    W.data.mul_(0.02 / W[W != 0].float().square().mean().sqrt())
    layer = layers(get_peft_model(base, config, autocast_adapter_dtype=False))[0].train()
    M, original = W != 0, W.float()
    exact, naive = torch.zeros(64, 64, dtype=torch.float64), W.clone()
    for number in range(200):
        A, B = layer.factors("default")
        # Eight sign steps of 1e-4 on both factors, as Adam makes at its start.
        A.data = ((2 * torch.rand(1, 64) - 1) / 8 + 8e-4 * torch.randn(1, 64).sign()).bfloat16()
        B.data = (8e-4 * torch.randn(64, 1).sign()).bfloat16()
        booster = 16 * M * (B.double() @ A.double())
        exact += booster
        naive += booster.bfloat16()
        layer.merge_booster("default", number)
    error = lambda W: ((W.double() - original - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(original + layer.delta_weight(original, "default")) < 1e-5
    boosted = layer.boosted_weight(["default"])
    assert boosted.dtype == torch.bfloat16
    assert error(boosted) < 0.015
    assert error(naive) > 0.03
    assert torch.equal(boosted != 0, M)
    assert torch.equal(W.float(), original)


def test_a_weight_that_boosters_bring_to_zero_can_still_be_trained_and_merged():
    layer = layers(adapted((1, 2), dtype=torch.float32, lora_alpha=1))[0]
    layer.base_layer.weight.copy_(torch.tensor([[0.5, 0.0]]))
    A, B = layer.factors("default")
    A.data = torch.tensor([[-0.5, 1.0]])
    B.data = torch.tensor([[1.0]])
    layer.merge_booster("default", 0)
    assert layer.boosted_weight(["default"]).tolist() == [[pytest.approx(0, abs=1e-30), 0.0]]
    A.data = torch.tensor([[0.25, 1.0]])
    B.data = torch.tensor([[1.0]])
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).item() == pytest.approx(0.25)
    layer.merge()
    assert layer.weight.tolist() == [[0.25, 0.0]]


def test_w_t_is_made_again_when_the_boosters_change_in_whatever_way():
    layer = layers(adapted((6, 8)))[0]
    x = torch.randn(3, 8, dtype=torch.float64)
    before = layer(x)
    assert layer.boosted_weight(["default"]) is layer.boosted_weight(["default"])
    layer.xgblora_merged_A["default"].normal_()
    layer.xgblora_merged_B["default"].normal_()  # as loading a checkpoint does
    assert not torch.allclose(layer(x), before)
    layer.merge()
    merged = layer.base_layer(x)
    layer.unmerge()
    torch.testing.assert_close(layer(x), merged)
    layer.xgblora_merged_B["default"].zero_()
    assert torch.equal(layer(x), before)


# ---- what a booster trains


def test_draws_are_those_of_seed_and_number_and_all_units_have_their_turn():
    model = adapted(*[(4, 6)] * 6)
    draws = []
    for number in range(40):
        chosen = select(model, number)
        assert len(chosen) == 2
        assert working(model) == chosen
        draws.append([layers(model).index(layer) for layer in chosen])
    assert draws == [[layers(model).index(layer) for layer in select(model, number)] for number in range(40)]
    counts = [sum(index in draw for draw in draws) for index in range(6)]
    assert all(5 <= count <= 22 for count in counts)  # 13.3 on average, deviation 3
    other = adapted(*[(4, 6)] * 6, seed=1)
    assert draws != [[layers(other).index(layer) for layer in select(other, number)] for number in range(40)]


def test_units_are_blocks_or_single_matrices_and_as_many_as_asked_for():
    by_block = adapt(method_of("xgblora"), pruned(), [batch()])
    blocks = [index for index, layer in enumerate(layers(by_block)) if layer.at_work["default"]]
    assert blocks in ([*range(7)], [*range(7, 14)])
    single = adapt(method_of("xgblora", "method.peft.unit=matrix", "method.peft.drawn=3"), pruned(), [batch()])
    assert len(working(single)) == 3
    with pytest.raises(ValueError, match="drawn=3: the model has 2 units of the kind unit='block'"):
        adapt(method_of("xgblora", "method.peft.drawn=3"), pruned(), [batch()])


def test_boosters_have_at_least_two_steps_and_the_counts_are_those_of_the_run():
    assert [steps_per_booster(steps, 10) for steps in (4, 15, 20, 300, 301)] == [2, 2, 2, 30, 31]
    model = first_booster(adapted((6, 8), (6, 8), (6, 8)))
    stored = 3 * 14 * 8 + 3 * 4 * 14 * 4  # factors in the type of the model, and four slots in float32
    assert parameter_counts(model) == {"trainable": 14, "trained_over_run": 0, "adapter_bytes": stored}
    for made, boosters in ((1, 1), (3, 1), (4, 2), (12, 4)):  # of three steps each
        model = first_booster(adapted((6, 8), (6, 8), (6, 8)))
        train_with(Boosting(), model, adamw(model), lambda model=model: squares(model), range(made), of=12)
        assert parameter_counts(model) == {
            "trainable": 14,
            "trained_over_run": boosters * 14,
            "adapter_bytes": stored,
        }


def test_the_penalty_is_that_of_the_present_booster():
    model = first_booster(adapted((6, 8), (6, 8), penalty_weight=0.5))
    (layer,) = working(model)
    A, B = layer.factors("default")
    B.data.normal_()
    assert factor_penalty(model).item() == pytest.approx(0.5 * (A.square().sum() + B.square().sum()).item())
    assert factor_penalty(adapted((6, 8))) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boosters": 0}, "boosters=0: must be a whole number >= 1"),
        ({"drawn": 0}, "drawn=0: must be a whole number >= 1"),
        ({"unit": "layer"}, "unit='layer': must be one of block, matrix"),
        ({"boosting_rate": 0}, "boosting_rate=0: must be a number > 0"),
        ({"penalty_weight": -1}, "penalty_weight=-1: must be a number >= 0"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        XgbLoraConfig(**fields)
    assert "\n" not in str(error.value)
