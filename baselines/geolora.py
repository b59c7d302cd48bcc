"""GeoLoRA (arXiv 2410.18720), low-rank adaptation by a geometric integrator with rank adaptation, as a PEFT tuner.

    delta W = s U S V^t,    U (out x r), V (in x r) orthonormal, S (r x r) = 0 at the start, s = alpha / r of the start

Training is a cycle of c + 1 steps. In c of them AdamW moves S alone, the bases stand still. In one of them, with
G = dL/d(U S V^t) and the step size eta, the present learning rate, the *parallel integrator* turns the bases towards
the gradient, all from one backward pass:

    G_K = G V, G_L = G^t U
    U~, V~ = the columns r .. 2r of the Q factors of [U, G_K] and [V, G_L]
    K = U S - eta G_K,  L = V S^t - eta G_L
    S <- [[S - eta U^t G V, (V~^t L)^t], [U~^t K, 0]],  U <- [U, U~],  V <- [V, V~]       rank 2r, at most r_max

and once per cycle the rank is cut: with S = P diag(sigma) Q^t, U <- U P, V <- V Q, S <- diag(sigma), keeping the
leading r values, where r is the smallest with ||sigma_r..||_2 < tau ||sigma||_2, at least 2. The integrator makes
exactly one step of the gradient projected on the tangent space of the rank-r matrices.

G_K and G_L come from two zero matrices, Z_K (out x r) and Z_L (in x r), that stand in the product during such a step,
U S V^t + Z_K V^t + U Z_L^t, and whose gradients they are, for any S. The released code divides the gradients of U and V
by singular values that are out of date by then.

U, V and S have the fixed width r_max; what is beyond the rank is zero, gets zero gradients, and changes nothing. On a
pruned weight the update is M (.) (s U S V^t), M = (W != 0), unless ``keep_zeros=False``.

In data-parallel training the probes are no parameters, whose gradients would be averaged for them: the integrator takes
the mean of theirs over the processes, so that all replicas make the same step.

    Trainer(model, callbacks=[GeometricIntegrator()])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from harness.method import Method
from lors.checks import number, one_of, option, whole
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.placement import execution_device
from lors.plugin import register
from lors.sparse_layer import active_layers

__all__ = [
    "GeoLoraConfig",
    "GeoLoraLinear",
    "GeoLoraMethod",
    "GeoLoraModel",
    "GeometricIntegrator",
    "augmented",
    "truncated",
]

LOWEST_RANK = 2


@dataclass
class GeoLoraConfig(LowRankConfig):
    """Configuration of GeoLoRA; r is the rank at the start. A bad value raises ``ValueError``."""

    largest_rank: int | None = option(
        None, "r_max, which the rank never exceeds; None: twice r. A layer's sides bound it.", whole(optional=True)
    )
    tolerance: float = option(0.15, "tau; the larger, the lower the ranks. 0: none is cut.", number(">= 0", "< 1"))
    coefficient_steps: int = option(10, "c, steps on S between two integrator steps.", whole(">= 0"))
    truncation: str = option(
        "end",
        "When a cycle cuts the rank: 'end' (language), or 'three_quarters' through it (vision).",
        one_of("end", "three_quarters"),
    )
    skipped_steps: int = option(
        3, "No integrator step among so many first steps: 3 (language), 0 (vision).", whole(">= 0")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest_rank is not None and self.largest_rank < self.r:
            raise ValueError(f"largest_rank={self.largest_rank}: must be a whole number >= {self.r}, which is r")

    def integrates(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is an integrator step."""
        return step % (self.coefficient_steps + 1) == 0 and step >= self.skipped_steps

    def truncates(self, step: int) -> bool:
        """Whether the rank is cut at the end of step ``step`` (from 0)."""
        c = self.coefficient_steps
        return step % (c + 1) == (c if self.truncation == "end" else int(0.75 * c))


