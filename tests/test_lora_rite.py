"""LoRA-RITE: its step against the formula pair by pair, its invariance in float64, and the laws of its first steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from contract import batch, method_of, pruned
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from baselines.lora_rite import LoraRite, lora_pairs, lora_rite
from baselines.masked_lora import MaskedLoraConfig
from harness.method import adapt
from harness.recipe import gradient_clipping

IN, OUT, R, S = 24, 30, 4, 1.5
RECIPE = SimpleNamespace(learning_rate=1e-3, betas=[0.9, 0.999], weight_decay=0.0, max_grad_norm=1.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(A: Tensor, B: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(A.clone()), nn.Parameter(B.clone())


def set_gradients(A: nn.Parameter, B: nn.Parameter, masked: bool = False) -> float:
    """Gradients of a least squares problem in W_eff = s M (.) (B A) and its loss."""
    A.grad = B.grad = None
    M = (draw(OUT, IN, seed=1) > 0) if masked else 1
    loss = (draw(64, IN, seed=2) @ (S * M * (B @ A) - 0.3 * draw(OUT, IN, seed=3)).t()).square().mean()
    loss.backward()
    return loss.item()


def products(A: Tensor, B: Tensor, steps: int, masked: bool = False, adam: bool = False, **options: object) -> Tensor:
    """B A after every step, ``[steps, out, in]``."""
    A, B = pair(A, B)
    optimizer = torch.optim.Adam([A, B], lr=1e-2) if adam else LoraRite([(A, B)], lr=1e-2, **options)
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


def gap(first: Tensor, second: Tensor) -> float:
    return ((first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)).max().item()


STARTS = {"random": 0.3 * draw(OUT, R, seed=6), "zero": torch.zeros(OUT, R, dtype=torch.float64)}
A0, T = 0.2 * draw(R, IN, seed=5), turn()


@pytest.mark.parametrize(("start", "steps"), [("random", 200), ("zero", 40)])
def test_the_path_of_the_product_does_not_depend_on_its_factors(start, steps):
    B = STARTS[start]
    turned = torch.linalg.solve(T, A0), B @ T
    assert gap(products(A0, B, steps), products(*turned, steps)) < 1e-10
    assert gap(products(A0, B, steps, adam=True), products(*turned, steps, adam=True)) > 0.1


@pytest.mark.parametrize(("masked", "decay"), [(False, 0.1), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize(
    "options", [{"clip": None}, {"escaped_mass": "decayed"}, {"escaped_mass": "summed", "cap": 0.5}]
)
def test_no_option_breaks_the_invariance(masked, decay, options):
    B = STARTS["random"]
    first, second = (
        products(*factors, 20, masked, weight_decay=decay, **options)
        for factors in ((A0, B), (torch.linalg.solve(T, A0), B @ T))
    )
    assert gap(first, second) < 1e-10


@pytest.mark.parametrize("options", [{"clip": 0.01}, {"cap": 0.1}, {"escaped_mass": "decayed"}, {"weight_decay": 0.1}])
def test_every_option_changes_the_path(options):
    B = STARTS["random"]
    assert gap(products(A0, B, 5, **options), products(A0, B, 5)) > 1e-4


@pytest.mark.parametrize("lr", [1e-2, 1e-4])
def test_weight_decay_is_decoupled_and_goes_with_the_rate(lr):
    """Beside the preconditioned step each factor loses lr wd of what it was."""
    decayed, plain = pair(A0, STARTS["random"]), pair(A0, STARTS["random"])
    for factors, decay in ((decayed, 0.3), (plain, 0.0)):
        set_gradients(*factors)
        LoraRite([factors], lr=lr, weight_decay=decay).step()
    for factor, without, start in zip(decayed, plain, (A0, STARTS["random"]), strict=True):
        torch.testing.assert_close(factor.detach() - without.detach(), -lr * 0.3 * start, rtol=1e-9, atol=1e-15)


def test_factors_turn_with_the_basis_and_the_steps_of_the_product_have_the_length_of_the_rate():
    one = pair(A0, STARTS["random"])
    two = pair(torch.linalg.solve(T, A0), STARTS["random"] @ T)
    optimizers = [LoraRite([factors], lr=1e-2) for factors in (one, two)]
    for _ in range(20):
        (A, B), before = one, [factor.detach().clone() for factor in one]
        for factors, optimizer in zip((one, two), optimizers, strict=True):
            set_gradients(*factors)
            optimizer.step()
        torch.testing.assert_close(two[0], torch.linalg.solve(T, A), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(two[1], B @ T, rtol=1e-9, atol=1e-9)
        M_A, M_B = (optimizers[0].state[factor]["M"] for factor in one)
        assert ((B - before[1]) @ before[0]).norm().item() == pytest.approx(1e-2 * M_B.norm().item(), rel=1e-10)
        assert (before[1] @ (A - before[0])).norm().item() == pytest.approx(1e-2 * M_A.norm().item(), rel=1e-10)


def test_the_first_step_from_a_zero_factor_is_the_closed_form():
    (A, B), lr, eps = pair(A0, STARTS["zero"]), 1e-2, 1e-12
    set_gradients(A, B)
    R_A = torch.linalg.qr(A0.t()).R
    u = B.grad @ torch.linalg.inv(R_A)
    U, _, V = torch.linalg.svd(u, full_matrices=False)
    LoraRite([(A, B)], lr=lr, eps=eps, clip=None, skip=None).step()
    assert torch.equal(A.detach(), A0)
    torch.testing.assert_close(B.detach(), -lr * math.sqrt(OUT) * (U @ V) @ torch.linalg.inv(R_A).t())


@pytest.mark.parametrize(("rates", "own_steps"), [((1e-3, 1e-3), False), ((1e-3, 2e-3), False), ((1e-3, 1e-3), True)])
def test_the_second_step_replaces_most_of_the_first_factor_whatever_the_rate(rates, own_steps):
    wide, tall = 400, 900
    A, B = pair(draw(R, wide) / math.sqrt(wide), torch.zeros(tall, R, dtype=torch.float64))
    optimizer = LoraRite([(A, B)], own_steps=own_steps, clip=None, skip=None)
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        start = A.detach().clone()
        A.grad = B.grad = None
        (B @ A - draw(tall, wide, seed=7)).square().sum().backward()
        optimizer.step()
    change = ((A - start).norm() / start.norm()).item()
    law = (1.0 if own_steps else 0.744) * math.sqrt(wide / tall) * rates[1] / rates[0]
    assert change == pytest.approx(law, rel=0.05)


def reference_step(
    pairs: list, states: list, lr: float, b: tuple, eps: float, clip: float, skip: float, escaped: str
) -> None:
    """The numbered step of the paper's code, one pair at a time, written out."""
    bases, us = [], []
    for A, B in pairs:
        Q_A, R_A = torch.linalg.qr(A.detach().t())
        Q_B, R_B = torch.linalg.qr(B.detach())
        u_A, u_B = A.grad.t() @ torch.linalg.pinv(R_B), B.grad @ torch.linalg.pinv(R_A)
        bases.append((Q_A, R_A, Q_B, R_B))
        us.append([u if u.square().mean().sqrt() <= skip else torch.zeros_like(u) for u in (u_A, u_B)])
    n = math.sqrt(sum(u.square().sum().item() for both in us for u in both))
    for (A, B), (Q_A, R_A, Q_B, R_B), both, state in zip(pairs, bases, us, states, strict=True):
        t, r = state["t"], len(A)
        b1, b2 = (beta * (1 - beta**t) / (1 - beta ** (t + 1)) for beta in b)
        moves = []
        for side, (u, own_new, key) in enumerate(zip(both, (Q_B, Q_A), ("Q_B", "Q_A"), strict=True)):
            u = u / n * clip if n > clip else u
            P = own_new.t() @ state[key] if t else torch.zeros(r, r, dtype=u.dtype)
            old, carried = state["V"][side], P @ state["V"][side] @ P.t()
            if escaped != "none":
                fall = torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(carried)
                d = max(0.0, min(fall.max().item(), (old.trace() - carried.trace()).item()))
                state["rho"][side] = (b2 if escaped == "decayed" else 1) * (state["rho"][side] + d)
            V = b2 * carried + (1 - b2) * u.t() @ u / len(u)
            lam, Y = torch.linalg.eigh((V + V.t()) / 2)
            D = u @ Y @ torch.diag(1 / ((lam.clamp(min=0) + state["rho"][side]).sqrt() + eps)) @ Y.t()
            M = b1 * state["M"][side] @ P.t() + (1 - b1) * D
            state["V"][side], state["M"][side] = V, M
            moves.append(M @ torch.linalg.pinv((R_B, R_A)[side]).t())
        A.data -= lr * moves[0].t()
        B.data -= lr * moves[1]
        state.update(Q_A=Q_A, Q_B=Q_B, t=t + 1)


