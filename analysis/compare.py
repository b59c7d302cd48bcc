"""Our numbers beside the published ones, never across protocols; what is missing on either side.

A *cell* is a model, pruner, pattern, sparsity, method, end state, task and metric (acc and acc_norm are two metrics). A
published number and ours stand in one row only if the cell and the protocol are the same. The protocol is, where it
applies: window of the perplexity, shots, BOS token, share of the items, the tasks of an average, samples x length of
the calibration of a pruner, data and rank of a fine-tuning, device, batch and length of a time. What a source does not
state equals nothing. Learning rate, steps and seeds are printed, not matched. The published numbers, what was left out
and the rules are in `analysis/published/`.
"""

import argparse
import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from analysis.results import CONTROLS, MACHINE, add_run_arguments, load, output_folder

__all__ = ["Comparison", "Missing", "Row", "compare", "markdown", "measurements", "published"]

PUBLISHED = Path(__file__).parent / "published"
CELL = ("model", "pruner", "pattern", "sparsity", "method", "end_state", "task", "metric")
# The axes of a cell from coarse to fine, with what to say where nothing of ours agrees any more.
REASONS = (
    (("model",), "no run of this model"),
    (("pruner", "pattern", "sparsity"), "not pruned this way"),
    (("method", "end_state"), "method not run"),
    (("task", "metric"), "not scored"),
)
SCORES = ("acc", "acc_norm")
# What must be alike between two runs whose seeds are averaged. A control is never trained.
RECIPE = ("model", "prune", "method", "adapter", "data", "train", "eval")
RECIPE_OF_CONTROL = ("model", "prune", "eval")
# Names of the results where they differ from the published ones.
TEXTS = {"wikitext": "wikitext2"}


@dataclass(frozen=True)
class Row:
    """A published number with ours: mean, standard deviation over n seeds (None for one), and the runs behind it.

    `differs` names the protocol fields in which the two differ, as "field: ours here, theirs there".
    """

    number: dict[str, str]
    mean: float
    std: float | None
    n: int
    keys: tuple[str, ...]
    recipe: str
    differs: tuple[str, ...] = ()

    @property
    def named(self) -> dict[str, str]:
        """Model, cell, metric and paper in words."""
        return _named(self.number)

    @property
    def difference(self) -> float | None:
        """Ours minus published; None if that is not a number (OOM) or another protocol."""
        return None if self.differs or self.number["value"] == "OOM" else self.mean - float(self.number["value"])


@dataclass(frozen=True)
class Missing:
    """A published number that no run of ours stands beside, and why."""

    number: dict[str, str]
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All published numbers, each in one of three places, and our cells that nobody published."""

    matched: list[Row]
    other_protocol: list[Row]
    missing: list[Missing]
    unpublished: list[dict[str, str]]

    @property
    def beside(self) -> int:
        """Published numbers with one of ours beside them; several recipes of ours may stand beside one."""
        return len({id(row.number) for row in self.matched})

    @property
    def total(self) -> int:
        """Published numbers."""
        return self.beside + len(self.other_protocol) + len(self.missing)

    @property
    def summary(self) -> str:
        """How many there are of each, in a sentence."""
        return (
            f"{self.total} published numbers: {self.beside} have one of ours beside them, {len(self.other_protocol)} "
            f"have one under another protocol only, which is not compared, {len(self.missing)} have none."
        )


def published() -> list[dict[str, str]]:
    """The curated numbers, and the mean of every published set of scores of the seven tasks (`mean` in the note)."""
    with (PUBLISHED / "numbers.csv").open(encoding="utf-8", newline="") as file:
        numbers = [row | {"items": "all"} for row in csv.DictReader(file)]
    return numbers + _means(numbers)


def _means(numbers: list[dict[str, str]]) -> list[dict[str, str]]:
    """Authors give either the scores or their mean; the mean of acc over all tasks of a row is computed here."""
    sets: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    varying = ("task", "value", "note")
    for row in numbers:
        if row["metric"] == "acc" and row["task"] != "average":
            sets[tuple(value for name, value in row.items() if name not in varying)].append(row)
    return [
        rows[0]
        | {"task": "average", "task_set": "+".join(sorted(row["task"] for row in rows))}
        | {"value": f"{fmean(float(row['value']) for row in rows):.2f}", "note": "mean of the published scores"}
        for rows in sets.values()
        if len(rows) > 1
    ]


def measurements(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Every number of ours, in the columns of the published ones; `value` in their units, and seed, key and recipe.

    Args:
        table: As `analysis.results.load` returns it.
    """
    models = _models()
    return [
        _axes(row, models) | number
        for row in table[table.status == "ok"].to_dict("records")
        for number in (*_scores(row), *_costs(row))
        if not math.isnan(number["value"])
    ]


