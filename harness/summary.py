"""What a run prints at its end: the content of its result file for a reader in a hurry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness.cards import HEADROOM, cards_needed

__all__ = ["scores", "sections", "summary"]

MEBIBYTE = 2**20
MEMORY = {"live_tensors": "live tensors, exact", "cuda": "CUDA allocator", "simulated": "simulated"}
# Headers of the end states; a single merged model needs no more than "fine-tuned".
TUNED = {"adapter": "with adapter", "remasked": "re-masked", "dense": "zeros lost"}


def summary(result: dict[str, Any], file: Path) -> str:
    """Text of several lines: zeros, memory by category, cards that a simulated step fits on, step time, loss, all
    scores side by side, and where the file is.

    Args:
        result: Content of ``result.json``.
        file: Its path.
    """
    error = result["error"]
    failed = [] if result["status"] == "ok" else [f"{error['type']}: {' '.join(error['message'].split())}"]
    lines = ["", _title(result), ""]
    for name, texts in {"error": failed, **sections(result)}.items():
        lines += [f"{name if text is texts[0] else '':<11}{text}" for text in texts]
    table = scores(result)
    if not table.empty:
        lines += ["", table.to_string()]
    return "\n".join([*lines, "", f"result     {file}"])


def sections(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines about what was measured, by their subject; none where a subject was not, or not yet."""
    flops = result["flops"]["per_step"]
    phases = [f"{name} {seconds:.1f}" for name, seconds in result["time"]["phases"].items()]
    return {
        "zeros": _zeros(result),
        "memory": _memory(result["memory"]),
        "fits on": _cards(result),
        "step time": _step_time(result["time"]),
        "FLOPs": [] if flops is None else [f"{flops / 1e9:,.1f} GFLOP a step"],
        "phases": [f"{', '.join(phases)} s"] if phases else [],
        "loss": _loss(result["loss"]),
    }


def _title(result: dict[str, Any]) -> str:
    pattern = "" if result["pattern"] == "unstructured" else f" {result['pattern']}"
    pruned = f"{result['pruner']} {result['sparsity']:g}{pattern}" if result["sparsity"] else "not pruned"
    if result["pruner"] == "none" and result["sparsity"]:
        pruned = f"comes with {result['sparsity']:.2%} zeros{pattern}"
    return f"{result['method']} · {result['model']} · {pruned} · seed {result['seed']} · {result['status']}"


def _end_states(result: dict[str, Any], field: str) -> dict[str, Any]:
    """A field of the row itself and of its variants, where it is known."""
    states = {result["end_state"]: result, **result["variants"]}
    return {name: row[field] for name, row in states.items() if row.get(field) is not None}


def _zeros(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, zeros in _end_states(result, "zeros").items():
        text = f"{zeros['after_prune']:.2%} after pruning"
        if "blocks" in zeros:
            text += f" ({min(zeros['blocks']):.2%} to {max(zeros['blocks']):.2%} of a block)"
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
    if memory.get("prune_peak") is not None:
        lines = [f"{_size(memory['prune_peak'])} at the peak of pruning on the {memory['device']} device (simulated)"]
        if memory["host_peak"] is not None:
            lines.append(f"{_size(memory['host_peak'])} on the host: {memory['format']} weights and hidden states")
        return lines
    if memory["train_peak"] is None:
        return []
    lines = [f"{_size(memory['train_peak'])} at the peak of a training step ({MEMORY[memory['kind']]})"]
    if memory["breakdown"] is not None:
        lines.append(", ".join(f"{name} {_size(size)}" for name, size in memory["breakdown"].items()))
    if memory["kind"] == "simulated":
        devices = f"each of {memory['shards']} sharded devices" if memory["shards"] > 1 else "one device"
        lines.append(f"on {devices} ({memory['device']}), {memory['peak_phase']}: {memory['peak_module']}")
    others = {"init": "init_peak", "evaluation": "eval_peak", "process": "process_rss_peak"}
    known = [f"{name} {_size(memory[key])}" for name, key in others.items() if memory.get(key) is not None]
    return [*lines, f"peaks of the other phases: {', '.join(known)}"] if known else lines


def _cards(result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    peaks = memory.get("train_peak_by_devices") or {"1": memory.get("prune_peak")}
    if peaks["1"] is None:
        return []
    found, most = cards_needed(peaks), len(peaks)
    fitting = [f"{number} x {size} GB" for size, number in found.items() if number is not None]
    too_small = [f"not on {most} x {size} GB" for size, number in found.items() if number is None]
    train = result["config"]["train"]
    divided = f"FSDP divides all but the batch, {train['batch_size']} x {train['sequence_length']} tokens on each card"
    if most == 1:
        divided = f"one card, because the steps of {result['method']} need whole weights"
    if memory["train_peak"] is None:
        divided = "one card, which has one block at a time"
    free = f"{_size(HEADROOM)} of each card left for what is no tensor: CUDA context, NCCL, reserve of the allocator"
    return [", ".join(fitting + too_small), divided, free]


def _step_time(time: dict[str, Any]) -> list[str]:
    if time["step_ms"] is None:
        return []
    step = time["step_ms"]
    spans = ", ".join(f"{name} {time[f'{name}_ms']:.1f}" for name in ("forward", "backward", "optimizer"))
    dropped = f"{time['steps']} steps timed, {time['warmup_steps']} warm-up steps dropped"
    return [
        f"{step['p50']:.1f} ms (p10 {step['p10']:.1f}, p90 {step['p90']:.1f}; {spans})",
        f"{time['tokens_per_second']:,.0f} tokens/s; {dropped}",
    ]


def _loss(loss: dict[str, Any]) -> list[str]:
    lines = []
    if loss["first"] is not None:
        lines.append(f"{loss['first']:.4f} in the first step, {loss['last']:.4f} in the last")
    if loss["eval_after"] is not None:
        before = "" if loss["eval_before"] is None else f"{loss['eval_before']:.4f} before, "
        lines.append(f"held-out text: {before}{loss['eval_after']:.4f} after")
    return lines


def scores(result: Mapping[str, Any]) -> pd.DataFrame:
    """One column per model: dense, pruned, and every end state of the fine-tuned one."""
    columns = {name: row for name, row in result["baselines"].items() if row is not None}
    for state, row in _end_states(result, "eval").items():
        columns[TUNED.get(state, "fine-tuned") if result["method"] != "none" else "as pruned"] = row
    return pd.DataFrame({name: _cells(row) for name, row in columns.items()}).fillna("-")


def _cells(scores: dict[str, Any]) -> dict[str, str]:
    cells = {f"{task} ({score['metric']})": _percent(score) for task, score in scores["tasks"].items()}
    if scores["average"]:
        cells["average"] = _percent(scores["average"])
    if scores["perplexity"]:
        cells["perplexity"] = "-" if scores["perplexity"]["value"] is None else f"{scores['perplexity']['value']:.2f}"
    return cells


def _percent(score: dict[str, Any]) -> str:
    if score["value"] is None:
        return "-"
    error = "" if score.get("stderr") is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def _size(size: int) -> str:
    mebibytes = size / MEBIBYTE
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
