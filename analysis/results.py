"""Result files as one table: a row for each run and end state, and one for each control (dense, pruned).

Nothing is computed here except units: scores become points (per cent), everything else stays as the harness wrote it.
Runs that failed or ran out of memory are rows too, with their axes and sizes and without a single measured number, so
that no mean can pick up what a broken run had measured before it broke. The columns:

    axes      status (ok, oom, failed), mode, method, model, pruner, pattern, sparsity, seed (NaN for a control),
              label ("0.5", "2:4", "0"), end_state, headline (the first end state of its run). A model that came with
              zeros has the pruner none and the sparsity that was measured
    support   fingerprint of the zeros that the run started from, where runs with one config have several; else None
    run       key, path (of result.json; of a packed run its file with the key below it), experiments (all that the run
              was made for, and the packed files that it was found in), error, config (nested, resolved)
    machine   MACHINE, python, git_commit, git_dirty
    provenance  config key -> where that model or text comes from; empty for older results
    quality   accuracy and accuracy_stderr (points), accuracy_metric, averaged (tasks), tasks, task_stderr, task_metric,
              task_norm and task_items (by task; acc_norm where a task has one, and points of each item if recorded),
              margin, margin_stderr and margin_items (by task, where recorded; nats), perplexity of the text,
              perplexity_text, perplexity_window, heldout_loss and heldout_stderr (nats), heldout_items (nats of each
              window, or None); of held-out answers: answers_perplexity, answers_loss, answers_stderr, answers_items
    zeros     zeros_lost (count), zeros_kept (fraction of the old zeros that are still zero; NaN beside an unmerged
              adapter)
    others    numbers of SIZES and COSTS: counts, bytes, milliseconds; memory_kind, memory_breakdown (by category),
              peak_by_devices (bytes of a simulated step on one of so many devices, by their number; else None);
              of simulated pruning prune_peak, host_peak (bytes) and prune_format (of the weights; else None)
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import result_schema
from analysis.parquet_file import SUFFIX, results_of
from analysis.result_schema import MACHINE
from harness.store import read_result

__all__ = ["CONTROLS", "COSTS", "MACHINE", "SIZES", "add_run_arguments", "is_dense", "load", "machine_of"]
__all__ += ["output_folder", "publish", "results_in"]

RESULT = "result.json"
# Models that no method has trained; rows of their own, whatever run they were scored in.
CONTROLS = ("dense", "pruned")
NAN = float("nan")
# Numeric columns and their places in the result: of every run, and of a finished one.
SIZES = {name: f"parameters.{name}" for name in ("trainable", "total", "adapter_bytes")}
COSTS = {
    **{name: f"memory.{name}" for name in ("train_peak", "init_peak", "eval_peak")},
    **{"step_ms": "time.step_ms.p50", "step_ms_p10": "time.step_ms.p10", "step_ms_p90": "time.step_ms.p90"},
    **{name: f"time.{name}" for name in ("forward_ms", "backward_ms", "optimizer_ms", "tokens_per_second")},
    **{"flops": "flops.per_step", "loss_first": "loss.first", "loss_last": "loss.last"},
}

Result = dict[str, Any]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads runs: where they are, and where to write."""
    parser.add_argument(
        "runs", type=Path, nargs="*", default=[Path("runs")], help="folders of runs, or packed files; default: runs"
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder for what is written; default: the first of RUNS, without {SUFFIX}"
    )


def output_folder(options: argparse.Namespace) -> Path:
    """The folder for what a command writes, made if it is not there yet."""
    first: Path = options.runs[0]
    output: Path = options.output or (first.with_suffix("") if first.suffix == SUFFIX else first)
    output.mkdir(parents=True, exist_ok=True)
    return output


def publish(text: str, options: argparse.Namespace, name: str) -> None:
    """Print a text, and write it to a file of this name in the folder for what a command writes."""
    print(text)
    (output_folder(options) / name).write_text(text, encoding="utf-8")


def load(places: Iterable[Path]) -> pd.DataFrame:
    """All results in `places`, columns as in the module's text.

    A ``method=none`` run is the control that it scores: "pruned", or "dense" if it has no zeros. A run that was
    repeated on the same machine counts once: the finished one, then the latest.

    Args:
        places: Packed files, and folders with runs or packed files below.

    Raises:
        ValueError: No result in `places`, or one that is damaged.
    """
    found = list(results_in(places))
    experiments: dict[str, set[str]] = defaultdict(set)
    supports: dict[str, set[str]] = defaultdict(set)  # the fingerprints that are known of each pruned model
    for path, result in found:
        experiments[result["key"]] |= {result["config"]["name"]}
        experiments[result["key"]] |= {path.parent.stem} if path.parent.suffix == SUFFIX else set()
        pruned_first = result["config"]["prune"].get("when") != "after"
        if result["mode"] == "run" and result.get("support") and pruned_first:
            supports[_pruned_model(result)].add(result["support"]["sha256"])
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, result in _newest(found):
        # It is needed only where it takes one to tell a pruned model from another.
        support = result.get("support") if len(supports[_pruned_model(result)]) > 1 and not is_dense(result) else None
        run = {"path": path, "experiments": sorted(experiments[result["key"]])}
        run |= {"support": support and support["sha256"]} | _run(result)
        for row in _end_states(result, run):
            if row["method"] not in CONTROLS:
                rows[result["key"], *machine_of(row), str(row["end_state"])] = row
            elif row["status"] == "ok":
                rows.setdefault(_control_identity(row), row)
            else:
                rows[result["key"], *machine_of(row), "control"] = row
    # Text stays text and None stays None: pandas would make NaN of it.
    table = pd.DataFrame(rows.values(), dtype=object)
    return table.astype({name: float for name in table if set(map(type, table[name])) == {float}})


