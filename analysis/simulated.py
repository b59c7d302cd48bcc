"""Peak memory of simulated training steps: table, figure, the card they fit on, and the authors' A6000 as a check.

Reads the results of ``mode=simulate`` (`experiment=efficiency_simulated` and `methods_simulated`) and writes
``simulated.csv``, ``simulated.md``, ``simulated.png`` and ``simulated.pdf``. A card holds a step if its peak and
`HEADROOM` fit: the simulation counts tensors, and a process needs more than those.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from analysis.results import add_run_arguments, load, output_folder
from analysis.style import name_of, order_of, style_of

__all__ = ["a6000_table", "fits_on", "peaks", "table_of"]

HEADER = "method,tokens,r,peak (GiB),of LoRA,weights,activations,transients,rest,TFLOP,fits on".split(",")
MEBIBYTE, GIBIBYTE = 2**20, 2**30
# Memory of common cards, in GiB.
CARDS = (16, 24, 48, 80)
# CUDA context, workspaces of libraries and what the allocator keeps, in bytes: so much more than the simulated tensors
# did the authors' process hold on their A6000 (`a6000_table`, LoRA and LoRS).
HEADROOM = 3 * GIBIBYTE // 2
A6000 = Path(__file__).parent / "published" / "a6000_memory.csv"
A6000_MIB = 49140
# What the authors' script trains: model, tokens, rank; see the source in the file.
A6000_STEP = {"model": "llama2_7b", "tokens": 2048, "batch": 1, "r": 16, "checkpointing": False, "shards": 1}
CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "transients", "other")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the tables, write the files; exit code 0."""
    table = peaks(load(options.runs))
    output = output_folder(options)
    text = "\n".join([*table_of(table), *a6000_table(table)]) + "\n"
    print(text)
    (output / "simulated.md").write_text(text)
    table.to_csv(output / "simulated.csv", index=False)
    plot(table, output / "simulated.png")
    return 0


def peaks(results: pd.DataFrame) -> pd.DataFrame:
    """One row for each simulated step, in the order of the table.

    Columns: model, method, storage, precision, batch, tokens (sequence length), r, checkpointing, shards, device; peak
    and the categories (bytes on one device), relative (peak over that of LoRA in the same step; NaN without it), flops
    (per step), fits_on.

    Raises:
        ValueError: No finished simulation among the results.
    """
    rows = []
    for result in results[(results["mode"] == "simulate") & (results["status"] == "ok")].to_dict("records"):
        config = result["config"]
        train, simulated = config["train"], config["simulate"]
        rows.append(
            {
                "model": result["model"],
                "method": result["method"],
                "storage": ((config["method"].get("peft") or {}).get("storage")) or "dense",
                "label": result["label"],
                "precision": train["precision"],
                "batch": train["batch_size"],
                "accumulation": train["gradient_accumulation"],
                "tokens": train["sequence_length"],
                "r": config["adapter"]["r"],
                "checkpointing": train["activation_checkpointing"],
                "shards": simulated["shards"],
                "device": simulated["device"],
                "peak": result["train_peak"],
                **{name: result["memory_breakdown"].get(name, 0) for name in CATEGORIES},
                "flops": result["flops"],
                "fits_on": fits_on(result["train_peak"]),
            }
        )
    if not rows:
        raise ValueError("runs: no finished simulation; python run.py -m experiment=efficiency_simulated makes some")
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("peak") + 1, "relative", _relative_to_lora(table))
    keys = table.apply(lambda row: (row.model, row.label, row.precision, row.checkpointing, row.shards, row.batch,
                                    row.tokens, row.r, order_of(row.method), row.storage), axis=1)  # fmt: skip
    return table.loc[keys.sort_values().index].reset_index(drop=True)


def fits_on(peak: float) -> str:
    """The smallest of `CARDS` that a step with this peak (bytes) fits on; a dash if none does."""
    return next((f"{card} GB" for card in CARDS if peak + HEADROOM <= card * GIBIBYTE), "-")


def table_of(table: pd.DataFrame) -> Iterator[str]:
    """Lines of Markdown: one table for each model and setting."""
    setting = ["model", "label", "precision", "batch", "accumulation", "checkpointing", "shards", "device"]
    for (model, label, precision, batch, accumulation, checkpointing, shards, device), rows in table.groupby(setting):
        parts = [f"batch {batch}" + (f" x {accumulation}" if accumulation > 1 else ""), precision, f"sparsity {label}"]
        parts += ["activation checkpointing"] if checkpointing else []
        parts += [f"each of {shards} devices"] if shards > 1 else []
        yield f"\n## {model}: {', '.join(parts)}, simulated for {device}\n"
        yield f"| {' | '.join(HEADER)} |"
        yield "|---" + "|---:" * (len(HEADER) - 1) + "|"
        for row in rows.itertuples():
            rest = row.adapters + row.gradients + row.optimizer + row.other
            sizes = (row.weights, row.activations, row.transients, rest)
            relative = "-" if math.isnan(row.relative) else f"{row.relative:.2f}"
            cells = [_name(row), row.tokens, row.r, f"{row.peak / GIBIBYTE:.2f}", relative]
            cells += [*(f"{size / GIBIBYTE:.2f}" for size in sizes), f"{row.flops / 1e12:.1f}", row.fits_on]
            yield f"| {' | '.join(map(str, cells))} |"


