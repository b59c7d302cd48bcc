"""Peak memory of simulated steps and pruning: how many cards they fit on, and the authors' A6000 as a check.

Reads the results of ``mode=simulate`` (`experiment=efficiency_simulated`, `methods_simulated`, `pruning_simulated`)
and writes ``simulated.md``. Several cards divide the model as FSDP does, and `harness.cards` says what of each stays
free. `python -m analysis plots` draws the peaks against sequence length and rank.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.notes import origin_of
from analysis.results import add_run_arguments as add_arguments
from analysis.results import load, publish
from analysis.style import name_of, order_of
from analysis.table_writer import TextTable, markdown
from harness.cards import CARDS, HEADROOM, MOST_CARDS, cards_needed

__all__ = ["a6000_table", "add_arguments", "peaks", "run", "tables_of"]

HEADER = "method,tokens,r,peak (GiB),of LoRA,weights,activations,transients,rest,TFLOP".split(",")
HEADER += [f"{card} GB" for card in CARDS]
PRUNING = "model,pruner,pruned,samples,format,GPU (GiB),host (GiB),fits on".split(",")
MEBIBYTE, GIBIBYTE = 2**20, 2**30
NOTE = f"""Columns of GB: how many cards of this size take the step if FSDP divides the model among them and each has a
batch of its own; a dash: {MOST_CARDS} do not, or one does not and the method needs whole weights."""
FREE = f"Of each card {HEADROOM / GIBIBYTE:g} GiB stay free for what is no tensor: CUDA context, NCCL, reserve of the "
FREE += "allocator."
A6000 = Path(__file__).parent / "published" / "a6000_memory.csv"
A6000_MIB = 49140
# What the authors' script trains: model, tokens, rank; see the source in the file.
A6000_STEP = {"model": "llama2_7b", "tokens": 2048, "batch": 1, "r": 16, "checkpointing": False, "shards": 1}
# What is the same for all steps of a table.
SETTING = ["model", "label", "precision", "batch", "accumulation", "checkpointing", "shards", "device"]


def run(options: argparse.Namespace) -> int:
    """Print the tables and write them to `simulated.md`; exit code 0."""
    results = load(options.runs)
    simulated = results[results["mode"] == "simulate"]
    found = simulated[simulated["status"] == "ok"]
    if found.empty:
        raise ValueError("runs: no finished simulation; python run.py -m experiment=efficiency_simulated makes some")
    table = peaks(found[found["train_peak"].notna()])
    parts = [*tables_of(table), *pruning_tables(found[found["prune_peak"].notna()]), FREE]
    parts += [*a6000_table(table), *origin_of(simulated)]
    publish("\n\n".join(parts) + "\n", options, "simulated.md")
    return 0


def peaks(results: pd.DataFrame) -> pd.DataFrame:
    """One row for each simulated step, in the order of the table; the results are those of finished ones.

    Columns: those of SETTING, method, storage, tokens (sequence length), r; peak and its categories (bytes on one
    device), relative (peak over that of LoRA in the same step; NaN without it), flops (per step), cards (how many of
    each size it takes, see `harness.cards.cards_needed`; an older result knows one number of devices).
    """
    rows = []
    for result in results.to_dict("records"):
        config, sizes = result["config"], result["memory_breakdown"]
        train, simulated, peak = config["train"], config["simulate"], result["train_peak"]
        rows.append(
            {name: result[name] for name in ("model", "label", "method", "flops")}
            | {"precision": train["precision"], "batch": train["batch_size"], "tokens": train["sequence_length"]}
            | {"accumulation": train["gradient_accumulation"], "checkpointing": train["activation_checkpointing"]}
            | {"shards": simulated["shards"], "device": simulated["device"], "r": config["adapter"]["r"]}
            | {"storage": _storage(config)}
            | {"peak": peak, "cards": cards_needed(result["peak_by_devices"] or {str(simulated["shards"]): peak})}
            | {name: sizes.get(name, 0) for name in ("weights", "activations", "transients")}
            | {"rest": sum(sizes.get(name, 0) for name in ("adapters", "gradients", "optimizer", "other"))}
        )
    if not rows:
        return pd.DataFrame(columns=list(dict.fromkeys([*SETTING, *A6000_STEP, "method", "storage", "peak"])))
    table = pd.DataFrame(rows)
    table["order"] = table.method.map(order_of)
    table = table.sort_values([*SETTING, "tokens", "r", "order", "storage"], ignore_index=True)
    # Not the sparsity: LoRA keeps zeros like any other weight.
    step = [name for name in (*SETTING, "tokens", "r") if name != "label"]
    lora = table[table.method == "lora"].groupby(step).peak.first().rename("lora")
    return table.assign(relative=table.peak / table.join(lora, on=step).lora)


def _storage(config: Mapping[str, Any]) -> str:
    """How the frozen weights are kept: quantised (``int4``), or as ``method.peft.storage`` says; and whether
    the merged ones are rounded to a grid."""
    peft, prune = config["method"].get("peft") or {}, config["prune"]
    integers = f"int{prune.get('bits', 4)}" if prune.get("quantize", "none") != "none" else None
    return (integers or peft.get("storage") or "dense") + (
        f", merged to {peft['bits']} bits" if peft.get("bits") else ""
    )


def tables_of(table: pd.DataFrame) -> Iterator[str]:
    """Markdown: one table for each model and setting, and what its columns of cards say; none without a step."""
    for (model, label, precision, batch, accumulation, checkpointing, shards, device), rows in table.groupby(SETTING):
        parts = [f"batch {batch}" + (f" x {accumulation}" if accumulation > 1 else ""), precision, f"sparsity {label}"]
        parts += ["activation checkpointing"] if checkpointing else []
        parts += [f"each of {shards} devices"] if shards > 1 else []
        yield f"## {model}: {', '.join(parts)}, simulated for {device}"
        yield markdown(TextTable(HEADER, [_cells(row) for row in rows.itertuples()]))
    if not table.empty:
        yield NOTE


def pruning_tables(results: pd.DataFrame) -> Iterator[str]:
    """Markdown: the peaks of pruning with one block at a time on a GPU; none without its runs."""
    rows = []
    for result in results.sort_values(["model", "pruner", "label"]).to_dict("records"):
        prune = result["config"]["prune"]
        sizes = [f"{result[name] / GIBIBYTE:.2f}" for name in ("prune_peak", "host_peak")]
        cards = [card for card, number in cards_needed({"1": result["prune_peak"]}).items() if number]
        run = [result["model"], result["pruner"], result["label"], f"{prune['samples']} x {prune['sequence_length']}"]
        rows.append([*run, result["prune_format"], *sizes, f"{cards[0]} GB" if cards else "-"])
    if rows:
        yield "## Pruning, simulated: a GPU with one block at a time, and the host with the rest"
        yield markdown(TextTable(PRUNING, rows))


def _cells(row) -> list[str]:
    name = name_of(row.method) + ("" if row.storage == "dense" else f", {row.storage}")
    relative = "-" if math.isnan(row.relative) else f"{row.relative:.2f}"
    sizes = [f"{size / GIBIBYTE:.2f}" for size in (row.peak, row.weights, row.activations, row.transients, row.rest)]
    cards = [str(number or "-") for number in row.cards.values()]
    return [name, str(row.tokens), str(row.r), sizes[0], relative, *sizes[1:], f"{row.flops / 1e12:.1f}", *cards]


def a6000_table(table: pd.DataFrame) -> Iterator[str]:
    """Markdown: differences to the in-place method, published and simulated; none without its runs."""
    step = table[(table[list(A6000_STEP)] == pd.Series(A6000_STEP)).all(axis=1) & (table.storage == "dense")]
    simulated = step[step.precision == "bf16"].groupby("method").peak.first() / MEBIBYTE
    if "lors" not in simulated:
        return
    published = pd.read_csv(A6000)
    logged = published.set_index("method").memory_mib.replace("OOM", math.nan).astype(float)
    rows = []
    for row in published[published.method.isin(simulated.index)].itertuples():
        log, found = logged[row.method], simulated[row.method]
        sizes = ["out of memory" if math.isnan(log) else f"{log:,.0f}", f"{found:,.0f}"]
        sizes += ["-" if math.isnan(log) else f"{log - logged['lors']:+,.0f}", f"{found - simulated['lors']:+,.0f}"]
        rows.append([row.published, name_of(row.method), *sizes])
    yield f"## The authors' A6000 ({A6000_MIB:,} MiB): memory of their process, and the simulated tensors, in MiB"
    header = ["published as", "here", "logged", "simulated", "more than LoRS, logged", "simulated"]
    yield markdown(TextTable(header, rows))
