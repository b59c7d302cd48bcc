"""XGBLoRA: boosters that are merged without a trace, ranks that add up, and an accumulator that loses nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from callback_loop import pruned_layers, train_with
from contract import batch, logits, method_of, pruned
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from baselines.xgblora import (
    Boosting,
    XgbLoraConfig,
    XgbLoraLinear,
    all_factors_adamw,
    factor_penalty,
    first_booster,
    parameter_counts,
    select,
    steps_per_booster,
)
from lors.harness.method import adapt

RECIPE = SimpleNamespace(learning_rate=2e-2, betas=(0.9, 0.99), weight_decay=0.0)


def adapted(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    config = XgbLoraConfig(**({"lora_alpha": 2, "target_modules": ["proj"], "boosters": 4} | fields))
    return get_peft_model(pruned_layers(*shapes, dtype=dtype), config, autocast_adapter_dtype=False).train()


def layers(model: nn.Module) -> list[XgbLoraLinear]:
    return [part for part in model.modules() if isinstance(part, XgbLoraLinear)]


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- merging


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_a_merge_does_not_change_the_function_and_touches_nothing_else(keep_zeros):
    method = method_of("xgblora", f"method.peft.keep_zeros={str(keep_zeros).lower()}")
    model = adapt(method, pruned(), [batch()])
    optimizer = all_factors_adamw(model, RECIPE)
    start = everything(model)

    def loss() -> Tensor:
        return model(**batch()).loss

    # Five of ten steps: two whole boosters of two steps, and a third one that has made its first.
    train_with(Boosting(), model.train(), optimizer, loss, range(2), of=10)
    before, end = logits(model.eval()), everything(model)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    chosen = {part for part in (f"layers.{index}." for index in range(2)) if any(part in name for name in changed)}
    assert len(chosen) == 1, "a third of two blocks, rounded up"
    assert all(".xgblora_" in name for name in changed)

    train_with(Boosting(), model.train(), optimizer, lambda: model(**batch()).loss * 0, [2], of=10)
    torch.testing.assert_close(logits(model.eval()), before, rtol=0, atol=1e-5)
    assert not torch.equal(before, logits(pruned()))
    for layer in layers(model):
        A, B = layer.factors("default")
        assert (B == 0).all()
        assert A.requires_grad == layer.at_work["default"]
    for name, tensor in everything(model).items():
        assert ".xgblora_" in name or torch.equal(tensor, start[name]), name


def test_every_booster_starts_with_fresh_factors_and_without_moments():
    model = adapted((6, 8), (6, 8), (6, 8), drawn=1)
    optimizer = all_factors_adamw(model, RECIPE)
    x, callback = torch.randn(5, 8, dtype=torch.float64), Boosting()
    loss = lambda: sum(layer(x).square().sum() for layer in layers(model))  # noqa: E731
    starts = []
    for number in range(4):
        args = SimpleNamespace(seed=0)
        state = SimpleNamespace(global_step=3 * number, max_steps=12)
        callback.on_step_begin(args, state, None, model=model, optimizer=optimizer)
        assert not optimizer.state
        working = [layer for layer in layers(model) if layer.at_work["default"]]
        assert len(working) == 1
        assert working[0].factors("default")[1].count_nonzero() == 0
        starts.append(working[0].factors("default")[0].detach().clone())
        train_with(callback, model, optimizer, loss, range(3 * number + 1, 3 * number + 3), of=12)
        assert {id(factor) for factor in optimizer.state} == {id(factor) for factor in working[0].factors("default")}
    assert all((A.abs() <= 8**-0.5).all() for A in starts)
    assert not any(torch.equal(starts[i], starts[j]) for i in range(4) for j in range(i))


def test_the_last_booster_needs_no_merge_and_a_boosting_rate_scales_the_others():
    layer = layers(adapted((6, 8), boosting_rate=0.5))[0]
    layer.factors("default")[1].data.normal_()
    whole = layer.delta_weight(layer.weight, "default")
    layer.merge_booster("default", 0)
    half = layer.delta_weight(layer.weight, "default")
    torch.testing.assert_close(half, whole / 2, rtol=1e-6, atol=1e-7)  # slots are float32
    layer.merge_booster("default", 1)  # B is zero: nothing counts twice
    assert torch.equal(layer.delta_weight(layer.weight, "default"), half)


# ---- rank and loss


def test_the_rank_grows_by_one_per_booster_and_goes_below_the_best_rank_one_loss():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    target = left @ right.t()
    sigma = torch.linalg.svdvals(target)
    floor = sigma[1:].square().sum().item()  # what a rank-1 update must leave

    model = adapted((12, 12), keep_zeros=False, lora_alpha=1)
    layer = layers(model)[0]
    optimizer = all_factors_adamw(model, RECIPE)
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
        working = select(model, number)
        assert len(working) == 2
        draws.append([layers(model).index(layer) for layer in working])
    assert draws == [[layers(model).index(layer) for layer in select(model, number)] for number in range(40)]
    counts = [sum(index in draw for draw in draws) for index in range(6)]
    assert all(5 <= count <= 22 for count in counts)  # 13.3 on average, deviation 3
    other = adapted(*[(4, 6)] * 6, seed=1)
    assert draws != [[layers(other).index(layer) for layer in select(other, number)] for number in range(40)]


def test_units_are_blocks_or_single_matrices_and_as_many_as_asked_for():
    by_block = adapt(method_of("xgblora"), pruned(), [batch()])
    assert {name.split(".layers.")[1][0] for name, p in by_block.named_parameters() if p.requires_grad}.__len__() == 1
    assert sum(layer.at_work["default"] for layer in layers(by_block)) == 7
    single = adapt(method_of("xgblora", "method.peft.unit=matrix", "method.peft.drawn=3"), pruned(), [batch()])
    assert sum(layer.at_work["default"] for layer in layers(single)) == 3
    with pytest.raises(ValueError, match="drawn=3: the model has 2 units of the kind unit='block'"):
        adapt(method_of("xgblora", "method.peft.drawn=3"), pruned(), [batch()])


def test_boosters_have_at_least_two_steps_and_the_counts_are_those_of_the_run():
    assert [steps_per_booster(steps, 10) for steps in (4, 15, 20, 300, 301)] == [2, 2, 2, 30, 31]
    model = first_booster(adapted((6, 8), (6, 8), (6, 8)))
    assert parameter_counts(model) == {"trained_over_run": 14}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 14
    x = torch.randn(5, 8, dtype=torch.float64)
    loss = lambda: sum(layer(x).square().sum() for layer in layers(model))  # noqa: E731
    train_with(Boosting(), model, all_factors_adamw(model, RECIPE), loss, range(12), of=12)
    assert parameter_counts(model) == {"trained_over_run": 4 * 14}


def test_the_penalty_is_that_of_the_present_booster():
    model = first_booster(adapted((6, 8), (6, 8), penalty_weight=0.5))
    working = next(layer for layer in layers(model) if layer.at_work["default"])
    A, B = working.factors("default")
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
