"""Which runs stand in one table: what they share, in what else than method and seed they differ, and their controls.

A value of the config of a run is either

- *protocol*: data, training length, pruning, scoring. Runs of another protocol go to another table;
- a *choice* of the user of a method: rank, scale, learning rate, the method's own options. Runs of another choice are
  another row of the same table, and a column shows the value.

Runs that differ in nothing but the seed are one row. Nothing else is averaged, two pruned checkpoints neither: the
fingerprint of the zeros is a protocol value. Results of several machines share a table only on demand, as rows of their
own.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.results import CONTROLS, MACHINE, is_dense, machine_of
from harness.identity import ABSENT, PLACE_OF_MODEL, idle_options

__all__ = ["AXES", "CHOICES", "IGNORED", "OF_CONTROLS", "Group", "check_one_machine", "configs", "flat", "groups_of"]
__all__ += ["ignored_without_data", "repeats_shared", "sortable", "text_of", "varying", "within", "without"]

AXES = ("mode", "model", "pruner", "pattern", "sparsity", "label")
# Config values that say where and how a job runs, that are an axis, or that another value says already.
IGNORED = (
    *("seed", "mode", "sparsity", "pattern", "force", "only", "name", "runs_root", "cache_root", "save_merged"),
    "save_base",
    *("data_root", "launch", "model.name", "model.wheel", "prune.name", "eval.baselines"),
    *("prune.quantize", "prune.bits", "prune.group_size", "prune.layerwise"),  # in the name of the pruner
    *("train.checkpoint_every", "train.report_to", "train.steps_by_mode", "train.tuned", "method.merges"),
)
# On random weights and tokens, without scores, these say nothing.
IGNORED_WITHOUT_DATA = ("data", "eval", "prune")
CHOICES = (
    *("adapter", "method", "train.learning_rate", "train.minimum_learning_rate", "train.warmup_steps"),
    *("train.weight_decay", "train.betas", "train.max_grad_norm", *MACHINE),
)
# Before the fine-tuning, or after it: then a control.
WHEN = "prune.when"
PEFT = "method.peft."  # the options of an adapter
# Digits of a fingerprint.
SHOWN = 12
# Folders of conf/ in which every file has keys of its own: values are compared between runs of the same file.
OWNERS = {name: f"{name}.name" for name in ("model", "prune", "method", "data", "eval")}
# What the scores of a model without fine-tuning depend on.
OF_CONTROLS = {"dense": ("model", "eval"), "pruned": ("model", "eval", "prune")}

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The rows of one table. The frames have the columns of `results.load`, and `values`: the flat config.

    Attributes:
        axes: Value by axis: mode, model, pruner, pattern, sparsity, label.
        protocol: Value by config key, of the protocol keys in which tables differ.
        choices: Config keys (and columns of MACHINE, if mixed) in which rows of this table differ.
        runs: The trained runs, and those that failed.
        tuned_dense: The dense model with the same fine-tuning, and pruned after it.
        controls: The dense and the pruned model, scored or failed.
    """

    axes: Mapping[str, Any]
    protocol: Values
    choices: tuple[str, ...]
    runs: pd.DataFrame
    tuned_dense: pd.DataFrame
    controls: pd.DataFrame


def groups_of(table: pd.DataFrame, *, mix: bool = False) -> list[Group]:
    """Sort runs into tables, one for each mode, model, pruner, pattern with sparsity, and protocol.

    A pruned model that nobody has trained is a table too, of controls alone.

    Args:
        table: What `results.load` returns.
        mix: Allow runs of several devices or library versions in one table.

    Raises:
        ValueError: A table would mix devices or versions, and `mix` is false.
    """
    values = zip(table.iterrows(), configs(table), strict=True)
    table = table.assign(values=[_values(row, config) for (_, row), config in values])
    is_control = table.method.isin(CONTROLS)
    trained, controls = table[~is_control], table[is_control & (table["mode"] == "run")]
    groups = []
    for _, runs in trained.groupby("mode", sort=False):
        keys = [key for key in varying(runs["values"]) if not below(key, CHOICES)]
        sorted_in = [text_of(_picked(values, keys)) for values in runs["values"]]
        for _, same in runs.groupby([*AXES, pd.Series(sorted_in, runs.index)], sort=False):
            groups.append(_group(same.iloc[0], same, runs, controls, keys, mix))
    # The dense model with the same fine-tuning is a control of the others, and a table only where there are none; so it
    # is where it was pruned after it.
    absorbed = {index for group in groups for index in group.tuned_dense.index}
    groups = [group for group in groups if not absorbed.issuperset(group.runs.index)]
    used = {index for group in groups for index in group.controls.index}
    pruned = controls[controls.method == "pruned"]
    keys = varying(controls["values"])
    heads = pruned[~pruned.index.isin(used)] if groups or len(pruned) else controls
    groups += [_group(head, trained.iloc[:0], trained, controls, keys, mix) for _, head in heads.iterrows()]
    return sorted(groups, key=_place)


