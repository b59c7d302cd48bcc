"""Pairs of results that bear on a claim, and whether it holds in each.

Two rows are a pair if they lie in one *cell*: same mode, model, pruner, sparsity, data, recipe, scoring and machine. If
a side was run with several choices (rank, learning rate, options), its rows with most seeds count, and of several those
whose shared choices agree with the other side's; a learning rate that is the only one of its side need not agree. With
tolerance t a pair

- *holds* if the claim is true beyond noise: for scores, left + t > right at the two-sided level of
  `analysis.statistics`; for costs, the whole range of the left side (p10 to p90 of the step times, exact sizes) is
  below (1 + t) times that of the right ("at most");
- *fails* if the opposite is true beyond noise. Since one of k pairs refutes a claim, the level for scores is divided by
  k (Bonferroni). A number on the right side is a bound that every run must keep;
- is *open* otherwise, also with a single seed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.claim_file import COSTS, SCORES, Claim, Side
from analysis.groups import (
    CHOICES,
    IGNORED,
    OF_CONTROLS,
    Values,
    configs,
    ignored_without_data,
    repeats_shared,
    text_of,
    within,
    without,
)
from analysis.results import CONTROLS, MACHINE
from analysis.statistics import ALPHA, Sample, difference
from harness.identity import ABSENT

__all__ = ["FAILS", "HOLDS", "OPEN", "Evidence", "evidence", "prepared", "rows_of"]

HOLDS, FAILS, OPEN = "holds", "fails", "open"
AXES = ("mode", "model", "pruner", "label")
# Parts of the config that a pair of trained runs shares; rank, learning rate and the method's own options may differ.
SHARED = ("model", "prune", "data", "train", "eval")
RATES = ("train.learning_rate", "train.minimum_learning_rate")
Pair = tuple[pd.DataFrame, pd.DataFrame | None]


@dataclass(frozen=True)
class Evidence:
    """One pair.

    Attributes:
        cell: Value by axis, of the left side.
        measured: Both sides with spread and n, and the difference or ratio.
        state: HOLDS, FAILS or OPEN.
        keys: The runs.
    """

    cell: Mapping[str, Any]
    measured: str
    state: str
    keys: tuple[str, ...]


def prepared(table: pd.DataFrame) -> pd.DataFrame:
    """The finished rows of `results.load`, with what pairs are found by, worked out once for all claims.

    Columns added: `values` (the flat config), `protocol` (text by part of the config: what two sides must share),
    `choices`, `shared` and `rate` (texts: all that was chosen; what of it every method has, as rank and scale; and the
    learning rate).
    """
    rows = table[table.status == "ok"]
    values = configs(rows)
    repeated = [key for key in set().union(*values) if repeats_shared(key, values)]
    chosen = [without(within(of_row, CHOICES), repeated) for of_row in values]
    return rows.assign(
        values=values,
        protocol=[_protocol(of_row, mode) for of_row, mode in zip(values, rows["mode"], strict=True)],
        choices=list(map(text_of, chosen)),
        shared=[text_of(without(of_row, ("method", *RATES))) for of_row in chosen],
        rate=[text_of([of_row.get(key) for key in RATES]) for of_row in values],
    )


def _protocol(values: Values, mode: str) -> dict[str, str]:
    kept = without(values, IGNORED + CHOICES + (ignored_without_data(values) if mode != "run" else ()))
    return {part: text_of(within(kept, (part,))) for part in SHARED}


def rows_of(claim: Claim, rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each side that have the claim's metric and lie in its scope."""
    rows = rows[rows[claim.metric].notna()]
    for axis, allowed in claim.scope.items():
        # The dense model has no sparsity: the scope is that of the side beside it.
        rows = rows[rows[axis].isin(allowed) | (rows.method == "dense")]
    return [_filtered(rows, side) for side in claim.sides]


def _filtered(rows: pd.DataFrame, side: Side) -> pd.DataFrame:
    for key, wanted in side.items():
        values = [of.get(key, ABSENT.get(key)) for of in rows["values"]]  # a result may be older than an option
        rows = rows[(rows[key] if key in rows else pd.Series(values, rows.index, dtype=object)) == wanted]
    return rows if "end_state" in side else rows[rows.headline.astype(bool)]


def evidence(claim: Claim, sides: list[pd.DataFrame]) -> tuple[Evidence, ...]:
    """Every pair of rows that bears on a claim, judged.

    Args:
        claim: A claim with a comparison.
        sides: What `rows_of` returns, none of them empty.
    """
    pairs = list(_all_pairs(claim, sides))
    return tuple(_judged(claim, *pair, len(pairs)) for pair in pairs)


def _all_pairs(claim: Claim, sides: list[pd.DataFrame]) -> Iterator[Pair]:
    apart = {axis for side in claim.sides for axis in side} & set(AXES)
    methods = {name for rows in sides for name in rows.method}
    if "dense" in methods:
        apart |= {"pruner", "label"}
    parts = set(SHARED).intersection(*(OF_CONTROLS[name] for name in methods & set(CONTROLS)))
    parts -= {"prune"} if "pruner" in apart else set()
    axes = [axis for axis in AXES if axis not in apart]
    cells = [_cells(rows, axes, sorted(parts)) for rows in sides]
    for cell, left in cells[0].items():
        if len(cells) == 1:
            yield from ((rows, None) for rows in _variants(left))
        elif cell in cells[1]:
            yield from _pairs(left, cells[1][cell])


