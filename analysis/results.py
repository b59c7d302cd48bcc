"""Result files as one table: a row for each run and end state, and one for each control (dense, pruned).

Nothing is computed here except units: scores become points (per cent), everything else stays as the harness wrote it.
Runs that failed or ran out of memory are rows too, with their axes and sizes and without a single measured number, so
that no mean can pick up what a broken run had measured before it broke. The columns:

    axes      status (ok, oom, failed), mode, method, model, pruner, pattern, sparsity, seed (NaN for a control),
              label ("0.5", "2:4", "0"), end_state, headline (the first end state of its run). A model that came with
              zeros has the pruner none and the sparsity that was measured
    support   fingerprint of the zeros that the run started from, where runs with one config have several; else None
    run       key, path (of result.json), experiment, error, config (nested, resolved), steps_file
    machine   device, threads, python, torch, transformers, peft, lm_eval, datasets, git_commit, git_dirty
    quality   accuracy and accuracy_stderr (points), accuracy_metric, averaged (tasks), tasks, task_stderr, task_metric,
              task_norm and task_items (by task; acc_norm where a task has one, and points of each item if recorded),
              perplexity, heldout_loss and heldout_stderr (nats), heldout_items (nats of each window, or None),
              perplexity_text, perplexity_window
    training  loss_first, loss_last
    zeros     zeros_before and zeros_after (fractions), zeros_lost and zeros_gained (counts), zeros_kept (fraction of
              the old zeros that are still zero; NaN beside an unmerged adapter), pattern_valid
    size      trainable, total (counts), adapter_bytes
    memory    memory_kind, train_peak, init_peak, eval_peak, reserved_peak (bytes), memory_breakdown (by category)
    time      step_ms (median), step_ms_p10, step_ms_p90, forward_ms, backward_ms, optimizer_ms, tokens_per_second,
              flops (per step)
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.shape import problem_of
from harness.store import read_result

__all__ = ["CONTROLS", "MACHINE", "add_run_arguments", "is_dense", "load", "output_folder", "read", "zeros_kept"]

SCHEMA = 1
# Models that no method has trained; rows of their own, whatever run they were scored in.
CONTROLS = ("dense", "pruned")
# Runs that differ in one of these do not share a table: what they were measured on, and with.
MACHINE = ("device", "threads", "torch", "transformers", "peft", "lm_eval", "datasets")
NAN = float("nan")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads runs: their folders, and where to write."""
    parser.add_argument(
        "runs", type=Path, nargs="*", default=[Path("runs")], help="folders of result files; default: runs"
    )
    parser.add_argument("--output", type=Path, help="folder for what is written; default: the first of the folders")


def output_folder(options: argparse.Namespace) -> Path:
    """The folder for what a command writes, made if it is not there yet."""
    output: Path = options.output or options.runs[0]
    output.mkdir(parents=True, exist_ok=True)
    return output


