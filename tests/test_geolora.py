"""GeoLoRA: the integrator's identity, truncation, the cycle, and ranks that are found."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from callback_loop import pruned_layers, train_with
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from baselines.geolora import (
    GeoLoraConfig,
    GeoLoraLinear,
    GeometricIntegrator,
    augmented,
    parameter_counts,
    probing,
    truncated,
)

OUT, IN, R = 11, 14, 3
TIGHT = {"rtol": 0, "atol": 1e-12}


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def assert_orthonormal(Q: Tensor) -> None:
    torch.testing.assert_close(Q.t() @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), **TIGHT)


def adapted(
    *shapes: tuple[int, int], start: float = 1.0, dtype: torch.dtype = torch.float64, **fields: object
) -> PeftModel:
    """Layers with an adapter whose S is a random matrix times ``start``."""
    torch.manual_seed(0)
    config = GeoLoraConfig(**({"r": R, "lora_alpha": 6, "target_modules": ["proj"]} | fields))
    model = get_peft_model(pruned_layers(*shapes, dtype=dtype), config, autocast_adapter_dtype=False).to(dtype).train()
    for layer in layers(model):
        r = layer.rank("default")
        layer.geolora_S["default"].data[:r, :r] = start * torch.randn(r, r)
        layer.geolora_U["default"].copy_(torch.linalg.qr(layer.geolora_U["default"]).Q * (torch.arange(2 * R) < r))
        layer.geolora_V["default"].copy_(torch.linalg.qr(layer.geolora_V["default"]).Q * (torch.arange(2 * R) < r))
    return model


def layers(model: nn.Module) -> list[GeoLoraLinear]:
    return [part for part in model.modules() if isinstance(part, GeoLoraLinear)]


def product(layer: GeoLoraLinear) -> Tensor:
    """U S V^t."""
    A, B = layer.eval().factors("default")
    layer.train()
    return (B @ A).detach()


# ---- one step


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_a_step_is_one_of_the_gradient_projected_on_the_tangent_space(start):
    torch.manual_seed(0)
    U, V, S = orthonormal(OUT, R), orthonormal(IN, R), start * torch.randn(R, R, dtype=torch.float64)
    G = torch.randn(OUT, IN, dtype=torch.float64)
    new_U, new_S, new_V = augmented(U, S, V, G @ V, G.t() @ U, 0.3, 2 * R)
    P, Q = U @ U.t(), V @ V.t()
    torch.testing.assert_close(new_U @ new_S @ new_V.t(), U @ S @ V.t() - 0.3 * (P @ G + G @ Q - P @ G @ Q), **TIGHT)
    assert new_S.shape == (2 * R, 2 * R)
    assert_orthonormal(new_U)
    assert_orthonormal(new_V)
    assert torch.equal(new_U[:, :R], U)


def test_surplus_columns_are_dropped_at_the_largest_rank():
    U, V, S = orthonormal(OUT, R), orthonormal(IN, R), torch.randn(R, R, dtype=torch.float64)
    G = torch.randn(OUT, IN, dtype=torch.float64)
    new_U, new_S, new_V = augmented(U, S, V, G @ V, G.t() @ U, 0.3, 4)
    assert (new_U.shape, new_S.shape, new_V.shape) == ((OUT, 4), (4, 4), (IN, 4))
    assert_orthonormal(new_U)


@pytest.mark.parametrize("fields", [{}, {"keep_zeros": False}], ids=str)
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_the_probes_receive_the_gradients_of_the_bases_without_s(start, fields):
    """G_K = (dL/dU) S^-t and G_L = (dL/dV) S^-1, which autograd gives only for an invertible S."""
    layer = layers(adapted((OUT, IN), start=start, **fields))[0]
    layer.probe("default")
    x, weights = torch.randn(6, IN, dtype=torch.float64), torch.randn(6, OUT, dtype=torch.float64)
    plain = layer.eval()(x)
    (layer.train()(x) * weights).sum().backward()
    torch.testing.assert_close(layer(x), plain, **TIGHT)

    U, S, V = (part.detach().clone().requires_grad_() for part in layer._parts("default"))
    M = 1.0 if fields else (layer.weight != 0)
    W = layer.weight + layer.scaling["default"] * M * (U @ S @ V.t())
    dU, dV, dS = torch.autograd.grad(((x @ W.t()) * weights).sum(), (U, V, S))
    G = layer.scaling["default"] * M * (weights.t() @ x)
    G_K, G_L = (probe.grad[:, :R] for probe in layer.probes["default"])
    torch.testing.assert_close(G_K, G @ V, **TIGHT)
    torch.testing.assert_close(G_L, G.t() @ U, **TIGHT)
    torch.testing.assert_close(layer.geolora_S["default"].grad[:R, :R], dS, **TIGHT)
    assert layer.geolora_S["default"].grad[R:].count_nonzero() == 0  # the padding does not learn
    if start:
        inverse = torch.linalg.inv(S)
        torch.testing.assert_close(G_K, dU @ inverse.t(), rtol=0, atol=1e-11)
        torch.testing.assert_close(G_L, dV @ inverse, rtol=0, atol=1e-11)


# ---- truncation


def test_truncation_stays_within_the_tolerance_and_higher_ones_cut_more():
    torch.manual_seed(0)
    U, V, S = orthonormal(OUT, 8), orthonormal(IN, 8), torch.randn(8, 8, dtype=torch.float64)
    before, ranks = U @ S @ V.t(), []
    for tolerance in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        new_U, new_S, new_V = truncated(U, S, V, tolerance)
        ranks.append(len(new_S))
        change = (new_U @ new_S @ new_V.t() - before).norm()
        assert change <= tolerance * S.norm() + 1e-12
        assert_orthonormal(new_U)
        assert_orthonormal(new_V)
        torch.testing.assert_close(new_S, torch.diag(new_S.diagonal()))
    assert ranks[0] == 8
    assert ranks == sorted(ranks, reverse=True)
    assert 2 <= ranks[-1] < ranks[1]


def test_at_least_two_directions_stay_and_a_zero_update_keeps_its_rank():
    U, V = orthonormal(OUT, 5), orthonormal(IN, 5)
    assert len(truncated(U, torch.diag(torch.tensor([1.0, 0, 0, 0, 0]).double()), V, 0.5)[1]) == 2
    assert len(truncated(U, torch.zeros(5, 5, dtype=torch.float64), V, 0.5)[1]) == 5


# ---- the cycle


@pytest.mark.parametrize(
    ("fields", "integrations", "truncations"),
    [
        ({"coefficient_steps": 3}, [4, 8], [3, 7, 11]),
        ({"coefficient_steps": 3, "skipped_steps": 0}, [0, 4, 8], [3, 7, 11]),
        ({"coefficient_steps": 4, "skipped_steps": 0, "truncation": "three_quarters"}, [0, 5, 10], [3, 8]),
        ({"coefficient_steps": 0, "skipped_steps": 9}, [9, 10, 11], list(range(12))),
        ({"coefficient_steps": 3, "settling": 0.5}, [4], [3, 7, 11]),
    ],
)
def test_a_cycle_has_one_integration_and_one_truncation_of_every_layer(monkeypatch, fields, integrations, truncations):
    model = adapted((OUT, IN), (OUT, IN), **fields)
    calls = {"integrate": [], "truncate": []}
    step = -1

    def watched(kind: str):
        original = getattr(GeoLoraLinear, kind)

        def call(layer: GeoLoraLinear, *arguments: object) -> None:
            calls[kind].append((step, id(layer)))
            original(layer, *arguments)

        return call

    for kind in calls:
        monkeypatch.setattr(GeoLoraLinear, kind, watched(kind))
    x = torch.randn(9, IN, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(12):
        loss = lambda: sum(layer(x).square().mean() for layer in layers(model))  # noqa: E731
        train_with(GeometricIntegrator(), model, optimizer, loss, [step], of=12)
        for layer in layers(model):
            assert_orthonormal(layer._parts("default")[0])
            assert_orthonormal(layer._parts("default")[2])
    each = [id(layer) for layer in layers(model)]
    assert calls["integrate"] == [(step, layer) for step in integrations for layer in each]
    assert calls["truncate"] == [(step, layer) for step in truncations for layer in each]


def test_an_integrator_step_moves_the_bases_by_the_present_rate_and_leaves_the_optimizer_out():
    """The rate that a schedule has come to, neither the one that it began with nor that of another group."""
    model = adapted((OUT, IN), skipped_steps=0, coefficient_steps=5)
    layer, head = layers(model)[0], nn.Linear(OUT, 1).double()
    x = torch.randn(9, IN, dtype=torch.float64)
    groups = [{"params": head.parameters()}, {"params": [layer.geolora_S["default"]], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    LambdaLR(optimizer, lambda step: 0.25)
    before, weight = product(layer), head.weight.detach().clone()
    W = (layer.weight + layer.scaling["default"] * (layer.weight != 0) * before).requires_grad_()
    head(x @ W.t()).square().mean().backward()
    G = layer.scaling["default"] * (layer.weight != 0) * W.grad
    head.zero_grad()
    U, _, V = layer._parts("default")
    P, Q = U @ U.t(), V @ V.t()
    expected = before - 0.05 * (P @ G + G @ Q - P @ G @ Q)

    train_with(GeometricIntegrator(), model, optimizer, lambda: head(layer(x)).square().mean(), [0], of=9)
    torch.testing.assert_close(product(layer), expected, **TIGHT)
    assert layer.rank("default") == 2 * R
    assert layer.geolora_S["default"] not in optimizer.state
    assert not torch.equal(head.weight, weight)
    bases = [layer.geolora_U["default"].clone(), layer.geolora_V["default"].clone()]
    train_with(GeometricIntegrator(), model, optimizer, lambda: head(layer(x)).square().mean(), [1, 2], of=9)
    assert torch.equal(layer.geolora_U["default"], bases[0])
    assert torch.equal(layer.geolora_V["default"], bases[1])
    assert not torch.allclose(product(layer), expected)


def test_a_layer_that_no_token_has_reached_keeps_its_product():
    """Its probes have no gradient; an expert may be idle for a step."""
    model = adapted((OUT, IN), (OUT, IN), skipped_steps=0)
    used, idle = layers(model)
    before = [product(used), product(idle)]
    x = torch.randn(9, IN, dtype=torch.float64)
    optimizer = torch.optim.AdamW([layer.geolora_S["default"] for layer in layers(model)], lr=1e-2, weight_decay=0.1)
    train_with(GeometricIntegrator(), model, optimizer, lambda: used(x).square().mean(), [0], of=9)
    assert not torch.allclose(product(used), before[0])
    torch.testing.assert_close(product(idle), before[1], **TIGHT)
    assert_orthonormal(idle._parts("default")[0])


def test_micro_batches_add_up_in_the_probes():
    updates = []
    x = torch.randn(8, IN, dtype=torch.float64)
    for parts in ([x], [x[:4], x[4:]]):
        model = adapted((OUT, IN), skipped_steps=0)
        layer, queue = layers(model)[0], list(parts)
        optimizer = torch.optim.SGD([layer.geolora_S["default"]], lr=0.1)
        loss = lambda layer=layer, queue=queue: layer(queue.pop(0)).square().sum()  # noqa: E731
        train_with(GeometricIntegrator(), model, optimizer, loss, [0], of=9, micro_batches=len(parts))
        updates.append(product(layer))
    torch.testing.assert_close(*updates, **TIGHT)


@pytest.mark.parametrize("reset", [True, False])
def test_moments_are_forgotten_with_their_basis_unless_the_code_is_followed(reset):
    model = adapted((OUT, IN), coefficient_steps=2, reset_moments=reset)
    S = layers(model)[0].geolora_S["default"]
    optimizer = torch.optim.AdamW([S], lr=1e-2)
    x = torch.randn(9, IN, dtype=torch.float64)
    loss = lambda: layers(model)[0](x).square().mean()  # noqa: E731
    train_with(GeometricIntegrator(), model, optimizer, loss, range(3), of=9)  # a truncation ends it
    assert (S in optimizer.state) == (not reset)


# ---- the whole


@pytest.mark.parametrize("start", [2, 8])
def test_the_rank_of_a_least_squares_problem_is_found(start):
    torch.manual_seed(0)
    target = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 16, dtype=torch.float64)
    config = GeoLoraConfig(
        r=start, lora_alpha=start, largest_rank=12, tolerance=0.02, coefficient_steps=0, skipped_steps=0,
        keep_zeros=False, target_modules=["proj"],
    )  # fmt: skip
    model = get_peft_model(pruned_layers((20, 16)), config, autocast_adapter_dtype=False).double().train()
    layer, identity = layers(model)[0], torch.eye(16, dtype=torch.float64)
    loss = lambda: 0.5 * (layer(identity).t() - layer.weight - target).square().sum()  # noqa: E731
    optimizer = torch.optim.SGD([layer.geolora_S["default"]], lr=0.2)
    losses = train_with(GeometricIntegrator(), model, optimizer, loss, range(150), of=150)
    assert layer.rank("default") == 3
    assert losses[-1] < 1e-12 * losses[0]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(losses))


def test_counts_have_the_ranks_of_the_end_and_the_bases():
    model = adapted((OUT, IN), tolerance=0.9)
    layer = layers(model)[0]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (2 * R) ** 2
    layer.truncate("default", 0.9)
    assert layer.rank("default") == 2
    assert parameter_counts(model) == {
        "trainable": 2 * (OUT + IN + 2),
        "trainable_peak": 2 * R * (OUT + IN + 2 * R),
        "adapter_bytes": 8 * 2 * R * (OUT + IN + 2 * R),
    }


def test_bases_stay_float32_in_a_bfloat16_model_and_are_orthonormal():
    config = GeoLoraConfig(r=R, target_modules=["proj"])
    model = get_peft_model(pruned_layers((40, 50), dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    layer = layers(model)[0].train()
    assert layer.geolora_S["default"].dtype == torch.bfloat16
    x = torch.randn(9, 50, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([layer.geolora_S["default"]], lr=1e-2)
    loss = lambda: layer(x).float().square().mean()  # noqa: E731
    train_with(GeometricIntegrator(), model, optimizer, loss, range(30), of=30)
    for basis in (layer._parts("default")[0], layer._parts("default")[2]):
        assert basis.dtype == torch.float32
        assert (basis.t() @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-4


def test_the_costliest_step_has_probes_and_leaves_none():
    model = adapted((OUT, IN))
    with probing(model):
        assert "default" in layers(model)[0].probes
    assert not layers(model)[0].probes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8, "largest_rank": 4}, "largest_rank=4: must be a whole number >= 8"),
        ({"tolerance": 1.0}, "tolerance=1.0: must be a number with 0 <= tolerance < 1"),
        ({"coefficient_steps": -1}, "coefficient_steps=-1: must be a whole number >= 0"),
        ({"truncation": "never"}, "truncation='never': must be one of end, three_quarters"),
        ({"settling": 2}, "settling=2: must be a number with 0 <= settling < 1"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        GeoLoraConfig(**fields)
    assert "\n" not in str(error.value)