@pytest.mark.parametrize("escaped", ["none", "decayed", "summed"])
def test_stacked_pairs_of_several_shapes_follow_the_formula_pair_by_pair(escaped):
    shapes = [(24, 30, 4), (24, 30, 4), (30, 24, 4), (24, 30, 3)]
    starts = [(draw(r, i, seed=k) / 5, draw(o, r, seed=k + 9) / 5 * (k > 0)) for k, (i, o, r) in enumerate(shapes)]
    pairs, copies = ([pair(A, B) for A, B in starts] for _ in range(2))
    zeros = [
        {"t": 0, "rho": [0.0, 0.0], "V": [0.0 * torch.eye(r).double()] * 2, "M": [0.0 * draw(i, r), 0.0 * draw(o, r)]}
        for i, o, r in shapes
    ]
    optimizer = LoraRite(pairs, lr=0.1, clip=1.0, skip=0.4, escaped_mass=escaped)
    for step in range(6):
        for k, ((A, B), (A2, B2)) in enumerate(zip(pairs, copies, strict=True)):
            # The u of the second A is above the skip guard, all others together are above the clip.
            A.grad = draw(*A.shape, seed=50 * step + k) / (1 if k == 1 else 12)
            B.grad = draw(*B.shape, seed=50 * step + k + 25) / 12
            A2.grad, B2.grad = A.grad.clone(), B.grad.clone()
        optimizer.step()
        reference_step(copies, zeros, 0.1, (0.9, 0.999), 1e-6, 1.0, 0.4, escaped)
    for mine, reference in zip(pairs, copies, strict=True):
        for factor, wanted in zip(mine, reference, strict=True):
            torch.testing.assert_close(factor, wanted, rtol=1e-9, atol=1e-9)


