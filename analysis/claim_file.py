"""A claim of a paper as data: `analysis/published/claims.yaml`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from analysis.measures import ACCURACY, HELDOUT_LOSS

__all__ = ["COSTS", "SCORES", "Claim", "Side", "name_of", "read_claims"]

CLAIMS = Path(__file__).parent / "published" / "claims.yaml"
RELATIONS = {"at least": "≥", "at most": "≤", "equal": "="}
# The options of LoRS as it was published, which go without saying.
PUBLISHED = {"init": "gradient", "scaling": "rank_stabilized", "exact_gradient": False, "gradient": "straight_through"}
PUBLISHED |= {"gradient_until": 1.0}
# Scores, and the unit of their tolerance.
SCORES = {"accuracy": (ACCURACY, "points"), "heldout_loss": (HELDOUT_LOSS, "nats")}
# Of a cost: the columns of its low and high end. Its tolerance is a share of the other side.
COSTS = {
    **{name: (name, name) for name in ("train_peak", "trainable", "zeros_kept")},
    "step_ms": ("step_ms_p10", "step_ms_p90"),
}

Side = dict[str, Any]


class Claim(BaseModel):
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

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    paper: str
    place: str
    statement: str
    models: tuple[str, ...] = ()
    scope: dict[Literal["label", "pruner"], list[str]] = {}
    metric: Literal[(*SCORES, *COSTS)] | None = None
    left: Side | None = None
    relation: Literal[tuple(RELATIONS)] | None = None
    right: Side | float | None = None
    factor: float = 1.0
    tolerance: float = 0.0
    note: str | None = None
    not_testable: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Claim":
        given = [value is not None for value in (self.metric, self.left, self.relation, self.right)]
        if any(given) if self.not_testable else not all(given):
            raise ValueError("either metric, left, relation and right, or not_testable")
        return self

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
        unit = f" {SCORES[self.metric][1]}" if self.metric in SCORES else " %"
        tolerance = self.tolerance * (1 if self.metric in SCORES else 100)
        return f"{text}, within {tolerance:g}{unit}" if tolerance else text


def name_of(side: Side) -> str:
    """A side in words: the method, its end state or pruner, and the options that set it apart."""
    options = [str(side[key]) for key in ("pruner", "end_state") if key in side]
    names = {key: key.rpartition(".")[2] for key in side if key.startswith("method.peft.")}
    options += [f"{name}={str(side[key]).lower()}" for key, name in names.items() if side[key] != PUBLISHED.get(name)]
    return side["method"] + (f"[{', '.join(options)}]" if options else "")


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of a file.

    Raises:
        ValueError: A claim has an unknown key or value, or lacks one, or its name is taken.
    """
    claims: dict[str, Claim] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]:
        where = f"{path.name}: claim {entry.get('id', '?')}"
        if entry.get("id") in claims:
            raise ValueError(f"{where}: there is another of this name")
        try:
            claims[entry["id"]] = Claim(**entry)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{where}: {' '.join(map(str, first['loc']))}: {first['msg']}") from error
    return list(claims.values())
