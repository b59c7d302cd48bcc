"""LoRA-Mini (arXiv 2411.15804): four factors, of which the two outer ones are random and frozen.

A pruned weight W (out x in, frozen) gets delta W = s B A, s = alpha / r, with

    A = A_t A_o      A_o a x in, frozen       A_t r x a, trained
    B = B_o B_t      B_o out x b, frozen      B_t b x r, trained        under M = (W != 0) unless keep_zeros=False

so r (a + b) parameters are trained whatever the widths are, and the change lies in a random subspace of inputs and of
outputs. It needs r <= min(a, b), a <= in and b <= out. B_t starts at zero, A_t uniform in +- 1 / sqrt(a).

The outer factors are scaled so that learning rates of LoRA carry over: A_o has orthonormal rows, so A_t A_o has the
size of LoRA's A; B_o has orthonormal columns times sqrt(out / b), so a step of the length lr for every entry of B_t
moves the entries of B by lr (root mean square). Each layer draws its own from ``outer_seed`` and the layer's name, on
the CPU in float32. They are not saved unless asked for: loading draws them again, and the checksum in
``adapter_config.json`` refuses another random stream.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lors.checks import flag, one_of, option, whole
from lors.low_rank import LowRankConfig, LowRankLinear, kaiming_uniform
from lors.placement import execution_device
from lors.plugin import register
from lors.sparse_tuner import SparseTunerModel

__all__ = ["LoraMiniConfig", "LoraMiniLinear", "LoraMiniModel", "OuterFactors"]

OUTERS = ("orthonormal", "gaussian", "kaiming")
NARROW, FEW, MANY = 1024, 64, 128  # inner width of a layer up to NARROW wide, and of a wider one


@dataclass
class LoraMiniConfig(LowRankConfig):
    """Configuration of LoRA-Mini; a bad value raises ``ValueError``."""

    a: int | None = option(
        None,
        "Width between the two input-side factors; None: 64 for up to 1024 inputs, 128 for more, at most half of them.",
        whole(">= 1", optional=True),
    )
    b: int | None = option(
        None,
        "Width between the two output-side factors; None: likewise for the outputs.",
        whole(">= 1", optional=True),
    )
    outer: str = option(
        "orthonormal",
        "Outer factors: 'orthonormal', 'gaussian' or 'kaiming', all random, of the same scale (Kaiming: a third of the "
        "variance).",
        one_of(*OUTERS),
    )
    outer_seed: int = option(0, "Seed of the outer factors. The seed of a run leaves them alone.", whole())
    save_outer: bool = option(False, "Save the outer factors with the adapter; False: drawn again on loading.", flag)
    outer_checksum: str | None = option(
        None, "Of the random numbers that the outer factors were made from; set when they are drawn."
    )
    outer_torch: str | None = option(None, "The version of torch that has drawn them.")

    def inner_widths(self, inputs: int, outputs: int) -> tuple[int, int]:
        """a and b of a layer of these widths."""
        return tuple(
            min(FEW if width <= NARROW else MANY, width // 2) if chosen is None else chosen
            for chosen, width in ((self.a, inputs), (self.b, outputs))
        )


class OuterFactors(nn.Module):
    """The frozen factors of one adapter in one layer: buffers ``A_o`` (a x in) and ``B_o`` (out x b).

    Attributes:
        checksum: Of the random numbers that they were made from; empty on the meta device.
    """

    def __init__(self, A_o: Tensor, B_o: Tensor, checksum: str, persistent: bool) -> None:
        super().__init__()
        self.checksum = checksum
        self.register_buffer("A_o", A_o, persistent=persistent)
        self.register_buffer("B_o", B_o, persistent=persistent)


def draw(width: int, inner: int, kind: str, seed: str) -> tuple[Tensor, int]:
    """A random width x inner matrix, its columns of norm about 1, and the checksum of the random numbers behind it.

    The checksum is taken before the decomposition, whose last digits differ from machine to machine.

    Args:
        kind: ``orthonormal``, ``gaussian`` or ``kaiming`` (uniform, a third of the variance).
        seed: Any text.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
    if kind == "kaiming":
        Z = torch.rand(width, inner, generator=generator, device="cpu") * 2 - 1
    else:
        Z = torch.randn(width, inner, generator=generator, device="cpu")
    checksum = zlib.crc32(Z.numpy().tobytes())
    if kind != "orthonormal":
        return Z / math.sqrt(width), checksum
    Q, R = torch.linalg.qr(Z)
    return Q * R.diagonal().sign(), checksum  # the one decomposition whose diagonal is positive


