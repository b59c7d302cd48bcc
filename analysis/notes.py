"""The words around a table: its title, what a reader must know of its numbers, and the runs that have none."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.groups import Group, sortable
from analysis.lines import Line, short_name
from analysis.measures import ACCURACY, ANSWERS_LOSS
from analysis.results import MACHINE
from analysis.statistics import ALPHA, CONDITION, pooled
from analysis.style import name_of, order_of

__all__ = ["LEGEND", "cautions_of", "failures_of", "notes_of", "origin_of"]
__all__ += ["pruning_of", "settings", "slug", "title_of"]

LEGEND = (
    "Scores are in per cent; ± is the standard deviation over n seeds, beside `Δ LoRA` the standard error of the "
    "difference. `Δ LoRA` and `× LoRA` compare with LoRA as trained (the adapter beside the sparse weight) with the "
    "same settings.",
    "A score is **bold** if it differs from that of every other row at the two-sided level "
    f"{ALPHA:g}, in a test that is paired over seeds and test items, which all methods share (two-way layout; a line "
    "below each table says how many degrees of freedom the variance over the seeds has; where single items are not "
    "recorded, the errors of two methods on them are taken as independent, which is cautious). One seed shows no "
    "spread: nothing is bold then. Controls, and models that lost zeros or are not one merged model, do not compete.",
    f"This, and every p value in `differences.csv` (`holm`: corrected for all pairs of its table), is {CONDITION}.",
    "A cost is **bold** if its range ends before every other one begins: step times from p10 to p90, bytes over the "
    "seeds.",
    "`-` was not measured; OOM ran out of memory.",
)
KINDS = {
    "cuda": "peak of the CUDA allocator during the training",
    "live_tensors": "exact peak of live tensor bytes in one training step",
    "simulated": "simulated on fake tensors, nothing was allocated",
}
MODES = {"run": "", "profile": "random weights, time and memory only", "simulate": "simulated"}


def title_of(group: Group) -> str:
    """Model, how it was pruned, and the protocol where there are several."""
    axes = group.axes
    pruned = pruning_of(axes)
    if axes["mode"] != "run":
        _, _, quantised = axes["pruner"].partition("-")
        pruned = f"sparsity {axes['label']}" + (f", {quantised}" if quantised else "")
    return ", ".join(part for part in (axes["model"], pruned, MODES[axes["mode"]], *settings(group.protocol)) if part)


def pruning_of(axes: Mapping[str, Any]) -> str:
    """How a model came to its zeros."""
    if axes["sparsity"] == 0:
        return "not pruned"
    return f"{'came with zeros,' if axes['pruner'] == 'none' else axes['pruner']} {axes['label']}"


def settings(values: Mapping[str, object]) -> list[str]:
    """Config values for readers: `sequence length 512`."""
    return [f"{short_name(key)} {value}" for key, value in values.items()]


def slug(value: object) -> str:
    """Any value as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", str(value).replace(":", "of")).strip("_")


def notes_of(group: Group) -> list[str]:
    """Errors over the items, what perplexity and memory are, and the machine; only what there is."""
    rows = _finished(group)
    scores = [_contradiction(group.controls), _items(rows), _perplexity(rows), _answers(rows), _margins(rows)]
    notes = [_weights(rows), _snapshots(rows), *scores, _memory(group.runs), _machine(rows)]
    commits = sorted({commit[:10] for commit in rows.git_commit.dropna()})
    return [note for note in notes if note] + ([f"Code: {', '.join(commits)}."] if commits else [])


def cautions_of(group: Group, lines: Sequence[Line]) -> list[str]:
    """Where the runs come from, and over which lines (those that were scored) the variance was pooled."""
    return [*origin_of(_finished(group)), *_pooling(lines)]


def origin_of(rows: pd.DataFrame) -> list[str]:
    """How many of the runs behind some rows ran on a changed tree, and how many belong to another experiment too."""
    runs = rows.drop_duplicates("path")
    changed = sum(dirty is True for dirty in runs.git_dirty)
    shared = [names for names in runs.experiments if len(names) > 1]
    notes = [f"{changed} of {len(runs)} runs with changes that were not committed."] if changed else []
    if shared:
        names = ", ".join(sorted(set().union(*shared)))
        notes.append(f"{len(shared)} of {len(runs)} runs belong to more than one experiment ({names}).")
    return notes


