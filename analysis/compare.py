"""Our numbers beside the published ones, never across protocols, and which of those were not measured here.

A *cell* is a model, pruner, pattern, sparsity, method, end state, task and metric (acc and acc_norm are two metrics). A
published number and ours stand in one row only if the cell and the protocol are the same. The protocol is, where it
applies: window of the perplexity, shots, BOS token, share of the items, the tasks of an average, samples x length of
the calibration of a pruner, data and rank of a fine-tuning, device, batch and length of a time. What a source does not
state equals nothing. Learning rate, steps and seeds are printed, not matched. The published numbers, what was left out
and the rules are in `analysis/published/`.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.results import CONTROLS, MACHINE, load, publish
from analysis.results import add_run_arguments as add_arguments
from analysis.table_writer import TextTable
from analysis.table_writer import markdown as markdown_table

__all__ = ["Comparison", "Row", "add_arguments", "compare", "markdown", "published", "run"]

PUBLISHED = Path(__file__).parent / "published"
CELL = ("model", "pruner", "pattern", "sparsity", "method", "end_state", "task", "metric")
# How many axes of a cell a number of ours shares with a published one, and what is missing if it is no more.
REASONS = {
    0: "no run of this model",
    1: "not pruned this way",
    4: "method not run",
    6: "not scored",
}
SCORES = ("acc", "acc_norm")
CALIBRATED = ("wanda", "sparsegpt")
# What must be alike between two runs whose seeds are averaged. A control is never trained.
RECIPE = ("model", "prune", "method", "adapter", "data", "train", "eval")
RECIPE_OF_CONTROL = ("model", "prune", "eval")
# Of a number of ours beside its cell: its seed's run, what must agree, and what is shown.
COLUMNS = ("key", "value", "same", "recipe", "calibration", "data", "r", "context", "shots", "bos", "items", "task_set",
           "device", "batch", "sequence_length")  # fmt: skip
# Names of the results where they differ from the published ones.
TEXTS = {"wikitext": "wikitext2"}


@dataclass(frozen=True)
class Row:
    """A published number with ours.

    Attributes:
        number: A row of `numbers.csv`.
        ours: Our values, a row for each seed, as `_measurements` has them.
        differs: The protocol fields in which the two differ, as "field: ours here, theirs there".
    """

    number: dict[str, str]
    ours: pd.DataFrame
    differs: list[str]

    @property
    def mean(self) -> float:
        """Of ours over the seeds."""
        return float(self.ours.value.mean())

    @property
    def difference(self) -> float | None:
        """Ours minus published; None if that is not a number (OOM) or another protocol."""
        return None if self.differs or self.number["value"] == "OOM" else self.mean - float(self.number["value"])

    @property
    def cells(self) -> dict[str, str]:
        """Text by column."""
        number, n = self.number, len(self.ours)
        pruned = number["pattern"] if number["pattern"] != "unstructured" else number["sparsity"]
        parts = [number["pruner"], pruned] * (number["pruner"] != "none") + [number["method"], number["end_state"]]
        unit = f" ({number['unit']})" if number["unit"] else ""
        return {
            "model": number["model"],
            "cell": " ".join(filter(None, parts)),
            "metric": f"{number['task']} {number['metric']}{unit}".strip(),
            "published": number["value"],
            "ours": f"{self.mean:.2f}" + (f" ± {self.ours.value.std():.2f}" if n > 1 else ""),
            "difference": "-" if self.difference is None else f"{self.difference:+.2f}",
            "n": str(n),
            "protocol": "; ".join(self.differs),
            "recipe": self.ours.recipe.iloc[0] or "-",
            "paper": number["paper"],
        }


@dataclass(frozen=True)
class Comparison:
    """All published numbers, each in one of three places.

    Attributes:
        matched: Numbers with ours beside them; several recipes of ours may stand beside one.
        other_protocol: Numbers that we have under another protocol only.
        missing: The others, each with the reason.
    """

    matched: list[Row]
    other_protocol: list[Row]
    missing: list[tuple[dict[str, str], str]]

    @property
    def summary(self) -> str:
        """How many there are of each, in a sentence."""
        beside = len({id(row.number) for row in self.matched})
        other, missing = len(self.other_protocol), len(self.missing)
        return (
            f"{beside + other + missing} published numbers: {beside} have one of ours beside them, {other} have one "
            f"under another protocol only, which is not compared, {missing} have none."
        )

    @property
    def tables(self) -> dict[str, TextTable]:
        """Table by title, for each of the three places."""
        beside = ("model", "cell", "metric", "published", "ours", "difference", "n", "recipe", "paper")
        other = ("model", "cell", "metric", "published", "ours", "protocol", "paper")
        missing = Counter((number["paper"], number["model"], number["method"], why) for number, why in self.missing)
        return {
            "Side by side": _table(beside, self.matched),
            "Same cell, another protocol: not compared": _table(other, self.other_protocol),
            "Published, not measured here": TextTable(
                ("paper", "model", "method", "why", "numbers"), [[*key, str(n)] for key, n in missing.items()]
            ),
        }


def _table(columns: tuple[str, ...], rows: list[Row]) -> TextTable:
    return TextTable(columns, [[row.cells[name] for name in columns] for row in rows], [row.ours.key for row in rows])


def published() -> list[dict[str, str]]:
    """The curated numbers, and the mean of every published set of scores of several tasks.

    Authors give either the scores or their mean; the mean of acc over all tasks of a row is computed here.
    """
    numbers = pd.read_csv(PUBLISHED / "numbers.csv", dtype=str, keep_default_na=False).assign(items="all")
    scores = numbers[(numbers.metric == "acc") & (numbers.task != "average")]
    same = [name for name in numbers if name not in ("task", "value", "note")]
    means = [
        rows.iloc[0].to_dict()
        | {"task": "average", "task_set": "+".join(sorted(rows.task)), "note": "mean of the published scores"}
        | {"value": f"{rows.value.astype(float).mean():.2f}"}
        for _, rows in scores.groupby(same, sort=False)
        if len(rows) > 1
    ]
    return numbers.to_dict("records") + means


def compare(table: pd.DataFrame) -> Comparison:
    """Put every published number into its place.

    Args:
        table: As `analysis.results.load` returns it.
    """
    measured = _measurements(table)
    ours: dict[tuple[str, ...], list[pd.DataFrame]] = defaultdict(list)
    for (*cell, _), seeds in measured.groupby([*CELL, "same"], sort=False) if len(measured) else ():
        ours[tuple(cell)].append(seeds)
    known = {()} | {cell[:level] for cell in ours for level in REASONS}
    numbers = published()
    cells = [tuple(number[axis] for axis in CELL) for number in numbers]
    result = Comparison([], [], [])
    for number, cell in zip(numbers, cells, strict=True):
        rows = [Row(number, seeds, _differences(number, seeds.iloc[0])) for seeds in ours.get(cell, [])]
        if same := [row for row in rows if not row.differs]:
            result.matched.extend(same)
        elif rows:
            result.other_protocol.append(min(rows, key=lambda row: len(row.differs)))
        else:
            shared = max(level for level in REASONS if cell[:level] in known)
            result.missing.append((number, REASONS[shared]))
    return result


def _differences(number: dict[str, str], ours: pd.Series) -> list[str]:
    return [
        f"{field}: {ours[field] or 'none'} here, {number[field] or 'not stated'} there"
        for field in _protocol(number)
        if ours[field] != number[field] or not number[field]
    ]


def _protocol(number: dict[str, Any]) -> list[str]:
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
    if number["pruner"] in CALIBRATED:
        fields += ["calibration"]
    if number["method"] not in CONTROLS:
        fields += ["data"] if number["method"] == "full" else ["data", "r"]
    return fields


def _measurements(table: pd.DataFrame) -> pd.DataFrame:
    """Every number of ours, in the columns of the published ones; `value` in their units, and key and recipe.

    `same` tells the runs whose seeds are averaged. Memory is left out: ours is the allocator's, the published one what
    the device reports as used.
    """
    models = pd.read_csv(PUBLISHED / "models.csv")
    names = dict(zip(models.hub.str.rpartition("/")[2].str.lower(), models.model, strict=True))
    found = [
        _axes(row, names) | number
        for row in table[table.status == "ok"].to_dict("records")
        for number in _numbers(row)
        if not math.isnan(number["value"])
    ]
    return pd.DataFrame(found, columns=[*COLUMNS, *CELL]).fillna("")


def _axes(row: dict[str, Any], models: dict[str, str]) -> dict[str, Any]:
    config, control = row["config"], row["method"] in CONTROLS
    train, prune = config["train"], config["prune"]
    recipe = [config[name] for name in (RECIPE_OF_CONTROL if control else RECIPE)]
    length = f"{train['epochs']} epochs" if train["epochs"] is not None else f"{train['steps']} steps"
    trained = {
        "end_state": row["end_state"],
        "data": config["data"]["name"],
        "r": str(config["adapter"]["r"]),
        "recipe": f"{length}, lr {train['learning_rate']:g}",
    }
    return {
        "model": models.get(Path(str(config["model"]["path"])).name.lower(), row["model"]),
        **{axis: row[axis] for axis in ("pruner", "pattern", "method", "key")},
        "sparsity": f"{row['sparsity']:g}",
        "calibration": f"{prune.get('samples')}x{prune.get('sequence_length')}" if row["pruner"] in CALIBRATED else "",
        "same": json.dumps([recipe, [row[name] for name in MACHINE]], sort_keys=True, default=str),
        **({} if control else trained),
    }


def _numbers(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Scores and step time of a row, each with its protocol."""
    scoring, train = row["config"]["eval"], row["config"]["train"]
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
        average = {"task": "average", "metric": row["accuracy_metric"], "value": row["accuracy"]}
        yield {**average, "task_set": "+".join(sorted(row["tasks"])), **protocol}
    if row["perplexity_text"] is not None:
        text = TEXTS.get(row["perplexity_text"], row["perplexity_text"])
        window = f"{row['perplexity_window']:.0f}"
        yield {"task": text, "metric": "perplexity", "value": row["perplexity"], "context": window}
    shape = {"batch": str(train["batch_size"]), "sequence_length": str(train["sequence_length"])}
    yield {"task": "", "metric": "step_time", "value": row["step_ms"], "device": row["device"], **shape}


def markdown(comparison: Comparison) -> str:
    """The comparison for a reader: what agrees with what, and what is missing."""
    parts = ["# Published numbers and ours", comparison.summary]
    for title, table in comparison.tables.items():
        parts += [f"## {title}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def run(options: argparse.Namespace) -> int:
    """Print the comparison and write `compare.md`."""
    publish(markdown(compare(load(options.runs))), options, "compare.md")
    return 0
