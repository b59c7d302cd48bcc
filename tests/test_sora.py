"""SoRA: the proximal step, its formula and its export, and how gates die, revive and find a rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from contract import batch, method_of, pruned
from single_layers import adapted, assert_same, draw, layers, support
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.lr_scheduler import LambdaLR

from baselines.sora import ProximalAdamW, SoraConfig, SoraLinear, SoraMethod, active_ranks, soft_threshold
from harness.method import adapt

IN, OUT, R, ALPHA = 10, 12, 4, 6.0
RECIPE = SimpleNamespace(learning_rate=1e-2, betas=[0.9, 0.999], weight_decay=0.1)


def layer_of(r: int = R, **fields: object) -> SoraLinear:
    (layer,) = layers(adapted(SoraConfig(r=r, lora_alpha=ALPHA, **fields), (OUT, IN)))
    layer.sora_B["default"].data.copy_(draw(OUT, r, seed=3))
    return layer


def gate_of(layer: SoraLinear) -> nn.Parameter:
    return layer.sora_gate["default"]


def optimizer_of(layer: nn.Module, recipe: SimpleNamespace = RECIPE, **options: object) -> ProximalAdamW:
    return SoraMethod("sora", SoraConfig(), **options).optimizer(nn.ModuleDict({"proj": layer}), recipe)


@pytest.mark.parametrize("xi", [0.0, 0.25, 1.0])
def test_soft_thresholding_is_the_minimiser(xi):
    v = torch.cat([torch.linspace(-3, 3, 121, dtype=torch.float64), torch.tensor([xi, -xi, 1.5 * xi, 0.0])])
    objective = lambda u: (u - v).square() / 2 + xi * u.abs()  # noqa: E731
    result = soft_threshold(v, xi)
    torch.testing.assert_close(result, v - v.clamp(-xi, xi))
    for u in torch.linspace(-4, 4, 321, dtype=torch.float64):
        assert (objective(result) <= objective(u) + 1e-12).all()


def test_the_published_threshold_has_twice_the_dead_zone_and_spares_its_edge():
    v = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.49, 0.5, 0.75, -0.25, -0.3, -0.75])
    expected = torch.tensor([0.0, 0.0, 0.25, 0.0, 0.0, 0.25, 0.5, -0.25, 0.0, -0.5])
    assert torch.equal(soft_threshold(v, 0.25, "repo"), expected)


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
    gate, start = gate_of(layer), gate_of(layer).detach().clone()
    optimizer = optimizer_of(layer, **options)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for _ in range(6):
        gate.grad = torch.zeros_like(gate)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(gate.detach(), soft_threshold(start, total))  # neither decay nor momentum moved it


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_output_gradients_and_export_are_those_of_the_formula(keep_zeros):
    layer = layer_of(keep_zeros=keep_zeros)
    A, B, gate = layer.sora_A["default"], layer.sora_B["default"], gate_of(layer)
    gate.data[1] = 0
    x, W, M = draw(2, 3, IN).requires_grad_(), layer.weight, support(layer)
    expected = linear(x, W + M * (ALPHA / R * B @ torch.diag(gate) @ A))
    _, dA, dB, dg = assert_same(layer(x), expected, x, A, B, gate)
    assert not dA[1].any() and not dB[:, 1].any() and dg[1] != 0
    smaller_A, smaller_B = layer.exported("default")
    assert (smaller_A.shape, smaller_B.shape) == ((3, IN), (OUT, 3))
    torch.testing.assert_close(linear(x, W + M * (smaller_B @ smaller_A)), expected)


def test_ranks_are_those_of_the_gates_that_are_left():
    model = adapted(SoraConfig(r=R), (OUT, IN), (IN, IN))
    first, second = layers(model)
    gate_of(first).data[:3] = 0
    gate_of(second).data.zero_()
    assert active_ranks(model) == {"layers.0.proj": 1, "layers.1.proj": 0}
    assert SoraMethod("sora", SoraConfig()).counts(model) == {"after_pruning": OUT + IN}
    assert second.exported("default")[0].shape == (0, IN)


def test_gates_start_standard_normal_and_are_float32_in_a_bfloat16_training():
    gate = gate_of(layer_of(r=10))
    assert 0.3 < gate.std() < 2 and gate.unique().numel() == 10
    method = SoraMethod("sora", SoraConfig(r=R))
    model = adapt(method, pruned(dtype=torch.bfloat16), [batch()], precision="bf16")
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"sora_A": torch.bfloat16, "sora_B": torch.bfloat16, "sora_gate": torch.float32}
    optimizer = method.optimizer(model, RECIPE)
    model(**batch()).loss.backward()
    optimizer.step()


def test_gates_are_in_one_group_without_decay_and_shrink_once_per_update():
    layer = layer_of()
    gate = gate_of(layer)
    optimizer = optimizer_of(layer, shrinkage=0.01, scale="per_step")
    plain = torch.optim.AdamW([gate.detach().clone().requires_grad_()], lr=1e-2, weight_decay=0.0)
    assert [[p is gate for p in group["params"]] for group in optimizer.param_groups] == [[False, False], [True]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for _ in range(2):  # two micro-batches, one update
        layer(draw(5, IN)).square().sum().backward()
    (copied,) = plain.param_groups[0]["params"]
    copied.grad = gate.grad.clone()
    optimizer.step()
    plain.step()
    torch.testing.assert_close(gate.detach(), soft_threshold(copied.detach(), 0.01))


def final_rank(shrinkage: float) -> int:
    """Gates left of 8 after fitting a change of W of rank 2."""
    layer = layer_of(r=8, keep_zeros=False)
    layer.sora_B["default"].data.zero_()
    x = draw(64, IN, seed=5)
    target: Tensor = layer.base_layer(x) + x @ (draw(OUT, 2, seed=6) @ draw(2, IN, seed=7)).t()
    recipe = SimpleNamespace(learning_rate=5e-2, betas=[0.9, 0.999], weight_decay=0.0)
    optimizer = optimizer_of(layer, recipe, shrinkage=shrinkage)
    schedule = LambdaLR(optimizer, lambda t: 1 - t / 301)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    return int(gate_of(layer).count_nonzero())


def test_the_rank_of_a_target_is_found_and_falls_with_the_shrinkage():
    ranks = [final_rank(shrinkage) for shrinkage in (0.0, 0.9, 100.0)]
    assert ranks[0] == 8 and ranks[1] in (2, 3) and ranks[2] == 0


def test_the_penalty_is_the_mean_gate_and_its_gradient_the_sign():
    layer = layer_of()
    gate, model = gate_of(layer), nn.ModuleDict({"proj": layer})
    penalty = SoraMethod("sora", SoraConfig(), penalty_weight=10.0).penalty(model)
    assert penalty.item() == pytest.approx(10 * gate.abs().mean().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(penalty, gate)
    torch.testing.assert_close(gradient, 10 / R * gate.detach().sign())
    assert method_of("sora").penalty(model) is None