def load(folders: Iterable[Path]) -> pd.DataFrame:
    """All results below `folders`, columns as in the module's text.

    A ``method=none`` run is the control that it scores: "pruned", or "dense" if it has no zeros. A run that was
    repeated on the same machine counts once: the finished one, then the latest.

    Raises:
        ValueError: No result file below `folders`, or one that is damaged.
    """
    folders = [Path(folder) for folder in folders]
    # Hidden is a repetition under way, or failed, beside its good result.
    files = [
        file
        for folder in folders
        for file in sorted(folder.rglob("result.json"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"runs={', '.join(map(str, folders))}: no result.json below")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    results = _newest((file, read(file)) for file in files)
    supports = _supports(result for _, result in results)
    for file, result in results:
        for row in _rows(result, file, supports[_pruned_model(result)]):
            if row["method"] not in CONTROLS:
                rows[result["key"], *_machine(row), str(row["end_state"])] = row
            elif row["status"] == "ok":
                rows.setdefault(_control_identity(row), row)
            else:
                rows[result["key"], *_machine(row), "control"] = row
    # Text stays text and None stays None: pandas would make NaN of it.
    table = pd.DataFrame(rows.values(), dtype=object).drop(columns="end")
    return table.astype({name: float for name in table if set(map(type, table[name])) == {float}})


def read(file: Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        ValueError: It is damaged: no JSON, changed since it was written, or without a field that is read here.
    """
    result = read_result(file)
    if result is None:
        raise ValueError(f"{file}: is gone")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{file}: schema {result.get('schema')}; this version reads {SCHEMA}")
    if problem := problem_of(result):
        raise ValueError(f"{file}: damaged, {problem}")
    return result


def is_dense(values: Mapping[str, Any]) -> bool:
    """Whether a run, by its axes, starts from the model as it is, without zeros."""
    return values["pruner"] == "none" and values["sparsity"] == 0


def _pruned_model(result: dict[str, Any]) -> str:
    """What a pruned model is made of."""
    axes = [result[axis] for axis in ("mode", "pruner", "pattern", "sparsity")]
    return json.dumps([*axes, result["config"]["model"], result["config"]["prune"]], sort_keys=True)


def _supports(results: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    """The fingerprints that are known of each pruned model."""
    known: dict[str, set[str]] = defaultdict(set)
    for result in results:
        if result["mode"] == "run" and result.get("support"):
            known[_pruned_model(result)].add(result["support"]["sha256"])
    return known


def _support(result: dict[str, Any], known: set[str]) -> str | None:
    """The fingerprint of a run, where it takes one to tell its pruned model from another."""
    own = result.get("support")
    return own["sha256"] if own and len(known) > 1 and not is_dense(result) else None


def _newest(results: Iterable[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """One result for each run and machine; those that scored a control by itself come first."""
    kept: dict[tuple[str, ...], tuple[Path, dict[str, Any]]] = {}
    for file, result in sorted(results, key=lambda item: (item[1]["status"] == "ok", _end(item[1]))):
        kept[result["key"], *_machine(result["environment"])] = (file, result)
    return sorted(kept.values(), key=lambda item: (item[1]["method"] != "none", item[0]))


def _end(result: dict[str, Any]) -> str:
    return result["environment"]["end"] or ""


def _machine(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(values[name]) for name in MACHINE)


def _control_identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What a control's scores depend on: the model, how it was pruned, how it is scored, and the machine.

    The scores themselves are part of it: if they differ, code or data have changed, and one of two must not hide the
    other.
    """
    config = row["config"]
    parts = [config["model"], config["eval"]] + ([config["prune"]] if row["method"] == "pruned" else [])
    scores = f"{row['accuracy']:.2f} {row['heldout_loss']:.3f}"
    return (row["method"], row["label"], str(row["support"]), json.dumps(parts, sort_keys=True), *_machine(row), scores)


def _rows(result: dict[str, Any], file: Path, supports: set[str]) -> Iterator[dict[str, Any]]:
    run = {**_axes(result), "support": _support(result, supports), **_origin(result, file)}
    run |= _sizes(result["parameters"])
    ok = result["status"] == "ok"
    cost = {**_memory(result["memory"] if ok else {}), **_time(result if ok else {})}
    if result["method"] == "none":
        yield (
            run
            | cost
            | _as_control("dense" if is_dense(result) else "pruned")
            | (_quality(result["eval"] if ok else None) | _zeros(result["zeros"] if ok else None))
        )
        yield from _controls(result, run, ("dense",)) if ok else ()
        return
    states = {result["end_state"]: (result["eval"], result["zeros"])}
    states |= {name: (variant["eval"], variant["zeros"]) for name, variant in result["variants"].items()}
    for state, (scores, zeros) in states.items() if ok else [(None, (None, None))]:
        end = {"end_state": state, "headline": state == result["end_state"] or not ok}
        yield run | cost | end | _quality(scores) | _zeros(zeros)
    yield from _controls(result, run, CONTROLS) if ok else ()


def _controls(result: dict[str, Any], run: dict[str, Any], names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The baseline scores that a run carries; none of its own cost belongs to them."""
    for name in names:
        scores = result["baselines"][name]
        if scores is None or (name == "pruned" and is_dense(result)):
            continue
        row = run | _as_control(name) | _sizes({"trainable": 0}) | _memory({}) | _time({}) | _quality(scores)
        zeros = result["zeros"] if name == "pruned" else None
        before = {} if zeros is None else {"after_prune": zeros["after_prune"], "after_merge": zeros["after_prune"]}
        row |= _zeros(before | {"lost": 0, "gained": 0} if before else None)
        if name == "dense":
            row |= {"pruner": "none", "pattern": "unstructured", "sparsity": 0.0, "label": "0", "support": None}
        yield row


def _as_control(name: str) -> dict[str, Any]:
    return {"method": name, "seed": NAN, "end_state": None, "headline": True, "steps_file": None}


def _axes(result: dict[str, Any]) -> dict[str, Any]:
    axes = ("status", "mode", "method", "model", "pruner", "pattern")
    label = result["pattern"] if result["pattern"] != "unstructured" else f"{result['sparsity']:.4g}"
    numbers = {axis: _number(result[axis]) for axis in ("sparsity", "seed")}
    return {**{axis: result[axis] for axis in axes}, **numbers, "label": label}


def _origin(result: dict[str, Any], file: Path) -> dict[str, Any]:
    error, environment = result["error"], result["environment"]
    steps = result["artifacts"]["steps"]
    machine = (*MACHINE, "python", "git_commit", "git_dirty", "end")
    return {
        "key": result["key"],
        "path": file,
        "experiment": result["config"]["name"],
        "error": None if error is None else f"{error['type']}: {' '.join(error['message'].split())}",
        "config": result["config"],
        "steps_file": None if steps is None else file.parent / steps,
        **{name: environment[name] for name in machine},
    }


def _quality(scores: dict[str, Any] | None) -> dict[str, Any]:
    scores = scores or {}
    tasks, average, text = scores.get("tasks", {}), scores.get("average") or {}, scores.get("perplexity") or {}
    return {
        "accuracy": _points(average.get("value")),
        "accuracy_stderr": _points(average.get("stderr")),
        "accuracy_metric": average.get("metric"),
        "averaged": average.get("tasks", []),
        "tasks": {name: _points(task["value"]) for name, task in tasks.items()},
        "task_stderr": {name: _points(task["stderr"]) for name, task in tasks.items()},
        "task_metric": {name: task["metric"] for name, task in tasks.items()},
        "task_norm": {name: _points(task["acc_norm"]) for name, task in tasks.items() if "acc_norm" in task},
        "task_items": {name: _item_points(task["correct"]) for name, task in tasks.items() if "correct" in task},
        "perplexity": _number(text.get("value")),
        "heldout_loss": _number(text.get("loss")),
        "heldout_stderr": _number(text.get("loss_stderr")),
        "heldout_items": np.array(text["losses"]) if "losses" in text else None,
        "perplexity_text": text.get("text"),
        "perplexity_window": _number(text.get("window")),
    }


def _item_points(correct: str) -> np.ndarray:
    """A text of "1" and "0", an item each, as points."""
    return 100.0 * (np.frombuffer(correct.encode("ascii"), np.uint8) == ord("1"))


def _zeros(zeros: dict[str, Any] | None) -> dict[str, Any]:
    zeros = zeros or {}
    return {
        "zeros_before": _number(zeros.get("after_prune")),
        "zeros_after": _number(zeros.get("after_merge")),
        "zeros_lost": _number(zeros.get("lost")),
        "zeros_gained": _number(zeros.get("gained")),
        "zeros_kept": zeros_kept(zeros),
        "pattern_valid": zeros.get("pattern_valid"),
    }


def zeros_kept(zeros: Mapping[str, Any]) -> float:
    """Fraction of the zeros of the pruned model that are still zero; NaN where it is not known.

    The file has the fractions z and z' of zeros before and after, and the numbers of lost and of gained ones. From
    gained - lost = (z' - z) N follows N, the number of weights.
    """
    lost, before, after = zeros.get("lost"), zeros.get("after_prune"), zeros.get("after_merge")
    if lost is None or not before:
        return NAN
    if lost == 0:
        return 1.0
    if after == before:
        return NAN
    weights = (zeros["gained"] - lost) / (after - before)
    return 1 - lost / (before * weights)


def _sizes(parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {name: _number((parameters or {}).get(name)) for name in ("trainable", "total", "adapter_bytes")}


def _memory(memory: dict[str, Any]) -> dict[str, Any]:
    peaks = ("train_peak", "init_peak", "eval_peak", "reserved_peak")
    return {
        "memory_kind": memory.get("kind"),
        **{name: _number(memory.get(name)) for name in peaks},
        "memory_breakdown": memory.get("breakdown") or {},
    }


def _time(result: dict[str, Any]) -> dict[str, Any]:
    time, loss = result.get("time") or {}, result.get("loss") or {}
    step = time.get("step_ms") or {}
    spans = ("forward_ms", "backward_ms", "optimizer_ms", "tokens_per_second")
    return {
        "step_ms": _number(step.get("p50")),
        "step_ms_p10": _number(step.get("p10")),
        "step_ms_p90": _number(step.get("p90")),
        **{name: _number(time.get(name)) for name in spans},
        "flops": _number((result.get("flops") or {}).get("per_step")),
        "loss_first": _number(loss.get("first")),
        "loss_last": _number(loss.get("last")),
    }


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def _points(fraction: float | None) -> float:
    """Points, the unit of every accuracy in tables and plots: 100 for all items right."""
    return 100 * _number(fraction)