def results_in(places: Iterable[Path]) -> Iterator[tuple[Path, Result]]:
    """Every result in `places`, by its path as in the column `path`; arguments and errors as of `load`."""
    places = [Path(place) for place in places]
    files = [file for place in places for file in ([place] if place.is_file() else _files_below(place))]
    if not files:
        raise ValueError(f"runs={', '.join(map(str, places))}: no {RESULT} and no packed file ({SUFFIX}) below")
    for file in files:
        for result in [read_result(file)] if file.name == RESULT else results_of(file):
            path = file if file.name == RESULT else file / str(result["key"])
            try:
                result_schema.check(result)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            yield path, result


def _files_below(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.name == RESULT or file.suffix == SUFFIX)
    # Hidden is a repetition under way, or failed, beside its good result.
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def is_dense(values: Mapping[str, Any]) -> bool:
    """Whether a run, by its axes, starts from the model as it is, without zeros."""
    return values["pruner"] == "none" and values["sparsity"] == 0


# Of results that are older than this field.
ONE = {"processes": 1}


def machine_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What a run was measured on and with, comparable."""
    return tuple(str({**ONE, **values}[name]) for name in MACHINE)


def _pruned_model(result: Result) -> str:
    """What a pruned model is made of."""
    axes = [result[axis] for axis in ("mode", "pruner", "pattern", "sparsity")]
    return json.dumps([*axes, result["config"]["model"], result["config"]["prune"]], sort_keys=True)


def _newest(results: Iterable[tuple[Path, Result]]) -> list[tuple[Path, Result]]:
    """One result for each run and machine; those that scored a control by itself come first."""
    ordered = sorted(results, key=lambda item: (item[1]["status"] == "ok", item[1]["environment"]["end"] or ""))
    kept = {(result["key"], machine_of(result["environment"])): (path, result) for path, result in ordered}
    return sorted(kept.values(), key=lambda item: (item[1]["method"] != "none", item[0]))


def _control_identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What a control's scores depend on: the model, how it was pruned, how it is scored, and the machine.

    The scores themselves are part of it: if they differ, code or data have changed, and one of two must not hide the
    other.
    """
    config = row["config"]
    parts = [config["model"], config["eval"]] + ([config["prune"]] if row["method"] == "pruned" else [])
    scores = f"{row['accuracy']:.2f} {row['heldout_loss']:.3f} {row['answers_loss']:.3f}"
    chosen = json.dumps(parts, sort_keys=True)
    return (row["method"], row["label"], str(row["support"]), chosen, *machine_of(row), scores)


def _run(result: Result) -> dict[str, Any]:
    """What all rows of a run have in common."""
    error, environment, sparsity = result["error"], ONE | result["environment"], float(result["sparsity"])
    return {
        **{axis: result[axis] for axis in ("status", "mode", "method", "model", "pruner", "pattern", "key", "config")},
        **{"sparsity": sparsity, "seed": float(result["seed"])},
        "label": result["pattern"] if result["pattern"] != "unstructured" else f"{sparsity:.4g}",
        "error": None if error is None else f"{error['type']}: {' '.join(error['message'].split())}",
        **{name: environment[name] for name in (*MACHINE, "python", "git_commit", "git_dirty")},
        "provenance": result.get("provenance") or {},
        **_numbers(result, SIZES),
    }


