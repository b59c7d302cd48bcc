"""Layers that share their weight with another module, such as a head that is tied to the embedding.

Adapters of such a layer are its own, but a merge would change the other module as well. So a merge gives the layer a
copy of the weight first, and the config of the model no longer says that the two are tied: else saving and loading
would tie them again.
"""

from __future__ import annotations

import warnings
from collections import defaultdict

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

__all__ = ["note_untied_head", "untie_adapted"]


def untie_adapted(model: nn.Module) -> None:
    """Give every adapted layer that shares its weight with another module a copy of it, with one warning.

    Raises:
        ValueError: The weight is sharded; FSDP2 would put the shared one back in its place.
    """
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(name)
    untied = []
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        others = [] if weight is None else [other for other in holders[id(weight)] if not other.startswith(f"{name}.")]
        if not others:
            continue
        if isinstance(weight, DTensor):
            raise ValueError(
                f"{name} shares its weight with {others[0]}: merging would change both; give it a weight of its own "
                "before the model is sharded"
            )
        holders[id(weight)] = others
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        untied.append(f"{name} and {others[0]}")
    if untied:
        note_untied_head(model)
        warnings.warn(
            f"a shared weight is adapted: {', '.join(untied)} are separate from now on, and the config of the model "
            "says tie_word_embeddings=False",
            stacklevel=3,
        )


def note_untied_head(model: nn.Module) -> None:
    """Set ``tie_word_embeddings=False`` in the config of a model whose head and embedding are separate weights."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or _weight_of(head) is _weight_of(embedding):
        return
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _weight_of(module: nn.Module) -> object:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base._parameters.get("weight")
