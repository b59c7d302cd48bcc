"""LoRA-RITE: its step against the formula pair by pair, and its invariance in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from contract import method_of
from peft import LoraConfig
from single_layers import adapted, draw
from torch import Tensor, nn

from baselines.lora_rite import LoraRite, lora_pairs
from baselines.masked_lora import MaskedLoraConfig
from harness.recipe import gradient_clipping

METHOD = method_of("lora_rite")
IN, OUT, R, S = 24, 30, 4, 1.5
BETAS = (0.9, 0.999)
RECIPE = SimpleNamespace(learning_rate=1e-3, betas=list(BETAS), weight_decay=0.0, max_grad_norm=1.0)


def rite(
    *pairs: tuple[nn.Parameter, nn.Parameter], lr: float = 1e-3, decay: float = 0.0, **options: object
) -> LoraRite:
    """The optimizer with the options of the method's file but for those given."""
    return LoraRite(pairs, lr=lr, betas=BETAS, weight_decay=decay, **(METHOD.options | options))


def pair(A: Tensor, B: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(A.clone()), nn.Parameter(B.clone())


def set_gradients(A: nn.Parameter, B: nn.Parameter, masked: bool = False) -> None:
    """Gradients of a least squares problem in W_eff = s M (.) (B A)."""
    A.grad = B.grad = None
    M = (draw(OUT, IN, seed=1) > 0) if masked else 1
    residual = draw(64, IN, seed=2) @ (S * M * (B @ A) - 0.3 * draw(OUT, IN, seed=3)).t()
    residual.square().mean().backward()


def products(A: Tensor, B: Tensor, steps: int, masked: bool = False, adam: bool = False, **options: object) -> Tensor:
    """B A after every step, ``[steps, out, in]``."""
    A, B = pair(A, B)
    optimizer = torch.optim.Adam([A, B], lr=1e-2) if adam else rite((A, B), lr=1e-2, **options)
    path = []
    for _ in range(steps):
        set_gradients(A, B, masked)
        optimizer.step()
        path.append((B @ A).detach())
    return torch.stack(path)


def turn() -> Tensor:
    """T with a condition number of about 15."""
    U, _, V = torch.linalg.svd(draw(R, R, seed=4))
    return U @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.27], dtype=torch.float64)) @ V


STARTS = {"random": 0.3 * draw(OUT, R, seed=6), "zero": torch.zeros(OUT, R, dtype=torch.float64)}
A0, T = 0.2 * draw(R, IN, seed=5), turn()


def gap(start: str, steps: int, **options: object) -> float:
    """Largest relative difference between the paths of B A and of (B T) (T^-1 A)."""
    first = products(A0, STARTS[start], steps, **options)
    second = products(torch.linalg.solve(T, A0), STARTS[start] @ T, steps, **options)
    return ((first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)).max().item()


@pytest.mark.parametrize(
    ("start", "steps", "options"),
    [
        ("random", 200, {}),
        ("zero", 40, {}),
        ("random", 20, {"masked": True, "decay": 0.1, "clip": None}),
        ("random", 20, {"masked": True, "escaped_mass": "decayed"}),
        ("random", 20, {"decay": 0.1, "escaped_mass": "summed", "cap": 0.5}),
    ],
)
def test_the_path_of_the_product_does_not_depend_on_its_factors(start, steps, options):
    assert gap(start, steps, **options) < 1e-10


@pytest.mark.parametrize("start", STARTS)
def test_that_of_adam_does(start):
    assert gap(start, 40, adam=True) > 0.1


LR, DECAY, CLIP, SKIP = 0.1, 0.2, 1.0, 0.4


def reference_step(pairs: list, states: list, escaped: str, cap: float | None) -> None:
    """The numbered step of the paper's code, one pair at a time, written out."""
    bases, us = [], []
    for A, B in pairs:
        Q_A, R_A = torch.linalg.qr(A.detach().t())
        Q_B, R_B = torch.linalg.qr(B.detach())
        u_A, u_B = A.grad.t() @ torch.linalg.pinv(R_B), B.grad @ torch.linalg.pinv(R_A)
        bases.append((Q_A, R_A, Q_B, R_B))
        us.append([u if u.square().mean().sqrt() <= SKIP else torch.zeros_like(u) for u in (u_A, u_B)])
    n = math.sqrt(sum(u.square().sum().item() for both in us for u in both))
    for (A, B), (Q_A, R_A, Q_B, R_B), both, state in zip(pairs, bases, us, states, strict=True):
        t, r = state["t"], len(A)
        b1, b2 = (beta * (1 - beta**t) / (1 - beta ** (t + 1)) for beta in BETAS)
        moves = []
        for side, (u, own_new, key) in enumerate(zip(both, (Q_B, Q_A), ("Q_B", "Q_A"), strict=True)):
            u = u / n * CLIP if n > CLIP else u
            P = own_new.t() @ state[key] if t else torch.zeros(r, r, dtype=u.dtype)
            old, carried = state["V"][side], P @ state["V"][side] @ P.t()
            if escaped != "none":
                fall = torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(carried)
                d = max(0.0, min(fall.max().item(), (old.trace() - carried.trace()).item()))
                state["rho"][side] = (b2 if escaped == "decayed" else 1) * (state["rho"][side] + d)
            V = b2 * carried + (1 - b2) * u.t() @ u / len(u)
            lam, Y = torch.linalg.eigh((V + V.t()) / 2)
            D = u @ Y @ torch.diag(1 / ((lam.clamp(min=0) + state["rho"][side]).sqrt() + METHOD.options["eps"])) @ Y.t()
            M = b1 * state["M"][side] @ P.t() + (1 - b1) * D
            state["V"][side], state["M"][side] = V, M
            M = M / max(1.0, M.square().mean().sqrt().item() / (cap or math.inf))
            moves.append(M @ torch.linalg.pinv((R_B, R_A)[side]).t())
        A.data -= LR * (moves[0].t() + DECAY * A.data)
        B.data -= LR * (moves[1] + DECAY * B.data)
        state.update(Q_A=Q_A, Q_B=Q_B, t=t + 1)