def test_an_exploding_gradient_is_skipped_and_a_bad_one_stops_the_training():
    A, B = pair(A0, STARTS["random"])
    set_gradients(A, B)
    A.grad[0, 0] = 1e6
    LoraRite([(A, B)]).step()
    assert torch.equal(A.detach(), A0)  # u_A was set to zero
    assert not torch.equal(B.detach(), STARTS["random"])
    for bad in (math.nan, math.inf):
        A.grad[0, 0] = bad
        with pytest.raises(ArithmeticError, match="NaN or infinite; no factor was changed"):
            LoraRite([(A, B)]).step()
        assert torch.equal(A.detach(), A0)


def test_balancing_equals_the_norms_and_leaves_the_product():
    paths = [products(A0, STARTS["random"], 1, balance=balance)[0] for balance in (False, True)]
    torch.testing.assert_close(*paths)
    A, B = pair(A0, STARTS["random"])
    set_gradients(A, B)
    LoraRite([(A, B)], balance=True).step()
    assert A.norm().item() == pytest.approx(B.norm().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype):
    def fresh() -> tuple:
        factors = pair(A0.to(dtype), STARTS["random"].to(dtype))
        return factors, LoraRite([factors], lr=1e-2)

    def train(factors: tuple, optimizer: LoraRite, steps: range) -> None:
        for step in steps:
            for k, factor in enumerate(factors):
                factor.grad = draw(*factor.shape, seed=2 * step + k).to(dtype) / 9
            optimizer.step()

    whole, resumed = fresh(), fresh()
    train(*whole, range(3))
    state = whole[1].state_dict()
    assert {value.dtype for entry in state["state"].values() for value in entry.values()} == {
        torch.float32,
        torch.promote_types(dtype, torch.float32),
    }
    for mine, saved in zip(resumed[0], whole[0], strict=True):
        mine.data.copy_(saved.data)
    resumed[1].load_state_dict(state)
    train(*whole, range(3, 6))
    train(*resumed, range(3, 6))
    for mine, wanted in zip(resumed[0], whole[0], strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("config", [LoraConfig, MaskedLoraConfig])
def test_pairs_are_found_by_name_and_strangers_are_refused(config):
    model = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(8, 6)}), config(r=2, target_modules=["a", "b"])
    )
    pairs = lora_pairs(model)
    assert [(tuple(A.shape), tuple(B.shape)) for A, B in pairs] == [((2, 6), (8, 2)), ((2, 8), (6, 2))]
    model.base_model.model["a"].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"a\.base_layer\.bias has none$"):
        lora_rite(model, RECIPE)
    with pytest.raises(ValueError, match="the model has none"):
        lora_pairs(nn.ModuleDict())


def test_the_method_brings_its_optimizer_and_its_clipping():
    method = method_of("lora_rite")
    assert gradient_clipping(RECIPE, method) is None
    model = adapt(method, pruned(), [batch()])
    optimizer = method.optimizer(model, RECIPE)
    assert isinstance(optimizer, LoraRite) and optimizer.param_groups[0]["lr"] == RECIPE.learning_rate
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoraRite([pair(A0, A0)]), r"must be a pair r x in and out x r$"),
        (lambda: LoraRite([pair(A0, STARTS["zero"])], skip=0), "skip=0: must be a positive number"),
        (lambda: LoraRite([pair(A0, STARTS["zero"])], escaped_mass="on"), "escaped_mass='on': must be one of none, "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(RuntimeError, match="a gradient for both factors"):
        LoraRite([pair(A0, STARTS["zero"])]).step()
