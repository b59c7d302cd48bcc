"""Result files as the harness writes them, with numbers that a test chooses."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from analysis.results import load
from analysis.tables import build

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
HUB = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "llama3_8b": "meta-llama/Meta-Llama-3-8B"}
MEBIBYTE = 2**20
PRECISE = 0.001  # standard error over the items
# Tokens of the held-out answers, and how far their losses are from the mean.
TARGETS, AWAY = (10, 40, 150, 20), (2.0, 1.0, -0.5, 0.75)


def scores(
    accuracy: float,
    loss: float,
    *,
    stderr: float = 0.005,
    text: str = "wikitext",
    window: int = 2048,
    answers: float | None = None,
    margin: float | None = None,
) -> dict[str, Any]:
    """Scores of one model: every task the same. `answers` is the loss of held-out ones; older files have no margins."""
    task = {"metric": "acc", "value": accuracy, "stderr": 2 * stderr, "n": 600, "version": 1}
    if margin is not None:
        task |= {"margin": margin, "margin_stderr": 0.5, "margins": [margin - 1, margin + 1, margin]}
    normed = {name: task | {"acc_norm": accuracy + 0.1} for name in SEVEN}
    average = {"metric": "acc", "value": accuracy, "stderr": stderr, "tasks": list(SEVEN)}
    perplexity = {"text": text, "value": 2.718281828**loss, "loss": loss, "loss_stderr": 0.01, "window": window}
    found = {"tasks": normed, "average": average, "perplexity": perplexity | {"windows": 100, "tokens": 10000}}
    return found | {"held_out": None if answers is None else held_out([answers + away for away in AWAY])}


def held_out(losses: list[float]) -> dict[str, Any]:
    """Held-out answers of these mean losses and TARGETS tokens."""
    total, rows = sum(TARGETS), list(zip(losses, TARGETS, strict=True))
    loss = sum(one * weight for one, weight in rows) / total
    squares = sum((weight * (one - loss)) ** 2 for one, weight in rows)
    error = math.sqrt(squares * len(rows) / (len(rows) - 1)) / total
    return {"value": math.exp(loss), "loss": loss, "loss_stderr": error, "losses": losses, "targets": list(TARGETS)} | {
        "rows": len(rows), "tokens": total}  # fmt: skip


def result(
    method: str = "lors",
    *,
    model: str = "microworld",
    pruner: str = "wanda",
    pattern: str = "unstructured",
    sparsity: float = 0.5,
    seed: int = 0,
    mode: str = "run",
    accuracy: float = 0.7,
    loss: float = 1.0,
    answers: float | None = None,
    margin: float | None = None,
    step_ms: tuple[float, float, float] = (95.0, 100.0, 105.0),
    train_peak: int = 100 * MEBIBYTE,
    trainable: int = 1000,
    lost: int = 0,
    states: tuple[str, ...] = ("merged",),
    status: str = "ok",
    support: str | None = None,
    dense: tuple[float, float] = (0.8, 0.9),
    pruned: tuple[float, float] = (0.6, 1.2),
    config: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One result. `config` holds changes by dotted key, `support` is a fingerprint; older files have none."""
    trains = method != "none"
    full = _config(method, model, pruner, pattern, sparsity, seed, mode)
    for key, value in (config or {}).items():
        *parents, last = key.split(".")
        node = full
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    after = sparsity * (1 - lost / 100_000)
    zeros = {"requested": sparsity, "after_prune": sparsity, "after_merge": after, "lost": lost, "gained": 0}
    zeros |= {"pattern_valid": True, "mergeable": lost == 0}
    own = scores(accuracy, loss, answers=answers, margin=margin)
    evaluated = {"eval": own, "zeros": zeros} if mode == "run" else {"eval": None, "zeros": None}
    first, *others = states
    baselines = {"dense": None, "pruned": None}
    if mode == "run":
        of_dense = {} if answers is None else {"answers": 1.5, "margin": 0.9}
        of_pruned = {} if answers is None else {"answers": 2.5, "margin": -0.9}
        baselines = {"dense": scores(*dense, **of_dense), "pruned": scores(*pruned, **of_pruned)}
    spans = dict.fromkeys(("forward_ms", "backward_ms", "optimizer_ms"), 30.0 if trains else None)
    p10, p50, p90 = step_ms
    phases = {"load": 1.0, "prune": 2.0, "init": 0.5, "train": 30.0, "merge": 0.1, "evaluate": 9.0}
    breakdown = dict.fromkeys(
        ("weights", "adapters", "gradients", "optimizer", "activations", "other"), train_peak // 6
    )
    error = None if status == "ok" else {"type": "OutOfMemoryError", "message": "no room", "traceback": "..."}
    written = {
        "schema": 1,
        "status": status,
        "error": error,
        **{"mode": mode, "method": method, "model": model, "pruner": pruner, "pattern": pattern},
        "provenance": None,
        "support": None if support is None else {"sparsity": sparsity, "pattern": pattern, "sha256": support},
        **{"sparsity": sparsity, "seed": seed, "config": full, "environment": _environment() | (environment or {})},
        "parameters": {"total": 10**6, "trainable": trainable, "adapter_bytes": 4 * trainable},
        "end_state": first,
        **evaluated,
        "memory": {"kind": "live_tensors" if trains else None, "init_peak": None, "eval_peak": 5 * MEBIBYTE}
        | {"train_peak": train_peak if trains else None, "breakdown": breakdown if trains else None}
        | {"reserved_peak": None, "process_rss_peak": 10**9},
        "time": {"warmup_steps": 5, "steps": 300, **spans, "phases": phases}
        | {"step_ms": {"p10": p10, "p50": p50, "p90": p90} if trains else None}
        | {"tokens_per_second": 1000.0 if trains else None},
        "flops": {"per_step": 10**9 if trains else None},
        "loss": {"first": 3.0, "last": 1.0, "eval_before": 1.2, "eval_after": loss} if trains else dict.fromkeys(
            ("first", "last", "eval_before", "eval_after")),
        "baselines": baselines,
        "variants": {name: copy.deepcopy(evaluated) for name in others},
        "artifacts": {"config": "config.yaml", "log": "log.txt", "steps": "steps.jsonl" if trains else None}
        | {"adapter": None, "merged": None},
    }  # fmt: skip
    return {"key": _key(full), **written}


