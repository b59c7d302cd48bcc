"""XGBLoRA: boosters that are merged without a trace, ranks that add up, and an accumulator that loses nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from callback_loop import train_with
from contract import batch, method_of, pruned
from peft import PeftModel
from single_layers import adapted, draw, layers, support
from test_contract_training import fit
from torch import Tensor, nn

from baselines.xgblora import Boosting, XgbLoraConfig, XgbLoraLinear, select, steps_per_booster
from harness.method import adapt

METHOD = method_of("xgblora")


def model_of(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, **fields: object) -> PeftModel:
    """Three layers of the shape 6 x 8 by default."""
    config = XgbLoraConfig(**({"boosters": 4} | fields))
    return adapted(config, *(shapes or [(6, 8)] * 3), dtype=dtype)


def adamw(model: nn.Module, weight_decay: float = 0.0) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-2, betas=(0.9, 0.99), weight_decay=weight_decay)


def working(model: nn.Module) -> list[XgbLoraLinear]:
    return [layer for layer in layers(model) if layer.at_work["default"]]


def updates(model: nn.Module) -> list[Tensor]:
    """delta W of every layer."""
    return [layer.delta_weight(layer.weight, "default").detach() for layer in layers(model)]


# ---- merging


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_a_merge_does_not_change_the_function_and_ends_the_work_of_the_booster(keep_zeros):
    class AroundTheMerge(Boosting):
        def on_step_end(self, args, state, control, model, **_):
            before = squares(model)
            super().on_step_end(args, state, control, model=model)
            torch.testing.assert_close(squares(model), before, rtol=1e-6, atol=0)

    model = model_of(keep_zeros=keep_zeros, drawn=2)
    train_with(AroundTheMerge(), model, adamw(model), lambda: squares(model), range(2), of=8)  # the first booster
    assert [bool(layer.taken_slots("default")[0]) for layer in layers(model)].count(True) == 2
    assert all(layer.factors("default")[1].count_nonzero() == 0 for layer in layers(model))
    assert not working(model)


def test_every_booster_starts_with_fresh_factors_of_its_own_and_without_moments():
    """Of one shape and at work together, two layers must not learn the same direction."""
    model = model_of(drawn=2)
    optimizer, callback, starts = adamw(model), Boosting(), []
    for number in range(4):
        state = SimpleNamespace(global_step=3 * number, max_steps=12)
        callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)
        assert not optimizer.state
        assert all(layer.factors("default")[1].count_nonzero() == 0 for layer in layers(model))
        starts += [layer.factors("default")[0].detach().clone() for layer in working(model)]
        train_with(callback, model, optimizer, lambda: squares(model), range(3 * number, 3 * number + 3), of=12)
    assert len(starts) == 8
    assert all((A.abs() <= 8**-0.5).all() for A in starts)
    assert not any(torch.equal(starts[i], starts[j]) for i in range(8) for j in range(i))


def squares(model: nn.Module) -> Tensor:
    """A loss of which every layer has a share."""
    x = draw(5, 8)
    return sum(layer(x).square().sum() for layer in layers(model))


class Watched(Boosting):
    """Adds up s alpha_t M (.) (B A) by hand, from the factors at the end of every booster."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends, self.sums = ends, {}

    def on_step_end(self, args, state, control, model, **_):
        for layer in working(model) if state.global_step in self.ends else ():
            (A, B), s = layer.factors("default"), layer.scaling["default"]
            booster = s * layer.options["default"].boosting_rate * support(layer) * (B @ A).detach()
            self.sums[layer] = self.sums.get(layer, 0) + booster
        super().on_step_end(args, state, control, model=model)


@pytest.mark.parametrize(
    ("made", "of", "ends"),
    [(6, 6, (2, 4, 6)), (7, 7, (3, 6, 7)), (4, 9, (3, 4)), (6, 9, (3, 6)), (1, 9, (1,))],
    ids=["whole boosters", "a shorter last one", "stopped within a booster", "stopped after one", "after one step"],
)
def test_the_boosting_rate_counts_for_every_booster_and_the_last_one(made, of, ends):
    model = model_of(boosters=3, boosting_rate=0.5, drawn=2)
    callback = Watched(ends)
    train_with(callback, model, adamw(model), lambda: squares(model), range(made), of=of)
    expected = [callback.sums.get(layer, torch.zeros(6, 8)).double() for layer in layers(model)]
    assert any(sum_.any() for sum_ in expected)
    for update, wanted in zip(updates(model), expected, strict=True):
        torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-7)  # slots are float32
    for layer in layers(model):
        assert layer.taken_slots("default")[len(ends) :].count_nonzero() == 0


