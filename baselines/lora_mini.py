"""LoRA-Mini (arXiv 2411.15804): four factors, of which the two outer ones are random and frozen.

A pruned weight W (out x in, frozen) gets delta W = s B A, s = alpha / r, with

    A = A_t A_o      A_o a x in, frozen       A_t r x a, trained
    B = B_o B_t      B_o out x b, frozen      B_t b x r, trained        under M = (W != 0) unless keep_zeros=False

so r (a + b) numbers are trained whatever the widths are, and the change lies in a random subspace of inputs and of
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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lors.low_rank import LowRankConfig, LowRankLinear, kaiming_uniform
from lors.placement import execution_device, whole
from lors.plugin import register
from lors.sparse_config import check_choice, check_flag
from lors.sparse_tuner import SparseTunerModel

__all__ = ["LoraMiniConfig", "LoraMiniLinear", "LoraMiniModel", "OuterFactors"]

OUTERS = ("orthonormal", "gaussian", "kaiming", "svd")
NARROW, FEW, MANY = 1024, 64, 128  # inner width of a layer up to NARROW wide, and of a wider one


@dataclass
class LoraMiniConfig(LowRankConfig):
    """Configuration of LoRA-Mini; a bad value raises ``ValueError``."""

    a: int | None = field(
        default=None,
        metadata={
            "help": "Width between the two input-side factors; None: 64 for up to 1024 inputs, 128 for more, at "
            "most half of them."
        },
    )
    b: int | None = field(
        default=None, metadata={"help": "Width between the two output-side factors; None: likewise for the outputs."}
    )
    outer: str = field(
        default="orthonormal",
        metadata={
            "help": "Outer factors. 'orthonormal', 'gaussian', 'kaiming': random, of the same scale (Kaiming: a "
            "third of the variance); 'svd': leading singular vectors of W, which is not LoRA-Mini."
        },
    )
    outer_seed: int = field(default=0, metadata={"help": "Seed of the outer factors; the seed of a run is another."})
    share_outer: bool = field(
        default=False, metadata={"help": "One A_o for all layers of an input width, one B_o for each output width."}
    )
    save_outer: bool = field(default=False, metadata={"help": "Save the outer factors with the adapter."})
    rescale_by_density: bool = field(
        default=False,
        metadata={"help": "With keep_zeros: divide s by sqrt(density of W), which the mask takes from the norm."},
    )
    outer_checksum: str | None = field(
        default=None,
        metadata={"help": "Of the numbers that the outer factors were drawn from; set when they are drawn."},
    )
    outer_torch: str | None = field(default=None, metadata={"help": "The version of torch that has drawn them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORA_MINI
        check_choice("outer", self.outer, OUTERS)
        for name in ("share_outer", "save_outer", "rescale_by_density"):
            check_flag(name, getattr(self, name))
        for name in ("a", "b"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: must be a positive integer or null")
        if self.share_outer and self.outer == "svd":
            raise ValueError("share_outer=True: must be false with outer='svd', whose factors are those of each W")

    def inner_widths(self, inputs: int, outputs: int) -> tuple[int, int]:
        """a and b of a layer of these widths."""
        return tuple(
            min(FEW if width <= NARROW else MANY, width // 2) if chosen is None else chosen
            for chosen, width in ((self.a, inputs), (self.b, outputs))
        )


class OuterFactors(nn.Module):
    """The frozen factors of one adapter in one layer: buffers ``A_o`` (a x in) and ``B_o`` (out x b).

    Attributes:
        checksum: Of the random numbers that they were made from.
    """

    def __init__(self, A_o: Tensor, B_o: Tensor, checksum: str, persistent: bool) -> None:
        super().__init__()
        self.checksum = checksum
        self.register_buffer("A_o", A_o, persistent=persistent)
        self.register_buffer("B_o", B_o, persistent=persistent)


def orthonormal_columns(Z: Tensor) -> Tensor:
    """The orthonormal basis of the columns of Z that its QR decomposition with a positive diagonal gives."""
    Q, R = torch.linalg.qr(Z)
    return Q * R.diagonal().sign()


def draw(width: int, inner: int, kind: str, seed: str) -> tuple[Tensor, int]:
    """A random width x inner matrix, its columns of norm about 1, and the checksum of the numbers behind it.

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
    matrix = orthonormal_columns(Z) if kind == "orthonormal" else Z / math.sqrt(width)
    return matrix, zlib.crc32(Z.numpy().tobytes())


