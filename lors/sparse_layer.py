"""A pruned linear layer with adapters, without the method: what SPP, SQFT and their like have in common.

The layer has a frozen pruned weight W (out x in) and, per adapter, a few small trainable factors from which a method
makes its change delta W, zero wherever W is zero (or anywhere, in a method that can be asked to let the zeros go:
``keep_zeros=False``). Here is the life of adapters in a layer: add, activate, disable, merge, unmerge, delete. A method
adds the factors, the forward pass and delta W; see ``lors.low_rank`` for all methods with delta W = s B A.

Several active adapters add up: W + delta W_1 + delta W_2. A merge is float32 arithmetic on the original W
with one rounding, whatever the order and number of adapters, and the original is kept until the unmerge.

An adapted layer computes from W itself. What hangs on the layer underneath works as it will after a merge all the
same: its hooks, accelerate's among them, see the input of the layer and its adapted output. What replaces the
computation of a layer is refused (``lors.blocks.linear_fault``), before anything is changed.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from lors.functional import without_autocast
from lors.placement import execution_device, full, whole, write
from lors.sparse_config import UnscaledTunerConfig
from lors.sparsity import masked_merge

__all__ = ["BASE", "MaskedLinear", "SparseLinear", "active_layers", "adapted_layers", "check_finite", "layers_by_block"]

BASE = "__base__"  # PEFT's name for a row without adapter
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

    @classmethod
    def check_fit(cls, name: str, layer: nn.Linear, config: UnscaledTunerConfig) -> None:
        """Raise ``ValueError`` if the layer called ``name`` cannot have an adapter of this config.

        By default the rank must not exceed a side of the layer.
        """
        r, _ = config.layer_settings(name)
        widest = min(layer.in_features, layer.out_features)
        if r > widest:
            raise ValueError(
                f"r={r}: larger than a side of {name!r} ({layer.in_features} -> {layer.out_features}); "
                f"at most {widest}: a smaller rank for it in rank_pattern, or put it into exclude_modules"
            )

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
            _check_rows(self, x, adapter_names)
            return self._call(partial(_mixed, self, adapter_names), x)
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
            check_finite(merged, names)
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
            with without_autocast(W.device.type):
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


class MaskedLinear(SparseLinear):
    """A layer of a method that can put the mask M = (W != 0) on its update, or fill the zeros (``MaskedConfig``).

    A subclass defines ``initial_factors``, ``masked_output``, ``branch`` and ``update``.
    """

    def masked_output(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """X (W + M (.) (update_1 + update_2 + ...))^t + bias of the adapters ``names``."""
        raise NotImplementedError

    def branch(self, x: Tensor, name: str) -> Tensor:
        """drop(X) update^t of one adapter, ``[..., in]`` to ``[..., out]``."""
        raise NotImplementedError

    def update(self, name: str, dtype: torch.dtype) -> Tensor:
        """delta W of one adapter without the mask: a new tensor, out x in, scale included."""
        raise NotImplementedError

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One product for all adapters that keep the zeros, one branch beside it for each other."""
        masked = [name for name in names if self.options[name].keep_zeros]
        y = self.masked_output(x, masked) if masked else self.base_output(x)
        for name in names:
            if name not in masked:
                y = y + self.branch(x, name).to(y.dtype)
        return y

    def delta_weight(self, weight: Tensor, name: str) -> Tensor:
        """M (.) update, or the update of an adapter that does not keep the zeros."""
        delta = self.update(name, weight.dtype)
        return delta.mul_(weight != 0) if self.options[name].keep_zeros else delta


def active_layers(model: nn.Module, kind: type[L]) -> Iterator[tuple[L, str]]:
    """Every layer of a kind with each of its active adapters, in the order of the model."""
    for layer in model.modules():
        if isinstance(layer, kind):
            yield from ((layer, name) for name in layer._own(layer.active_adapters))


def adapted_layers(model: nn.Module, *adapter_names: str) -> dict[str, SparseLinear]:
    """The layers of a model that have one of the adapters, by name."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, SparseLinear)}
    return {name: layer for name, layer in layers.items() if layer._own(adapter_names)}


def layers_by_block(layers: Mapping[str, L]) -> list[list[L]]:
    """The layers of each decoder block, which is what their names have up to the first number; others stand alone."""
    blocks: dict[str, list[L]] = {}
    for name, layer in layers.items():
        in_block = re.match(r".*?\.\d+(?=\.)", name)
        blocks.setdefault(in_block[0] if in_block else name, []).append(layer)
    return list(blocks.values())


def _check_rows(layer: SparseLinear, x: Tensor, adapter_names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless there is one name for each row of x and no adapter is merged."""
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively. A model that regroups the rows (OPT, DBRX), or returns "
            "several sequences for one, cannot have an adapter for each."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def _mixed(layer: SparseLinear, adapter_names: Sequence[str], x: Tensor) -> Tensor:
    """Output of a layer, ``[b, ..., in]`` to ``[b, ..., out]``, with the adapter ``adapter_names[i]`` in row i."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows.setdefault(name if name in layer.r else BASE, []).append(row)
    parts = [layer.base_output(x[at]) if name == BASE else layer.adapted(x[at], [name]) for name, at in rows.items()]
    order = torch.tensor([row for at in rows.values() for row in at], device=x.device)
    return torch.cat(parts)[order.argsort()]


def check_finite(merged: Tensor, names: Sequence[str], of: str = "") -> None:
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