def _place(group: Group) -> list[tuple[bool, float, str]]:
    """Sorts tables by their axes and protocol; unstructured zeros come before patterns."""
    axes = {**group.axes, "pattern": group.axes["pattern"].removeprefix("unstructured")}
    return [sortable(value) for value in (*axes.values(), *group.protocol.values())]


def varying(configs: Iterable[Values]) -> list[str]:
    """Keys in which flat configs differ, in the order of the config.

    What belongs to one method, pruner or the like is compared within it. A key of a method that repeats a shared one is
    left out.
    """
    configs = sorted(configs, key=text_of)  # the order of columns must not depend on names of folders
    seen: dict[str, dict[Any, set[str]]] = defaultdict(lambda: defaultdict(set))
    for key in dict.fromkeys(key for config in configs for key in config):
        owner = OWNERS.get(key.split(".")[0])
        for config in configs:
            if key in config or owner is None:
                seen[key][config.get(owner)].add(text_of(config.get(key)))
    different = [key for key, by_owner in seen.items() if any(len(values) > 1 for values in by_owner.values())]
    return [key for key in different if not below(key, IGNORED) and not repeats_shared(key, configs)]


def repeats_shared(key: str, configs: Iterable[Values]) -> bool:
    """Whether a method's own key always has the value of a shared one, of which it is an interpolation.

    The shared ones are those of `adapter` and, for a seed, that of the run.
    """
    own = [config for config in configs if key in config]
    shared = {name for config in own for name in config if name.startswith("adapter.")}
    shared |= {"seed"} if key.endswith(".seed") else set()
    return key.startswith("method.") and any(all(c[key] == c.get(name) for c in own) for name in shared)


def sortable(value: Any) -> tuple[bool, float, str]:
    """A key that sorts numbers by size, and what is no number by its text."""
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else 0, "" if is_number else str(value))


def _group(
    head: pd.Series, runs: pd.DataFrame, trained: pd.DataFrame, controls: pd.DataFrame, keys: list[str], mix: bool
) -> Group:
    """The table that `head` stands in: its controls are those of the same protocol (and, unless mixed, machine)."""
    same_protocol = [key for key in keys if not key.startswith("prune.")]
    wanted = text_of(_picked(head["values"], same_protocol))
    dense = trained[(trained.pruner == "none") & (trained.sparsity == 0) & (trained.model == head.model)]
    dense = dense.loc[[text_of(_picked(values, same_protocol)) == wanted for values in dense["values"]]]
    pruned_last = head["values"].get(WHEN) == "after"
    if is_dense(head) or head["mode"] != "run" or pruned_last:
        dense = dense.iloc[:0]
    else:
        dense = pd.concat([dense, trained.loc[[_is_pruned_after(row, head, keys) for _, row in trained.iterrows()]]])
    controls = controls.loc[[_is_control_of(row, head) for _, row in controls.iterrows()]]
    if not mix:
        check_one_machine(runs)
        dense, controls = (
            rows.loc[[machine_of(row) == machine_of(head) for _, row in rows.iterrows()]] for rows in (dense, controls)
        )
    chosen = [key for key in varying([*runs["values"], *dense["values"]]) if key != WHEN]
    machines = pd.concat([runs, dense, controls])
    mixed = [name for name in MACHINE if name not in chosen and machines[name].map(str).nunique() > 1]
    return Group(
        axes={axis: head[axis] for axis in AXES},
        protocol=_picked(head["values"], [key for key in keys if key != WHEN or pruned_last]),
        choices=(*chosen, *mixed),
        runs=runs,
        tuned_dense=dense,
        controls=controls,
    )