def test_the_best_model_that_is_loaded_at_the_end_stays_what_it_is():
    """Its booster is that of an earlier step, in other layers than those at work in the last one."""

    class Best(Boosting):
        def on_step_end(self, args, state, control, model, **_):
            super().on_step_end(args, state, control, model=model)
            if state.global_step == 2:
                self.state, self.loss = copy.deepcopy(model.state_dict()), squares(model)
                self.working = working(model)

        def on_train_end(self, args, state, control, model, **_):
            model.load_state_dict(self.state)
            super().on_train_end(args, state, control, model=model)

    model, best = model_of(boosters=3, drawn=1), Best()
    train_with(best, model, adamw(model), lambda: squares(model), range(6), of=9)
    assert best.working != select(model, 1), "choose another seed"
    torch.testing.assert_close(squares(model), best.loss, rtol=1e-6, atol=0)
    assert all(layer.factors("default")[1].count_nonzero() == 0 for layer in layers(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_booster_is_merged_once_times_its_rate_in_float32(dtype):
    (layer,) = layers(model_of((6, 8), boosting_rate=0.3, dtype=dtype))
    B = layer.factors("default")[1]
    B.data.normal_()
    expected = B.detach().float() * 0.3
    layer.merge_booster("default", 0)
    once = layer.delta_weight(layer.weight.float(), "default")
    assert torch.equal(layer.xgblora_merged_B["default"][:, :1], expected)
    for number in (0, 1):
        layer.merge_booster("default", number)
        assert torch.equal(layer.delta_weight(layer.weight.float(), "default"), once)
        assert layer.taken_slots("default").tolist() == [True, False, False, False]


# ---- the optimizer and the gradients


@pytest.mark.parametrize(("keep_zeros", "set_to_none"), [(True, True), (True, False), (False, True)])
def test_every_factor_is_a_parameter_and_only_those_at_work_are_touched(keep_zeros, set_to_none):
    """Data-parallel training needs to know all parameters from the start; AdamW must not decay those at rest."""
    model = model_of(keep_zeros=keep_zeros, drawn=1)
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


@pytest.mark.parametrize("steps", [4, 6])
def test_a_finished_training_that_is_resumed_stays_what_it_is(tmp_path, steps):
    """Without a step left, or with one too many, which the Trainer makes within an epoch (of 4 steps)."""
    whole, resumed = (adapt(METHOD, pruned(), [batch()], seed=seed) for seed in (0, 1))
    fit(whole, METHOD, tmp_path, steps=steps, save_steps=steps)
    checkpoint = tmp_path / f"checkpoint-{steps}"
    trainer = fit(resumed, METHOD, tmp_path / "on", steps=steps, resume=checkpoint, save_strategy="no")
    assert trainer.state.global_step == steps + (steps % 4 > 0)
    assert not working(whole) and not working(resumed)
    assert all(torch.equal(*both) for both in zip(updates(whole), updates(resumed), strict=True))
    assert METHOD.counts(whole) == METHOD.counts(resumed)


@pytest.mark.parametrize(("done", "of"), [(0, 6), (6, 12)], ids=["from the start", "with more steps"])
def test_boosters_are_not_written_over_those_of_another_training(done, of):
    model = model_of(boosters=3)
    train_with(Boosting(), model, adamw(model), lambda: squares(model), range(6), of=6)
    with pytest.raises(ValueError, match=r"'default': boosters of another training fill the slots from .* on"):
        Boosting().on_train_begin(None, SimpleNamespace(global_step=done, max_steps=of), None, model=model)
    Boosting().on_train_begin(None, SimpleNamespace(global_step=6, max_steps=6), None, model=model)


# ---- rank and loss


def test_the_rank_grows_by_one_per_booster_and_goes_below_the_best_rank_one_loss():
    target, identity = draw(12, 4, seed=1) @ draw(4, 12, seed=2), torch.eye(12, dtype=torch.float64)
    floor = torch.linalg.svdvals(target)[1:].square().sum().item()  # what a rank-1 update must leave
    model = model_of((12, 12), keep_zeros=False, lora_alpha=1)
    (layer,), optimizer = layers(model), adamw(model)
    loss = lambda: (layer(identity).t() - layer.weight - target).square().sum()  # noqa: E731
    for number in range(4):
        steps = range(200 * number, 200 * (number + 1))
        last = train_with(Boosting(), model, optimizer, loss, steps, of=800)[-1]
        assert torch.linalg.matrix_rank(updates(model)[0], rtol=1e-4) == number + 1
        if number == 0:
            assert last == pytest.approx(floor, rel=0.05)
    assert last < 1e-3 * floor


# ---- precision and zeros


def test_two_hundred_boosters_into_bfloat16_lose_nothing_and_keep_the_zeros():
    (layer,) = layers(model_of((64, 64), dtype=torch.bfloat16, lora_alpha=16, boosters=200))
    W = layer.base_layer.weight
    W.data.mul_(0.02 / W[W != 0].float().square().mean().sqrt())
    original = W.float()
    exact, naive = torch.zeros(64, 64, dtype=torch.float64), W.clone()
    for number in range(200):
        A, B = layer.factors("default")
        # Eight sign steps of 1e-4 on both factors, as Adam makes at its start.
        A.data = ((2 * torch.rand(1, 64) - 1) / 8 + 8e-4 * torch.randn(1, 64).sign()).bfloat16()
        B.data = (8e-4 * torch.randn(64, 1).sign()).bfloat16()
        booster = 16 * support(layer) * (B.double() @ A.double())
        exact += booster
        naive += booster.bfloat16()
        layer.merge_booster("default", number)
    error = lambda W: ((W.double() - original - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(original + layer.delta_weight(original, "default")) < 1e-5
    boosted = layer.boosted_weight(["default"])
    assert boosted.dtype == torch.bfloat16
    assert error(boosted) < 0.015
    assert error(naive) > 0.03
    assert torch.equal(boosted != 0, support(layer))
    assert torch.equal(W.float(), original)


def test_a_weight_that_boosters_bring_to_zero_can_still_be_trained_and_merged():
    (layer,) = layers(model_of((1, 2), dtype=torch.float32, lora_alpha=1))
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
    (layer,), x = layers(model_of((6, 8))), draw(3, 8)
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


def test_draws_are_those_of_seed_and_number_and_all_blocks_have_their_turn():
    def draws(seed: int) -> list[list[int]]:
        model = model_of(*[(4, 6)] * 6, seed=seed)
        chosen = [select(model, number) for number in range(40)]
        assert working(model) == chosen[-1]
        return [[layers(model).index(layer) for layer in each] for each in chosen]

    first = draws(0)
    assert {len(draw) for draw in first} == {2}
    counts = [sum(index in draw for draw in first) for index in range(6)]
    assert all(5 <= count <= 22 for count in counts)  # 13.3 on average, deviation 3
    assert draws(0) == first != draws(1)


def test_whole_blocks_are_drawn_and_as_many_as_asked_for():
    drawn = [index for index, layer in enumerate(layers(adapt(METHOD, pruned()))) if layer.at_work["default"]]
    assert drawn in ([*range(7)], [*range(7, 14)])
    assert len(working(adapt(method_of("xgblora", "method.peft.drawn=2"), pruned()))) == 14
    with pytest.raises(ValueError, match="drawn=3: must be at most 2, the blocks"):
        adapt(method_of("xgblora", "method.peft.drawn=3"), pruned())


def test_boosters_have_at_least_two_steps_and_the_counts_are_those_of_the_run():
    assert [steps_per_booster(steps, 10) for steps in (4, 15, 20, 300, 301)] == [2, 2, 2, 30, 31]
    stored = 3 * 14 * 8 + 3 * 4 * 14 * 4  # factors in the type of the model, and four slots in float32
    for made, boosters in ((0, 0), (1, 1), (3, 1), (4, 2), (12, 4)):  # of three steps each
        model = METHOD.prepare(model_of(), None, 0)
        if made:
            train_with(Boosting(), model, adamw(model), lambda model=model: squares(model), range(made), of=12)
        counts = {"trainable": 14, "trained_over_run": boosters * 14, "adapter_bytes": stored}
        assert METHOD.counts(model) == counts


def test_the_penalty_is_that_of_the_present_booster():
    model = METHOD.prepare(model_of(penalty_weight=0.5), None, 0)
    (layer,) = working(model)
    A, B = layer.factors("default")
    B.data.normal_()
    assert METHOD.penalty(model).item() == pytest.approx(0.5 * (A.square().sum() + B.square().sum()).item())
    assert METHOD.penalty(model_of()) is None