class GeoLoraLinear(LowRankLinear):
    """A linear layer with GeoLoRA adapters.

    ``geolora_S[name]`` (r_max x r_max) is trained; ``geolora_U[name]`` (out x r_max), ``geolora_V[name]``
    (in x r_max) and ``geolora_rank[name]`` are buffers. The bases are float32 in any model, float64 in a double one.
    ``probes[name]`` is (Z_K, Z_L) during an integrator step.
    """

    adapter_layer_names = ("geolora_S",)
    bases = ("geolora_U", "geolora_V", "geolora_rank")
    other_param_names = (*LowRankLinear.other_param_names, *bases)
    sums_by_concatenation = False  # the bases of a sum are not orthonormal

    def update_layer(self, adapter_name: str, config: GeoLoraConfig, r: int, scaling: float) -> None:
        """Add an adapter with random bases and S = 0."""
        if not hasattr(self, "probes"):
            for part in self.bases:
                setattr(self, part, BufferDict(persistent=True))
            self.probes: dict[str, tuple[Tensor, Tensor]] = {}
        super().update_layer(adapter_name, config, r, scaling)
        # After S has got the type of W: orthonormal columns need float32 whatever that is.
        base, width = self.get_base_layer(), self._width(adapter_name)
        device = execution_device(base) or base.weight.device
        for part, side in (("geolora_U", self.out_features), ("geolora_V", self.in_features)):
            Q = torch.linalg.qr(torch.randn(side, width, device=device)).Q
            getattr(self, part)[adapter_name] = _padded(Q[:, :r], side, width)
        self.geolora_rank[adapter_name] = torch.tensor(r, device=device)

    def initial_factors(self, name: str) -> tuple[Tensor]:
        """S = 0."""
        width = self._width(name)
        return (torch.zeros(width, width),)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """V^t and U S; during an integrator step [V^t; Z_L^t] and [U S + Z_K, U]."""
        S = self.geolora_S[name]
        U, V = self.geolora_U[name].to(S.dtype), self.geolora_V[name].to(S.dtype)
        if name not in self.probes or not self.training:
            return V.t(), U @ S
        Z_K, Z_L = (probe.to(S.dtype) for probe in self.probes[name])
        return torch.cat([V.t(), Z_L.t()], dim=0), torch.cat([U @ S + Z_K, U], dim=1)

    def probe(self, name: str) -> None:
        """Let the passes of this step collect G_K and G_L."""
        self.probes[name] = tuple(
            torch.zeros_like(basis, requires_grad=True) for basis in (self.geolora_U[name], self.geolora_V[name])
        )

    def rank(self, name: str) -> int:
        """The present rank; waits for the device."""
        return int(self.geolora_rank[name])

    @torch.no_grad()
    def integrate(self, name: str, eta: float) -> None:
        """One step of the parallel integrator from the gradients of the probes, all processes together.

        That of S is not used: the Trainer may have clipped it, and U^t G V is U^t G_K.
        """
        U, S, V = self.parts(name)
        G_K, G_L = (_mean_gradient(probe)[:, : len(S)] for probe in self.probes[name])
        self._store(name, *augmented(U, S, V, G_K, G_L, eta, self._width(name)))

    @torch.no_grad()
    def truncate(self, name: str, tolerance: float) -> None:
        """Cut the rank, see ``truncated``."""
        self._store(name, *truncated(*self.parts(name), tolerance))

    def _width(self, name: str) -> int:
        """r_max."""
        largest = self.options[name].largest_rank or 2 * self.r[name]
        return min(self.in_features, self.out_features, largest)

    def parts(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V without their padding, in the type of the bases."""
        r = self.rank(name)
        U, V = self.geolora_U[name][:, :r], self.geolora_V[name][:, :r]
        return U, self.geolora_S[name][:r, :r].to(U.dtype), V

    def _store(self, name: str, U: Tensor, S: Tensor, V: Tensor) -> None:
        width = self._width(name)
        self.geolora_U[name].copy_(_padded(U, self.out_features, width))
        self.geolora_V[name].copy_(_padded(V, self.in_features, width))
        self.geolora_S[name].copy_(_padded(S, width, width))
        self.geolora_rank[name].fill_(len(S))


def augmented(
    U: Tensor, S: Tensor, V: Tensor, G_K: Tensor, G_L: Tensor, eta: float, largest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the parallel integrator, see the module's text.

    Args:
        U: out x r, orthonormal.
        S: r x r.
        V: in x r, orthonormal.
        G_K: G V, out x r.
        G_L: G^t U, in x r.
        eta: Step size.
        largest: The new rank is 2r, but not more than this (at most in and out).

    Returns:
        The new U, S and V.
    """
    r = len(S)
    width = min(2 * r, largest)
    # QR may turn the signs of the first columns, so U and V themselves stay.
    new_U = torch.linalg.qr(torch.cat([U, G_K], dim=1)).Q[:, r:width]
    new_V = torch.linalg.qr(torch.cat([V, G_L], dim=1)).Q[:, r:width]
    K, L = U @ S - eta * G_K, V @ S.t() - eta * G_L
    S_hat = S.new_zeros(width, width)
    S_hat[:r, :r] = S - eta * U.t() @ G_K
    S_hat[:r, r:] = (new_V.t() @ L).t()
    S_hat[r:, :r] = new_U.t() @ K
    return torch.cat([U, new_U], dim=1), S_hat, torch.cat([V, new_V], dim=1)


def truncated(U: Tensor, S: Tensor, V: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the rank so that U S V^t changes by less than ``tolerance`` times |S|_F; at least 2 stays.

    Args:
        U: out x r.
        S: r x r.
        V: in x r.
        tolerance: tau; with 0 nothing is cut.

    Returns:
        The new U, S (diagonal) and V.
    """
    P, sigma, Qt = torch.linalg.svd(S)
    # Norm of what is left out if the first j values stay, j = 0 .. r - 1; it falls with j.
    tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = int((tails >= tolerance * tails[0]).sum())
    r = min(len(sigma), max(LOWEST_RANK, kept))
    return U @ P[:, :r], torch.diag(sigma[:r]), V @ Qt[:r].t()


class GeometricIntegrator(TrainerCallback):
    """Integrator steps and truncations, by the number of the step; it has no state of its own.

    On an integrator step S has no gradient left for the optimizer, which still updates whatever else is trained. When
    the bases change, the optimizer forgets the moments of S, which belong to the old ones.
    """

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        for layer, name in active_layers(model, GeoLoraLinear):
            layer.probes.pop(name, None)
            if layer.options[name].integrates(state.global_step):
                layer.probe(name)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **_: Any
    ) -> None:
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for layer, name in active_layers(model, GeoLoraLinear):
            if name in layer.probes:
                S = layer.geolora_S[name]
                layer.integrate(name, rates[S])
                S.grad = None
                layer.probes.pop(name)
                optimizer.state.pop(S, None)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **_: Any
    ) -> None:
        for layer, name in active_layers(model, GeoLoraLinear):
            if layer.options[name].truncates(state.global_step):
                layer.truncate(name, layer.options[name].tolerance)
                optimizer.state.pop(layer.geolora_S[name], None)


class GeoLoraMethod(Method):
    """GeoLoRA in the harness."""

    def callbacks(self) -> list[TrainerCallback]:
        """The integrator."""
        return [GeometricIntegrator()]

    @contextmanager
    def largest_step(self, model: nn.Module) -> Iterator[None]:
        """Passes as in an integrator step."""
        for layer, name in active_layers(model, GeoLoraLinear):
            layer.probe(name)
        try:
            yield
        finally:
            for layer, name in active_layers(model, GeoLoraLinear):
                layer.probes.pop(name)

    def counts(self, model: nn.Module) -> dict[str, int]:
        """In place of S alone.

        ``trainable`` is the sum of r (in + out + r) with the ranks at the end, ``trainable_peak`` that with r_max, and
        ``adapter_bytes`` what is stored: U, V and S at their full width.
        """
        counts = {"trainable": 0, "trainable_peak": 0, "adapter_bytes": 0}
        for layer, name in active_layers(model, GeoLoraLinear):
            parts = (layer.geolora_U[name], layer.geolora_V[name], layer.geolora_S[name])
            counts["trainable"] += sum(part.numel() for part in layer.parts(name))
            counts["trainable_peak"] += sum(part.numel() for part in parts)
            counts["adapter_bytes"] += sum(part.nbytes for part in parts)
        return counts


def _mean_gradient(probe: Tensor) -> Tensor:
    """Gradient of a probe, the mean over the processes of a data-parallel training.

    It is zero where no token has come by, in this process or in all of them: every process takes part.
    """
    gradient = torch.zeros_like(probe) if probe.grad is None else probe.grad
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix in the upper left corner of a larger one of zeros."""
    return nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


GeoLoraModel = register("GEOLORA", GeoLoraConfig, GeoLoraLinear)
