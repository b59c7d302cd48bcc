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
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lors.functional import frozen_linear
from lors.kernels import BITMAP, DENSE, PackedWeight, decode, pack
from lors.kernels.layout import GROUPS, empty, values_at
from lors.sparsity import UNSTRUCTURED, resolve_sparsity

__all__ = [
    "STORAGES",
    "CompressedLinear",
    "best_layout",
    "compress_linear",
    "count_weights",
    "decompress_linear",
    "gradient_weight",
]

GROUPED = "n:m"
STORAGES = (DENSE, BITMAP, GROUPED, "auto")
# Names of a layout's tensors in the state of a layer.
PARTS = {BITMAP: ("values", "bits", "offsets"), GROUPED: ("values", "codes")}


class CompressedLinear(nn.Linear):
    """A linear layer with a packed, frozen weight. ``compress_linear`` turns a plain layer into one.

    The parts are parameters without gradient, so they move, are cast, copied, saved and sharded with the model;
    a cast touches the values only. ``weight`` is decoded afresh at every access and cannot be assigned to.

    Attributes:
        layout: ``bitmap`` or the n:m pattern.
    """

    layout: str
    _plain_class: type[nn.Linear]  # what it was and will be again
    _like_weight: Tensor | None  # see gradient_weight

    @property
    def _part_names(self) -> tuple[str, ...]:
        return PARTS[BITMAP if self.layout == BITMAP else GROUPED]

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels take it."""
        parts = tuple(getattr(self, name) for name in self._part_names)
        return PackedWeight(self.layout, parts, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """W, ``[out, in]``, decoded: a copy that does not require a gradient."""
        return decode(self.packed)

    def dense(self, values: Tensor) -> Tensor:
        """The weight, ``[out, in]``, that has other values in the places of this one."""
        return decode(self.packed._replace(parts=(values, *self.packed.parts[1:])))

    def values_of(self, weight: Tensor) -> Tensor:
        """What to store of a weight whose zeros contain those of this one; the inverse of ``dense``."""
        return values_at(self.packed, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``; the dense weight is made again in the backward pass."""
        return frozen_linear(x, self.packed, self.bias, self._like_weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layout={self.layout}"


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
    if packed.layout == DENSE:
        return
    del linear.weight
    linear._plain_class, linear.__class__ = type(linear), CompressedLinear
    linear._like_weight, linear.layout = None, packed.layout
    for name, part in zip(linear._part_names, packed.parts, strict=True):
        # Past register_parameter, which accelerate makes create empty parameters while PEFT loads an adapter.
        linear._parameters[name] = nn.Parameter(part, requires_grad=False)


def decompress_linear(linear: nn.Linear) -> None:
    """Undo ``compress_linear``: the layer has a dense weight again, which does not require a gradient."""
    if not isinstance(linear, CompressedLinear):
        return
    weight = nn.Parameter(linear.weight, requires_grad=False)
    bias = linear._parameters.pop("bias")
    for name in linear._part_names:
        delattr(linear, name)
    linear.__class__ = linear._plain_class
    del linear._plain_class, linear._like_weight, linear.layout
    linear.weight, linear.bias = weight, bias  # in the order of a plain layer


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
    linear._like_weight = linear.values.new_empty(()).expand(linear.out_features, linear.in_features)
    try:
        yield linear._like_weight
    finally:
        linear._like_weight = None


def count_weights(model: nn.Module) -> int:
    """Numbers in a model as if no weight of it were packed."""
    layers = [part for part in model.modules() if isinstance(part, CompressedLinear)]
    packed = {id(part): 0 for layer in layers for part in layer.packed.parts}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed)
    return plain + sum(layer.out_features * layer.in_features for layer in layers)