class LoraMiniLinear(LowRankLinear):
    """A linear layer with LoRA-Mini adapters: ``mini_A_t[name]`` r x a, ``mini_B_t[name]`` b x r, and
    ``mini_outer[name]``."""

    adapter_layer_names = ("mini_A_t", "mini_B_t")
    other_param_names = (*LowRankLinear.other_param_names, "mini_outer")
    sums_by_concatenation = False  # the outer factors are those of one adapter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mini_outer = nn.ModuleDict()

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A_t uniform in +- 1 / sqrt(a), B_t zero."""
        a, b = self.options[name].inner_widths(self.in_features, self.out_features)
        return kaiming_uniform(self.r[name], a), torch.zeros(b, self.r[name])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A_t A_o and B_o B_t: the adapter as an ordinary LoRA of rank r and the same scale."""
        A_t, B_t, outer = self.mini_A_t[name], self.mini_B_t[name], self.mini_outer[name]
        return A_t @ outer.A_o.to(A_t.dtype), outer.B_o.to(B_t.dtype) @ B_t

    def set_outer(self, name: str, module_name: str, shared: dict[str, tuple[Tensor, int]]) -> None:
        """Make the outer factors of the adapter ``name``, in the type and on the device of W.

        Args:
            module_name: The name of this layer in the model; its seeds are made from it.
            shared: Factors of other layers of the model by what they belong to; added to.
        """
        config, W = self.options[name], self.get_base_layer().weight
        device = execution_device(self.base_layer) or W.device
        a, b = config.inner_widths(self.in_features, self.out_features)
        sides = {"A_o": (self.in_features, a, 1.0), "B_o": (self.out_features, b, math.sqrt(self.out_features / b))}
        found = []
        for side, (width, inner, scale) in sides.items():
            owner = f"{side}:{width}x{inner}" if config.share_outer else f"{side}:{module_name}"
            if owner not in shared:
                matrix, checksum = self._outer(side, width, inner, config.outer, f"{config.outer_seed}:{owner}")
                matrix = (scale * matrix if side == "B_o" else matrix.t()).contiguous()
                shared[owner] = matrix.to(device, W.dtype), checksum
            found.append(shared[owner])
        (A_o, first), (B_o, second) = found
        self.mini_outer[name] = OuterFactors(A_o, B_o, f"{first:08x}{second:08x}", config.save_outer)

    def _outer(self, side: str, width: int, inner: int, kind: str, seed: str) -> tuple[Tensor, int]:
        """One outer factor as width x inner, with columns of norm about 1, and its checksum."""
        base = self.get_base_layer()
        if base.weight.is_meta and execution_device(base) is None:
            return base.weight.new_empty(width, inner), 0
        if kind == "svd":
            with whole(base):
                U, _, V = torch.linalg.svd(base.weight.detach().float(), full_matrices=False)
            return (U if side == "B_o" else V.t())[:, :inner], 0
        return draw(width, inner, kind, seed)


class LoraMiniModel(SparseTunerModel):
    """A model with ``LoraMiniLinear`` layers; made by ``peft.get_peft_model`` from a ``LoraMiniConfig``.

    Raises:
        ValueError: Besides the errors of every tuner: inner widths that do not fit a layer, or outer factors that are
            not those that an adapter was saved with.
    """

    prefix = "mini_"
    tuner_layer_cls = LoraMiniLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As every tuner, with factors that layers may share."""
        self._shared: dict[str, tuple[Tensor, int]] = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._shared

    def _injected(self, adapter_name: str) -> None:
        """Compare the outer factors with the checksum of a saved adapter, besides what every tuner does."""
        super()._injected(adapter_name)
        self._check_outer(self.peft_config[adapter_name], adapter_name)

    def _create_and_replace(
        self,
        peft_config: LoraMiniConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        layer.set_outer(adapter_name, current_key, self._shared)
        base = layer.get_base_layer()
        in_memory = not base.weight.is_meta or execution_device(base) is not None
        if peft_config.rescale_by_density and peft_config.keep_zeros and in_memory:
            with whole(base):
                W = base.weight
                layer.scaling[adapter_name] *= math.sqrt(W.numel() / max(1, int(W.count_nonzero())))

    def _check_target(self, config: LoraMiniConfig, name: str, module: nn.Module) -> None:
        """Refuse inner widths that do not fit, besides what no method can adapt."""
        super()._check_target(config, name, module)
        (a, b), (r, _) = config.inner_widths(module.in_features, module.out_features), config.layer_settings(name)
        narrower = min(module.in_features, module.out_features)
        widest = (narrower, narrower) if config.outer == "svd" else (module.in_features, module.out_features)
        for label, inner, most in (("a", a, widest[0]), ("b", b, widest[1])):
            if not r <= inner <= most:
                raise ValueError(
                    f"{label}={inner}: must be at least r={r} and at most {most} in {name!r} "
                    f"({module.in_features} -> {module.out_features})"
                )

    def _check_outer(self, config: LoraMiniConfig, adapter_name: str) -> None:
        """Note what the outer factors were drawn from, or hold it against what the config has noted."""
        layers = [(key, part) for key, part in self.named_modules() if isinstance(part, LoraMiniLinear)]
        layers = [(key, part) for key, part in layers if adapter_name in part.mini_outer]
        drawn = config.outer != "svd" and all(part.mini_outer[adapter_name].checksum for _, part in layers)
        if config.save_outer or not drawn:
            return
        text = " ".join(part.mini_outer[adapter_name].checksum for _, part in layers)
        checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
        if config.outer_checksum is None:
            config.outer_checksum, config.outer_torch = checksum, torch.__version__
        elif config.outer_checksum != checksum:
            raise ValueError(
                f"outer_checksum={config.outer_checksum!r}: torch {torch.__version__} draws other outer factors for "
                f"this model ({checksum}) than torch {config.outer_torch} did for the adapter; a config for a new "
                "adapter must leave it out, an adapter for another version must be saved with save_outer=true"
            )


LORA_MINI = register("LORA_MINI", LoraMiniConfig, LoraMiniModel, prefix=LoraMiniModel.prefix)
