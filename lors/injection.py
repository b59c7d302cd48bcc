"""Which modules an adapter is put on: the names that a config gives, checked, and a model that stays as it was if the
adapter cannot be had."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from lors.blocks import decoder_blocks, fused_weights, reads_weight
from lors.placement import full

__all__ = ["FEW_ZEROS", "as_before_on_error", "check_callers", "check_names", "left_out"]

FEW_ZEROS = 0.01
# PEFT adds all of them to the modules to save of a classifier, though a model has one.
HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")


@contextmanager
def as_before_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Take a new adapter off the model again, its layers and all, if the context ends with an error."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    layers = [(part, part._active_adapter) for part in model.modules() if isinstance(part, BaseTunerLayer)]
    held = [
        getattr(part, label) for part, _ in layers for label in (*part.adapter_layer_names, *part.other_param_names)
    ]
    without = [adapters for adapters in held if adapter_name not in adapters]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for adapters in without:
            if adapter_name in adapters:
                del adapters[adapter_name]
        for layer, active in layers:
            layer._active_adapter = active
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise


def check_names(config: PeftConfig, model: nn.Module) -> None:
    """Raise ``ValueError`` for a name in ``target_modules``, ``exclude_modules`` or ``modules_to_save`` that matches no
    module, and for an index in ``layers_to_transform`` that picks none."""
    modules = [name for name, _ in _outside_adapters(model)]
    for label in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(config, label, None)
        wanted = {*wanted} if isinstance(wanted, set | list | tuple) else set()
        if label == "modules_to_save":
            wanted -= {*HEADS}
        for name in sorted(wanted):
            if not any(key == name or key.endswith(f".{name}") for key in modules):
                ends = sorted({key.rpartition(".")[2] for key in modules} - {""})
                near = get_close_matches(name.rpartition(".")[2], ends, n=3)
                hint = f"did you mean {', '.join(near)}?" if near else f"the names there are {', '.join(ends[:20])}"
                raise ValueError(f"{label}: {name!r} matches no module of the model; {hint}")
    indices = getattr(config, "layers_to_transform", None)
    for index in indices if isinstance(indices, list) else [] if indices is None else [indices]:
        alone = copy.copy(config)
        alone.layers_to_transform = [index]
        if not any(check_target_module_exists(alone, key) for key in modules):
            raise ValueError(f"layers_to_transform: {index} is no block with a layer of target_modules")


def check_callers(config: PeftConfig, model: nn.Module) -> None:
    """Raise ``ValueError`` for a target that is not called as one layer with a weight of its own.

    Either a module above it computes with its weight, or another layer has the same weight (Zamba's shared blocks): an
    adapter would have no effect, or one on half of the places that a merge changes. An embedding may have it.
    """
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():  # a parent that stands in several places is one place for its layers
        for child, module in parent._modules.items():
            if isinstance(module, nn.Linear) and module._parameters.get("weight") is not None:
                holders[id(module._parameters["weight"])].append(f"{name}.{child}".removeprefix("."))
    for name, module in _outside_adapters(model):
        if not check_target_module_exists(config, name):
            continue
        parts = name.split(".")
        for depth in range(len(parts)):
            above, below = model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
            if reads_weight(above, below):
                raise ValueError(
                    f"target_modules: {name!r} is not always called: {type(above).__name__} computes with its weight "
                    f"itself, where an adapter has no effect; put {parts[-1]!r} into exclude_modules"
                )
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = base._parameters.get("weight")
        same = [] if weight is None else [key for key in holders[id(weight)] if key not in (name, f"{name}.base_layer")]
        if same:
            raise ValueError(
                f"target_modules: {name!r} has the same weight as {same[0]!r}, and a merge would change both; put "
                f"{parts[-1]!r} into exclude_modules, or give each a weight of its own"
            )


def left_out(model: nn.Module) -> list[str]:
    """What of the weights in the decoder blocks has no adapter, a line for each kind.

    Args:
        model: A model with adapters.

    Returns:
        Empty if nothing is left out, or if the blocks cannot be told. Linear layers count if they are pruned: what was
        pruned should learn to make up for it.
    """
    try:
        name, blocks = decoder_blocks(model)
    except ValueError:
        return []
    adapted, others = 0, {}
    for key, part in _outside_adapters(blocks):
        if isinstance(part, BaseTunerLayer) and isinstance(part.get_base_layer(), nn.Linear):
            adapted += part.in_features * part.out_features
        elif isinstance(part, nn.Linear):
            others[f"{name}.{key}"] = part
    fused = {key: matrix.numel() for key, matrix in fused_weights(model).items()}
    total = adapted + sum(part.in_features * part.out_features for part in others.values()) + sum(fused.values())
    pruned = {key: part.in_features * part.out_features for key, part in others.items() if _is_pruned(part)}
    lines = []
    for sizes, what in (
        (pruned, "pruned linear layers have no adapter, as target_modules leaves them out"),
        (fused, "weights are no linear layers (fused experts, Conv1D) and have no adapter"),
    ):
        if sizes:
            names = sorted(sizes)
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            lines.append(
                f"{len(names)} {what}: {shown}, {100 * sum(sizes.values()) / total:.0f} % of the block weights"
            )
    return lines


def _is_pruned(layer: nn.Linear) -> bool:
    """Whether a layer has zeros; a few among many weights are a matter of rounding."""
    weight = full(layer.weight)
    return not weight.is_meta and int(weight.count_nonzero()) <= (1 - FEW_ZEROS) * weight.numel()


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name but for those inside the layers of a tuner."""
    inside = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, BaseTunerLayer))
    return ((name, part) for name, part in model.named_modules() if name and not name.startswith(inside))