def _pooling(lines: Sequence[Line]) -> list[str]:
    pools: dict[str, list[Line]] = {}
    for line in lines:
        if line.pool is not None and line.n > 1:
            pools.setdefault(line.pool, []).append(line)
    found = []
    for same in pools.values():
        samples = ([line.sample(measure) for line in same] for measure in (ACCURACY, ANSWERS_LOSS))
        rows = next(filter(None, map(pooled, samples)), [])
        if rows:
            degrees = (len(rows) - 1) * (rows[0].n - 1)
            found.append(f"over the {len(rows)} rows of {same[0].label} ({degrees} degrees of freedom)")
    if found:
        return [f"Variance over the seeds: pooled {' and '.join(found)}, else n - 1 degrees of freedom."]
    return ["Variance over the seeds: not pooled, n - 1 degrees of freedom for every pair."] if pools else []


def failures_of(group: Group) -> list[str]:
    """Method, seed, what was chosen, and the error of every run without a result."""
    rows = pd.concat([group.controls, group.tuned_dense, group.runs])
    lines = []
    for _, row in rows[rows.status != "ok"].iterrows():
        chosen = [(key, row["values"][key]) for key in group.choices if key in row["values"]]
        seed = [] if pd.isna(row.seed) else [f"seed {row.seed:g}"]
        what = ", ".join([name_of(row.method), *(f"{key}={value}" for key, value in chosen), *seed])
        place = (order_of(row.method), [sortable(value) for _, value in chosen], row.seed)
        lines.append((place, f"{what}: {'out of memory' if row.status == 'oom' else row.status} ({row.error})"))
    return [line for _, line in sorted(lines)]


def _finished(group: Group) -> pd.DataFrame:
    rows = pd.concat([group.controls, group.tuned_dense, group.runs])
    return rows[rows.status == "ok"]


def _contradiction(controls: pd.DataFrame) -> str | None:
    """The same untrained model with several scores on one machine."""
    scored = controls[controls.status == "ok"]
    twice = scored[scored.duplicated(["method", *MACHINE], keep=False)]
    names = " and ".join(dict.fromkeys(twice.method))
    return f"The {names} model was scored differently: code or data changed between these runs." if names else None


def _weights(rows: pd.DataFrame) -> str | None:
    """Weights that are not those that were published, but made of them."""
    models = [sources.get("model.path", {}) for sources in rows.provenance]
    known = {f"{model['source'].rpartition('/')[2]}: {model['values']}" for model in models if model.get("values")}
    return f"{'; '.join(sorted(known))}." if known else None


def _snapshots(rows: pd.DataFrame) -> str | None:
    """What was read from local copies, which may be a part of what they are named after."""
    texts = [text for sources in rows.provenance for key, text in sources.items() if key != "model.path"]
    counted = {f"{text['source']} ({sum(text['rows'].values())} rows)" for text in texts if text.get("rows")}
    return f"Local copies of {', '.join(sorted(counted))}." if counted else None


def _items(rows: pd.DataFrame) -> str | None:
    average = rows.accuracy_stderr.max()
    tasks = max((error for errors in rows.task_stderr for error in errors.values()), default=None)
    if tasks is None:
        return None
    of_average = "" if pd.isna(average) else f"{average:.1f} of the average, "
    return f"Standard errors over the test items: {of_average}up to {tasks:.1f} of a task."


def _perplexity(rows: pd.DataFrame) -> str | None:
    scored = rows[rows.perplexity.notna()]
    texts = {f"{row.perplexity_text}, windows of {row.perplexity_window:g} tokens" for _, row in scored.iterrows()}
    return f"Perplexity on {'; '.join(sorted(texts))}." if texts else None


def _answers(rows: pd.DataFrame) -> str | None:
    counts = sorted({len(items) for items in rows.answers_items if items is not None})
    if not counts:
        return None
    return (
        f"Held-out answers: those of {' or '.join(map(str, counts))} rows of instructions that no run trains on. "
        "Perplexities are compared by their logarithms, the losses; Δ LoRA (nats) is the difference of these with its "
        "standard error, and below 0 is better than LoRA."
    )


def _margins(rows: pd.DataFrame) -> str | None:
    errors = [error for of_row in rows.margin_stderr for error in of_row.values()]
    if not errors:
        return None
    return (
        "Margin: by how much the right answer is likelier than the best wrong one, mean over the items in nats; "
        f"standard errors over the items up to {max(errors):.2f}."
    )


def _memory(rows: pd.DataFrame) -> str | None:
    kinds = [KINDS[kind] for kind in sorted(set(rows.memory_kind.dropna()))]
    return f"Memory: {'; '.join(kinds)}." if kinds else None


def _machine(rows: pd.DataFrame) -> str | None:
    values = {name: " and ".join(sorted({str(value) for value in rows[name].dropna()})) or "none" for name in MACHINE}
    versions = ", ".join(f"{name} {values[name]}" for name in MACHINE if name not in ("device", "threads"))
    return None if rows.empty else f"Device: {values['device']}, threads: {values['threads']}; {versions}."
