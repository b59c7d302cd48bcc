"""A linear layer whose frozen pruned weight is kept packed, and decoded one layer at a time.

W (out x in) is stored as its non-zero values and where they are (``lors.kernels.layout``): a half-sparse
bfloat16 weight takes 9/16 of its dense bytes. The dense matrix exists only while it is multiplied: under a LoRS
adapter inside the merge, otherwise in ``CompressedLinear.forward``. Nothing is lost but the sign of zeros.

==========  =================================================================================================
storage     layout of a layer
==========  =================================================================================================
dense       as it is
bitmap      values and bitmap: any pattern
n:m         values and indices, in the smallest n:m pattern that the weight follows (m = 2, 4, 8 or 16); one that
            was not pruned to such a pattern may follow 13:16, say, and gain nothing
auto        the smallest of these
==========  =================================================================================================

A weight that has been quantised (``lors.kernels.integers``, ``lors.kernels.nf4``) is kept as codes with their grid by
the same class: ``hold`` puts any packed weight into a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lors.functional import frozen_linear
from lors.kernels import BITMAP, DENSE, PackedWeight, decode, pack
from lors.kernels.layout import GROUPED, GROUPS, INTEGERS, NF4, empty, is_quantizing, kind_of, values_at
from lors.placement import full, whole
from lors.sparsity import UNSTRUCTURED, resolve_sparsity

__all__ = [
    "PARTS",
    "STORAGES",
    "CompressedLinear",
    "best_layout",
    "check_compression",
    "compress_linear",
    "count_weights",
    "decompress_linear",
    "dense_state_dict",
    "gradient_weight",
    "hold",
    "is_quantized",
    "places_as_parameters",
]

STORAGES = (DENSE, BITMAP, GROUPED, "auto")
# Names of a layout's tensors in the state of a layer.
PARTS = {
    BITMAP: ("values", "bits", "offsets"),
    GROUPED: ("values", "codes"),
    INTEGERS: ("scales", "codes", "zeros"),
    NF4: ("scales", "codes"),
}


class _Decoded(Tensor):
    """A copy of a weight, for which PEFT's own layers would take it in a merge; results of operations are plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """A plain tensor of the same memory."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(
            "the weight is compressed, and what is written into a decoded copy of it is lost: leave the adapter beside "
            "it, or merge LoRS or SQFT"
        )