def configs(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The flat config of every row of `results.load`, with what tells two runs apart that were configured alike.

    That is the fingerprint of the zeros (`prune.support`), where it is needed. Class paths are left out: a method is
    known by its name. An option that older runs of a method lack gets the value that its absence means (`ABSENT`);
    one that changes nothing beside the others is left out.
    """
    flats = [
        {key: value for key, value in flat(config).items() if not key.rpartition(".")[2].startswith("_")}
        for config in table.config
    ]
    known = {(config["method.name"], key) for config in flats for key in ABSENT if key in config}
    for config, support in zip(flats, table.support, strict=True):
        for key in ABSENT:
            if (config["method.name"], key) in known:
                config.setdefault(key, ABSENT[key])
        peft = {key.removeprefix(PEFT): value for key, value in config.items() if key.startswith(PEFT)}
        for name in idle_options(peft):
            config.pop(f"{PEFT}{name}", None)
        if support is not None:
            config["prune.support"] = support[:SHOWN]
    return flats


def _values(row: pd.Series, config: Values) -> Values:
    """The flat config as far as it can matter for this row, and the machine."""
    if row.method in CONTROLS:
        config = within(config, OF_CONTROLS[row.method])
    elif row["mode"] != "run":
        config = without(config, ignored_without_data(config))
    return config | {name: row[name] for name in MACHINE}


def ignored_without_data(config: Values) -> tuple[str, ...]:
    """What says nothing of a run on random weights; where the model is says its shape, if nothing else does."""
    has_shape = any(below(key, ("model.shape",)) and value is not None for key, value in config.items())
    return IGNORED_WITHOUT_DATA + (PLACE_OF_MODEL if has_shape else ())


def flat(config: Values, prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys; lists stay values."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _is_control_of(control: pd.Series, head: pd.Series) -> bool:
    """Whether this is the model that `head` started from, scored in the same way."""
    if head["mode"] != "run" or control.model != head.model:
        return False
    if control.method == "pruned" and (control.pruner, control.label) != (head.pruner, head.label):
        return False
    own = without(within(control["values"], OF_CONTROLS[control.method]), IGNORED)
    return text_of(own) == text_of(_picked(head["values"], own))


def _is_pruned_after(run: pd.Series, head: pd.Series, keys: list[str]) -> bool:
    """Whether this is the dense model fine-tuned as `head`, then pruned as it."""
    same = [key for key in keys if key != WHEN]
    alike = all(run[axis] == head[axis] for axis in AXES)
    return (
        alike and run["values"].get(WHEN) == "after" and _picked(run["values"], same) == _picked(head["values"], same)
    )


def check_one_machine(runs: pd.DataFrame) -> None:
    """Raise ValueError if runs come from several devices or were made with several library versions."""
    different = {name: sorted(set(runs[name].map(str))) for name in MACHINE if runs[name].map(str).nunique() > 1}
    if different:
        found = "; ".join(f"{name}: {', '.join(values)}" for name, values in different.items())
        first = runs.iloc[0]
        raise ValueError(
            f"{first.model}, {first.pruner} {first.label}, mode={first['mode']}: runs of several machines ({found}); "
            "name folders of one machine, or use --mix to show them as rows of their own"
        )


def _picked(values: Values, keys: Iterable[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def within(values: Values, names: Iterable[str]) -> Values:
    """The values whose keys are one of `names` or lie below it."""
    return {key: value for key, value in values.items() if below(key, names)}


def without(values: Values, names: Iterable[str]) -> Values:
    """The other ones."""
    return {key: value for key, value in values.items() if not below(key, names)}


def text_of(value: Any) -> str:
    """A value of a config as a text; equal values have equal texts."""
    return json.dumps(value, sort_keys=True, default=str)


def below(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names` or lies below it."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
