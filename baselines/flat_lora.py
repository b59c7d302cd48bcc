"""Flat-LoRA (arXiv 2409.14396): a LoRA whose loss is taken at randomly moved full weights.

A LoRA, A (r x in), B (out x r), s = alpha / r, trained for  min E L(W + s B A + E)  with one random E (out x in) per
optimizer step, so that the merged weight, which is what is deployed, lies in a flat place of the full space:

    E_ij ~ N(0, sigma_t^2 |W'_i|^2 / d),    W' = W + s B A at the start of the step, d = in,
    sigma_t = sigma (1 - cos(pi t / T)) / 2 at step t of T: the first step is one of LoRA

A and B get the gradients of LoRA at the moved point. All micro-batches of a step see the same E. Evaluation,
checkpoints and merges never see it.

On a pruned weight, M = (W != 0), everything is masked (W' and the product in the forward pass too):

    Y = X (W + M (.) (s B A + E))^t + bias

The variance is divided by in as in the dense method, so the relative noise of a row falls with its density.
``keep_zeros=False`` is the method as published, without M.

W is never changed. E is drawn from a seed and one deviation per row (out floats per layer), again in the backward pass,
where PyTorch's non re-entrant checkpoint computes the moved weight a second time: between the passes only X, W, A
and B are kept. The authors add E to W in place and subtract it later, which in bfloat16 wears W out and fills zeros.

    Trainer(model, callbacks=[WeightNoise()])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainerState

from baselines.sqft import masked_product
from harness.method import Method
from lors.checks import number, option, whole
from lors.low_rank import LowRankConfig, LowRankLinear
from lors.plugin import register
from lors.randomness import generator_of

__all__ = [
    "FlatLoraConfig",
    "FlatLoraLinear",
    "FlatLoraMethod",
    "FlatLoraModel",
    "Noise",
    "WeightNoise",
    "draw_noise",
    "noise_scale",
    "remove_noise",
]


@dataclass
class FlatLoraConfig(LowRankConfig):
    """Configuration of Flat-LoRA; a bad value raises ``ValueError``."""

    sigma: float = option(
        0.05, "Norm of the noise of a row of W' relative to that of the row, at the last step.", number(">= 0")
    )
    interval: int = option(1, "Only the first of so many steps is perturbed.", whole(">= 1"))


@dataclass(frozen=True)
class Noise:
    """What E of one layer is drawn from, as often as it is needed.

    Attributes:
        key: Seed, 0, step and layer.
        std: Standard deviation of every row, ``[out]``, float32 or better.
        masked: Whether E is zero where W is.
    """

    key: tuple[int, ...]
    std: Tensor
    masked: bool

    def sample(self, weight: Tensor) -> Tensor:
        """E, out x in, in the type of the weight W; the same at every call."""
        device = self.std.device
        E = torch.randn(weight.shape, generator=generator_of(*self.key, device=device), device=device)
        E = E.mul_(self.std[:, None]).to(weight.dtype)
        return E.mul_(weight != 0) if self.masked else E


class FlatLoraLinear(LowRankLinear):
    """A linear layer with Flat-LoRA adapters: ``flat_lora_A[name]`` is r x in, ``flat_lora_B[name]`` is out x r.

    ``noise`` is E of the step under way, or None; only a forward pass in training mode sees it.
    """

    adapter_layer_names = ("flat_lora_A", "flat_lora_B")
    noise: Noise | None = None

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The low-rank layer, with W + E in place of W while there is noise."""
        if self.noise is None or not self.training:
            return super().adapted(x, names)
        base = self.get_base_layer()
        masked = [name for name in names if self.options[name].keep_zeros]
        A, B, scaling = self._stacked(masked) if masked else (None, None, 0.0)
        estimate = masked and not any(self.options[name].exact_gradient for name in masked)
        factors = (A.detach(), B.detach()) if estimate else (A, B)
        y = checkpoint(
            _noisy_linear,
            *(x, base.weight, base.bias, *factors, scaling, self.noise),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        if estimate:  # the gradients of A and B without the mask, from a branch whose value is taken off again
            branch = linear(linear(x.detach().to(A.dtype), A), B)
            y = y + scaling * (branch - branch.detach()).to(y.dtype)
        for name in names:
            if name not in masked:
                y = y + self.branch(x, name).to(y.dtype)
        return y

    @property
    def noise_options(self) -> FlatLoraConfig | None:
        """The config of the first active adapter; None if there is none."""
        names = self._own(self.active_adapters)
        return self.options[names[0]] if names else None

    @torch.no_grad()
    def noise_at(self, sigma: float, key: tuple[int, ...]) -> Noise:
        """The noise of the scale sigma around the present W'."""
        weight = self.get_base_layer().weight
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        W = precise + sum(self.delta_weight(precise, name) for name in self._own(self.active_adapters))  # W'
        return Noise(key, sigma * W.norm(dim=1) / math.sqrt(self.in_features), self.noise_options.keep_zeros)


def _noisy_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scaling: float, noise: Noise
) -> Tensor:
    """X (W + s M (.) (B A) + E)^t + bias, ``[..., in]`` to ``[..., out]``, in the type of W; no update without A."""
    T = weight
    if A is not None:
        T = T + masked_product(weight, A.to(weight.dtype), B.to(weight.dtype), scaling)
    return linear(x.to(weight.dtype), T + noise.sample(weight), bias)


def noise_scale(sigma: float, step: int, steps: int) -> float:
    """sigma_t, which rises from 0 at step 0 to sigma at step ``steps`` on half a cosine."""
    return sigma * (1 - math.cos(math.pi * step / steps)) / 2


def draw_noise(model: nn.Module, step: int, steps: int, seed: int) -> None:
    """Give every layer with an active adapter the noise of one step, the same in all processes; none if its scale is 0.

    Args:
        model: A model with Flat-LoRA adapters; A and B must not change before ``remove_noise``.
        step: Steps made so far, t.
        steps: Steps of the whole training, T.
        seed: Seed of the run.
    """
    for index, layer in enumerate(_layers(model)):
        options = layer.noise_options
        sigma = 0.0 if step % options.interval else noise_scale(options.sigma, step, steps)
        layer.noise = layer.noise_at(sigma, (seed, 0, step, index)) if sigma else None


def remove_noise(model: nn.Module) -> None:
    """End the perturbation of all layers."""
    for layer in _layers(model):
        layer.noise = None


class WeightNoise(TrainerCallback):
    """Draws the noise at the start of every optimizer step and ends it before the update.

    All that it does follows from the step's number, so it has no state, and a resumed run draws what an
    uninterrupted one would.
    """

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        draw_noise(model, state.global_step, state.max_steps, args.seed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        remove_noise(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        remove_noise(model)


class FlatLoraMethod(Method):
    """Flat-LoRA in the harness."""

    def callbacks(self) -> list[TrainerCallback]:
        """The noise."""
        return [WeightNoise()]

    @contextmanager
    def largest_step(self, model: nn.Module) -> Iterator[None]:
        """Every layer has the noise of the last step."""
        for index, layer in enumerate(_layers(model)):
            layer.noise = layer.noise_at(layer.noise_options.sigma, (index,))
        try:
            yield
        finally:
            remove_noise(model)


def _layers(model: nn.Module) -> Iterator[FlatLoraLinear]:
    """The layers that have an active adapter, in the order of the model."""
    for layer in model.modules():
        if isinstance(layer, FlatLoraLinear) and layer.noise_options is not None:
            yield layer


FlatLoraModel = register("FLAT_LORA", FlatLoraConfig, FlatLoraLinear)
