"""SoRA: the proximal step, its formula and its export, and how gates die, revive and find a rank."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from contract import batch, logits, method_of, pruned, trained
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.lr_scheduler import LambdaLR

from baselines.sora import (
    THRESHOLDS,
    ProximalAdamW,
    RankLog,
    SoraConfig,
    SoraLinear,
    active_ranks,
    gate_penalty,
    parameter_counts,
    proximal_adamw,
    soft_threshold,
)
from harness.method import adapt, finish
from lors.sparsity import supports

IN, OUT, R, ALPHA = 10, 12, 4, 6.0
RECIPE = SimpleNamespace(learning_rate=1e-2, betas=[0.9, 0.999], weight_decay=0.1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(r: int = R, **fields: object) -> SoraLinear:
    """A float64 layer, half pruned, with an adapter away from zero."""
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(OUT, IN, seed=1) * (draw(OUT, IN, seed=2) > 0))
    config = SoraConfig(r=r, lora_alpha=ALPHA, **fields)
    layer = SoraLinear(base, "default", config, r, ALPHA / r)
    layer.sora_B["default"].data.copy_(draw(OUT, r, seed=3))
    return layer


def parts(layer: SoraLinear) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    return layer.sora_A["default"], layer.sora_B["default"], layer.sora_gate["default"]


def optimizer_of(layer: nn.Module, **options: object) -> ProximalAdamW:
    return proximal_adamw(nn.ModuleDict({"q_proj": layer}), RECIPE, **options)


@pytest.mark.parametrize("xi", [0.0, 0.25, 1.0])
def test_soft_thresholding_is_the_closed_form_and_the_minimiser(xi):
    v = torch.cat([torch.linspace(-3, 3, 121, dtype=torch.float64), torch.tensor([xi, -xi, 1.5 * xi, 0.0])])
    result = soft_threshold(v, xi)
    expected = torch.tensor([max(abs(t) - xi, 0) * (t > 0) - max(abs(t) - xi, 0) * (t < 0) for t in v.tolist()])
    torch.testing.assert_close(result, expected.double())

    def objective(u: Tensor) -> Tensor:
        return (u - v).square() / 2 + xi * u.abs()

    for u in torch.linspace(-4, 4, 321, dtype=torch.float64):
        assert (objective(result) <= objective(u) + 1e-12).all()


def test_the_published_threshold_has_twice_the_dead_zone_and_spares_its_edge():
    v = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.49, 0.5, 0.75, -0.25, -0.3, -0.75])
    expected = torch.tensor([0.0, 0.0, 0.25, 0.0, 0.0, 0.25, 0.5, -0.25, 0.0, -0.5])
    assert torch.equal(soft_threshold(v, 0.25, "repo"), expected)
    torch.testing.assert_close(soft_threshold(v, 0.25)[2:4], torch.tensor([0.0, 0.05]))


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"shrinkage": 3.0}, 3.0 * sum(1e-2 / (1 + t) for t in range(6))),
        ({"shrinkage": 3.0, "gate_rate": 2e-2}, 3.0 * sum(2e-2 / (1 + t) for t in range(6))),
        ({"shrinkage": 0.02, "scale": "per_step"}, 0.02 * 6),
        ({"shrinkage": [0.0, 0.01, 0.05], "scale": "per_step", "stage_steps": 2}, 2 * 0.01 + 2 * 0.05),
        ({"shrinkage": [0.0, 0.05], "scale": "per_step", "stage_steps": 2}, 4 * 0.05),
    ],
)
def test_without_a_gradient_the_gates_shrink_by_the_sum_of_the_thresholds(options, total):
    layer = layer_of(r=8)
    gate, start = parts(layer)[2], parts(layer)[2].detach().clone()
    optimizer = optimizer_of(layer, **options)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for _ in range(6):
        gate.grad = torch.zeros_like(gate)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(gate.detach(), soft_threshold(start, total))  # neither decay nor momentum moved it


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_output_and_gradients_are_those_of_the_formula(keep_zeros):
    layer = layer_of(keep_zeros=keep_zeros)
    A, B, gate = parts(layer)
    gate.data[1] = 0
    x, W = draw(2, 3, IN).requires_grad_(), layer.weight
    M = W != 0 if keep_zeros else torch.ones_like(W)
    expected = linear(x, W + M * (ALPHA / R * B @ torch.diag(gate) @ A), layer.base_layer.bias)
    y, upstream = layer(x), draw(2, 3, OUT, seed=4)
    torch.testing.assert_close(y, expected)
    gradients, wanted = (torch.autograd.grad(out, [x, A, B, gate], upstream) for out in (y, expected))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference)
    _, dA, dB, dg = gradients
    assert not dA[1].any() and not dB[:, 1].any() and dg[1] != 0
    G = upstream.reshape(-1, OUT).t() @ x.reshape(-1, IN)
    torch.testing.assert_close(dg, torch.stack([ALPHA / R * B[:, i] @ (M * G) @ A[i] for i in range(R)]))


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_gated_exported_and_merged_models_are_one_function(keep_zeros):
    method = method_of("sora", f"method.peft.keep_zeros={str(keep_zeros).lower()}")
    model = trained(method, pruned())
    layers = {name: part for name, part in model.get_base_model().named_modules() if isinstance(part, SoraLinear)}
    for index, layer in enumerate(layers.values()):
        layer.sora_gate["default"].data[: index % 5] = 0  # of 4 gates: 0 to 4 die
    assert set(active_ranks(model).values()) == {0, 1, 2, 3, 4}
    widths = [sum(layer.weight.shape) for layer in layers.values()]
    kept = sum(rank * width for rank, width in zip(active_ranks(model).values(), widths, strict=True))
    assert parameter_counts(model) == {"after_pruning": kept}
    merged = finish(method, model, supports(pruned()), "merged" if keep_zeros else "dense")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)

    exported = pruned()
    for name, layer in layers.items():
        A, B = layer.exported("default")
        assert A.shape[0] == B.shape[1] == active_ranks(model)[name]
        W = exported.get_submodule(name).weight.data
        W += (B @ A) * (W != 0 if keep_zeros else 1)
    torch.testing.assert_close(logits(exported), logits(model), rtol=1e-5, atol=1e-5)


def test_gates_start_standard_normal_and_are_float32_in_a_bfloat16_training():
    torch.manual_seed(0)
    gate = parts(layer_of(r=10, keep_zeros=True))[2]
    assert 0.3 < gate.std() < 2 and gate.unique().numel() == 10
    model = adapt(method_of("sora"), pruned(dtype=torch.bfloat16), [batch()], precision="bf16")
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"sora_A": torch.bfloat16, "sora_B": torch.bfloat16, "sora_gate": torch.float32}
    optimizer = method_of("sora").optimizer(model, RECIPE)
    model(**batch()).loss.backward()
    optimizer.step()


def test_gates_are_in_one_group_without_decay_and_step_once_per_update():
    layer = layer_of()
    gate = parts(layer)[2]
    optimizer = optimizer_of(layer, shrinkage=0.01, scale="per_step")
    plain = torch.optim.AdamW([gate.detach().clone().requires_grad_()], lr=1e-2, weight_decay=0.0)
    assert [[p is gate for p in group["params"]] for group in optimizer.param_groups] == [[False, False], [True]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for _ in range(2):  # two micro-batches, one update
        layer(draw(5, IN)).square().sum().backward()
    copied = plain.param_groups[0]["params"][0]
    copied.grad = gate.grad.clone()
    optimizer.step()
    plain.step()
    torch.testing.assert_close(gate.detach(), soft_threshold(copied.detach(), 0.01))


def test_a_dead_gate_revives_if_its_gradient_is_strong_enough():
    layer = layer_of(r=1)
    gate = parts(layer)[2]
    for rate_over_threshold, alive in ((0.5, False), (2.0, True)):
        gate.data.zero_()
        optimizer = optimizer_of(layer, shrinkage=1 / rate_over_threshold)  # Adam's first step is as long as the rate
        optimizer.zero_grad()
        layer(draw(5, IN)).sum().backward()
        assert gate.grad.abs() > 0
        optimizer.step()
        assert (gate != 0) == alive


def final_rank(shrinkage: float) -> int:
    """Gates left of 8 after fitting a change of W of rank 2."""
    torch.manual_seed(0)
    layer = layer_of(r=8, keep_zeros=False)
    layer.sora_B["default"].data.zero_()
    x = draw(64, IN, seed=5)
    target = layer.base_layer(x) + x @ (draw(OUT, 2, seed=6) @ draw(2, IN, seed=7)).t()
    recipe = SimpleNamespace(learning_rate=5e-2, betas=[0.9, 0.999], weight_decay=0.0)
    optimizer = proximal_adamw(nn.ModuleDict({"q_proj": layer}), recipe, shrinkage=shrinkage)
    schedule = LambdaLR(optimizer, lambda t: 1 - t / 301)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    return int(parts(layer)[2].count_nonzero())


def test_the_rank_of_a_target_is_found_and_falls_with_the_shrinkage():
    ranks = [final_rank(shrinkage) for shrinkage in (0.0, 0.9, 100.0)]
    assert ranks[0] == 8 and ranks[1] in (2, 3) and ranks[2] == 0


def test_the_penalty_is_the_mean_gate_and_its_gradient_the_sign():
    layer = layer_of()
    gate, model = parts(layer)[2], nn.ModuleDict({"q_proj": layer})
    penalty = gate_penalty(model, weight=10.0)
    assert penalty.item() == pytest.approx(10 * gate.abs().mean().item(), rel=1e-6)
    penalty.backward()
    torch.testing.assert_close(gate.grad, 10 / R * gate.detach().sign())
    assert gate_penalty(model, weight=0.0).item() == 0


def test_the_log_names_the_ranks_that_are_left(caplog):
    layer = layer_of()
    parts(layer)[2].data[0] = 0
    with caplog.at_level(logging.INFO, "lors"):
        RankLog().on_train_end(None, None, None, model=nn.ModuleDict({"q_proj": layer}))
    assert caplog.messages == ["SoRA: 3 of 4 gates are not zero; {'q_proj': 3}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": -1.0}, "shrinkage=-1.0: must be one number >= 0 or a list"),
        ({"shrinkage": 1.0, "scale": "lr"}, "scale='lr': must be one of rate, per_step"),
        ({"shrinkage": 1.0, "threshold": "hard"}, f"threshold='hard': must be one of {', '.join(THRESHOLDS)}"),
        ({"shrinkage": [0.0, 1.0]}, "stage_steps=None: must be a positive number of steps for a list, else null"),
        ({"shrinkage": 1.0, "stage_steps": 5}, "stage_steps=5: must be"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(layer_of(), **options)