def write(folder: Path, *results: dict[str, Any]) -> None:
    """Run folders as the harness leaves them: result, config, log and steps."""
    for content in results:
        run = folder / content["key"]
        run.mkdir(parents=True, exist_ok=True)
        (run / "result.json").write_text(json.dumps(content), encoding="utf-8")
        (run / "config.yaml").write_text(json.dumps(content["config"]), encoding="utf-8")
        (run / "log.txt").write_text("a log\n", encoding="utf-8")
        if content["artifacts"]["steps"]:
            steps = ({"step": step, "loss": 3.0 - 0.2 * step, "step_ms": 100.0} for step in range(1, 11))
            (run / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")


def scored(method, accuracy, *, stderr=PRECISE, **options):
    """A result whose scores have a standard error of their own."""
    content = result(method, accuracy=accuracy, **options)
    content["eval"] = scores(accuracy, options.get("loss", 1.0), stderr=stderr)
    return content


def lora(seed, accuracy, **options):
    """A LoRA run: beside the weights, merged and masked again (3 points less), merged with all zeros lost."""
    content = scored("lora", accuracy, seed=seed, states=("adapter", "remasked", "dense"), **options)
    content["zeros"] |= {"after_merge": None, "lost": None, "gained": None, "mergeable": False}
    content["variants"]["remasked"]["eval"] = scores(accuracy - 0.03, 1.0, stderr=PRECISE)
    content["variants"]["dense"]["zeros"] |= {"after_merge": 0.0, "lost": 500, "gained": 0, "mergeable": False}
    return content


def tables_of(folder, *contents):
    """The tables of results that are written there."""
    write(folder, *contents)
    return build(load([folder]))


def row_of(table, label):
    """The row of a name."""
    (row,) = [row for row in table.rows if row.label == label]
    return row


def _key(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _environment() -> dict[str, Any]:
    versions = {"python": "3.11.7", "lors": None, "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    times = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:01:00+00:00"}
    return versions | times | {
        "lm_eval": "0.4.13", "datasets": "5.2.0", "platform": "Linux", "device": "A CPU", "driver": None, "cuda": None,
        "threads": 2, "git_commit": "0" * 40, "git_dirty": False, "command": ["run.py", "method=lors"],
    }  # fmt: skip


def _config(
    method: str, model: str, pruner: str, pattern: str, sparsity: float, seed: int, mode: str
) -> dict[str, Any]:
    own = {"name": method, "_target_": "harness.method.Method", "peft": {"r": 16}}
    if method == "lors":
        own["peft"] |= {"init": "gradient", "scaling": "rank_stabilized", "exact_gradient": False}
    return {
        **{"sparsity": sparsity, "pattern": pattern, "seed": seed, "mode": mode, "force": False, "name": "test"},
        **{"runs_root": "runs", "cache_root": "cache", "save_merged": False},
        "adapter": {"r": 16, "alpha": 16, "targets": ["q_proj"]},
        "model": {"name": model, "path": HUB.get(model, model), "revision": None, "layers": None, "shape": None},
        "prune": {"name": pruner, "samples": 128, "sequence_length": 2048, "seed": 0, "text": None},
        "method": own,
        "data": {"name": "alpaca", "kind": "instructions", "path": None, "split": "train"},
        "train": {"steps": 300, "epochs": None, "batch_size": 16, "gradient_accumulation": 1, "sequence_length": 512}
        | {"learning_rate": 1e-3, "minimum_learning_rate": 5e-5, "warmup_steps": 0, "weight_decay": 0.0}
        | {"betas": [0.9, 0.999], "max_grad_norm": 1.0, "precision": "float32", "steps_by_mode": {"run": 300}},
        "eval": {"name": "zeroshot", "tasks": list(SEVEN), "data_root": None, "limit": None, "batch_size": 16}
        | {"add_bos_token": False, "perplexity": {"text": "wikitext", "window": 2048}, "baselines": True},
        "launch": {"name": "python", "arguments": []},
    }
