"""A claim of a paper as data: `analysis/published/claims.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from analysis.measures import ACCURACY, HELDOUT_LOSS

__all__ = ["COSTS", "SCORES", "Claim", "Side", "read_claims"]

CLAIMS = Path(__file__).parent / "published" / "claims.yaml"
RELATIONS = {"at least": "≥", "at most": "≤", "equal": "="}
# Scores, and the unit of their tolerance.
SCORES = {"accuracy": (ACCURACY, "points"), "heldout_loss": (HELDOUT_LOSS, "nats")}
# Of a cost: the columns of its low and high end. Its tolerance is a share of the other side.
COSTS = {
    **{name: (name, name) for name in ("train_peak", "trainable", "zeros_kept")},
    "step_ms": ("step_ms_p10", "step_ms_p90"),
}

Side = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim. `left` and `right` are filters on columns and config keys; `right` may be a number.

    Attributes:
        id: Short name.
        paper: Paper with its arXiv number.
        place: Where the paper says it.
        statement: What it says, in our words.
        models: Models of the paper, by our names.
        scope: Values of `label` (sparsity or pattern) and `pruner` to which the claim is confined.
        metric: Column of the results: one of SCORES or COSTS.
        relation: One of RELATIONS.
        factor: Times the right side.
        tolerance: In points or nats for a score, as a share of the right side for a cost.
        note: What a reader of the verdict should know.
        not_testable: Why our bench cannot bear it out, whatever is run.
    """

    id: str
    paper: str
    place: str
    statement: str
    models: tuple[str, ...] = ()
    scope: Mapping[str, list[str]] = field(default_factory=dict)
    metric: str | None = None
    left: Side | None = None
    relation: str | None = None
    right: Side | float | None = None
    factor: float = 1.0
    tolerance: float = 0.0
    note: str | None = None
    not_testable: str | None = None

    @property
    def sides(self) -> list[Side]:
        """The sides that are runs."""
        return [side for side in (self.left, self.right) if isinstance(side, Mapping)]

    @property
    def comparison(self) -> str:
        """The claim as a formula; "-" if it is not testable."""
        if self.metric is None:
            return "-"
        factor = "" if self.factor == 1 else f"{self.factor:g} × "
        right = f"{name_of(self.right)}.{self.metric}" if isinstance(self.right, Mapping) else f"{self.right:g}"
        text = f"{name_of(self.left)}.{self.metric} {RELATIONS[self.relation]} {factor}{right}"
        if self.tolerance == 0:
            return text
        unit = (
            f"{self.tolerance:g} {SCORES[self.metric][1]}" if self.metric in SCORES else f"{100 * self.tolerance:g} %"
        )
        return f"{text}, within {unit}"


def name_of(side: Side) -> str:
    """A side in words: the method, its end state or pruner, and the options that set it apart."""
    options = [str(side[key]) for key in ("pruner", "end_state") if key in side]
    options += ["init=kaiming"] if side.get("method.peft.init") == "kaiming" else []
    options += ["keep_zeros=false"] if side.get("method.peft.keep_zeros") is False else []
    return side["method"] + (f"[{', '.join(options)}]" if options else "")


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of a file.

    Raises:
        ValueError: A claim has an unknown key or value, or lacks one, or its name is taken.
    """
    claims: dict[str, Claim] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]:
        where = f"{path.name}: claim {entry.get('id', '?')}"
        if problem := _problem(entry, claims):
            raise ValueError(f"{where}: {problem}")
        claims[entry["id"]] = Claim(**entry)
    return list(claims.values())


def _problem(entry: Mapping[str, Any], taken: Mapping[str, Claim]) -> str | None:
    known = {entry.name for entry in fields(Claim)}
    if unknown := set(entry) - known:
        return f"unknown key {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
    if missing := {"id", "paper", "place", "statement"} - set(entry):
        return f"no {', '.join(sorted(missing))}"
    if entry["id"] in taken:
        return "there is another of this name"
    if unknown := set(entry.get("scope", {})) - {"label", "pruner"}:
        return f"scope has {', '.join(sorted(unknown))}; known: label, pruner"
    if "not_testable" in entry:
        return "not_testable, yet with a comparison" if {"left", "right", "metric"} & set(entry) else None
    if missing := {"left", "relation", "right", "metric"} - set(entry):
        return f"no {', '.join(sorted(missing))}, and no not_testable"
    for key, allowed in (("relation", RELATIONS), ("metric", {**SCORES, **COSTS})):
        if entry[key] not in allowed:
            return f"{key}={entry[key]}: one of {', '.join(allowed)}"
    return None