@pytest.mark.parametrize(("escaped", "cap"), [("none", None), ("decayed", 0.3), ("summed", 0.3)])
def test_stacked_pairs_of_several_shapes_follow_the_formula_pair_by_pair(escaped, cap):
    shapes = [(24, 30, 4), (24, 30, 4), (30, 24, 4), (24, 30, 3)]
    starts = [(draw(r, i, seed=k) / 5, draw(o, r, seed=k + 9) / 5 * (k > 0)) for k, (i, o, r) in enumerate(shapes)]
    pairs, copies = ([pair(A, B) for A, B in starts] for _ in range(2))
    zeros = [
        {"t": 0, "rho": [0.0, 0.0], "V": [0.0 * torch.eye(r).double()] * 2, "M": [0.0 * draw(i, r), 0.0 * draw(o, r)]}
        for i, o, r in shapes
    ]
    optimizer = rite(*pairs, lr=LR, decay=DECAY, clip=CLIP, skip=SKIP, cap=cap, escaped_mass=escaped)
    for step in range(6):
        for k, ((A, B), (A2, B2)) in enumerate(zip(pairs, copies, strict=True)):
            # The u of the second A is above the skip guard, all others together are above the clip.
            A.grad = draw(*A.shape, seed=50 * step + k) / (1 if k == 1 else 12)
            B.grad = draw(*B.shape, seed=50 * step + k + 25) / 12
            A2.grad, B2.grad = A.grad.clone(), B.grad.clone()
        optimizer.step()
        reference_step(copies, zeros, escaped, cap)
    for mine, reference in zip(pairs, copies, strict=True):
        for factor, wanted in zip(mine, reference, strict=True):
            torch.testing.assert_close(factor, wanted, rtol=1e-9, atol=1e-9)


def test_an_exploding_gradient_is_skipped_and_a_bad_one_stops_the_training():
    A, B = pair(A0, STARTS["random"])
    set_gradients(A, B)
    A.grad[0, 0] = 1e6
    rite((A, B)).step()
    assert torch.equal(A.detach(), A0)  # u_A was set to zero
    assert not torch.equal(B.detach(), STARTS["random"])
    for bad in (math.nan, math.inf):
        A.grad[0, 0] = bad
        with pytest.raises(ArithmeticError, match="NaN or infinite; no factor was changed"):
            rite((A, B)).step()
        assert torch.equal(A.detach(), A0)


def test_balancing_equals_the_norms_and_leaves_the_product():
    paths = [products(A0, STARTS["random"], 1, balance=balance)[0] for balance in (False, True)]
    torch.testing.assert_close(*paths)
    A, B = pair(A0, STARTS["random"])
    set_gradients(A, B)
    rite((A, B), balance=True).step()
    assert A.norm().item() == pytest.approx(B.norm().item(), rel=1e-12)


def test_the_restored_state_of_half_precision_factors_is_not_rounded():
    first, second = (rite(pair(A0.bfloat16(), STARTS["random"].bfloat16())) for _ in range(2))
    for factor in first.param_groups[0]["params"]:
        factor.grad = draw(*factor.shape).bfloat16() / 9
    first.step()
    second.load_state_dict(first.state_dict())
    for saved, restored in zip(first.state.values(), second.state.values(), strict=True):
        for name, value in saved.items():
            assert restored[name].dtype == torch.float32
            assert torch.equal(restored[name], value)


@pytest.mark.parametrize("config", [LoraConfig, MaskedLoraConfig])
def test_pairs_are_found_by_name_and_strangers_are_refused(config):
    model = adapted(config(r=2), (8, 6), (6, 8))
    assert [(A.shape, B.shape) for A, B in lora_pairs(model)] == [((2, 6), (8, 2)), ((2, 8), (6, 2))]
    model.get_parameter("base_model.model.layers.0.proj.base_layer.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.0\.proj\.base_layer\.weight has none$"):
        lora_pairs(model)
    with pytest.raises(ValueError, match="the model has none"):
        lora_pairs(nn.ModuleDict())


def test_the_method_brings_its_optimizer_and_its_clipping():
    assert gradient_clipping(RECIPE, METHOD) is None
    optimizer = METHOD.optimizer(adapted(MaskedLoraConfig(r=2), (8, 6)), RECIPE)
    assert isinstance(optimizer, LoraRite)
    assert optimizer.defaults == rite(pair(A0, STARTS["zero"]), lr=RECIPE.learning_rate).defaults


def test_what_is_no_pair_or_has_no_gradient_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"must be a pair r x in and out x r$"):
        rite(pair(A0, A0))
    factors = pair(A0, STARTS["zero"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a gradient for both factors"):
            rite(factors).step()
        factors[0].grad = torch.ones_like(factors[0])


def test_a_pair_without_a_gradient_stays_as_it_is():
    """As an expert without a token is."""
    idle, used = pair(A0, STARTS["zero"]), pair(A0, STARTS["zero"])
    for factor in used:
        factor.grad = torch.full_like(factor, 1e-3)
    optimizer = rite(idle, used, lr=0.1)
    optimizer.step()
    assert torch.equal(idle[0], A0) and not idle[1].any() and used[1].any()
    assert not optimizer.state[idle[0]]