def _models() -> dict[str, str]:
    """Our name of a model by its name on the Hub, without the owner, in lower case."""
    with (PUBLISHED / "models.csv").open(encoding="utf-8", newline="") as file:
        return {row["hub"].rpartition("/")[2].lower(): row["model"] for row in csv.DictReader(file)}


def _axes(row: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    config, control = row["config"], row["method"] in CONTROLS
    parts = {name: config[name] for name in (RECIPE_OF_CONTROL if control else RECIPE)}
    train = config["train"]
    length = f"{train['epochs']} epochs" if train["epochs"] is not None else f"{train['steps']} steps"
    source = Path(str(config["model"]["path"])).name.lower()
    prune, calibrated = config["prune"], row["pruner"] in ("wanda", "sparsegpt")
    return {
        "model": models.get(source, row["model"]),
        **{axis: row[axis] for axis in ("pruner", "pattern", "method")},
        "sparsity": f"{row['sparsity']:g}",
        "end_state": "" if control else row["end_state"],
        "data": "" if control else config["data"]["name"],
        "r": "" if control else str(config["adapter"]["r"]),
        "calibration": f"{prune.get('samples')}x{prune.get('sequence_length')}" if calibrated else "",
        "recipe": "" if control else f"{length}, lr {train['learning_rate']:g}",
        "same": json.dumps([parts, [row[name] for name in MACHINE]], sort_keys=True, default=str),
        "key": row["key"],
    }


def _scores(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    scoring = row["config"]["eval"]
    protocol = {
        "shots": "0",
        "bos": str(scoring["add_bos_token"]).lower(),
        "items": "all" if scoring["limit"] is None else f"first {scoring['limit']}",
    }
    for task, value in row["tasks"].items():
        yield {"task": task, "metric": row["task_metric"][task], "value": value, **protocol}
    for task, value in row["task_norm"].items():
        yield {"task": task, "metric": "acc_norm", "value": value, **protocol}
    if row["accuracy_metric"] is not None:
        tasks = "+".join(sorted(row["tasks"]))
        yield {"task": "average", "metric": row["accuracy_metric"], "value": row["accuracy"], **protocol} | {
            "task_set": tasks
        }
    if row["perplexity_text"] is not None:
        text = TEXTS.get(row["perplexity_text"], row["perplexity_text"])
        window = f"{row['perplexity_window']:.0f}"
        yield {"task": text, "metric": "perplexity", "value": row["perplexity"], "context": window}


def _costs(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Step times; our memory is the allocator's, the published one what the device reports as used: not one metric."""
    train = row["config"]["train"]
    shape = {"batch": str(train["batch_size"]), "sequence_length": str(train["sequence_length"])}
    yield {"task": "", "metric": "step_time", "value": row["step_ms"], "device": row["device"], **shape}


def _protocol(number: dict[str, Any]) -> tuple[str, ...]:
    """Fields that must agree for this number, by what it is."""
    fields: list[str] = []
    if number["metric"] == "perplexity":
        fields += ["context"]
    elif number["metric"] in SCORES:
        fields += ["shots", "bos", "items"]
    elif number["metric"] == "step_time":
        fields += ["device", "batch", "sequence_length"]
    if number["task"] == "average":
        fields += ["task_set"]
    if number["pruner"] in ("wanda", "sparsegpt"):
        fields += ["calibration"]
    if number["method"] not in CONTROLS:
        fields += ["data"] if number["method"] == "full" else ["data", "r"]
    return tuple(fields)


def compare(table: pd.DataFrame) -> Comparison:
    """Put every published number into its place.

    Args:
        table: As `analysis.results.load` returns it.
    """
    ours = measurements(table)
    groups: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for number in ours:
        groups[_cell(number)][number["same"]].append(number)
    numbers = published()
    known = [{tuple(number[axis] for axis in _until(level)) for number in ours} for level in range(len(REASONS))]
    result = Comparison([], [], [], _unpublished(ours, {_cell(number) for number in numbers}))
    for number in numbers:
        rows = [_row(number, group) for group in groups.get(_cell(number), {}).values()]
        same = [row for row in rows if not row.differs]
        if same:
            result.matched.extend(same)
        elif rows:
            result.other_protocol.append(min(rows, key=lambda row: len(row.differs)))
        else:
            result.missing.append(Missing(number, _reason(number, known)))
    return result


def _cell(number: dict[str, Any]) -> tuple[str, ...]:
    return tuple(number[axis] for axis in CELL)


def _until(level: int) -> tuple[str, ...]:
    return tuple(axis for axes, _ in REASONS[: level + 1] for axis in axes)


def _reason(number: dict[str, Any], known: list[set[tuple[str, ...]]]) -> str:
    for level, (_, reason) in enumerate(REASONS):
        if tuple(number[axis] for axis in _until(level)) not in known[level]:
            return reason
    raise AssertionError("a cell of ours that is not ours")


def _row(number: dict[str, str], group: list[dict[str, Any]]) -> Row:
    values = [ours["value"] for ours in group]
    differs = [
        f"{field}: {group[0].get(field) or 'none'} here, {number[field] or 'not stated'} there"
        for field in _protocol(number)
        if group[0].get(field) != number[field] or not number[field]
    ]
    spread = stdev(values) if len(values) > 1 else None
    keys = tuple(ours["key"] for ours in group)
    return Row(number, fmean(values), spread, len(values), keys, group[0]["recipe"], tuple(differs))


def _unpublished(ours: list[dict[str, Any]], cells: set[tuple[str, ...]]) -> list[dict[str, str]]:
    """Our models and methods without a published number, with the count of such metrics."""
    axes = ("model", "pruner", "pattern", "sparsity", "method", "end_state")
    counts = Counter(cell[: len(axes)] for cell in {_cell(number) for number in ours} - cells)
    return [dict(zip(axes, cell, strict=True)) | {"numbers": str(n)} for cell, n in sorted(counts.items())]


def markdown(comparison: Comparison) -> str:
    """The comparison for a reader: what agrees with what, and what is missing."""
    sections = [
        f"# Published numbers and ours\n\n{comparison.summary}",
        "## Side by side\n\n" + _side_by_side(comparison.matched),
        "## Same cell, another protocol: not compared\n\n" + _other_protocol(comparison.other_protocol),
        "## Published, not measured here\n\n" + _not_here(comparison.missing),
        "## Measured here, not published\n\n"
        + _table(("model", "pruner", "pattern", "sparsity", "method", "end_state", "numbers"), comparison.unpublished),
    ]
    return "\n\n".join(sections) + "\n"


def _side_by_side(rows: list[Row]) -> str:
    return _table(("model", "cell", "metric", "published", "ours", "difference", "n", "recipe", "paper"), [
        row.named
        | {"published": row.number["value"], "ours": _ours(row), "n": str(row.n), "recipe": row.recipe or "-"}
        | {"difference": "-" if row.difference is None else f"{row.difference:+.2f}"}
        for row in rows
    ])  # fmt: skip


def _other_protocol(rows: list[Row]) -> str:
    return _table(("model", "cell", "metric", "published", "ours", "protocol", "paper"), [
        row.named
        | {"published": row.number["value"], "ours": _ours(row), "protocol": "; ".join(row.differs)}
        for row in rows
    ])  # fmt: skip


def _not_here(missing: list[Missing]) -> str:
    counts = Counter((m.number["paper"], m.number["model"], m.number["method"], m.reason) for m in missing)
    axes = ("paper", "model", "method", "why")
    return _table(
        (*axes, "numbers"), [dict(zip(axes, key, strict=True)) | {"numbers": str(n)} for key, n in counts.items()]
    )


def _named(number: dict[str, str]) -> dict[str, str]:
    sparsity = number["pattern"] if number["pattern"] != "unstructured" else number["sparsity"]
    cell = [number["pruner"], sparsity] * (number["pruner"] != "none") + [number["method"], number["end_state"]]
    metric = f"{number['task']} {number['metric']}".strip() + (f" ({number['unit']})" if number["unit"] else "")
    return {"model": number["model"], "cell": " ".join(filter(None, cell)), "metric": metric, "paper": number["paper"]}


def _ours(row: Row) -> str:
    return f"{row.mean:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}")


def _table(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    if not rows:
        return "None."
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row[name] or '-' for name in columns)} |" for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders of runs, and where to write."""
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the comparison and write `compare.md`."""
    text = markdown(compare(load(options.runs)))
    print(text)
    output = output_folder(options)
    (output / "compare.md").write_text(text, encoding="utf-8")
    return 0
