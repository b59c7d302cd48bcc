"""LoRA-RITE (arXiv 2410.20625): an optimizer for LoRA whose step of B A does not depend on how B A is factored.

For any invertible T (r x r) the factors B T and T^-1 A have the same product as B and A, yet Adam moves that product
differently for each choice. LoRA-RITE preconditions each factor in an orthonormal basis of the other one. With A
(r x in), B (out x r), their gradients gA, gB, and thin QR decompositions A^t = Q_A R_A, B = Q_B R_B, step t = 0, 1, ...
is

    u_A = gA^t R_B^+           u_B = gB R_A^+             in x r and out x r, without the other's magnitude
    u <- 0 if rms(u) > skip    u <- u clip / n if n > clip, with n the norm of all u of the model together
    P_A = Q_B(t)^t Q_B(t-1)    P_B = Q_A(t)^t Q_A(t-1)    r x r, from the old basis to the new one
    V <- b2 P V P^t + (1 - b2) u^t u / rows(u)            r x r
    D = u (sqrt(V + rho) + eps)^-1                        by the eigenvalues of V
    M <- b1 M P^t + (1 - b1) D                            of the shape of u
    A <- A - lr ((M_A R_B^+t)^t + wd A)                   B <- B - lr (M_B R_A^+t + wd B), both from the old A and B

with b = beta (1 - beta^t) / (1 - beta^(t+1)) in place of a bias correction. R^+ is the pseudo-inverse: B starts at
zero, so A does not move in the first step. That empty step of A counts, as in the released code, which makes its
second one larger by sqrt(2). rho is the mass that V loses when the basis turns (off by default, as in the released
code). All of it is float32 at least, whatever the type of the factors.

The global clip replaces that of the trainer: use it with ``max_grad_norm=0``. The adapter is an ordinary LoRA, here
under the mask of W (``baselines.masked_lora``); in either form the loss depends on B A alone, so the invariance holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from harness.method import Method
from lors.checks import number, one_of

__all__ = ["LoraRite", "LoraRiteMethod", "lora_pairs"]

Pair = tuple[nn.Parameter, nn.Parameter]  # A (r x in) and B (out x r)


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE over pairs (A, B); the state of a factor is Q, V, M, rho and its number of steps.

    Args:
        pairs: The factors of every layer.
        lr: Rate of the step of B A.
        betas: Decay of the first and the second moment.
        weight_decay: Decoupled, after the preconditioning.
        **options: Those of `LoraRiteMethod`, all of them.

    Raises:
        ValueError: Factors that are no pair.
    """

    def __init__(
        self, pairs: Iterable[Pair], *, lr: float, betas: Sequence[float], weight_decay: float, **options: Any
    ) -> None:
        pairs = list(pairs)
        for A, B in pairs:
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] > min(A.shape[1], B.shape[0]):
                raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)}: must be a pair r x in and out x r")
        defaults = dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay, **options)
        super().__init__([{"params": [factor for pair in pairs for factor in pair]}], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all pairs that have a gradient; an expert without a token has none.

        Raises:
            RuntimeError: One factor of a pair has no gradient, or no pair has one.
            ArithmeticError: A gradient is not finite.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            stacks = [self._stack(pairs, group) for pairs in _by_shape(group["params"])]
            n = torch.stack([side.u.square().sum() for stack in stacks for side in stack]).sum().sqrt()
            if not n.isfinite():
                raise ArithmeticError("LoRA-RITE: a gradient is NaN or infinite; no factor was changed")
            for A, B in stacks:
                for side, other in ((A, B), (B, A)):
                    if group["clip"] is not None:
                        side.u *= torch.where(n > group["clip"], group["clip"] / n, 1.0)
                    M = self._moments(side, other.transport, group)
                    side.moved = side.value - group["lr"] * (M @ other.inverse.mT + group["weight_decay"] * side.value)
                if group["balance"]:
                    _balance(A, B)
                for side in (A, B):
                    side.write()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but the state keeps its type; that of a half-precision factor would round it."""
        super().load_state_dict(state_dict)
        for index, factor in enumerate(factor for group in self.param_groups for factor in group["params"]):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[factor][name] = value.to("cpu" if name == "step" else factor.device, copy=True)

    def _stack(self, pairs: Sequence[Pair], group: Mapping[str, Any]) -> tuple[_Side, _Side]:
        """The A and the B of pairs of one shape, with u after the skip guard."""
        A, B = (_Side([pair[i] for pair in pairs], self.state, transposed=i == 0) for i in (0, 1))
        for side, other in ((A, B), (B, A)):
            u = side.u @ other.inverse
            u = torch.where(u.isinf(), math.nan, u)  # the skip guard must not hide it
            side.u = u if group["skip"] is None else torch.where(_rms(u) > group["skip"], 0.0, u)
        return A, B

    def _moments(self, side: _Side, P: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Carry V and M of a side to the new basis, take u in, and return the M of this step, ``[n, rows, r]``."""
        states, u = side.states, side.u
        V, M, rho = (torch.stack([state[name] for state in states]) for name in ("V", "M", "rho"))
        b1, b2 = (_decay(beta, states, u) for beta in group["betas"])
        carried = P @ V @ P.mT
        if group["escaped_mass"] != "none":
            rho = rho + _escaped(V, carried)
            rho = b2[:, 0] * rho if group["escaped_mass"] == "decayed" else rho
        V = b2 * carried + (1 - b2) * (u.mT @ u) / u.shape[-2]
        V = (V + V.mT) / 2
        eigenvalues, Y = torch.linalg.eigh(V)
        root = (eigenvalues.clamp(min=0) + rho).sqrt() + group["eps"]  # n x r
        D = u @ (Y / root[:, None, :]) @ Y.mT
        M = b1 * (M @ P.mT) + (1 - b1) * D
        for i, state in enumerate(states):
            state.update(V=V[i], M=M[i], rho=rho[i])
            state["step"] += 1
        if group["cap"] is not None:
            M = M * (group["cap"] / _rms(M)).clamp(max=1.0)
        return M


class _Side:
    """One factor of several pairs of the same shape, stacked, so that small decompositions run in one batch.

    Attributes:
        states: The optimizer's state of each factor.
        value: ``[n, rows, r]``, A transposed.
        inverse: R^+ of the value, ``[n, r, r]``.
        transport: Q(t)^t Q(t-1), ``[n, r, r]``; zero in the first step.
        u: The gradient; the optimizer turns it into the u of the module's text. ``[n, rows, r]``.
        moved: The new value, set by the optimizer.
    """

    def __init__(self, factors: Sequence[nn.Parameter], state: Mapping[Tensor, dict], transposed: bool) -> None:
        self.factors, self.transposed = factors, transposed
        exact = torch.promote_types(factors[0].dtype, torch.float32)
        self.value, self.u = (
            torch.stack([self._turned(tensor.detach().to(exact)) for tensor in tensors])
            for tensors in (factors, [factor.grad for factor in factors])
        )
        Q, R = torch.linalg.qr(self.value)
        self.inverse = torch.linalg.pinv(R)  # R of B is zero at the start
        self.states = [state[factor] for factor in factors]
        for i, kept in enumerate(self.states):
            if not kept:
                kept.update(Q=torch.zeros_like(Q[i]), V=torch.zeros_like(R[i]), M=torch.zeros_like(Q[i]))
                kept.update(rho=Q.new_zeros(1), step=torch.tensor(0.0))
        self.transport = Q.mT @ torch.stack([kept["Q"] for kept in self.states])
        for i, kept in enumerate(self.states):
            kept["Q"] = Q[i]
        self.moved = self.value

    def write(self) -> None:
        """Put the new values into the factors."""
        for factor, value in zip(self.factors, self.moved, strict=True):
            factor.copy_(self._turned(value))

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor


def lora_pairs(model: nn.Module) -> list[Pair]:
    """The trainable factors (A, B) of every layer with LoRA adapters, PEFT's or masked ones, paired by their names.

    Raises:
        ValueError: There is none, or something else is trainable too (an embedding, a bias, a module to save).
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    partners = {name: name.replace("lora_A.", "lora_B.") for name in trainable if "lora_A." in name}
    alone = [name for name in trainable if name not in partners and name not in partners.values()]
    alone += [name for name, partner in partners.items() if partner not in trainable]
    if alone or not partners:
        raise ValueError(f"LoRA-RITE trains pairs of LoRA factors only; {alone[0] if alone else 'the model'} has none")
    return [(trainable[name], trainable[partner]) for name, partner in partners.items()]


class LoraRiteMethod(Method):
    """LoRA-RITE in the harness.

    Args:
        eps: Added to the square roots of the eigenvalues.
        clip: Largest norm of all u together; None: no clipping.
        skip: A u with a larger root mean square is replaced by zero for this step; None: never.
        cap: Largest root mean square of M in a step (the stored M is not changed); None: no cap.
        escaped_mass: rho, the mass that V loses when its basis turns. ``none``: zero, as the released code runs;
            ``decayed``: beta2 (rho + d), its option, with d = max(0, min(largest difference of eigenvalues, difference
            of traces) of V before and after the change of basis); ``summed``: rho + d, as in the paper.
        balance: After each step scale A and B to equal norms; B A stays.

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        name: str,
        peft: PeftConfig,
        *,
        eps: float = 1e-6,
        clip: float | None = 1.0,
        skip: float | None = 1.0,
        cap: float | None = None,
        escaped_mass: str = "none",
        balance: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(name, peft, **common)
        number("> 0")("eps", eps)
        for option, value in (("clip", clip), ("skip", skip), ("cap", cap)):
            number("> 0", optional=True)(option, value)
        one_of("none", "decayed", "summed")("escaped_mass", escaped_mass)
        self.options = dict(eps=eps, clip=clip, skip=skip, cap=cap, escaped_mass=escaped_mass, balance=balance)

    def optimizer(self, model: nn.Module, train_cfg: Any) -> LoraRite:
        """LoRA-RITE over all pairs of the model."""
        recipe = {"lr": train_cfg.learning_rate, "betas": train_cfg.betas, "weight_decay": train_cfg.weight_decay}
        return LoraRite(lora_pairs(model), **recipe, **self.options)


def _by_shape(factors: Sequence[nn.Parameter]) -> list[list[Pair]]:
    """Pairs of a flat list A, B, A, B, ... that have a gradient, those of equal shapes, types and devices together."""
    found: dict[tuple, list[Pair]] = {}
    for A, B in zip(factors[::2], factors[1::2], strict=True):
        if A.grad is not None or B.grad is not None:
            found.setdefault((A.shape, B.shape, A.dtype, A.device), []).append((A, B))
    if not found or any(factor.grad is None for pairs in found.values() for pair in pairs for factor in pair):
        raise RuntimeError("LoRA-RITE needs a gradient for both factors of a pair")
    return list(found.values())


def _decay(beta: float, states: Sequence[Mapping[str, Tensor]], like: Tensor) -> Tensor:
    """beta (1 - beta^t) / (1 - beta^(t+1)) for the t of each factor, ``[n, 1, 1]``."""
    decays = [beta * (1 - beta ** int(s["step"])) / (1 - beta ** (int(s["step"]) + 1)) for s in states]
    return like.new_tensor(decays)[:, None, None]


def _escaped(V: Tensor, carried: Tensor) -> Tensor:
    """d of ``escaped_mass``, ``[n, 1]``: what the change of basis took from V."""
    before, after = (torch.linalg.eigvalsh(matrix) for matrix in (V, carried))  # ascending in both
    trace = before.sum(-1) - after.sum(-1)
    return torch.minimum((before - after).amax(-1), trace).clamp(min=0)[:, None]


def _rms(u: Tensor) -> Tensor:
    return u.square().mean((-2, -1), keepdim=True).sqrt()


def _balance(A: _Side, B: _Side) -> None:
    """Scale the new A and B to equal Frobenius norms; a pair with a zero factor stays."""
    norms = [side.moved.norm(dim=(-2, -1), keepdim=True) for side in (A, B)]
    ratio = (norms[1] / norms[0]).sqrt()
    ratio = torch.where((norms[0] > 0) & (norms[1] > 0), ratio, 1.0)
    A.moved, B.moved = A.moved * ratio, B.moved / ratio
