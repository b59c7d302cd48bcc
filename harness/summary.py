"""What a run prints at its end: the content of its result file for a reader in a hurry."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["summary"]

MEBIBYTE = 2**20
# Headers of the end states; a single merged model needs no more than "fine-tuned".
TUNED = {"adapter": "with adapter", "remasked": "re-masked", "dense": "zeros lost"}


def summary(result: dict[str, Any], file: Path) -> str:
    """Text of several lines: zeros, memory by category, step time, loss, all scores side by side, and where
    the file is.

    Args:
        result: Content of ``result.json``.
        file: Its path.
    """
    lines = [_title(result), ""]
    if result["status"] != "ok":
        lines.append(f"error      {result['error']['type']}: {' '.join(result['error']['message'].split())}")
    lines += _zeros(result) + _memory(result["memory"]) + _time(result) + _loss(result["loss"])
    table = _scores(result)
    if table:
        lines += ["", *table]
    return "\n".join(["", *lines, "", f"result     {file}"])


def _title(result: dict[str, Any]) -> str:
    pattern = "" if result["pattern"] == "unstructured" else f" {result['pattern']}"
    pruned = f"{result['pruner']} {result['sparsity']:g}{pattern}" if result["sparsity"] else "not pruned"
    if result["pruner"] == "none" and result["sparsity"]:
        pruned = f"comes with {result['sparsity']:.2%} zeros{pattern}"
    return f"{result['method']} · {result['model']} · {pruned} · seed {result['seed']} · {result['status']}"


def _zeros(result: dict[str, Any]) -> list[str]:
    states = {
        result["end_state"]: result["zeros"],
        **{name: row["zeros"] for name, row in result["variants"].items()},
    }
    lines = []
    for name, zeros in states.items():
        if zeros is None:
            continue
        text = f"zeros      {zeros['after_prune']:.2%} after pruning"
        if name == "adapter":
            text += ", adapter beside the weights: nothing merged"
        else:
            kept = "every zero kept" if zeros["lost"] == 0 else f"{zeros['lost']:,} zeros lost"
            text += f", {zeros['after_merge']:.2%} after the merge ({name}): {kept}, {zeros['gained']:,} new"
        if result["pattern"] != "unstructured":
            text += f"; pattern {result['pattern']} {'holds' if zeros['pattern_valid'] else 'is broken'}"
        lines.append(text)
    return lines


def _memory(memory: dict[str, Any]) -> list[str]:
    lines = []
    if memory["train_peak"] is not None:
        kinds = {"live_tensors": "live tensors, exact", "cuda": "CUDA allocator", "simulated": "simulated"}
        kind = kinds[memory["kind"]]
        lines.append(f"memory     {_size(memory['train_peak'])} at the peak of a training step ({kind})")
    if memory["breakdown"] is not None:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in memory["breakdown"].items())
        lines.append(f"           {parts}")
    if memory["kind"] == "simulated":
        devices = f"each of {memory['shards']} sharded devices" if memory["shards"] > 1 else "one device"
        lines.append(f"           on {devices} ({memory['device']}), {memory['peak_phase']}: {memory['peak_module']}")
    others = [
        f"{name} {_size(memory[key])}"
        for name, key in (("init", "init_peak"), ("evaluation", "eval_peak"), ("process", "process_rss_peak"))
        if memory.get(key) is not None
    ]
    return [*lines, f"           peaks of the other phases: {', '.join(others)}"] if lines and others else lines


def _time(result: dict[str, Any]) -> list[str]:
    time = result["time"]
    lines = []
    if time["step_ms"] is not None:
        step = time["step_ms"]
        spans = ", ".join(f"{name} {time[f'{name}_ms']:.1f}" for name in ("forward", "backward", "optimizer"))
        lines.append(f"step time  {step['p50']:.1f} ms (p10 {step['p10']:.1f}, p90 {step['p90']:.1f}; {spans})")
        dropped = f"{time['steps']} steps timed, {time['warmup_steps']} warm-up steps dropped"
        lines.append(f"           {time['tokens_per_second']:,.0f} tokens/s; {dropped}")
    if result["flops"]["per_step"] is not None:
        lines.append(f"FLOPs      {result['flops']['per_step'] / 1e9:,.1f} GFLOP a step")
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in time["phases"].items())
    return [*lines, f"phases     {phases} s"] if phases else lines


def _loss(loss: dict[str, Any]) -> list[str]:
    lines = []
    if loss["first"] is not None:
        lines.append(f"loss       {loss['first']:.4f} in the first step, {loss['last']:.4f} in the last")
    if loss["eval_after"] is not None:
        before = "" if loss["eval_before"] is None else f"{loss['eval_before']:.4f} before, "
        lines.append(f"           held-out text: {before}{loss['eval_after']:.4f} after")
    return lines


def _scores(result: dict[str, Any]) -> list[str]:
    """One column per model: dense, pruned, and every end state of the fine-tuned one."""
    columns = {"dense": result["baselines"]["dense"], "pruned": result["baselines"]["pruned"]}
    states = {result["end_state"]: result["eval"], **{name: row["eval"] for name, row in result["variants"].items()}}
    for name, scores in states.items():
        columns[TUNED.get(name, "fine-tuned") if result["method"] != "none" else "as pruned"] = scores
    columns = {name: scores for name, scores in columns.items() if scores is not None}
    if not columns:
        return []
    rows = [["", *columns]]
    for task in _in_order(name for scores in columns.values() for name in scores["tasks"]):
        cells = [scores["tasks"].get(task) for scores in columns.values()]
        metric = next(cell["metric"] for cell in cells if cell)
        rows.append([f"{task} ({metric})", *map(_percent, cells)])
    if any(scores["average"] for scores in columns.values()):
        rows.append(["average", *(_percent(scores["average"]) for scores in columns.values())])
    if any(scores["perplexity"] for scores in columns.values()):
        rows.append(["perplexity", *(_perplexity(scores["perplexity"]) for scores in columns.values())])
    return _aligned(rows)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _percent(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    error = "" if score.get("stderr") is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def _perplexity(score: dict[str, Any] | None) -> str:
    return "-" if score is None or score["value"] is None else f"{score['value']:.2f}"


def _size(size: int) -> str:
    mebibytes = size / MEBIBYTE
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first one to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
