"""RM-LoRA: the penalty, the mask of the gradients, and what is left of the method without either."""

from __future__ import annotations

import pytest
import torch
from callback_loop import pruned_layers, train_with
from peft import PeftModel, get_peft_model
from torch import nn

from baselines.masked_lora import MaskedLoraConfig
from baselines.rm_lora import (
    GradientMask,
    RmLoraConfig,
    gram_distance,
    mask_gradients,
    mean_cosine,
    orthogonality_penalty,
    parameter_counts,
)

R = 8


def adapted(**fields: object) -> PeftModel:
    """Two layers with an adapter of rank 8 in float64, both factors away from zero."""
    torch.manual_seed(0)
    config = RmLoraConfig(**({"r": R, "lora_alpha": 4, "target_modules": ["proj"]} | fields))
    model = get_peft_model(pruned_layers((24, 40), (48, 20)), config, autocast_adapter_dtype=False).double()
    for parameter in factors(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers(model: nn.Module) -> list[nn.Module]:
    return [part["proj"] for part in model.base_model.model["layers"]]


# ---- the penalty


def test_the_penalty_is_the_mean_distance_of_all_gram_matrices_from_the_identity():
    model = adapted(penalty_weight=0.25)
    distances = []
    for layer in layers(model):
        A, B = layer.rm_lora_A["default"].detach().numpy(), layer.rm_lora_B["default"].detach().numpy()
        for gram in (A @ A.T, B.T @ B):
            distances.append(((gram - torch.eye(R).numpy()) ** 2).sum() ** 0.5)
    assert orthogonality_penalty(model).item() == pytest.approx(0.25 * sum(distances) / 4, rel=1e-12)


def test_the_cosine_penalty_does_not_see_the_scale_of_a_component():
    rows = torch.randn(5, 9, dtype=torch.float64)
    expected = sum(abs(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i in range(5) for j in range(5) if i != j)
    assert mean_cosine(rows).item() == pytest.approx(expected.item() / 20)
    torch.testing.assert_close(mean_cosine(rows * torch.rand(5, 1, dtype=torch.float64)), mean_cosine(rows))
    assert mean_cosine(rows[:1]) == 0
    model = adapted(penalty="cosine", penalty_weight=1.0)
    cosines = [mean_cosine(part).item() for layer in layers(model) for part in (layer.factors("default")[0],)]
    cosines += [mean_cosine(layer.factors("default")[1].t()).item() for layer in layers(model)]
    assert orthogonality_penalty(model).item() == pytest.approx(sum(cosines) / 4)


def test_the_distance_is_zero_for_orthonormal_rows_and_its_gradient_is_that_of_finite_differences():
    Q = torch.linalg.qr(torch.randn(20, R, dtype=torch.float64)).Q.t()
    assert gram_distance(Q) < 1e-12
    rows = torch.randn(R, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gram_distance, rows)
    zero = torch.zeros(R, 20, requires_grad=True)  # B at the start: a saddle, not a NaN
    gram_distance(zero).backward()
    assert (zero.grad == 0).all()


def test_the_penalty_alone_makes_both_factors_orthonormal():
    torch.manual_seed(0)
    config = RmLoraConfig(r=R, target_modules=["proj"], init="kaiming", penalty_weight=1.0)
    model = get_peft_model(pruned_layers((64, 64), (64, 64)), config, autocast_adapter_dtype=False)
    for layer in layers(model):
        nn.init.normal_(layer.rm_lora_B["default"], std=1e-3)  # at B = 0 it would stand still
    optimizer = torch.optim.Adam(factors(model), lr=1e-3)
    for _ in range(300):
        orthogonality_penalty(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers(model):
        A, B = layer.factors("default")
        assert (A @ A.t() - torch.eye(R)).abs().max() < 1e-2
        assert (B.t() @ B - torch.eye(R)).abs().max() < 1e-2


def test_the_penalty_keeps_float32_under_autocast_and_zero_weight_costs_nothing():
    model = adapted().float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = orthogonality_penalty(model)
    assert torch.equal(inside, orthogonality_penalty(model))
    assert orthogonality_penalty(adapted(penalty_weight=0.0)) == 0


# ---- the mask


def sgd_step(model: PeftModel, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Components of A and of B, by layer, that one step of SGD on random gradients moves."""
    before = [(layer.factors("default")[0].clone(), layer.factors("default")[1].clone()) for layer in layers(model)]
    weights = [torch.randn_like(parameter) for parameter in factors(model)]
    loss = lambda: sum((w * p).sum() for w, p in zip(weights, factors(model), strict=True))  # noqa: E731
    train_with(GradientMask(), model, torch.optim.SGD(factors(model), lr=0.1), loss, [step], of=9)
    moved = []
    for layer, (A, B) in zip(layers(model), before, strict=True):
        new_A, new_B = layer.factors("default")
        moved.append(((new_A != A).all(dim=1), (new_B != B).all(dim=0)))
        assert ((new_A != A).any(dim=1) == moved[-1][0]).all()
        assert ((new_B != B).any(dim=0) == moved[-1][1]).all()
    return moved


@pytest.mark.parametrize("mask", ["coupled", "independent"])
def test_exactly_k_components_move_in_every_step_but_the_first(mask):
    model = adapted(mask=mask, keep_rate=0.375)
    assert all(A.all() and B.all() for A, B in sgd_step(model, 0))
    moved = [pair for step in range(1, 9) for pair in sgd_step(model, step)]
    assert all(A.sum() == 3 and B.sum() == 3 for A, B in moved)
    assert all(torch.equal(A, B) for A, B in moved) == (mask == "coupled")
    assert len({tuple(A.tolist()) for A, _ in moved}) > 4  # other components for other layers and steps


def test_every_component_is_chosen_equally_often_and_the_draw_is_that_of_seed_and_step():
    model = adapted(keep_rate=0.25)

    def drawn(seed: int, step: int) -> torch.Tensor:
        for parameter in factors(model):
            parameter.grad = torch.ones_like(parameter)
        return torch.stack([~still.flatten() for _, still in mask_gradients(model, seed, step)])

    counts = sum(drawn(0, step).int() for step in range(400)).double() / 400
    assert (counts - 0.25).abs().max() < 0.1  # deviation of a share: 0.022
    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert not torch.equal(drawn(0, 3), drawn(1, 3))


def test_what_is_no_factor_is_never_masked():
    model = nn.ModuleDict({"adapted": adapted(), "head": nn.Linear(3, 3)})
    model["head"].weight.grad = torch.ones(3, 3)
    mask_gradients(model, 0, 1)
    assert (model["head"].weight.grad == 1).all()


@pytest.mark.parametrize("strict", [False, True])
def test_masked_components_coast_on_their_momentum_unless_strict(strict):
    model = adapted(strict=strict)
    x = torch.randn(6, 40, dtype=torch.float64)
    loss = lambda: layers(model)[0](x).square().mean()  # noqa: E731
    optimizer = torch.optim.AdamW(factors(model), lr=1e-2, weight_decay=0.1)
    callback = GradientMask()
    train_with(callback, model, optimizer, loss, range(3), of=4)
    A = layers(model)[0].rm_lora_A["default"]
    tensors = (A, optimizer.state[A]["exp_avg"], optimizer.state[A]["exp_avg_sq"])
    before = [tensor.detach().clone() for tensor in tensors]
    train_with(callback, model, optimizer, loss, [3], of=4)
    standing = [int((tensor == old).all(dim=1).sum()) for tensor, old in zip(tensors, before, strict=True)]
    assert standing == ([R // 2] * 3 if strict else [0] * 3)


# ---- reductions


def test_without_mask_and_penalty_the_training_is_that_of_masked_lora_bit_for_bit():
    x, results = torch.randn(6, 40), []
    for config in (
        RmLoraConfig(r=R, lora_alpha=4, target_modules=["proj"], keep_rate=1.0, penalty_weight=0.0, init="kaiming"),
        MaskedLoraConfig(r=R, lora_alpha=4, target_modules=["proj"]),
    ):
        torch.manual_seed(0)
        model = get_peft_model(pruned_layers((24, 40), dtype=torch.float32), config)
        layer = model.base_model.model["layers"][0]["proj"]
        penalty = orthogonality_penalty if isinstance(config, RmLoraConfig) else lambda model: 0.0
        train_with(
            GradientMask(),
            model,
            torch.optim.AdamW(factors(model), lr=1e-2),
            lambda layer=layer, model=model, penalty=penalty: layer(x).square().mean() + penalty(model),
            range(5),
            of=5,
        )
        results.append(factors(model))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_start_is_gaussian_and_the_counts_tell_what_a_step_updates():
    model = get_peft_model(pruned_layers((400, 600)), RmLoraConfig(r=R, target_modules=["proj"], keep_rate=0.4))
    A, B = layers(model)[0].factors("default")
    assert A.std().item() == pytest.approx(0.02, rel=0.05)
    assert (B == 0).all()
    assert parameter_counts(model) == {"updated_per_step": 3 * 1000}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_rate": 0}, "keep_rate=0: must be a number with 0 < keep_rate <= 1"),
        ({"mask": "both"}, "mask='both': must be one of coupled, independent"),
        ({"penalty": "frd"}, "penalty='frd': must be one of orthonormal, cosine"),
        ({"penalty_weight": -0.1}, "penalty_weight=-0.1: must be a number >= 0"),
        ({"init": "zero"}, "init='zero': must be one of gaussian, kaiming"),
        ({"strict": 1}, "strict=1: must be True or False"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        RmLoraConfig(**fields)
    assert "\n" not in str(error.value)
