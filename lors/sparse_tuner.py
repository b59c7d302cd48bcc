"""A PEFT tuner over pruned linear layers, without the method: layers replaced by ``SparseLinear`` ones, and the checks.

Fused experts are linear layers as long as they have an adapter (``lors.experts``), one for each expert.

A method gives a config (``lors.sparse_config``) and a layer (``lors.sparse_layer``); ``lors.plugin.register`` makes its
model from the one here.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from lors import mixing
from lors.blocks import linear_fault
from lors.experts import ExpertLinears, experts_as_linears, fuse_experts
from lors.first_backward import FirstBackward
from lors.injection import FEW_ZEROS, as_before_on_error, check_callers, check_names, left_out
from lors.placement import execution_device, whole
from lors.shared_weights import untie_adapted
from lors.sparse_config import UnscaledTunerConfig
from lors.sparse_layer import SparseLinear, adapted_layers, check_finite
from lors.storage import CompressedLinear, is_quantized
from lors.support import Support, support_of

__all__ = ["SparseTunerModel"]


class SparseTunerModel(BaseTuner):
    """A model whose targeted linear layers are of the class ``tuner_layer_cls``, a ``SparseLinear``.

    ``lors.plugin.register`` makes a subclass for each method. One of its own sets ``tuner_layer_cls``, and in
    ``other_base_layers`` the kinds of ``nn.Linear`` with a forward pass of their own that its layers can have beneath
    them.

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

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DDP from the ``PeftModel`` around this one: what it need not send before every forward pass."""
        layers = {name: part for name, part in self.model.named_modules() if isinstance(part, CompressedLinear)}
        return [f"base_model.model.{name}.{key}" for name, part in layers.items() for key in part._buffers]

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's; ``adapter_names`` as in ``lors.mixing.adapter_for_each_row``."""
        with mixing.adapter_for_each_row(self, adapter_names):
            return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter on all its targets, or leave the model as it is.

        The model has a config of its own from then on: what is noted in it does not reach the next model that the same
        config is used for.
        """
        if not self.peft_config[adapter_name].inference_mode:  # else it was loaded for this model, and PEFT keeps it
            self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        names_before = list(self.targeted_module_names)
        with experts_as_linears(model):
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
        return adapted_layers(self.model, *adapter_names)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; the next backward pass is watched for adapters that it does not reach."""
        super().set_adapter(adapter_name, inference_mode)
        if self._first_backward is not None:
            self._first_backward.stop()
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        factors, layers = defaultdict(list), defaultdict(list)
        for key, layer in self.adapted_layers(*names).items():
            held = [getattr(layer, part)[name] for name in layer._own(names) for part in layer.adapter_layer_names]
            held = [parameter for parameter in held if parameter.requires_grad and not parameter.is_meta]
            above = key.rpartition(".")[0]
            if isinstance(self.model.get_submodule(above), ExpertLinears):
                key = above  # some expert has a token, and not all need have one
            factors[key] += held
            layers[key].append(layer)
        self._first_backward = FirstBackward(
            {key: held for key, held in factors.items() if held},
            expected=lambda key: any(
                layer.expects_gradient(name) for layer in layers[key] for name in layer._own(names)
            ),
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
        self._check_grid(adapter_name, layers)
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

    def _check_grid(self, adapter_name: str, layers: Mapping[str, SparseLinear]) -> None:
        """Refuse a base whose grid is not that on which the adapter was trained."""
        config = self.peft_config[adapter_name]
        if not getattr(config, "grid", ""):
            return
        found = any(is_quantized(layer.get_base_layer()) for layer in layers.values())
        if config.quantized_base is not None and config.quantized_base != found:
            was, do = "dense", "load the dense one"
            if config.quantized_base:
                was, do = "quantised", "call lors.load_quantized(base, folder) before the adapter is loaded"
            raise ValueError(f"adapter {adapter_name!r} was trained on a {was} base, and this one is not: {do}")
        config.quantized_base = found

    def _prepare_model(self, peft_config: UnscaledTunerConfig, model: nn.Module) -> None:
        """Resolve 'all-linear', and check all names before the first layer is replaced."""
        everywhere = peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
        _maybe_include_all_linear_layers(peft_config, model)
        if everywhere:  # of many experts one name
            above = {name: name.rpartition(".")[0] for name in peft_config.target_modules}
            peft_config.target_modules = {
                above[name] if isinstance(model.get_submodule(above[name]), ExpertLinears) else name for name in above
            }
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
        if isinstance(target, ExpertLinears):
            for name, layer in list(target.named_children()):
                self._create_and_replace(peft_config, adapter_name, layer, name, target, f"{current_key}.{name}")
            return
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
        self.tuner_layer_cls.check_fit(name, layer, config)

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
                check_finite(layer.merged_weight(together), names, f" of {key!r}")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return fuse_experts(super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names))


def _original_weight(layer: SparseLinear) -> Tensor:
    with whole(layer):
        return layer.original_weight()


def _described(support: Support) -> str:
    return f"sparsity {support['sparsity']:.3g}, {support['pattern']}, {support['sha256'][:8]}"
