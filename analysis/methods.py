"""One row per method and end state, from runs on the same pruned model: quality, zeros, memory, time."""

from pathlib import Path

import pandas as pd

ORDER = ("dense", "pruned", "none")
MEBIBYTE = 2**20


def table_of(table: pd.DataFrame) -> str:
    """Markdown; accuracies with their standard errors over items, or mean +- std over seeds where there are several."""
    lines = ["| method | n | mean acc (%) | held-out loss | zeros after | trainable | peak (MiB) | step (ms) |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    named = table.assign(end_state=table.end_state.fillna(""))
    keys = ["method", "end_state", "label", "pruner"]
    rows = [(key, group) for key, group in named.groupby(keys, sort=False) if key[0] != "none"]
    rows.sort(key=lambda row: (ORDER.index(row[0][0]) if row[0][0] in ORDER else 9, -row[1].accuracy.mean()))
    for (method, end_state, label, pruner), group in rows:
        first = group.iloc[0]
        name = method + (f", {end_state}" if end_state not in ("", "merged") else "")
        if method not in ("dense", "pruned") and pruner == "none":
            name += ", on the dense model"
        spread = group.accuracy.std() if len(group) > 1 else first.accuracy_stderr
        cells = [
            f"{name} ({pruner} {label})" if method == "pruned" else name,
            str(len(group)),
            f"{group.accuracy.mean():.1f} ± {spread:.1f}",
            f"{group.heldout_loss.mean():.3f}",
            "-" if pd.isna(first.zeros_after) or not first.trainable else f"{100 * first.zeros_after:.2f} %",
            f"{int(first.trainable):,}" if first.trainable else "-",
            f"{first.train_peak / MEBIBYTE:.1f}" if first.trainable and first.train_peak else "-",
            f"{group.step_ms.median():.0f}" if first.trainable and not pd.isna(first.step_ms) else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(table: pd.DataFrame, output: Path) -> int:
    """Print the table and write `methods.md`."""
    text = table_of(table)
    print(text)
    (output / "methods.md").write_text(text)
    return 0
