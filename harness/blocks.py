"""The jobs of a sweep: a list of blocks, each a product (`hydra_plugins.block_sweeper`)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

__all__ = ["composing_once", "expand"]


def expand(
    parser: OverridesParser,
    params: Mapping[str, Any] | None,
    blocks: Mapping[str, Mapping[str, Any] | None] | None,
    arguments: Sequence[str],
) -> list[list[str]]:
    """The overrides of every job, block by block; the last key of a block varies fastest.

    Args:
        parser: Hydra's, which knows the options of the groups.
        params: Key -> values, for every block; None: no keys.
        blocks: Name -> key -> values; None leaves a block out. Without any block the jobs are those of ``params``.
        arguments: Overrides of the command line, which replace all values but the single ones of a block.

    Raises:
        HydraException: Every block sets the key of an argument itself; values that match no option; blocks of another
            form.
    """
    given = parser.parse_overrides(list(arguments))
    unused = {argument.key_or_group: argument for argument in given}
    jobs: list[list[str]] = []
    params, blocks = _mapping("params", params), _mapping("blocks", blocks)
    chosen = {name: _mapping(f"blocks.{name}", block) for name, block in blocks.items() if block is not None}
    for block in list(chosen.values()) or [{}]:
        own = parser.parse_overrides([f"{key}={values}" for key, values in {**params, **block}.items()])
        single = {axis.key_or_group for axis in own if axis.key_or_group in block and not axis.is_sweep_override()}
        taken = [argument for argument in given if argument.key_or_group not in single]
        for argument in taken:
            unused.pop(argument.key_or_group, None)
        for axis in [*own, *taken]:
            if axis.is_sweep_override() and not list(axis.sweep_string_iterator()):
                raise HydraException(f"{axis.input_line}: must match something")
        jobs += BasicSweeper.split_arguments([*own, *taken], max_batch_size=None)[0]
    if unused:
        argument = next(iter(unused.values()))
        raise HydraException(f"{argument.input_line}: every block of the sweep sets {argument.key_or_group} itself")
    return jobs


def _mapping(name: str, axes: Any) -> Mapping[str, Any]:
    if not isinstance(axes, Mapping | None):
        raise HydraException(f"hydra.sweeper.{name}={axes}: must be a mapping of keys and values")
    return axes or {}


def composing_once(
    compose: Callable[[list[str]], DictConfig], groups: Container[str]
) -> Callable[[Sequence[str]], DictConfig]:
    """`compose`, called once for each choice of options of the groups; Hydra needs a fifth of a second for it.

    Jobs of a sweep differ in few options and in many values, which Hydra puts last into a config anyway.
    """
    parser, made = OverridesParser.create(), {}

    def is_option(override: Override) -> bool:
        key = override.key_or_group
        return key.startswith("hydra") or (key in groups and not isinstance(override.value(), dict))

    def composed(overrides: Sequence[str]) -> DictConfig:
        given = parser.parse_overrides(list(overrides))
        options = tuple(override.input_line for override in given if is_option(override))
        if options not in made:
            made[options] = pickle.dumps(compose(list(options)))  # six times faster to read than to copy
        cfg = pickle.loads(made[options])
        ConfigLoaderImpl._apply_overrides_to_config([each for each in given if not is_option(each)], cfg)
        return cfg

    return composed