class CompressedLinear(nn.Linear):
    """A linear layer with a packed, frozen weight. ``compress_linear`` turns a plain layer into one.

    The values (or scales) are a parameter without gradient, the other parts are buffers (FSDP1 takes no whole numbers
    as parameters, for FSDP2 see `places_as_parameters`): they move, are copied and saved with the model, a cast touches
    the values only, and the values are sharded.
    ``weight`` is decoded afresh at every access and cannot be assigned to. A state dict with a dense ``weight`` can be
    loaded: it is packed again.

    Attributes:
        layout: ``bitmap``, the n:m pattern, or one that quantises.
    """

    computes_linear = True  # see lors.blocks.linear_fault
    layout: str
    _plain_class: type[nn.Linear]  # what it was and will be again
    _like_weight: Tensor | None  # see gradient_weight

    @property
    def _part_names(self) -> tuple[str, ...]:
        return PARTS[kind_of(self.layout)]

    @property
    def stored(self) -> Tensor:
        """The part that a merge changes: the values, or the codes of a quantised weight."""
        return self.codes if is_quantized(self) else self.values

    @property
    def numbers(self) -> nn.Parameter:
        """The part in the type of the weight: the values, or the scales of a quantised weight."""
        return getattr(self, self._part_names[0])

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels take it."""
        parts = tuple(full(getattr(self, name)) for name in self._part_names)
        return PackedWeight(self.layout, parts, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """W, ``[out, in]``, decoded: a copy that does not require a gradient, and whose ``data`` cannot be set."""
        W = decode(self.packed)
        return W.as_subclass(_Decoded) if type(W) is Tensor else W

    def packed_with(self, stored: Tensor) -> PackedWeight:
        """The weight with another ``stored`` part."""
        parts = list(self.packed.parts)
        parts[1 if is_quantized(self) else 0] = stored
        return self.packed._replace(parts=tuple(parts))

    def dense(self, stored: Tensor) -> Tensor:
        """The weight, ``[out, in]``, that has other values in the places of this one, or other codes on its grid."""
        return decode(self.packed_with(stored))

    def values_of(self, weight: Tensor) -> Tensor:
        """What to store of a weight whose zeros contain those of this one; the inverse of ``dense``.

        Raises:
            ValueError: The weight does not lie on the grid of the quantised one.
        """
        return values_at(self.packed, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``; the dense weight is made again in the backward pass."""
        return frozen_linear(x, self.packed, self.bias, self._like_weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        W = state_dict.get(f"{prefix}weight")
        if W is not None:
            W = W.to(self.numbers.device, self.numbers.dtype)
            packed = self.packed_with(self.values_of(W)) if is_quantized(self) else pack(W, self.layout)
            state_dict = state_dict | {
                f"{prefix}{name}": part for name, part in zip(self._part_names, packed.parts, strict=True)
            }
            del state_dict[f"{prefix}weight"]
            if packed.parts[0].shape != self.numbers.shape:  # a bitmap with another number of values
                self.values = nn.Parameter(packed.parts[0].clone(), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layout={self.layout}"


def dense_state_dict(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state-dict hook of a base model: asked for alone, it has the dense weights that it had before its adapters.

    As a part of a larger model (PEFT saving an adapter) the packed parts stay, and so do those of a sharded layer.
    """
    if prefix:
        return
    weights = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, CompressedLinear) and not isinstance(part.numbers, DTensor)
    }
    entries = list(state_dict.items())
    state_dict.clear()
    for key, value in entries:
        name, _, part = key.rpartition(".")
        if name not in weights or part not in weights[name]._part_names:
            state_dict[key] = value
        elif part == weights[name]._part_names[0]:
            state_dict[f"{name}.weight"] = decode(weights[name].packed)


def best_layout(weight: Tensor, storage: str) -> str:
    """Layout of a weight (out x in) under one of ``STORAGES``.

    Raises:
        ValueError: ``n:m``, and the weight follows no such pattern.
    """
    if storage in (DENSE, BITMAP):
        return storage
    M = weight != 0
    grouped = []
    for m in GROUPS:
        if weight.shape[1] % m == 0:
            n = int(M.unflatten(1, (-1, m)).sum(-1).max().clamp_(min=1))
            grouped += [f"{n}:{m}"] * (n < m)
    if storage == GROUPED and not grouped:
        raise ValueError(
            f"storage={GROUPED!r}: the weight ({weight.shape[0]} x {weight.shape[1]}) follows no n:m pattern with m "
            f"of {', '.join(map(str, GROUPS))}; use 'bitmap' or 'auto'"
        )
    layouts = grouped if storage == GROUPED else [DENSE, BITMAP, *grouped]
    nonzeros = int(M.sum())
    return min(layouts, key=lambda layout: empty(layout, weight.shape, weight.dtype, nonzeros, "meta").nbytes)


def check_compression(linear: nn.Linear, storage: str, *, sparsity: float | None, pattern: str) -> None:
    """Raise what ``compress_linear`` would raise, and change nothing."""
    if isinstance(linear, CompressedLinear):
        return
    if linear.weight.is_meta:
        _without_content(linear.weight, storage, sparsity, pattern)
    elif storage == GROUPED:
        best_layout(linear.weight, storage)


def compress_linear(
    linear: nn.Linear, storage: str, *, sparsity: float | None = None, pattern: str = UNSTRUCTURED
) -> None:
    """Pack the weight of a layer, which becomes a ``CompressedLinear`` unless it is smallest as it is.

    It stays the same object, so its hooks go on, whoever else holds it sees the change, and the memory of the
    dense weight is free at once.

    Args:
        linear: A plain layer; nothing happens to one that is compressed already.
        storage: One of ``STORAGES``.
        sparsity: Fraction of zeros of a weight on the device ``meta``, which has none to count.
        pattern: Likewise, ``unstructured`` or the n:m pattern that it is to follow.

    Raises:
        ValueError: As ``best_layout``, and for a weight on ``meta`` without ``sparsity``.
    """
    if isinstance(linear, CompressedLinear):
        return
    weight = linear.weight.detach()
    if weight.is_meta:
        packed = _without_content(weight, storage, sparsity, pattern)
    else:
        packed = pack(weight, best_layout(weight, storage))
    if packed.layout != DENSE:
        hold(linear, packed)


def hold(linear: nn.Linear, packed: PackedWeight) -> None:
    """Put a packed weight in the place of the dense one of a plain layer, which becomes a ``CompressedLinear``."""
    del linear.weight
    linear._plain_class, linear.__class__ = type(linear), CompressedLinear
    linear._like_weight, linear.layout = None, packed.layout
    values, *places = packed.parts
    # Past register_parameter, which accelerate makes create empty parameters while PEFT loads an adapter.
    linear._parameters[linear._part_names[0]] = nn.Parameter(values, requires_grad=False)
    linear._buffers.update(zip(linear._part_names[1:], places, strict=True))


def is_quantized(linear: nn.Module) -> bool:
    """Whether the weight of a layer is kept quantised."""
    return isinstance(linear, CompressedLinear) and is_quantizing(linear.layout)


def decompress_linear(linear: nn.Linear) -> nn.Linear:
    """Undo ``compress_linear``: a layer with a dense weight, which does not require a gradient.

    Returns:
        The layer itself, with its hooks; if it is sharded another one, as FSDP2 goes on to put the parts into this one.
    """
    if not isinstance(linear, CompressedLinear):
        return linear
    with whole(linear):
        weight = nn.Parameter(decode(linear.packed), requires_grad=False)
        bias = linear.bias
    if isinstance(linear.numbers, DTensor):
        sharded, linear = linear, nn.Module.__new__(type(linear))
        linear.__dict__.update(sharded.__dict__)
        linear._parameters, linear._buffers = dict(sharded._parameters), dict(sharded._buffers)
    linear._parameters.pop("bias")
    for name in linear._part_names:
        delattr(linear, name)
    linear.__class__ = linear._plain_class
    del linear._plain_class, linear._like_weight, linear.layout
    linear.weight, linear.bias = weight, bias  # in the order of a plain layer
    return linear


def _without_content(weight: Tensor, storage: str, sparsity: float | None, pattern: str) -> PackedWeight:
    """What a weight of this shape, type, sparsity and pattern would be packed to."""
    if sparsity is None:
        raise ValueError("sparsity=None: needed for a weight on the meta device, whose zeros cannot be counted")
    if storage == GROUPED and pattern == UNSTRUCTURED:
        raise ValueError(f"storage={GROUPED!r}: pattern={pattern!r} is no n:m pattern; use 'bitmap' or 'auto'")
    nonzeros = round(weight.numel() * (1 - resolve_sparsity(sparsity, pattern)))
    grouped = [] if pattern == UNSTRUCTURED else [pattern]
    layouts = {DENSE: [DENSE], BITMAP: [BITMAP], GROUPED: grouped}.get(storage, [DENSE, BITMAP, *grouped])
    choices = [empty(layout, weight.shape, weight.dtype, nonzeros, "meta") for layout in layouts]
    return min(choices, key=lambda packed: packed.nbytes)


@contextmanager
def gradient_weight(linear: nn.Linear) -> Iterator[Tensor]:
    """A leaf tensor that receives the gradient of the layer's weight, out x in, if it asks for one.

    That is the weight itself, or for a compressed layer a stand-in without memory, inside the context.
    """
    if not isinstance(linear, CompressedLinear):
        yield linear.weight
        return
    linear._like_weight = linear.numbers.new_empty(()).expand(linear.out_features, linear.in_features)
    try:
        yield linear._like_weight
    finally:
        linear._like_weight = None


def places_as_parameters(model: nn.Module) -> None:
    """Let FSDP2 divide the places of compressed values too, which it does with parameters, of whole numbers as well.

    To be called before ``fully_shard``; without it every process keeps a bitmap, or the codes of n:m, whole.
    """
    for part in model.modules():
        if isinstance(part, CompressedLinear):
            for name in part._part_names[1:]:
                if name in part._buffers:
                    part._parameters[name] = nn.Parameter(part._buffers.pop(name), requires_grad=False)


def count_weights(model: nn.Module) -> int:
    """Numbers in a model as if no weight of it were packed."""
    layers = [part for part in model.modules() if isinstance(part, CompressedLinear)]
    packed = {id(getattr(layer, name)) for layer in layers for name in layer._part_names}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed)
    return plain + sum(layer.out_features * layer.in_features for layer in layers)