def a6000_table(table: pd.DataFrame) -> Iterator[str]:
    """Lines of Markdown: differences to the in-place method, published and simulated; none without its runs."""
    step = table[(table[list(A6000_STEP)] == pd.Series(A6000_STEP)).all(axis=1) & (table.storage == "dense")]
    simulated = step[step.precision == "bf16"].groupby("method").peak.first() / MEBIBYTE
    published = pd.read_csv(A6000)
    if "lors" not in simulated:
        return
    logged = published.set_index("method").memory_mib.replace("OOM", math.nan).astype(float)
    yield f"\n## The authors' A6000 ({A6000_MIB:,} MiB): memory of their process, and the simulated tensors, in MiB\n"
    yield "| published as | here | logged | simulated | more than LoRS, logged | simulated |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in published[published.method.isin(simulated.index)].itertuples():
        log, found = logged[row.method], simulated[row.method]
        known = not math.isnan(log)
        cells = [row.published, name_of(row.method), f"{log:,.0f}" if known else "out of memory", f"{found:,.0f}"]
        cells += [f"{log - logged['lors']:+,.0f}" if known else "-", f"{found - simulated['lors']:+,.0f}"]
        yield f"| {' | '.join(cells)} |"


def plot(table: pd.DataFrame, file: Path) -> None:
    """Peak against sequence length (above) and rank (below), a column for each model, lines for the cards."""
    from matplotlib import pyplot as plt

    table = table[table.shards == 1]
    models = list(table.groupby("model").weights.max().sort_values().index)
    figure, axes = plt.subplots(2, len(models), figsize=(3.2 * len(models), 5.6), squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        rows = table[table.model == model]
        for axis, (x, fixed) in zip(axes[:, column], (("tokens", "r"), ("r", "tokens")), strict=True):
            most = rows[fixed].mode().max()
            _panel(axis, rows[rows[fixed] == most], x)
            axis.set_title(f"{model}, {'rank' if fixed == 'r' else 'tokens'} {most}", fontsize=9)
            axis.set_xlabel("tokens" if x == "tokens" else "rank")
    axes[0, 0].set_ylabel("peak memory (GiB)")
    axes[1, 0].set_ylabel("peak memory (GiB)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=8)
    for suffix in (".png", ".pdf"):
        figure.savefig(file.with_suffix(suffix), dpi=160)
    plt.close(figure)


def _panel(axis, rows: pd.DataFrame, x: str) -> None:
    top = rows.peak.max() / GIBIBYTE * 1.05
    for card in CARDS:
        if card < top:
            axis.axhline(card, color="#BBBBBB", linewidth=0.8)
            axis.annotate(
                f"{card} GB", (1, card), xycoords=("axes fraction", "data"), fontsize=6, ha="right", va="bottom"
            )
    for (method, storage), line in rows.groupby(["method", "storage"], sort=False):
        style = style_of(method)
        line = line.groupby(x, as_index=False).peak.max()
        compressed = storage != "dense"
        axis.plot(
            line[x], line.peak / GIBIBYTE, color=style.colour, marker=style.marker, label=_name(line.assign(
                method=method, storage=storage).iloc[0]), linestyle="--" if compressed else style.line,
            markerfacecolor="white" if compressed else style.colour, markersize=6, linewidth=1.3,
        )  # fmt: skip
    axis.set_xticks(sorted(rows[x].unique()))
    axis.set_ylim(0, top)
    axis.grid(alpha=0.25)


def _name(row) -> str:
    return name_of(row.method) + ("" if row.storage == "dense" else f", {row.storage}")


def _relative_to_lora(table: pd.DataFrame) -> pd.Series:
    """Peak over that of LoRA in the same step."""
    # Not the sparsity: LoRA keeps zeros like any other weight.
    step = ["model", "precision", "batch", "accumulation", "tokens", "r", "checkpointing", "shards", "device"]
    lora = table[table.method == "lora"].set_index(step).peak.rename("lora").groupby(level=step).first()
    return table.peak / table.join(lora, on=step).lora
