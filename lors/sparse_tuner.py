"""A PEFT tuner over pruned linear layers, without the method: what SPP, SQFT and their like have in common.

A targeted layer has a frozen pruned weight W (out x in) and, per adapter, a few small trainable factors from
which a method makes its change delta W, zero wherever W is zero (or anywhere, in a method that can be asked to
let the zeros go: ``keep_zeros=False``). This module does what does not depend on the method: the life of adapters in
a layer (add, activate, disable, merge, unmerge, delete), and the replacement of layers in a model. A method gives a
config (``lors.sparse_config``) with its own fields, the factors, the forward pass and delta W; see ``SparseLinear``,
and ``lors.low_rank`` for all methods with delta W = s B A.

Several active adapters add up: W + delta W_1 + delta W_2. A merge is float32 arithmetic on the original W
with one rounding, whatever the order and number of adapters, and the original is kept until the unmerge.

An adapted layer computes from W itself. What hangs on the layer underneath works as it will after a merge all the
same: its hooks, accelerate's among them, see the input of the layer and its adapted output. What replaces the
computation of a layer is refused (``lors.blocks.linear_fault``), before anything is changed.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from lors import mixing
from lors.blocks import linear_fault
from lors.first_backward import FirstBackward
from lors.injection import FEW_ZEROS, as_before_on_error, check_callers, check_names, left_out
from lors.placement import execution_device, full, whole, write
from lors.shared_weights import untie_adapted
from lors.sparse_config import UnscaledTunerConfig
from lors.sparsity import masked_merge
from lors.support import Support, support_of

__all__ = ["SparseLinear", "SparseTunerModel", "active_layers"]

L = TypeVar("L", bound="SparseLinear")
_patching = threading.RLock()  # of forward functions; a hook may call its own layer


class SparseLinear(nn.Module, BaseTunerLayer):
    """A pruned linear layer with adapters; the base of the layers of one method.

    A subclass names its factors in ``adapter_layer_names`` (each becomes a ``ParameterDict`` by adapter) and
    defines ``initial_factors``, ``adapted`` and ``delta_weight``. ``r[name]``, ``scaling[name]`` and
    ``options[name]`` are rank, scale and config of an adapter.
    """

    other_param_names = ("r", "scaling", "options")
    sums_by_concatenation = False  # see lors.mixing.add_weighted_adapter

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

    def expects_gradient(self, name: str) -> bool:
        """Whether a backward pass should reach the adapter ``name`` now; a method may train one layer at a time."""
        return True

    def update_layer(self, adapter_name: str, config: UnscaledTunerConfig, r: int, scaling: float) -> None:
        """Add the adapter ``adapter_name``, with factors in the type and on the device of W."""
        self.r[adapter_name] = r
        self.scaling[adapter_name] = scaling
        self.options[adapter_name] = config
        for name, factor in zip(self.adapter_layer_names, self.initial_factors(adapter_name), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(factor)
        self._move_adapter_to_device_of_base_layer(adapter_name, execution_device(self.base_layer))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``.

        Args:
            x: The input.
            adapter_names: An adapter for each row of ``x``, ``__base__`` for none, in place of the active ones.

        Raises:
            ValueError: ``adapter_names`` has another length than ``x``, or an adapter is merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            mixing.check_rows(self, x, adapter_names)
            return self._call(partial(mixing.mixed, self, adapter_names), x)
        names = self._own(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x)
        return self._call(lambda inputs: self.adapted(inputs, names), x)

    def base_output(self, x: Tensor) -> Tensor:
        """X W^t + bias, past the hooks of the base layer: those run around the whole computation."""
        base = self.get_base_layer()
        return type(base).forward(base, x)

    def _call(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call the base layer with ``compute`` in place of its forward function, so that its hooks run around it."""
        base = self.base_layer
        if not (hasattr(base, "_hf_hook") or _has_hooks(base)):
            return compute(x)
        with ExitStack() as stack:
            # Factors that accelerate has offloaded with the layer: it brings what is called, and nobody calls these.
            for name, part in self._modules.items():
                if name != "base_layer" and hasattr(part, "_hf_hook"):
                    stack.enter_context(whole(part))
            return _call_with_hooks(base, compute, x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + delta W into the base layer: float32 arithmetic, one rounding to the type of W.

        The original W is kept beside the merged one until ``unmerge``. A later merge of another adapter
        starts from it, so neither the zeros nor the arithmetic depend on the order. An adapter with
        ``keep_zeros=False`` fills the zeros. A weight that is sharded by FSDP2 is gathered for it; all processes have
        to merge together.

        Args:
            safe_merge: Refuse a result that is not finite, and leave W as it was.
            adapter_names: Adapters to merge; by default the active ones.

        Raises:
            ValueError: ``safe_merge`` is set and the merged weight has an infinity or a NaN.
        """
        names = list(dict.fromkeys(self._own(check_adapters_to_merge(self, adapter_names))))
        if not names:
            return
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge:
            _check_finite(merged, names)
        with whole(self):
            values = self._as_stored(merged)
        stored = self._stored()
        if self._stored_before_merge is None:
            self._stored_before_merge = stored.detach().clone()
        write(stored, values)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """W + delta W of the adapters ``names``, out x in in the type of the original W, whole; changes nothing."""
        with whole(self):
            W = self.original_weight()
            precise = W.to(torch.promote_types(W.dtype, torch.float32))
            with torch.autocast(W.device.type, enabled=False):
                delta = sum(self.delta_weight(precise, name) for name in names)
                keep = all(self.options[name].keep_zeros for name in names)
                return masked_merge(W, delta) if keep else (precise + delta).to(W.dtype)

    def original_weight(self) -> Tensor:
        """W as it was before any merge, out x in, dense; inside ``lors.placement.whole`` if it is not in memory."""
        before = self._stored_before_merge
        stored = self._stored().detach() if before is None else full(before)
        return self._dense(stored.to(self._stored().device))

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("No adapter is merged, nothing to unmerge.", stacklevel=2)
            return
        write(self._stored(), self._stored_before_merge)
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
        ValueError: A target is no linear layer that can be adapted (``lors.blocks.linear_fault``), is not called as
            one, or its rank does not fit it; a name that matches nothing. The model is then as it was before.
    """

    other_base_layers: tuple[type[nn.Linear], ...] = ()
    _first_backward: FirstBackward | None = None

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        known = getattr(model, "peft_config", None)  # of adapters that transformers or PEFT have put on before
        before = copy.copy(known)
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            if before is not None:
                known.clear()
                known.update(before)
            raise

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's; ``adapter_names`` as in ``lors.mixing.adapter_for_each_row``."""
        with mixing.adapter_for_each_row(self, adapter_names):
            return self.model(*args, **kwargs)

    @staticmethod
    def check_rank(name: str, layer: nn.Linear, r: int) -> None:
        """Raise ``ValueError`` if the layer called ``name`` cannot have an update of rank r."""
        widest = min(layer.in_features, layer.out_features)
        if r > widest:
            raise ValueError(
                f"r={r}: larger than a side of {name!r} ({layer.in_features} -> {layer.out_features}); "
                f"at most {widest}: a smaller rank for it in rank_pattern, or put it into exclude_modules"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter on all its targets, or leave the model as it is.

        The model has a config of its own from then on: what is noted in it does not reach the next model that the same
        config is used for.
        """
        if not self.peft_config[adapter_name].inference_mode:  # else it was loaded for this model, and PEFT keeps it
            self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        names_before = list(self.targeted_module_names)
        try:
            with as_before_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._injected(adapter_name)
        except Exception:
            self.targeted_module_names = names_before
            raise
        for line in left_out(model):
            warnings.warn(f"{self.peft_config[adapter_name].peft_type.value}: {line}", stacklevel=4)

    def adapted_layers(self, *adapter_names: str) -> dict[str, SparseLinear]:
        """The layers that have one of the adapters, by name in the model without adapters."""
        return {
            name: part
            for name, part in self.model.named_modules()
            if isinstance(part, SparseLinear) and part._own(adapter_names)
        }

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; the next backward pass is watched for adapters that it does not reach."""
        super().set_adapter(adapter_name, inference_mode)
        if self._first_backward is not None:
            self._first_backward.stop()
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        factors, layers = {}, self.adapted_layers(*names)
        for key, layer in layers.items():
            held = [getattr(layer, part)[name] for name in layer._own(names) for part in layer.adapter_layer_names]
            factors[key] = [parameter for parameter in held if parameter.requires_grad and not parameter.is_meta]
        self._first_backward = FirstBackward(
            {key: held for key, held in factors.items() if held},
            expected=lambda key: any(layers[key].expects_gradient(name) for name in layers[key]._own(names)),
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; with ``safe_merge`` all layers are looked at before the first is changed."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add an adapter whose update is the weighted sum of others; see ``lors.mixing.add_weighted_adapter``."""
        mixing.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, options)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Called by PEFT around a forward pass, with its arguments."""
        return mixing.adapter_for_each_row(self, **kwargs)

    def _injected(self, adapter_name: str) -> None:
        """What is to be done and checked once all layers have the adapter; an error takes it off again."""
        config = self.peft_config[adapter_name]
        layers = self.adapted_layers(adapter_name)
        if not layers or any(
            layer._stored().is_meta and not execution_device(layer.base_layer) for layer in layers.values()
        ):
            return
        found = support_of({name: partial(_original_weight, layer) for name, layer in layers.items()})
        if config.keep_zeros and found["sparsity"] < FEW_ZEROS and config.support is None:
            warnings.warn(
                f"{config.peft_type.value}: the adapted layers have no zero to keep (sparsity {found['sparsity']:g}); "
                "prune the model first",
                stacklevel=5,
            )
        expected, config.support = config.support, found
        if config.keep_zeros and expected is not None and expected["sha256"] != found["sha256"]:
            message = (
                f"adapter {adapter_name!r} was made for a base with other zeros ({_described(expected)}; this one: "
                f"{_described(found)}): its update means something else here; load it on its own base, or set "
                "support=None in its config"
            )
            if config.other_support == "error":
                raise ValueError(message)
            warnings.warn(message, stacklevel=5)

    def _prepare_model(self, peft_config: UnscaledTunerConfig, model: nn.Module) -> None:
        """Resolve 'all-linear', and check all names before the first layer is replaced."""
        everywhere = peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
        _maybe_include_all_linear_layers(peft_config, model)
        if everywhere and peft_config.layers_to_transform is not None:  # PEFT picks blocks among endings of names only
            peft_config.target_modules = {name.rpartition(".")[2] for name in peft_config.target_modules}
        check_names(peft_config, model)
        check_callers(peft_config, model)

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
        self._check_target(peft_config, current_key, target)
        r, scaling = peft_config.layer_settings(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, r, scaling)
            return
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, r, scaling)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # No more: a layer puts its adapters where they belong; PEFT would move them to where an offloaded weight is.
        setattr(parent, child_name, new_module)

    def _check_target(self, config: UnscaledTunerConfig, name: str, module: nn.Module) -> None:
        layer = module.get_base_layer() if isinstance(module, self.tuner_layer_cls) else module
        fault = linear_fault(layer)
        if fault is None and getattr(type(layer), "computes_linear", False):
            known = isinstance(layer, self.other_base_layers)
            fault = None if known else f"is of type {type(layer).__name__}, which {config.peft_type.value} cannot adapt"
        if fault is not None:
            raise ValueError(f"target_modules: {name!r} {fault}")
        self.check_rank(name, layer, config.layer_settings(name)[0])

    def _check_merge_allowed(self) -> None:
        untie_adapted(self.model)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuse unknown adapters, layers that have since been changed so that a merge would be lost and, if asked for,
        results that are not finite, before any layer is changed."""
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter_names={adapter_names}: there is no adapter {unknown[0]!r}")
        layers = self.adapted_layers(*self.peft_config)
        for key, layer in layers.items():
            fault = linear_fault(layer.base_layer)
            if fault is not None:
                raise ValueError(f"{key} {fault}; nothing was merged")
        for key, layer in layers.items() if safe_merge else ():
            names = layer._own(layer.active_adapters if adapter_names is None else adapter_names)
            together = [*layer.merged_adapters, *(name for name in names if name not in layer.merged_adapters)]
            if together:
                _check_finite(layer.merged_weight(together), names, f" of {key!r}")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)


def _check_finite(merged: Tensor, names: Sequence[str], of: str = "") -> None:
    """Raise ``ValueError``, in the words of PEFT, unless a merged weight is finite."""
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: the weight{of} "
            "would have an infinity or a NaN; nothing was merged"
        )


@torch.compiler.disable  # which would not see that the forward function is another one for a while
def _call_with_hooks(layer: nn.Linear, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a layer whose forward function is ``compute`` in this call.

    One thread at a time: what a second one would restore is the computation of the first.
    """
    # Accelerate keeps the layer's own function there and has put one that runs its hook in its place.
    place, attributes = "_old_forward" if hasattr(layer, "_hf_hook") else "forward", vars(layer)
    missing = object()
    with _patching:
        before = attributes.get(place, missing)
        attributes[place] = compute
        try:
            return layer(x)
        finally:
            if before is missing:
                del attributes[place]
            else:
                attributes[place] = before


def _has_hooks(layer: nn.Module) -> bool:
    own = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    of_all = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    of_all = of_all or module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks
    return bool(own or of_all)


def _original_weight(layer: SparseLinear) -> Tensor:
    with whole(layer):
        return layer.original_weight()


def _described(support: Support) -> str:
    return f"sparsity {support['sparsity']:.3g}, {support['pattern']}, {support['sha256'][:8]}"
