"""GeoLoRA: the integrator's identity, truncation, the cycle, and ranks that are found."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from callback_loop import train_with
from contract import method_of
from peft import PeftModel
from single_layers import adapted, draw, layers, support
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from baselines import geolora
from baselines.geolora import GeoLoraConfig, GeoLoraLinear, GeometricIntegrator, augmented, truncated

OUT, IN, R = 11, 14, 3
TIGHT = {"rtol": 0, "atol": 1e-12}


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(rows, columns, seed=seed)).Q


def assert_orthonormal(*bases: Tensor) -> None:
    for Q in bases:
        torch.testing.assert_close(Q.t() @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), **TIGHT)


def model_of(count: int = 1, start: float = 1.0, **fields: object) -> PeftModel:
    """Layers with an adapter whose S is a random matrix times ``start``."""
    model = adapted(GeoLoraConfig(r=R, lora_alpha=6, **fields), *[(OUT, IN)] * count).double()
    for layer in layers(model):
        layer.geolora_S["default"].data[:R, :R] = start * draw(R, R, seed=2)
        for part in ("geolora_U", "geolora_V"):  # float32 at the start
            basis = getattr(layer, part)["default"]
            basis[:, :R] = torch.linalg.qr(basis[:, :R]).Q
    return model


def parts(*, rank: int = R, start: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V of a rank."""
    return orthonormal(OUT, rank, 1), start * draw(rank, rank, seed=2), orthonormal(IN, rank, 3)


def product(layer: GeoLoraLinear) -> Tensor:
    U, S, V = layer.parts("default")
    return (U @ S @ V.t()).detach()


def projected(U: Tensor, V: Tensor, G: Tensor) -> Tensor:
    """G on the tangent space of the rank-r matrices at U S V^t."""
    P, Q = U @ U.t(), V @ V.t()
    return P @ G + G @ Q - P @ G @ Q


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([layer.geolora_S["default"] for layer in layers(model)], lr=1e-2, weight_decay=0.1)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return sum(layer(x).square().mean() for layer in layers(model))


# ---- one step


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_a_step_is_one_of_the_gradient_projected_on_the_tangent_space(start):
    U, S, V = parts(start=start)
    G = draw(OUT, IN)
    new_U, new_S, new_V = augmented(U, S, V, G @ V, G.t() @ U, 0.3, 2 * R)
    torch.testing.assert_close(new_U @ new_S @ new_V.t(), U @ S @ V.t() - 0.3 * projected(U, V, G), **TIGHT)
    assert new_S.shape == (2 * R, 2 * R)
    assert_orthonormal(new_U, new_V)
    assert torch.equal(new_U[:, :R], U)
    # At the largest rank the surplus columns are dropped.
    smaller = augmented(U, S, V, G @ V, G.t() @ U, 0.3, 4)
    for part, expected in zip(smaller, (new_U[:, :4], new_S[:4, :4], new_V[:, :4]), strict=True):
        torch.testing.assert_close(part, expected, **TIGHT)


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_the_probes_receive_the_gradients_of_the_bases_without_s(start, keep_zeros):
    """G_K = G V and G_L = G^t U, for a singular S too."""
    (layer,) = layers(model_of(start=start, keep_zeros=keep_zeros))
    layer.probe("default")
    x, weights = draw(6, IN), draw(6, OUT, seed=1)
    plain = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), plain, **TIGHT)
    (layer(x) * weights).sum().backward()
    U, S, V = layer.parts("default")
    G = layer.scaling["default"] * support(layer) * (weights.t() @ x)
    torch.testing.assert_close(plain, x @ (layer.weight + support(layer) * 2 * (U @ S @ V.t())).t())
    G_K, G_L = (probe.grad[:, :R] for probe in layer.probes["default"])
    torch.testing.assert_close(G_K, G @ V, **TIGHT)
    torch.testing.assert_close(G_L, G.t() @ U, **TIGHT)
    dS = layer.geolora_S["default"].grad
    torch.testing.assert_close(dS[:R, :R], U.t() @ G @ V, **TIGHT)
    assert dS[R:].count_nonzero() == dS[:, R:].count_nonzero() == 0  # the padding does not learn


# ---- truncation


def test_truncation_stays_within_the_tolerance_and_higher_ones_cut_more():
    U, S, V = parts(rank=8)
    before, ranks = U @ S @ V.t(), []
    for tolerance in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        new_U, new_S, new_V = truncated(U, S, V, tolerance)
        ranks.append(len(new_S))
        assert (new_U @ new_S @ new_V.t() - before).norm() <= tolerance * S.norm() + 1e-12
        assert_orthonormal(new_U, new_V)
        torch.testing.assert_close(new_S, torch.diag(new_S.diagonal()))
    assert ranks[0] == 8
    assert ranks == sorted(ranks, reverse=True)
    assert 2 <= ranks[-1] < ranks[1]


def test_at_least_two_directions_stay_and_a_zero_update_keeps_its_rank():
    U, _, V = parts(rank=5)
    assert len(truncated(U, torch.diag(torch.tensor([1.0, 0, 0, 0, 0]).double()), V, 0.5)[1]) == 2
    assert len(truncated(U, torch.zeros(5, 5, dtype=torch.float64), V, 0.5)[1]) == 5


# ---- the cycle


