"""Several adapters at once: another one for each row of a batch, and a new one that is the weighted sum of others."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from lors.experts import ExpertLinears
from lors.sparse_layer import BASE, adapted_layers

__all__ = ["adapter_for_each_row", "add_weighted_adapter"]

# Fields in which adapters that are summed must agree; of all others the first adapter decides.
ALIKE = ("keep_zeros", "exact_gradient", "gradient", "gradient_share", "bits", "group")


@contextmanager
def adapter_for_each_row(tuner: BaseTuner, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Iterator[None]:
    """Hand ``adapter_names`` of a forward pass on to every layer inside the context; PEFT opens it around the pass.

    Args:
        tuner: The tuner.
        adapter_names: A name for each row of the batch, ``__base__`` for none.
        **kwargs: The other arguments of the pass.

    Raises:
        ValueError: The model is in training mode, has no adapter of a name, or adapters on fused experts.
    """
    if kwargs.get("alora_offsets") is not None:
        raise ValueError("alora_offsets: belongs to PEFT's activated LoRA, no other method has it")
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted({*adapter_names} - {BASE, *tuner.peft_config})
    if unknown:
        known = ", ".join(tuner.peft_config)
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {known}")
    if any(isinstance(part, ExpertLinears) for part in tuner.modules()):
        raise ValueError("adapter_names: not with adapters on experts, which take tokens of several rows together")
    beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None)
    if isinstance(beams, int) and beams > 1:
        adapter_names = [name for name in adapter_names for _ in range(beams)]
    hand_on = partial(_hand_on, list(adapter_names))
    handles = [
        part.register_forward_pre_hook(hand_on, with_kwargs=True)
        for part in tuner.modules()
        if isinstance(part, (tuner.tuner_layer_cls, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_on(names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


@torch.no_grad()
def add_weighted_adapter(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> None:
    """Add the adapter with the update sum_i w_i s_i B_i A_i, by concatenation: A = [A_1; A_2], B = [w_1 s_1 B_1, ...].

    Exact for every method whose update is s B A, under the mask or not. The rank is the sum of the ranks, the scale 1.
    A module of ``modules_to_save`` that one of them has trained is taken over.

    Args:
        tuner: The tuner.
        adapters: Adapters to sum.
        weights: w_i, one for each.
        adapter_name: Name of the sum; it is not made active.
        combination_type: ``cat``.
        options: Must be empty; the other combination types of LoRA have some.

    Raises:
        ValueError: A method with another update, another combination type, names or weights that do not fit, adapters
            that differ in more than size and place, or a rank larger than a side of a layer.
    """
    method = tuner.peft_config[next(iter(tuner.peft_config))].peft_type.value
    if not tuner.tuner_layer_cls.sums_by_concatenation:
        raise ValueError(f"add_weighted_adapter: the update of {method} is no product s B A that could be concatenated")
    if combination_type != "cat" or options:
        other = f"{combination_type!r}" if combination_type != "cat" else ", ".join(options)
        raise ValueError(f"combination_type: {other} is not for {method}, allowed is 'cat' without further options")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: there is an adapter of that name")
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown or len(adapters) != len(weights) or not adapters:
        wrong = (
            f"there is no adapter {unknown[0]!r}" if unknown else f"{len(adapters)} adapters, {len(weights)} weights"
        )
        raise ValueError(f"adapters={list(adapters)}: {wrong}; must be adapters of the model, with a weight for each")
    for field in ALIKE:
        if len({getattr(tuner.peft_config[name], field, None) for name in adapters}) > 1:
            raise ValueError(f"adapters={list(adapters)}: differ in {field}, so that they have no common form")
    saved = _saved_modules(tuner, adapters)
    layers = adapted_layers(tuner.model, *adapters)
    ranks = {name: sum(len(layer.factors(part)[0]) for part in layer._own(adapters)) for name, layer in layers.items()}
    config = _config_of_scale_1(tuner.peft_config[adapters[0]], ranks)
    trained = {name for part in adapters for name in tuner.peft_config[part].modules_to_save or ()}
    config.modules_to_save = sorted(trained) or None
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    weight_of = dict(zip(adapters, weights, strict=True))
    for layer in layers.values():
        names = layer._own(adapters)
        factors = [layer.factors(name) for name in names]
        A = torch.cat([A for A, _ in factors], dim=0)
        scales = [weight_of[name] * layer.scaling[name] for name in names]
        B = torch.cat([scale * B for scale, (_, B) in zip(scales, factors, strict=True)], dim=1)
        layer.set_factors(adapter_name, A, B)
    for wrapper, owner in saved:
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owner].state_dict())


def _saved_modules(tuner: BaseTuner, adapters: Sequence[str]) -> list[tuple[ModulesToSaveWrapper, str]]:
    """Every module that one of the adapters has trained in full, and which one; ``ValueError`` if two have."""
    wrappers = [part for part in tuner.model.modules() if isinstance(part, ModulesToSaveWrapper)]
    owners = [(wrapper, [name for name in adapters if name in wrapper.modules_to_save]) for wrapper in wrappers]
    several = sum(len(names) > 1 for _, names in owners)
    if several:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{several} such instance(s)."
        )
    return [(wrapper, names[0]) for wrapper, names in owners if names]


def _config_of_scale_1(config: Any, ranks: Mapping[str, int]) -> Any:
    """A copy of a config for other ranks, by layer, and the scale 1."""
    config = copy.deepcopy(config)
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): r for name, r in ranks.items() if r != config.r}
    config.lora_alpha, config.rank_pattern, config.alpha_pattern = config.r, others, dict(others)
    if hasattr(config, "scaling"):
        config.scaling = "alpha_over_r"
    if hasattr(config, "rank_shares"):  # what is summed are sub-networks
        config.rank_shares = config.subnetwork = None
    config.target_modules, config.exclude_modules = set(ranks), None
    config.layers_to_transform = config.layers_pattern = None
    return config
