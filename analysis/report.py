"""One page with everything: summary, tables that sort, plots, claims, and every run one click away.

The page needs no network and no other file. Every table row links to the runs behind it, which are in the page with
their scores, cost, key and config. The same results give the same page, to the byte: it carries no date of its own.
"""

import argparse
import base64
import io
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from PIL import Image

from analysis import claims, compare, plots, tables
from analysis.averages import AVERAGE, side_by_side
from analysis.groups import flat
from analysis.notes import LEGEND, pruning_of
from analysis.render import shared_notes
from analysis.results import CONTROLS, COSTS, MACHINE, SIZES, load, output_folder
from analysis.statistics import CONDITION
from analysis.style import END_STATES, name_of, style_of
from analysis.table_cells import Row, Table
from analysis.table_writer import Bold, TextTable
from analysis.tables import add_arguments

__all__ = ["add_arguments", "page", "run"]

TEMPLATES = Path(__file__).parent / "templates"
TITLE = "Fine-tuning pruned language models"
MEBIBYTE = 2**20
# Colours of an embedded plot: lines on white need no more, and the file is a third.
COLOURS = 64
# Of the config: what only says where things are.
PLACES = ("runs_root", "cache_root", "data_root", "force", "launch", "name")


def page(results: pd.DataFrame, *, mix: bool = False) -> str:
    """The page as HTML.

    Args:
        results: As `analysis.results.load` returns them.
        mix: Allow several devices or library versions in one table.

    Raises:
        ValueError: A table would mix devices or versions, and `mix` is false.
    """
    single = tables.build(results, mix=mix)
    averages = side_by_side(single)
    built = [*averages, *single]
    glances = [_glance(number, table) for number, table in enumerate(single, len(averages) + 1)]
    findings, compared, runs = claims.judge_all(results), compare.compare(results), _runs(results)
    drawn, missing = _plots(results, mix)
    return _environment().get_template("report.html.j2").render(
        title=TITLE,
        runs=runs,
        by_key={run["key"]: run for run in reversed(runs)},
        shared=_shared(runs),
        glance=[row for row in glances if row],
        tables=[(table, {title: _for_screen(text) for title, text in table.panels.items()}) for table in built],
        legend=[*LEGEND, *shared_notes(built)],
        condition=CONDITION,
        plots=drawn,
        missing_plots=missing,
        findings=findings,
        models=list(dict.fromkeys(model for finding in findings for model in finding.models)),
        compared=compared,
        origin=_origin(results),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    environment.filters |= {"marked": _marked, "colour_of": lambda method: style_of(method).colour}
    environment.tests["bold"] = lambda text: isinstance(text, Bold)
    environment.globals["source"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return environment


def _marked(text: str) -> Markup:
    """Escaped text with **bold** and `code`."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))


def _for_screen(text: TextTable) -> TextTable:
    """The table with the scores that are compared with LoRA behind the name, where a phone shows them."""
    titles = text.columns
    first = [i for i in range(1, len(titles) - 1) if titles[i + 1].startswith("Δ LoRA")]
    order = [0, *first, *(i for i in range(1, len(titles)) if i not in first)]
    return replace(text, columns=[titles[i] for i in order], rows=[[row[i] for i in order] for row in text.rows])


# ---- the runs


def _runs(results: pd.DataFrame) -> list[dict[str, Any]]:
    """The runs behind the rows, as the page shows them; a control that another run has scored belongs to that one."""
    names = results.config.map(lambda config: config["method"]["name"])
    seen: Counter[str] = Counter()
    runs = []
    for _, states in results[~results.method.isin(CONTROLS) | (names == "none")].groupby("path", sort=False):
        key = states.key.iloc[0]
        seen[key] += 1  # one key may have been run on several machines
        runs.append(_run(states, f"run-{key}" + (f"-{seen[key]}" if seen[key] > 1 else "")))
    known = {name for run in runs for name, text in run["cells"].items() if text != "-"}
    return [run | {"cells": {name: text for name, text in run["cells"].items() if name in known}} for run in runs]


def _run(states: pd.DataFrame, anchor: str) -> dict[str, Any]:
    """One of them: its anchor is its id in the page, its cells have their column in the list of runs."""
    first = states.iloc[0]
    seed = first.config.get("seed", "-")
    pruned = pruning_of(first)
    parts = [name_of(first.method), first.model, pruned, f"seed {seed}"]
    settings = {key: value for key, value in flat(first.config).items() if key.split(".")[0] not in PLACES}
    settings |= {name: first[name] for name in (*MACHINE, "python", "git_commit", "git_dirty")}
    cells = {
        "model": first.model,
        "pruned": pruned,
        "mode": first["mode"],
        "seed": str(seed),
        "average (%)": _shown(first.accuracy, "{:.1f}"),
        "perplexity": _shown(first.perplexity, "{:.2f}"),
        "held-out answers": _shown(first.answers_perplexity, "{:.2f}"),
        "zeros kept (%)": _shown(100 * states.zeros_kept.dropna().max(), "{:.2f}"),
        "memory (MiB)": _shown(first.train_peak / MEBIBYTE, "{:,.1f}"),
        "step (ms)": _shown(first.step_ms, "{:,.1f}"),
        "code": str(first.git_commit)[:10] + (", changed" if first.git_dirty else ""),
    }
    return {
        **{name: first[name] for name in ("key", "method", "status", "error")},
        **{"anchor": anchor, "name": name_of(first.method), "cells": cells},
        "title": " · ".join(parts if first["mode"] == "run" else [*parts, first["mode"]]),
        **{"scores": _scores(states), "facts": _facts(first)},
        "settings": {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()},
    }


def _scores(states: pd.DataFrame) -> TextTable:
    """Tasks, average, perplexity and zeros of each end state."""
    rows = {}
    for task, metric in states.iloc[0].task_metric.items():
        errors = [(row.tasks.get(task), row.task_stderr.get(task)) for row in states.itertuples()]
        rows[f"{task.removeprefix('microworld_')} ({metric})"] = [_with_error(*pair) for pair in errors]
    rows["average"] = [_with_error(*pair) for pair in zip(states.accuracy, states.accuracy_stderr, strict=True)]
    rows["perplexity"] = [_shown(value, "{:.2f}") for value in states.perplexity]
    rows["held-out answers (perplexity)"] = [_shown(value, "{:.2f}") for value in states.answers_perplexity]
    for task in states.iloc[0].margin:
        pairs = [(row.margin.get(task), row.margin_stderr.get(task)) for row in states.itertuples()]
        rows[f"{task.removeprefix('microworld_')} margin (nats)"] = [_with_error(*pair, digits=2) for pair in pairs]
    rows["zeros kept (%)"] = [_shown(100 * value, "{:.4f}") for value in states.zeros_kept]
    rows["zeros lost"] = [_shown(value, "{:,.0f}") for value in states.zeros_lost]
    header = ["", *(END_STATES.get(row.end_state, row.end_state or row.method) for row in states.itertuples())]
    return TextTable(header, [[name, *cells] for name, cells in rows.items() if set(cells) != {"-"}])


def _facts(row: pd.Series) -> list[tuple[str, str]]:
    """Sizes, memory and times that were measured."""
    sizes = {name: row[name] for name in (*SIZES, *COSTS)}
    sizes |= {f"{name}_in_train_peak": size for name, size in row.memory_breakdown.items()}
    facts = [("read from", str(row.path))]
    for name, value in sizes.items():
        whole = "{:,.0f}" if value % 1 == 0 else "{:,.3f}"
        unit, form = (MEBIBYTE, "{:,.1f} MiB") if name.endswith("_peak") else (1, whole)
        facts.append((name.replace("_", " "), _shown(value / unit, form)))
    return [(name, text) for name, text in facts if text != "-"]


def _shown(value: float, form: str) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value)


def _with_error(value: float | None, error: float | None, digits: int = 1) -> str:
    spread = _shown(error, f" ± {{:.{digits}f}}")
    return _shown(value, f"{{:.{digits}f}}") + (spread if spread != "-" else "")


def _shared(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Settings that all runs have in common; shown once."""
    first = runs[0]["settings"] if len(runs) > 1 else {}
    return {key: text for key, text in first.items() if all(run["settings"].get(key) == text for run in runs)}


# ---- the summary


def _glance(number: int, table: Table) -> Mapping[str, str] | None:
    """Where the model starts, and what the highest fine-tuning reaches; None for a table without an average."""
    column = next((column for column in table.quality if column.name == AVERAGE), None)
    scored = [row for row in table.rows if column and not math.isnan(row.cells[AVERAGE].mean)]
    if not scored:
        return None
    text = {id(row): str(row.cells[AVERAGE].text(column)) for row in scored}
    dense, pruned = (next((text[id(row)] for row in scored if row.method == name), "-") for name in CONTROLS)
    trained = [row for row in scored if row.role == "method"]
    highest = max(trained, key=lambda row: row.cells[AVERAGE].mean, default=None)
    return {
        "anchor": f"table-{number}",
        "title": table.title,
        "dense": dense,
        "pruned": pruned,
        "name": highest.label if highest else "",
        "highest": text[id(highest)] if highest else "-",
        "lead": _lead(highest, trained),
    }


def _lead(highest: Row | None, trained: Sequence[Row]) -> str:
    if highest is None:
        return "-"
    if highest.cells[AVERAGE].best:
        return "beyond noise"
    if len(trained) == 1:
        return "no other method"
    return "within noise" if highest.n > 1 else "one seed, which ranks nothing"


def _origin(results: pd.DataFrame) -> list[str]:
    """How many runs there are, and what they ran on."""
    found = results[list(MACHINE)].astype(str).drop_duplicates().to_dict("records")
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) for machine in found]
    code = {str(row.git_commit)[:10] + (", changed" if row.git_dirty else "") for row in results.itertuples()}
    counts = results.drop_duplicates("path").status.value_counts()
    runs = ", ".join(f"{counts[status]} runs {status}" for status in ("ok", "oom", "failed") if status in counts)
    return [runs, *lines, f"code at {'; '.join(sorted(code))}"]


def _plots(results: pd.DataFrame, mix: bool) -> tuple[list[tuple[plots.Plot, str]], list[str]]:
    """Each plot with its picture as base64, and why others were not made."""
    with tempfile.TemporaryDirectory() as folder:
        drawn, missing = plots.draw(results, Path(folder), mix=mix, formats=("png",), captions=False)
        return [(plot, _embedded(plot.files)) for plot in drawn], missing


def _embedded(files: Iterable[Path]) -> str:
    (file,), content = files, io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").quantize(COLOURS).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def run(options: argparse.Namespace) -> int:
    """Write `report.html`."""
    file = output_folder(options) / "report.html"
    file.write_text(page(load(options.runs), mix=options.mix), encoding="utf-8")
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    return 0