@pytest.mark.parametrize(
    ("fields", "integrations", "truncations"),
    [
        ({"coefficient_steps": 3}, [4, 8], [3, 7, 11]),
        ({"coefficient_steps": 3, "skipped_steps": 0}, [0, 4, 8], [3, 7, 11]),
        ({"coefficient_steps": 5, "skipped_steps": 0, "truncation": "three_quarters"}, [0, 6], [3, 9]),
        ({"coefficient_steps": 0, "skipped_steps": 9}, [9, 10, 11], list(range(12))),
    ],
)
def test_a_cycle_has_one_integration_and_one_truncation_of_every_layer(monkeypatch, fields, integrations, truncations):
    """Each makes the optimizer forget the moments of S, which belong to the old bases."""
    model, x, calls = model_of(2, **fields), draw(9, IN), []
    for name in ("augmented", "truncated"):
        original = getattr(geolora, name)
        monkeypatch.setattr(geolora, name, lambda *a, n=name, call=original: calls.append((step, n)) or call(*a))
    optimizer = adamw(model)
    for step in range(12):
        train_with(GeometricIntegrator(), model, optimizer, lambda: squares(model, x), [step], of=12)
        assert bool(optimizer.state) == (step not in integrations + truncations)
        for layer in layers(model):
            assert_orthonormal(layer.parts("default")[0], layer.parts("default")[2])
    expected = [(step, "augmented") for step in integrations] + [(step, "truncated") for step in truncations]
    assert calls == sorted(expected * 2)


def test_an_integrator_step_moves_the_bases_by_the_present_rate_and_leaves_the_optimizer_out():
    """The rate that a schedule has come to, neither the one that it began with nor that of another group."""
    model = model_of(skipped_steps=0, coefficient_steps=5)
    (layer,), head, x = layers(model), nn.Linear(OUT, 1).double(), draw(9, IN)
    groups = [{"params": head.parameters()}, {"params": [layer.geolora_S["default"]], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    LambdaLR(optimizer, lambda step: 0.25)
    before, weight = product(layer), head.weight.detach().clone()
    W = (layer.weight + layer.scaling["default"] * support(layer) * before).requires_grad_()
    (dW,) = torch.autograd.grad(head(x @ W.t()).square().mean(), W)
    U, _, V = layer.parts("default")
    expected = before - 0.05 * projected(U, V, layer.scaling["default"] * support(layer) * dW)

    loss = lambda: head(layer(x)).square().mean()  # noqa: E731
    train_with(GeometricIntegrator(), model, optimizer, loss, [0], of=9)
    torch.testing.assert_close(product(layer), expected, **TIGHT)
    assert layer.rank("default") == 2 * R
    assert not torch.equal(head.weight, weight)
    bases = [layer.geolora_U["default"].clone(), layer.geolora_V["default"].clone()]
    train_with(GeometricIntegrator(), model, optimizer, loss, [1, 2], of=9)
    assert torch.equal(layer.geolora_U["default"], bases[0])
    assert torch.equal(layer.geolora_V["default"], bases[1])
    assert not torch.allclose(product(layer), expected)


def test_a_layer_that_no_token_has_reached_keeps_its_product():
    """Its probes have no gradient; an expert may be idle for a step."""
    model, x = model_of(2, skipped_steps=0), draw(9, IN)
    used, idle = layers(model)
    before = [product(used), product(idle)]
    train_with(GeometricIntegrator(), model, adamw(model), lambda: used(x).square().mean(), [0], of=9)
    assert not torch.allclose(product(used), before[0])
    torch.testing.assert_close(product(idle), before[1], **TIGHT)
    assert_orthonormal(idle.parts("default")[0])
    assert idle.rank("default") == 2 * R, "it takes part: in another process it may have had a token"


# ---- the whole


@pytest.mark.parametrize("start", [2, 8])
def test_the_rank_of_a_least_squares_problem_is_found(start):
    target = draw(20, 3) @ draw(3, 16, seed=1)
    cycle = {"tolerance": 0.02, "coefficient_steps": 0, "skipped_steps": 0}
    config = GeoLoraConfig(r=start, lora_alpha=start, largest_rank=12, keep_zeros=False, **cycle)
    model = adapted(config, (20, 16)).double()
    (layer,), identity = layers(model), torch.eye(16, dtype=torch.float64)
    loss = lambda: 0.5 * (layer(identity).t() - layer.weight - target).square().sum()  # noqa: E731
    optimizer = torch.optim.SGD([layer.geolora_S["default"]], lr=0.2)
    losses = train_with(GeometricIntegrator(), model, optimizer, loss, range(150), of=150)
    assert layer.rank("default") == 3
    assert losses[-1] < 1e-12 * losses[0]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(losses))


def test_counts_have_the_ranks_of_the_end_and_the_bases_and_the_largest_step_has_probes():
    model, method = model_of(), method_of("geolora")
    (layer,) = layers(model)
    with method.largest_step(model):
        assert "default" in layer.probes
    assert not layer.probes
    layer.truncate("default", 0.9)
    assert layer.rank("default") == 2
    assert method.counts(model) == {
        "trainable": 2 * (OUT + IN + 2),
        "trainable_peak": 2 * R * (OUT + IN + 2 * R),
        "adapter_bytes": 8 * 2 * R * (OUT + IN + 2 * R),
    }


def test_bases_stay_float32_in_a_bfloat16_model_and_are_orthonormal():
    model = adapted(GeoLoraConfig(r=R), (40, 50), dtype=torch.bfloat16)
    (layer,), x = layers(model), draw(9, 50).bfloat16()
    assert layer.geolora_S["default"].dtype == torch.bfloat16
    loss = lambda: layer(x).float().square().mean()  # noqa: E731
    train_with(GeometricIntegrator(), model, adamw(model), loss, range(30), of=30)
    for basis in (layer.parts("default")[0], layer.parts("default")[2]):
        assert basis.dtype == torch.float32
        assert (basis.t() @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-4