class LoraMiniLinear(LowRankLinear):
    """A linear layer with LoRA-Mini adapters: ``lora_mini_A_t[name]`` r x a, ``lora_mini_B_t[name]`` b x r, and
    ``lora_mini_outer[name]``."""

    adapter_layer_names = ("lora_mini_A_t", "lora_mini_B_t")
    other_param_names = (*LowRankLinear.other_param_names, "lora_mini_outer")
    sums_by_concatenation = False  # the outer factors are those of one adapter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_mini_outer = nn.ModuleDict()

    @classmethod
    def check_fit(cls, name: str, layer: nn.Linear, config: LoraMiniConfig) -> None:
        """Raise ``ValueError`` unless rank and inner widths fit the layer called ``name``."""
        super().check_fit(name, layer, config)
        widths, (r, _) = (layer.in_features, layer.out_features), config.layer_settings(name)
        for label, inner, width in zip("ab", config.inner_widths(*widths), widths, strict=True):
            if not r <= inner <= width:
                raise ValueError(
                    f"{label}={inner}: must be at least r={r} and at most {width} in {name!r} "
                    f"({layer.in_features} -> {layer.out_features})"
                )

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A_t uniform in +- 1 / sqrt(a), B_t zero."""
        a, b = self.options[name].inner_widths(self.in_features, self.out_features)
        return kaiming_uniform(self.r[name], a), torch.zeros(b, self.r[name])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A_t A_o and B_o B_t: the adapter as an ordinary LoRA of rank r and the same scale."""
        A_t, B_t, outer = self.lora_mini_A_t[name], self.lora_mini_B_t[name], self.lora_mini_outer[name]
        return A_t @ outer.A_o.to(A_t.dtype), outer.B_o.to(B_t.dtype) @ B_t

    def set_outer(self, name: str, module_name: str) -> None:
        """Make the outer factors of the adapter ``name``, in the type and on the device of W.

        Args:
            module_name: The name of this layer in the model; its seeds are made from it.
        """
        config, W = self.options[name], self.get_base_layer().weight
        device = execution_device(self.base_layer) or W.device
        a, b = config.inner_widths(self.in_features, self.out_features)
        if device.type == "meta":
            A_o, B_o, checksum = W.new_empty(a, self.in_features), W.new_empty(self.out_features, b), ""
        else:
            columns, first = draw(self.in_features, a, config.outer, f"{config.outer_seed}:A_o:{module_name}")
            B_o, second = draw(self.out_features, b, config.outer, f"{config.outer_seed}:B_o:{module_name}")
            A_o = columns.t().contiguous().to(device, W.dtype)
            B_o = (math.sqrt(self.out_features / b) * B_o).to(device, W.dtype)
            checksum = f"{first:08x}{second:08x}"
        self.lora_mini_outer[name] = OuterFactors(A_o, B_o, checksum, config.save_outer)


class LoraMiniModel(SparseTunerModel):
    """A model with ``LoraMiniLinear`` layers; made by ``peft.get_peft_model`` from a ``LoraMiniConfig``.

    Raises:
        ValueError: Besides the errors of every tuner: inner widths that do not fit a layer, or outer factors that are
            not those that an adapter was saved with.
    """

    tuner_layer_cls = LoraMiniLinear

    def _injected(self, adapter_name: str) -> None:
        """Make the outer factors and note what they were drawn from, or hold it against what a saved config says."""
        layers, config = self.adapted_layers(adapter_name), self.peft_config[adapter_name]
        for name, layer in layers.items():
            layer.set_outer(adapter_name, name)
        super()._injected(adapter_name)
        checksums = [layer.lora_mini_outer[adapter_name].checksum for layer in layers.values()]
        if config.save_outer or not all(checksums):
            return
        checksum = hashlib.sha256(" ".join(checksums).encode()).hexdigest()[:16]
        if config.outer_checksum is None:
            config.outer_checksum, config.outer_torch = checksum, torch.__version__
        elif config.outer_checksum != checksum:
            raise ValueError(
                f"outer_checksum={config.outer_checksum!r}: torch {torch.__version__} draws other outer factors for "
                f"this model ({checksum}) than torch {config.outer_torch} did for the adapter; a config for a new "
                "adapter must leave it out, an adapter for another version must be saved with save_outer=true"
            )


register("LORA_MINI", LoraMiniConfig, LoraMiniModel)
