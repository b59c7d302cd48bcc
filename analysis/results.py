"""Finished results as one table: a row for each run and end state, scores in points (per cent)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd


def _row(result: dict[str, Any], end_state: str | None, scores: dict[str, Any] | None) -> dict[str, Any]:
    average, perplexity = (scores or {}).get("average") or {}, (scores or {}).get("perplexity") or {}
    return {
        **{axis: result[axis] for axis in ("method", "model", "pruner", "pattern", "sparsity", "seed")},
        "label": result["pattern"] if result["pattern"] != "unstructured" else f"{result['sparsity']:g}",
        "end_state": end_state,
        "accuracy": 100 * average.get("value", float("nan")),
        "accuracy_stderr": 100 * average.get("stderr", float("nan")),
        "heldout_loss": perplexity.get("loss", float("nan")),
        "tasks": {name: 100 * task["value"] for name, task in (scores or {}).get("tasks", {}).items()},
        "task_stderr": {name: 100 * task["stderr"] for name, task in (scores or {}).get("tasks", {}).items()},
        "step_ms": (result["time"].get("step_ms") or {}).get("p50"),
        "train_peak": result["memory"].get("train_peak"),
        "trainable": (result["parameters"] or {}).get("trainable"),
        "zeros_after": (result["zeros"] or {}).get("after_merge"),
        "key": result["key"],
    }


def load(folders: Iterable[Path]) -> pd.DataFrame:
    """All runs with status ok below `folders`; end states of one run are rows of their own, and so are the dense and
    the pruned model (methods "dense" and "pruned"), once for each pruned model.

    Raises:
        ValueError: no finished run below `folders`.
    """
    folders = list(folders)
    results = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.rglob("result.json"))]
    rows: dict[tuple, dict[str, Any]] = {}
    for result in results:
        if result["status"] != "ok":
            continue
        rows[result["key"], "headline"] = _row(result, result["end_state"], result["eval"])
        for variant, content in result["variants"].items():
            rows[result["key"], variant] = _row(result, variant, content["eval"]) | {
                "zeros_after": content["zeros"]["after_merge"]
            }
        for baseline, scores in result["baselines"].items():
            if scores is not None and not (baseline == "pruned" and result["pruner"] == "none"):
                row = _row(result, None, scores) | {
                    "method": baseline,
                    "seed": None,
                    "step_ms": None,
                    "trainable": 0,
                }
                if baseline == "dense":
                    row |= {"pruner": "none", "pattern": "unstructured", "sparsity": 0.0, "label": "0"}
                rows[tuple(row[axis] for axis in ("method", "model", "pruner", "label"))] = row
    if not rows:
        raise ValueError(f"runs={', '.join(map(str, folders))}: no finished result.json below")
    return pd.DataFrame(rows.values())
