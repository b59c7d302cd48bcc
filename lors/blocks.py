"""Find the decoder blocks of a transformers model, and the linear layers inside them.

These linears, and nothing else, are what a pruner may thin out and what sparsity is counted over. Each matrix of a
fused expert is such a linear too (``lors.experts``); the router that chooses among them is none. A model that carries
PEFT adapters is looked through: names and layers are those of the model underneath. What counts as a
linear layer is decided in one place, ``linear_fault``, for pruners and tuners alike.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from transformers import GenerationMixin, PreTrainedModel

from lors.experts import expert_linears, expert_names, routers

__all__ = [
    "block_linears",
    "decoder_blocks",
    "decoder_linears",
    "fused_weights",
    "linear_fault",
    "reads_weight",
]

# What nn.utils puts in the place of a weight that is computed before each call -> how to make it a weight again.
DERIVED = {
    "weight_mask": "torch.nn.utils.prune.remove(layer, 'weight')",
    "weight_orig": "torch.nn.utils.remove_spectral_norm(layer)",
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
}
# Attributes of a weight that say nothing of its values.
HARMLESS = {"device", "dtype", "is_meta", "ndim", "requires_grad", "shape", "size", "dim", "numel", "element_size"}
# Methods that are not the model's own.
OF_EVERY_MODEL = {*dir(PreTrainedModel), *dir(GenerationMixin)} - {"forward"}


def linear_fault(layer: nn.Module) -> str | None:
    """Why a module can be neither pruned nor adapted as Y = X W^t + bias; None if it can.

    It can if its output follows from its input, its ``weight`` and its ``bias`` alone: an ``nn.Linear`` with a
    floating-point weight that is a parameter, or a subclass that computes the same (Falcon's). Hooks do no harm, those
    of accelerate among them. A subclass that has another way to hold its weight and knows what it does says so by
    ``computes_linear = True``.
    """
    if isinstance(layer, BaseTunerLayer):
        return f"has an adapter of another method, {type(layer).__module__}.{type(layer).__name__}: unload that first"
    if not isinstance(layer, nn.Linear):
        return f"is of type {type(layer).__name__}: allowed are nn.Linear layers"
    if getattr(type(layer), "computes_linear", False):
        return None
    derived = _derivation(layer)
    if derived is not None:
        return f"has a weight that is computed before each call: call {derived} first"
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return f"has no weight but {', '.join(layer._parameters)}: allowed are floating-point nn.Linear layers"
    kind = type(weight.data)
    if not weight.is_floating_point() or (kind is not Tensor and not issubclass(kind, DTensor | FakeTensor)):
        held = weight.dtype if kind is Tensor else kind.__name__
        advice = "; lors.take_nf4 takes NF4 of bitsandbytes" if type(layer).__name__ == "Linear4bit" else ""
        return f"is quantised ({held}): allowed are floating-point nn.Linear layers{advice}"
    if not _is_own_forward(layer):
        return "has a forward function that somebody has put in place of its own: restore that first"
    if type(layer).forward is not nn.Linear.forward and not _computes_linear(type(layer)):
        return f"is of type {type(layer).__name__}, which computes something else than nn.Linear"
    return None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name (relative to the model without adapters) and list of the decoder blocks of a decoder-only model.

    The blocks are the outermost ``nn.ModuleList`` with as many entries as the config has layers.

    Raises:
        ValueError: An encoder-decoder, not a transformers model, or no list or more than one that fits.
    """
    model = _without_adapters(model)
    kind = type(model).__name__
    if getattr(model, "config", None) is None:
        raise ValueError(f"{kind} has no config: allowed are decoder-only models of transformers")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: allowed are decoder-only models of transformers")
    depth = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside_another:
            found[name] = module
    if len(found) != 1:
        candidates = ", ".join(found) or "none"
        raise ValueError(f"{kind}: cannot tell its list of {depth} decoder blocks (candidates: {candidates})")
    return found.popitem()


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer inside the decoder blocks, in the order of the model, by name without adapters.

    Under an adapter this is the frozen layer underneath; for fused experts it is made for the call, with a weight that
    is a view of theirs. Raises ValueError for a block with weight matrices that are kept in another way (GPT-2's
    Conv1D, quantised layers, experts that ``lors.experts`` cannot read): leaving those dense in silence would make
    every sparsity figure wrong.
    """
    name, blocks = decoder_blocks(model)
    others = [(key, part) for key, part in _leaves(name, blocks) if not isinstance(part, nn.Linear) and _matrices(part)]
    if others:
        key, part = max(others, key=lambda other: max(matrix.numel() for matrix in _matrices(other[1]).values()))
        labels = ", ".join(f"{label} {tuple(matrix.shape)}" for label, matrix in _matrices(part).items())
        raise ValueError(
            f"{key} is of type {type(part).__name__}, with weights of its own ({labels}), one of {len(others)} such "
            "modules: allowed inside decoder blocks are nn.Linear layers only"
        )
    return dict(block_linears(name, blocks))


def block_linears(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears inside one module called ``name``, with their full names; errors as ``decoder_linears``."""
    for key, part in _leaves(name, module):
        if isinstance(part, nn.Linear) or _matrices(part):
            fault = linear_fault(part)
            if fault is not None:
                raise ValueError(f"{key} {fault}")
            yield key, part


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weight matrices inside the decoder blocks that are no linear layers (Conv1D, other fused experts), by name.

    Empty for a model whose blocks cannot be told.
    """
    try:
        name, blocks = decoder_blocks(model)
    except ValueError:
        return {}
    return {
        f"{key}.{label}": matrix
        for key, part in _leaves(name, blocks)
        if not isinstance(part, nn.Linear)
        for label, matrix in _matrices(part).items()
    }


def reads_weight(module: nn.Module, path: str) -> bool:
    """Whether the code of a module computes with the weight of the layer ``path`` below it instead of calling it.

    Mamba's ``dt_proj`` is one, ``out_proj`` of torch's attention, or what RWKV rescales in its blocks. A class without
    source reads none, as far as one can tell.
    """
    return any(
        path == read or (not of_self and path.endswith(f".{read}")) for read, of_self in _weights_read_by(type(module))
    )


@functools.cache
def _weights_read_by(kind: type[nn.Module]) -> frozenset[tuple[str, bool]]:
    """Every ``<root>.<path>.weight`` in the methods of a class: the path, and whether the root is ``self``.

    Not counted are shape, type and device of a weight, and what only runs for ``pretraining_tp > 1``, an emulation of
    tensor parallelism by slices of the weights that no one uses.
    """
    found: set[tuple[str, bool]] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Attribute) and node.attr in HARMLESS:
            return
        if isinstance(node, ast.If) and "pretraining_tp" in ast.unparse(node.test):
            node = ast.Module(node.orelse, [])
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            return
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            root, _, path = ast.unparse(node.value).partition(".")
            found.add((path, root == "self"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name not in OF_EVERY_MODEL and not name.startswith(("__", "_init", "init_", "reset_")):
            try:
                visit(ast.parse(textwrap.dedent(inspect.getsource(method))))
            except (OSError, TypeError, SyntaxError):  # no source
                continue
    return frozenset((path, of_self) for path, of_self in found if path)


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears, adapters looked through, and all modules that are not linear, with their full names."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    yield name, module
    if isinstance(module, nn.Linear):
        return
    choosing = routers(module)
    for child_name, child in [*module.named_children(), *expert_linears(module).items()]:
        if child not in choosing:
            yield from _leaves(f"{name}.{child_name}", child)


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module itself that are matrices or more, not vectors; those of an embedding do not count, nor
    do experts that are linear layers, and their biases."""
    if isinstance(module, nn.Embedding):
        return {}
    own = dict(module.named_parameters(recurse=False))
    experts = expert_names(module)
    known = {*experts, *(f"{key}_bias" for key in experts)}
    return {key: value for key, value in own.items() if key not in known and sum(size > 1 for size in value.shape) > 1}


def _derivation(layer: nn.Linear) -> str | None:
    """What to call on a layer whose weight is computed from others, to make it a parameter again."""
    if parametrize.is_parametrized(layer, "weight"):
        return "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    own = {**layer._parameters, **layer._buffers}
    return next((call for name, call in DERIVED.items() if name in own), None)


def _is_own_forward(layer: nn.Linear) -> bool:
    """Whether the forward function of a layer is that of its class, behind a hook of accelerate if it has one."""
    hooked = hasattr(layer, "_hf_hook") and "_old_forward" in vars(layer)
    forward = vars(layer).get("_old_forward" if hooked else "forward")
    return forward is None or getattr(forward, "__func__", None) is type(layer).forward


@functools.cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass computes Y = X W^t + bias, tried on a small layer of it."""
    x, W, bias = torch.arange(12.0).view(2, 2, 3), torch.arange(6.0).view(2, 3), torch.arange(2.0)
    try:
        for b in (None, bias):
            layer = kind.__new__(kind)
            nn.Module.__init__(layer)
            # Past register_parameter, which accelerate makes create empty parameters while PEFT loads an adapter.
            layer._parameters.update(weight=nn.Parameter(W), bias=None if b is None else nn.Parameter(b))
            layer.in_features, layer.out_features = 3, 2
            if not torch.equal(layer.forward(x), linear(x, W, b)):
                return False
    except Exception:  # it needs more than a linear layer has
        return False
    return True


def _without_adapters(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    if isinstance(model, BaseTuner):
        return model.model
    return model