def _cells(rows: pd.DataFrame, axes: list[str], parts: list[str]) -> dict[tuple[str, ...], pd.DataFrame]:
    """Rows by what the two sides must share."""
    cells = defaultdict(list)
    for index, protocol, *rest in rows[["protocol", *axes, *MACHINE]].itertuples(name=None):
        cells[(*map(str, rest), *(protocol[part] for part in parts))].append(index)
    return {cell: rows.loc[indices] for cell, indices in cells.items()}


def _variants(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows that differ in nothing but the seed; only those with most seeds."""
    if rows.method.iloc[0] in CONTROLS:
        return [rows.loc[[index]] for index in rows.index]
    variants = [of_one for _, of_one in rows.groupby("choices", sort=False)]
    most = max(map(len, variants))
    return [of_one for of_one in variants if len(of_one) == most]


def _pairs(left: pd.DataFrame, right: pd.DataFrame) -> list[Pair]:
    lefts, rights = _variants(left), _variants(right)
    pairs = [(a, b) for a in lefts for b in rights]
    if len(pairs) == 1 or {left.method.iloc[0], right.method.iloc[0]} & set(CONTROLS):
        return pairs
    tuned = all(len({rows.rate.iloc[0] for rows in side}) == 1 for side in (lefts, rights))
    agree = ("shared",) if tuned else ("shared", "rate")
    return [(a, b) for a, b in pairs if all(a[name].iloc[0] == b[name].iloc[0] for name in agree)]


def _judged(claim: Claim, left: pd.DataFrame, right: pd.DataFrame | None, pairs: int) -> Evidence:
    if claim.metric in SCORES:
        state, measured = _scores(claim, left, right, ALPHA / pairs)
    else:
        state, measured = _costs(claim, left, right)
    keys = [key for rows in (left, right) if rows is not None for key in rows.key]
    return Evidence({axis: left.iloc[0][axis] for axis in AXES}, measured, state, tuple(dict.fromkeys(keys)))


def _scores(claim: Claim, left: pd.DataFrame, right: pd.DataFrame | None, fails_at: float) -> tuple[str, str]:
    measure, unit = SCORES[claim.metric]
    a = measure.sample(left)
    b = Sample({None: float(claim.right)}) if right is None else measure.sample(right, claim.factor)
    slack = claim.tolerance
    if claim.relation == "at least":
        state = _above(a, b, slack, fails_at)
    elif claim.relation == "at most":
        state = _above(b, a, slack, fails_at)
    else:
        state = _all_of(_above(a, b, slack, fails_at), _above(b, a, slack, fails_at))
    found = difference(a, b)
    lead = "one seed, no spread to judge by" if found is None else f"{found.mean:+.2g} ± {found.error:.2g} {unit}"
    return state, f"{_shown(a)} against {_shown(b)}: {lead}"


def _above(a: Sample, b: Sample, slack: float, fails_at: float) -> str:
    """Whether a + slack > b beyond noise, or below it at the level `fails_at`."""
    found = difference(replace(a, values={seed: value + slack for seed, value in a.values.items()}), b)
    if found is None or found.p >= (ALPHA if found.mean > 0 else fails_at):
        return OPEN
    return HOLDS if found.mean > 0 else FAILS


def _costs(claim: Claim, left: pd.DataFrame, right: pd.DataFrame | None) -> tuple[str, str]:
    low, high = _range(claim.metric, left)
    least, most = (float(claim.right),) * 2 if right is None else _range(claim.metric, right, claim.factor)
    slack = claim.tolerance
    enough = _ordered(((1 - slack) * least, (1 - slack) * most), (low, high))
    cheap = _ordered((low, high), ((1 + slack) * least, (1 + slack) * most))
    state = {"at least": enough, "at most": cheap, "equal": _all_of(enough, cheap)}[claim.relation]
    state = FAILS if right is None and state == OPEN else state
    a, b = left[claim.metric].median(), claim.right if right is None else right[claim.metric].median()
    ratio = f": {a / b:.3g} times" if right is not None and b else ""
    n = f"n {len(left)}" if right is None else f"n {len(left)} and {len(right)}"
    return state, f"{_amount(claim.metric, a)} against {_amount(claim.metric, b)}{ratio} ({n})"


def _range(metric: str, rows: pd.DataFrame, factor: float = 1.0) -> tuple[float, float]:
    low, high = COSTS[metric]
    return factor * float(rows[low].min()), factor * float(rows[high].max())


def _ordered(a: tuple[float, float], b: tuple[float, float]) -> str:
    """Whether all of range a is at most all of range b, or all of it above."""
    return HOLDS if a[1] <= b[0] else FAILS if a[0] > b[1] else OPEN


def _all_of(*states: str) -> str:
    return FAILS if FAILS in states else OPEN if OPEN in states else HOLDS


def _amount(metric: str, value: float) -> str:
    if metric == "train_peak":
        return f"{value / 2**20:,.1f} MiB"
    return {"step_ms": f"{value:,.1f} ms", "trainable": f"{value:,.0f}"}.get(metric, f"{100 * value:.2f} %")


def _shown(sample: Sample) -> str:
    if sample.fixed:
        return f"{sample.mean:.4g} (no seed)"
    return f"{sample.mean:.4g}" + (f" ± {sample.std:.2g}" if sample.n > 1 else "") + f" (n {sample.n})"