def _end_states(result: Result, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    ok = result["status"] == "ok"
    cost = _cost(result if ok else None)
    if result["method"] == "none" and result["mode"] != "simulate":
        control = _as_control("dense" if is_dense(result) else "pruned")
        yield run | cost | control | _quality(result["eval"] if ok else None) | _zeros(result["zeros"] if ok else None)
        yield from _controls(result, run, ("dense",)) if ok else ()
        return
    states = {result["end_state"]: result, **result["variants"]} if ok else {None: {"eval": None, "zeros": None}}
    for state, found in states.items():
        end = {"end_state": state, "headline": state == result["end_state"] or not ok}
        yield run | cost | end | _quality(found["eval"]) | _zeros(found["zeros"])
    yield from _controls(result, run, CONTROLS) if ok else ()


def _controls(result: Result, run: dict[str, Any], names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The baseline scores that a run carries; none of its own cost belongs to them."""
    for name in names:
        scores = result["baselines"][name]
        if scores is None or (name == "pruned" and is_dense(result)):
            continue
        before = result["zeros"]["after_prune"] if name == "pruned" and result["zeros"] else None
        untouched = None if before is None else {"after_prune": before, "after_merge": before, "lost": 0, "gained": 0}
        row = run | _as_control(name) | dict.fromkeys(SIZES, NAN) | {"trainable": 0.0} | _cost(None)
        row |= _quality(scores) | _zeros(untouched)
        if name == "dense":
            row |= {"pruner": "none", "pattern": "unstructured", "sparsity": 0.0, "label": "0", "support": None}
        yield row


def _as_control(name: str) -> dict[str, Any]:
    return {"method": name, "seed": NAN, "end_state": None, "headline": True}


def _quality(scores: Result | None) -> dict[str, Any]:
    scores = scores or {"tasks": {}, "average": None, "perplexity": None}
    tasks = scores["tasks"]
    average = scores["average"] or {"value": None, "stderr": None, "metric": None, "tasks": []}
    text, answers = scores["perplexity"] or {}, scores.get("held_out") or {}
    margins = {name: task for name, task in tasks.items() if "margin" in task}
    return {
        "accuracy": _points(average["value"]),
        "accuracy_stderr": _points(average["stderr"]),
        "accuracy_metric": average["metric"],
        "averaged": average["tasks"],
        "tasks": {name: _points(task["value"]) for name, task in tasks.items()},
        "task_stderr": {name: _points(task["stderr"]) for name, task in tasks.items()},
        "task_metric": {name: task["metric"] for name, task in tasks.items()},
        "task_norm": {name: _points(task["acc_norm"]) for name, task in tasks.items() if "acc_norm" in task},
        "task_items": {name: _item_points(task["correct"]) for name, task in tasks.items() if "correct" in task},
        "margin": {name: _number(task["margin"]) for name, task in margins.items()},
        "margin_stderr": {name: _number(task.get("margin_stderr")) for name, task in margins.items()},
        "margin_items": {name: np.array(task["margins"]) for name, task in margins.items() if "margins" in task},
        "perplexity": _number(text.get("value")),
        **_losses("heldout", text),
        "perplexity_text": text.get("text"),
        "perplexity_window": _number(text.get("window")),
        "answers_perplexity": _number(answers.get("value")),
        **_losses("answers", answers),
    }


def _losses(name: str, part: Result) -> dict[str, Any]:
    """Mean loss, its error, and its items, of which it is the plain mean: of a ratio of sums see `statistics`."""
    items = np.array(part["losses"], dtype=float) if "losses" in part else None
    if items is not None and "targets" in part:
        weights = np.array(part["targets"]) / np.mean(part["targets"])
        mean = np.mean(weights * items)
        items = mean + weights * (items - mean)
    numbers = {f"{name}_loss": _number(part.get("loss")), f"{name}_stderr": _number(part.get("loss_stderr"))}
    return numbers | {f"{name}_items": items}


def _item_points(correct: str) -> np.ndarray:
    """A text of "1" and "0", an item each, as points."""
    return 100.0 * (np.frombuffer(correct.encode("ascii"), np.uint8) == ord("1"))


def _zeros(zeros: Result | None) -> dict[str, float]:
    """Zeros lost, and the fraction of the zeros of the pruned model that are still zero; NaN where it is not known.

    `before` and `after` are the fractions z and z' of zeros, `lost` and `gained` numbers of them. From
    gained - lost = (z' - z) N follows N, the number of weights.
    """
    places = ("after_prune", "after_merge", "lost", "gained")
    before, after, lost, gained = (_number(zeros[name]) if zeros else NAN for name in places)
    kept = NAN
    if lost == 0 and before > 0:
        kept = 1.0
    elif before > 0 and after != before and gained != lost:
        kept = 1 - lost * (after - before) / (before * (gained - lost))
    return {"zeros_lost": lost, "zeros_kept": kept}


def _cost(result: Result | None) -> dict[str, Any]:
    """Memory, time and losses of a run; without a result there are none."""
    memory = result["memory"] if result else {"kind": None, "breakdown": None}
    parts = {"memory_kind": memory["kind"], "memory_breakdown": memory["breakdown"] or {}}
    parts |= {"peak_by_devices": memory.get("train_peak_by_devices"), "prune_format": memory.get("format")}
    parts |= {name: _number(memory.get(name)) for name in ("prune_peak", "host_peak")}
    return _numbers(result, COSTS) | parts


def _numbers(result: Result | None, places: Mapping[str, str]) -> dict[str, float]:
    found = {}
    for column, place in places.items():
        value: Any = result
        for name in place.split("."):
            value = None if value is None else value[name]
        found[column] = _number(value)
    return found


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def _points(fraction: float | None) -> float:
    """Points, the unit of every accuracy in tables and plots: 100 for all items right."""
    return 100 * _number(fraction)
