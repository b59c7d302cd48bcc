"""The runs of a group sorted into lines: one for each method, choice and end state, controls first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.groups import Group, sortable, text_of, without
from analysis.measures import Measure
from analysis.results import is_dense
from analysis.statistics import Sample
from analysis.style import END_STATES, name_of, order_of

__all__ = ["Line", "choice_headers", "contenders", "lines_of", "reference_of", "short_name", "told_apart"]

REFERENCE = "lora"
# Last parts of config keys that several groups have.
VAGUE = ("name", "path", "seed", "split", "text")


@dataclass(frozen=True)
class Line:
    """Runs that differ in nothing but the seed, in one end state.

    Attributes:
        method: As on the command line.
        end_state: Of the model that was scored.
        role: control or method.
        label: The name for readers.
        choices: Value by config key; a key that does not concern the method is absent.
        rows: The finished runs, rows of `results.load`; empty if there is none.
        headline: Whether this is the first end state.
        out_of_memory: Whether there is none because the runs did not fit.
    """

    method: str
    end_state: str | None
    role: str
    label: str
    choices: Mapping[str, Any]
    rows: pd.DataFrame
    headline: bool = True
    out_of_memory: bool = False

    @property
    def n(self) -> int:
        """Number of seeds; 0 for a model without one."""
        return self.rows.seed.nunique()

    @property
    def keeps_zeros(self) -> bool:
        """Whether every run ended as one model in which every zero of the pruned one is still there."""
        return bool((self.rows.zeros_kept == 1).all())

    @property
    def pool(self) -> str | None:
        """Name of the variants of one method that this is one of, as `statistics` has them; None for a control."""
        if self.role == "control":
            return None
        return f"{self.method} {self.end_state} {text_of(without(self.choices, ('method',)))}"

    def sample(self, measure: Measure) -> Sample:
        """A number by seed, without the runs that do not have it."""
        return measure.sample(self.rows)

    def text(self, key: str) -> str:
        """The value of a choice for readers."""
        return _text(self.choices[key]) if key in self.choices else "-"


def lines_of(group: Group, *, controls: bool) -> list[Line]:
    """The lines of a table in the order in which they are shown, with a line for each control if asked for."""
    lines = []
    if controls:
        comes_sparse = group.axes["pruner"] == "none" and not is_dense(group.axes)  # from what, nobody knows
        lines += [] if comes_sparse else _control("dense", group)
        if not is_dense(group.axes):
            lines += ([] if comes_sparse else _tuned_dense(group)) + _control("pruned", group)
    return lines + list(_trained(group.runs, group))


def reference_of(line: Line, lines: Sequence[Line]) -> int | None:
    """Place of the LoRA line that a line is compared with: the adapter as trained, the shared settings the same.

    A setting counts if some method was run with several values of it (a sweep of ranks, say); one that was tuned for
    each method does not. None if there is no such LoRA line, or more than one.
    """
    if line.role == "control":
        return None
    swept = [key for key in line.choices if not key.startswith("method.") and _is_swept(key, lines)]
    same = [
        place
        for place, other in enumerate(lines)
        if (other.method, other.role, other.headline) == (REFERENCE, "method", True)
        and all(other.choices.get(key) == line.choices[key] for key in swept)
    ]
    return same[0] if len(same) == 1 else None


def _is_swept(key: str, lines: Sequence[Line]) -> bool:
    values = {(line.method, text_of(line.choices.get(key))) for line in lines if line.role == "method"}
    return len(values) > len({method for method, _ in values})


def contenders(lines: Sequence[Line]) -> list[Line]:
    """One line of a plot for each training, in the end state that keeps the zeros, else the first.

    Where several have one label, it says by which choices they differ.
    """
    trained = [line for line in lines if line.role == "method" and not line.rows.empty]
    chosen: dict[tuple[str, str], Line] = {}
    for line in sorted(trained, key=lambda line: (line.keeps_zeros, line.headline), reverse=True):
        chosen.setdefault((line.method, text_of(line.choices)), line)
    kept = [line for line in trained if chosen[line.method, text_of(line.choices)] is line]
    alike = {line.label: [other for other in kept if other.label == line.label] for line in kept}
    return [replace(line, label=f"{line.label}{told_apart(line, alike[line.label])}") for line in kept]


def told_apart(line: Line, lines: Sequence[Line]) -> str:
    """The choices by which a line differs from others of the same method, in brackets, or nothing."""
    same = [other for other in lines if other.method == line.method]
    keys = [key for key in line.choices if len({other.text(key) for other in same}) > 1]
    return f" ({', '.join(f'{short_name(key)} {line.text(key)}' for key in keys)})" if keys else ""


def choice_headers(group: Group) -> dict[str, str]:
    """Header by config key: the last part of the key where that is unambiguous."""
    names = [short_name(key) for key in group.choices]
    return {key: name if names.count(name) == 1 else key for key, name in zip(group.choices, names, strict=True)}


def short_name(key: str) -> str:
    """A config key for readers: its last part in words, with the one before where the last says nothing by itself."""
    parts = key.split(".")
    return " ".join(parts[-2 if parts[-1] in VAGUE else -1 :]).replace("_", " ")


def _control(method: str, group: Group) -> list[Line]:
    """A line for each score of a control, or an empty one."""
    found = group.controls[group.controls.method == method]
    scored = found[found.status == "ok"]
    lines = [
        Line(method, None, "control", name_of(method), _choices(row, group), scored.loc[[index]])
        for index, row in scored.iterrows()
    ]
    out_of_memory = bool((found.status == "oom").any())
    return lines or [Line(method, None, "control", name_of(method), {}, scored, out_of_memory=out_of_memory)]


def _tuned_dense(group: Group) -> list[Line]:
    """The dense model with the same fine-tuning, in the end state that each method names first; and pruned after it."""
    label, dense = "dense, fine-tuned", group.tuned_dense.sparsity == 0
    found = [
        replace(line, role="control", label=f"{label}{then} ({name_of(line.method)})")
        for then, runs in (("", group.tuned_dense[dense]), (", then pruned", group.tuned_dense[~dense]))
        for line in _trained(runs, group)
        if line.headline and not line.rows.empty
    ]
    return found or [Line("dense", None, "control", label, {}, group.tuned_dense.iloc[:0])]


def _trained(runs: pd.DataFrame, group: Group) -> list[Line]:
    return sorted(_unsorted(runs, group), key=_order)


def _unsorted(runs: pd.DataFrame, group: Group) -> Iterator[Line]:
    chosen = [text_of(_choices(row, group)) for _, row in runs.iterrows()]
    for (method, _), same in runs.groupby(["method", pd.Series(chosen, runs.index, dtype=object)], sort=False):
        choices = _choices(same.iloc[0], group)
        finished = same[same.status == "ok"]
        for state, rows in finished.groupby("end_state", sort=False):
            alone = finished.end_state.nunique() == 1 and state == "merged"
            label = name_of(method, None if alone else state)
            yield Line(method, state, "method", label, choices, rows, bool(rows.headline.iloc[0]))
        if finished.empty:
            out_of_memory = bool((same.status == "oom").any())
            yield Line(method, None, "method", name_of(method), choices, finished, out_of_memory=out_of_memory)


def _choices(row: pd.Series, group: Group) -> dict[str, Any]:
    """What was chosen for this run, among that in which runs of the group differ."""
    return {key: row["values"][key] for key in group.choices if key in row["values"]}


def _order(line: Line) -> tuple[Any, ...]:
    states = [None, "merged", *END_STATES]
    return order_of(line.method), [sortable(value) for value in line.choices.values()], states.index(line.end_state)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
