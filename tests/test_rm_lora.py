"""RM-LoRA: the penalty, the mask of the gradients, and what is left of the method without either."""

from __future__ import annotations

import pytest
import torch
from callback_loop import train_with
from peft import PeftModel
from single_layers import adapted, draw, layers
from torch import Tensor, nn

from baselines.rm_lora import GradientMask, RmLoraConfig, RmLoraMethod, gram_distance, mask_gradients, mean_cosine

R = 8


def model_of(**fields: object) -> PeftModel:
    """Two layers with an adapter of rank 8, both factors away from zero."""
    model = adapted(RmLoraConfig(r=R, lora_alpha=4, **fields), (24, 40), (48, 20))
    for parameter in factors(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def components(model: nn.Module) -> list[Tensor]:
    """The rows of every A and the columns of every B."""
    return [rows for layer in layers(model) for A, B in [layer.factors("default")] for rows in (A, B.t())]


def penalty(model: PeftModel) -> Tensor | None:
    return RmLoraMethod("rm_lora", model.peft_config["default"]).penalty(model)


# ---- the penalty


def test_the_penalty_is_the_mean_distance_of_all_gram_matrices_from_the_identity():
    model = model_of(penalty_weight=0.25)
    distances = [(rows @ rows.t() - torch.eye(R)).square().sum().sqrt().item() for rows in components(model)]
    assert penalty(model).item() == pytest.approx(0.25 * sum(distances) / 4, rel=1e-12)
    assert penalty(model_of(penalty_weight=0.0)) is None


def test_the_cosine_penalty_does_not_see_the_scale_of_a_component():
    rows = draw(5, 9)
    expected = sum(abs(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i in range(5) for j in range(5) if i != j)
    assert mean_cosine(rows).item() == pytest.approx(expected.item() / 20)
    torch.testing.assert_close(mean_cosine(rows * draw(5, 1, seed=1).abs()), mean_cosine(rows))
    assert mean_cosine(rows[:1]) == 0
    model = model_of(penalty="cosine", penalty_weight=1.0)
    assert penalty(model).item() == pytest.approx(sum(mean_cosine(rows).item() for rows in components(model)) / 4)


def test_the_distance_has_the_gradient_of_finite_differences_and_none_at_zero():
    assert torch.autograd.gradcheck(gram_distance, draw(R, 20).requires_grad_())
    zero = torch.zeros(R, 20, requires_grad=True)  # B at the start: a saddle, not a NaN
    gram_distance(zero).backward()
    assert (zero.grad == 0).all()


def test_the_penalty_keeps_float32_under_autocast_and_in_a_bfloat16_model():
    model = model_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty(model).item() == pytest.approx(penalty(model_of()).item(), rel=1e-5)
    assert penalty(model.bfloat16()).dtype == torch.float32


# ---- the mask


def moved_by(model: PeftModel, step: int) -> list[tuple[Tensor, Tensor]]:
    """Components of A and of B, by layer, that one step of SGD on random gradients moves."""
    before = [rows.clone() for rows in components(model)]
    weights = [draw(*parameter.shape, seed=step) for parameter in factors(model)]
    loss = lambda: sum((w * p).sum() for w, p in zip(weights, factors(model), strict=True))  # noqa: E731
    train_with(GradientMask(), model, torch.optim.SGD(factors(model), lr=0.1), loss, [step], of=9)
    changed = [new != old for new, old in zip(components(model), before, strict=True)]
    assert all(torch.equal(rows.all(dim=1), rows.any(dim=1)) for rows in changed)
    moved = [rows.all(dim=1) for rows in changed]
    return list(zip(moved[::2], moved[1::2], strict=True))


@pytest.mark.parametrize("mask", ["coupled", "independent"])
def test_exactly_k_components_move_in_every_step_but_the_first(mask):
    model = model_of(mask=mask, keep_rate=0.375)
    assert all(A.all() and B.all() for A, B in moved_by(model, 0))
    moved = [pair for step in range(1, 9) for pair in moved_by(model, step)]
    assert all(A.sum() == 3 and B.sum() == 3 for A, B in moved)
    assert all(torch.equal(A, B) for A, B in moved) == (mask == "coupled")
    assert len({tuple(A.tolist()) for A, _ in moved}) > 4  # other components for other layers and steps


def test_every_component_is_chosen_equally_often_and_the_draw_is_that_of_seed_and_step():
    model = nn.ModuleDict({"adapted": model_of(keep_rate=0.25), "head": nn.Linear(3, 3)})

    def drawn(seed: int, step: int) -> Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        mask_gradients(model, seed, step)
        assert (model["head"].weight.grad == 1).all(), "what is no factor is never masked"
        return torch.stack([layer.rm_lora_A["default"].grad[:, 0] for layer in layers(model)])

    shares = sum(drawn(0, step) for step in range(400)) / 400
    assert (shares - 0.25).abs().max() < 0.1  # deviation of a share: 0.022
    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert any(not torch.equal(*drawn(0, step)) for step in range(3)), "layers have draws of their own"
    assert not torch.equal(drawn(0, 3), drawn(1, 3))


def test_the_start_is_gaussian_and_the_counts_tell_what_a_step_updates():
    model = adapted(RmLoraConfig(r=R, keep_rate=0.4), (400, 600))
    A, B = layers(model)[0].factors("default")
    assert A.std().item() == pytest.approx(0.02, rel=0.05)
    assert (B == 0).all()
    assert RmLoraMethod("rm_lora", RmLoraConfig()).counts(model) == {"updated_per_step": 3 * 1000}
