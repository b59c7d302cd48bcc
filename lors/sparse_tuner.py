"""A PEFT tuner over pruned linear layers, without the method: what SPP, SQFT and their like have in common.

A targeted layer has a frozen pruned weight W (out x in) and, per adapter, a few small trainable factors from
which a method makes its change delta W, zero wherever W is zero (or anywhere, in a method that can be asked to
let the zeros go: ``keep_zeros=False``). This module does what does not depend on the method: the config fields
that PEFT users know and their checks, the life of adapters in a layer (add, activate, disable, merge, unmerge,
delete), and the replacement of layers in a model. A method gives a config with its own fields, the factors, the
forward pass and delta W; see ``SparseLinear``, and ``lors.low_rank`` for all methods with delta W = s B A.

Several active adapters add up: W + delta W_1 + delta W_2. A merge is float32 arithmetic on the original W
with one rounding, whatever the order and number of adapters, and the original is kept until the unmerge.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from lors.sparsity import masked_merge

__all__ = [
    "SparseLinear",
    "SparseTunerConfig",
    "SparseTunerModel",
    "UnscaledTunerConfig",
    "active_layers",
    "check_choice",
    "check_dropout",
    "check_flag",
]

L = TypeVar("L", bound="SparseLinear")


@dataclass
class UnscaledTunerConfig(PeftConfig):
    """Fields shared by all methods; a bad value raises ``ValueError``. A subclass sets ``peft_type``.

    A method that can also fill the zeros declares ``keep_zeros`` as a field, with the default True.
    """

    keep_zeros: ClassVar[bool] = True

    r: int = field(default=16, metadata={"help": "Rank of the update, or the number of rows of its factor."})
    target_modules: list[str] | str | None = field(
        default=INCLUDE_LINEAR_LAYERS_SHORTHAND,
        metadata={
            "help": "Names (or their endings) of the linear layers to adapt, or one regular expression, or "
            "'all-linear' (default): every linear layer but the output head."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, of layers not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; needs target_modules to be a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the model's list of blocks, if layers_to_transform cannot tell it by itself."},
    )
    rank_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> rank, for layers whose rank is not r."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        check_flag("keep_zeros", self.keep_zeros)
        for name, r in {"r": self.r, **_labelled("rank_pattern", self.rank_pattern)}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name}={r!r}: the rank must be a positive integer")
        if self.target_modules is None:
            self.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r}: has no effect with "
                f"target_modules={self.target_modules!r}; give target_modules as a list of names"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r}: needs layers_to_transform")
        # Sets, as PEFT's own configs have: it looks every module of the model up in them.
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r of a layer, after ``rank_pattern``, and the scale of its update, 1."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), name), self.r), 1.0


@dataclass
class SparseTunerConfig(UnscaledTunerConfig):
    """The same for a method whose update has a scale, s = lora_alpha / r."""

    lora_alpha: float = field(
        default=16, metadata={"help": "Numerator of the scale of the update, s = lora_alpha / r."}
    )
    alpha_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> alpha, for layers whose alpha is not lora_alpha."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha_pattern = self.alpha_pattern or {}
        for name, alpha in {
            "lora_alpha": self.lora_alpha,
            **_labelled("alpha_pattern", self.alpha_pattern),
        }.items():
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ValueError(f"{name}={alpha!r}: alpha must be a positive number")

    def layer_settings(self, name: str) -> tuple[int, float]:
        """Rank r and scale s = alpha / r of a layer, after ``rank_pattern`` and ``alpha_pattern``."""
        r, _ = super().layer_settings(name)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), name), self.lora_alpha)
        return r, alpha / r


class SparseLinear(nn.Module, BaseTunerLayer):
    """A pruned linear layer with adapters; the base of the layers of one method.

    A subclass names its factors in ``adapter_layer_names`` (each becomes a ``ParameterDict`` by adapter) and
    defines ``initial_factors``, ``adapted`` and ``delta_weight``. ``r[name]``, ``scaling[name]`` and
    ``options[name]`` are rank, scale and config of an adapter.
    """

    other_param_names = ("r", "scaling", "options")

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, config: UnscaledTunerConfig, r: int, scaling: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.options: dict[str, UnscaledTunerConfig] = {}
        self.merged_adapters: list[str] = []
        self._stored_before_merge: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, scaling)

    def initial_factors(self, name: str) -> tuple[Tensor, ...]:
        """Initial factors of the adapter ``name``, in the order of ``adapter_layer_names``; delta W must be zero."""
        raise NotImplementedError

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Output of the layer with the adapters ``names`` (at least one), ``[..., in]`` to ``[..., out]``."""
        raise NotImplementedError

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """delta W of one adapter, scale included: out x in, in the type of ``weight``, the original W."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: UnscaledTunerConfig, r: int, scaling: float) -> None:
        """Add the adapter ``adapter_name``, with factors in the type and on the device of W."""
        self.r[adapter_name] = r
        self.scaling[adapter_name] = scaling
        self.options[adapter_name] = config
        for name, factor in zip(self.adapter_layer_names, self.initial_factors(adapter_name), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(factor)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._own(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x)
        return self.adapted(x, names)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + delta W into the base layer: float32 arithmetic, one rounding to the type of W.

        The original W is kept beside the merged one until ``unmerge``. A later merge of another adapter
        starts from it, so neither the zeros nor the arithmetic depend on the order. An adapter with
        ``keep_zeros=False`` fills the zeros.

        Args:
            safe_merge: Refuse a result that is not finite, and leave W as it was.
            adapter_names: Adapters to merge; by default the active ones.

        Raises:
            ValueError: ``safe_merge`` is set and the merged weight has an infinity or a NaN.
        """
        names = self._own(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        stored = self._stored()
        original = stored.data if self._stored_before_merge is None else self._stored_before_merge
        W = self._dense(original)
        precise = W.to(torch.promote_types(W.dtype, torch.float32))
        with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
            together = [*self.merged_adapters, *names]
            delta = sum(self.delta_weight(precise, name) for name in together)
            keep = all(self.options[name].keep_zeros for name in together)
            merged = masked_merge(W, delta) if keep else (precise + delta).to(W.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"adapter_names={names}: the merged weight has an infinity or a NaN; nothing was merged")
        self._stored_before_merge = original
        stored.data = self._as_stored(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("No adapter is merged, nothing to unmerge.", stacklevel=2)
            return
        stored = self._stored()
        stored.data = self._stored_before_merge.to(stored.device, stored.dtype)
        self._stored_before_merge = None
        self.merged_adapters.clear()

    def _stored(self) -> nn.Parameter:
        """The parameter that holds W; a subclass may keep less than W itself in it."""
        return self.get_base_layer().weight

    def _dense(self, stored: Tensor) -> Tensor:
        """W, out x in, from what ``_stored`` holds."""
        return stored

    def _as_stored(self, weight: Tensor) -> Tensor:
        """The inverse of ``_dense``, for a weight whose zeros contain those of W."""
        return weight

    def _own(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that this layer has; an adapter need not target every layer."""
        return [name for name in names if name in self.r]


def active_layers(model: nn.Module, kind: type[L]) -> Iterator[tuple[L, str]]:
    """Every layer of a kind with each of its active adapters, in the order of the model."""
    for layer in model.modules():
        if isinstance(layer, kind):
            yield from ((layer, name) for name in layer._own(layer.active_adapters))


class SparseTunerModel(BaseTuner):
    """A model whose targeted linear layers are of the class ``tuner_layer_cls``, a ``SparseLinear``.

    A subclass sets ``prefix`` and ``tuner_layer_cls``, and in ``other_base_layers`` the kinds of ``nn.Linear`` with
    a forward pass of their own that its layers can have beneath them.

    Raises:
        ValueError: A target is not a plain floating-point ``nn.Linear`` in memory, or its rank does not fit
        it.
    """

    other_base_layers: tuple[type[nn.Linear], ...] = ()

    @staticmethod
    def check_rank(name: str, layer: nn.Linear, r: int) -> None:
        """Raise ``ValueError`` if the layer called ``name`` cannot have an update of rank r."""
        widest = min(layer.in_features, layer.out_features)
        if r > widest:
            raise ValueError(
                f"r={r}: larger than a side of {name!r} ({layer.in_features} -> {layer.out_features}); "
                f"at most {widest}, or a smaller rank for it in rank_pattern"
            )

    def _prepare_model(self, peft_config: UnscaledTunerConfig, model: nn.Module) -> None:
        """Check all named targets before the first is replaced, so a refused config changes nothing."""
        inside_adapters = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, BaseTunerLayer))
        for name, module in model.named_modules():
            if not name.startswith(inside_adapters) and self._check_target_module_exists(peft_config, name):
                self._check_target(peft_config, name, module)

    def _create_and_replace(
        self,
        peft_config: UnscaledTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._check_target(peft_config, current_key, target)  # 'all-linear' is resolved after _prepare_model
        r, scaling = peft_config.layer_settings(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, r, scaling)
            return
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, r, scaling)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _check_target(self, config: UnscaledTunerConfig, name: str, module: nn.Module) -> None:
        layer = module.get_base_layer() if isinstance(module, self.tuner_layer_cls) else module
        method = config.peft_type.value
        plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if not plain and not isinstance(layer, self.other_base_layers):
            raise ValueError(
                f"target_modules: {name!r} is a {type(layer).__name__}; {method} adapts plain nn.Linear layers only"
            )
        if not layer.weight.is_floating_point():
            raise ValueError(f"target_modules: the weight of {name!r} is {layer.weight.dtype}; {method} needs floats")
        if getattr(getattr(layer, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"target_modules: {name!r} is offloaded by accelerate; {method} reads the weight "
                "itself, so it must stay on its device"
            )
        self.check_rank(name, layer, config.layer_settings(name)[0])


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def check_dropout(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a probability below 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"dropout={value!r}: must be a probability with 0 <= dropout < 1")


def check_flag(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def _labelled(field_name: str, pattern: dict) -> dict[str, Any]:
    """The entries of a pattern, named as a user would find them in an error."""
    return {f"{field_name}[{name!r}]": value for name, value in pattern.items()}
