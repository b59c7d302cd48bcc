"""Fused experts as linear layers, as long as somebody works on them.

A mixture of experts of transformers 5 holds the matrices of its E experts in one parameter for each product: ``E x out
x in``, read as ``linear(x, self.down_proj[e])``, or ``E x in x out``, read as ``x @ self.down_proj[e]`` (gpt-oss).
Inside ``experts_as_linears`` an ``ExpertLinears`` stands in its place: E ``nn.Linear`` called ``experts.down_proj.3``
and the like, with W (out x in) a view of the parameter where it lies like that, else a copy in its place. The forward
function of the module stays that of transformers, the eager one whatever ``experts_implementation`` says; to it
``self.down_proj[e]`` is what makes a product a call of the layer. So hooks, pruners and adapters see a linear layer,
and each expert is called with its own tokens.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from lors.placement import execution_device

__all__ = ["ExpertLinears", "expert_linears", "expert_names", "experts_as_linears", "fuse_experts", "routers"]

PRODUCTS = (linear, Tensor.matmul, Tensor.__matmul__, torch.matmul)


class ExpertLinears(nn.Module):
    """The matrices of all experts for one product, E linear layers called 0 to E - 1.

    Args:
        stacked: ``E x out x in``, or ``E x in x out`` if ``transposed``; the layers' weights are views of it.
        transposed: Whether the forward function of the experts computes ``x @ stacked[e]``.
    """

    def __init__(self, stacked: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        vars(self)["stacked"] = stacked  # no parameter of this module
        self.transposed = transposed
        for index, matrix in enumerate(stacked.detach()):
            W = matrix.t() if transposed else matrix
            layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
            # Past register_parameter, which accelerate makes create empty parameters while PEFT loads an adapter.
            layer._parameters["weight"] = nn.Parameter(W, requires_grad=stacked.requires_grad)
            self._modules[str(index)] = layer

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | Tensor) -> _Weight:
        return _Weight(self._modules[str(int(index))])

    def fused(self) -> nn.Parameter:
        """The parameter with what the weights of the layers are now; without a copy if they are still its views."""
        weights = [layer.weight for layer in self._modules.values()]
        stacked = _stacked([W.detach().t() if self.transposed else W.detach() for W in weights])
        if self.stacked.is_meta and not stacked.is_meta:  # the model has got its weights in the meantime
            vars(self)["stacked"] = nn.Parameter(stacked)
        self.stacked.data = stacked
        return self.stacked.requires_grad_(any(W.requires_grad for W in weights))


class _Weight:
    """The weight of an expert to the forward function of its module: a product with it is a call of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if function in PRODUCTS and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            return args[1].layer(args[0])
        raise TypeError(f"an expert that is a linear layer can be multiplied with its input, not used in {function}")


@contextmanager
def experts_as_linears(model: nn.Module) -> Iterator[None]:
    """Make all fused experts of a model linear layers; those that have an adapter at the end stay so.

    Weights that are offloaded by accelerate, or sharded, stay fused. Any tuner can be applied inside; after a merge
    ``fuse_experts`` makes a plain model of it.
    """
    for part in list(model.modules()):
        offloaded = execution_device(part) is not None
        for name, linears in ({} if offloaded else expert_linears(part)).items():
            for layer in linears.children():  # kernels and FSDP2 want rows; of those that lie so already it is no copy
                layer.weight.data = layer.weight.data.contiguous()
            del part._parameters[name]
            part._modules[name] = linears
            linears.stacked.data = linears.stacked.data.new_empty(0)  # the memory is that of the layers now
            if hasattr(part, "config") and not hasattr(part, "config_before"):
                part.config_before, part.config = part.config, copy.copy(part.config)
                part.config._experts_implementation = "eager"
    try:
        yield
    finally:
        fuse_experts(model)


def fuse_experts(model: nn.Module) -> nn.Module:
    """Put the parameter back in place of experts that are linear layers and have no adapter; ``model`` itself.

    Those that FSDP2 has sharded stay linear layers, as it goes on to bring the weights of these.
    """
    for part in model.modules():
        held = {name: linears for name, linears in part._modules.items() if isinstance(linears, ExpertLinears)}
        layers = [layer for linears in held.values() for layer in linears.children()]
        if not layers or any(isinstance(layer, BaseTunerLayer) or _sharded(layer) for layer in layers):
            continue
        for name, linears in held.items():
            del part._modules[name]
            part._parameters[name] = linears.fused()
        if hasattr(part, "config_before"):
            part.config = part.config_before
            del part.config_before
    return model


def expert_linears(module: nn.Module) -> dict[str, ExpertLinears]:
    """The linear layers that the fused experts of a module are, by the name of the parameter; changes nothing."""
    return {name: ExpertLinears(module._parameters[name], way) for name, way in _fused(module).items()}


def expert_names(module: nn.Module) -> set[str]:
    """Names of what holds experts in a module, fused or as linear layers."""
    return {*_fused(module), *(name for name, part in module._modules.items() if isinstance(part, ExpertLinears))}


def routers(module: nn.Module) -> set[nn.Module]:
    """Children of a module that are no linear layer and have a weight of one row for each expert of a child beside."""
    children = [child for child in module._modules.values() if child is not None]
    counts = {len(getattr(child, name)) for child in children for name in expert_names(child)}
    weights = {child: child._parameters.get("weight") for child in children if not isinstance(child, nn.Linear)}
    return {child for child, W in weights.items() if W is not None and W.ndim == 2 and len(W) in counts}


def _fused(module: nn.Module) -> dict[str, bool]:
    """Names of the parameters that hold fused experts, and whether ``in x out``.

    Empty for a module that reads one of its parameters of three dimensions in another way than the two that are named
    in the text of this file.
    """
    stacked = {name: held for name, held in module._parameters.items() if held is not None and held.ndim == 3}
    if any(isinstance(held, DTensor) or not held.is_floating_point() for held in stacked.values()):
        return {}
    transposed = _transposed(type(module)) if stacked else {}
    return {name: transposed[name] for name in stacked} if stacked.keys() <= transposed.keys() else {}


def _sharded(layer: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in layer.parameters())


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Matrices as one tensor of three dimensions; a view if they lie behind each other in one storage."""
    first = matrices[0]
    start, size, place = first.storage_offset(), first.numel(), first.untyped_storage().data_ptr()
    together = all(
        matrix.untyped_storage().data_ptr() == place
        and matrix.storage_offset() == start + index * size
        and matrix.stride() == first.stride()
        for index, matrix in enumerate(matrices)
    )
    if together:
        return first.as_strided((len(matrices), *first.shape), (size, *first.stride()))
    return torch.stack(matrices)


@functools.cache
def _transposed(kind: type[nn.Module]) -> dict[str, bool]:
    """Every ``self.<name>`` that the methods of a class read only as ``linear(x, self.<name>[e])`` (False), or only as
    ``x @ self.<name>[e]`` (True)."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # no source
        return {}
    reads, products = Counter(), defaultdict(Counter)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "self":
            reads[node.attr] += 1
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            products[_expert_of_self(node.right)][True] += 1
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("linear"):
            known = len(node.args) == 2 and not node.keywords
            products[_expert_of_self(node.args[1]) if known else None][False] += 1
    return {
        name: next(iter(ways))
        for name, ways in products.items()
        if name is not None and list(ways.values()) == [reads[name]]
    }


def _expert_of_self(node: ast.expr) -> str | None:
    """The name in ``self.<name>[...]``."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
        return node.value.attr if ast.unparse(node.value.value) == "self" else None
    return None
