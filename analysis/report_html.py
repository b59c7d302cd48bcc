"""The sections of the report as HTML: every value escaped, every number a link to the runs behind it."""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from analysis.claims import REPRODUCED, UNCLEAR, UNTESTABLE, WRONG, Finding
from analysis.columns import Column
from analysis.compare import Comparison
from analysis.report_runs import Run, Runs, pruning
from analysis.results import zeros_kept
from analysis.statistics import CONDITION
from analysis.style import name_of, style_of
from analysis.table_parts import Row, Table

__all__ = ["Section", "claims", "comparison", "facts", "overview", "plots", "results", "runs"]

VERDICT_COLOURS = {REPRODUCED: "good", WRONG: "bad", UNCLEAR: "open", UNTESTABLE: "none"}
STATE_COLOURS = {"holds": "good", "fails": "bad", "open": "open"}
STATUS_COLOURS = {"ok": "good", "failed": "bad", "oom": "open"}
MEBIBYTE = 2**20
# What a reader looks for first; the tasks follow.
FIRST = ("average", "average_minus_lora", "perplexity", "zeros_kept_percent")
# Colours of an embedded plot: lines on white need no more, and the file is a third.
COLOURS = 64


@dataclass(frozen=True)
class Section:
    """A part of the page: anchor, title, content, and (anchor, title) of what the table of contents lists below it."""

    id: str
    title: str
    body: str
    parts: Sequence[tuple[str, str]] = ()

    @property
    def html(self) -> str:
        """The section with its heading."""
        heading = f'<h2 id="{self.id}-title">{escape(self.title)}</h2>'
        return f'<section id="{self.id}" aria-labelledby="{self.id}-title">\n{heading}\n{self.body}\n</section>'


def overview(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table; the cells are HTML."""
    head = "".join(f'<th scope="col" class="words">{escape(name)}</th>' for name in columns)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td class=words>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def facts(values: Iterable[tuple[str, str, str]]) -> str:
    """Cards of (name, value, remark)."""
    cards = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in values
    )
    return f'<dl class="facts">{"".join(cards)}</dl>'


def results(tables: Sequence[Table], of: Runs, legend: Sequence[str]) -> Section:
    """Every table with a panel of scores and one of costs."""
    body, parts = [], []
    shared = [note for note in tables[0].notes if all(note in table.notes for table in tables)] if tables else []
    for number, table in enumerate(tables, 1):
        anchor = f"table-{number}"
        parts.append((anchor, table.title))
        body.append(f'<h3 id="{anchor}">{escape(table.title)}</h3>')
        quality = sorted(
            table.quality, key=lambda column: FIRST.index(column.name) if column.name in FIRST else len(FIRST)
        )
        panels = (("Scores", quality, table.rows), ("Size, memory and time", table.cost, table.trainings))
        body += [_panel(name, columns, rows, table, of) for name, columns, rows in panels if columns and rows]
        own = [note for note in table.remarks if note not in shared] + list(table.failures)
        body += [f'<p class="notes">{" ".join(map(_marked, own))}</p>'] if own else []
    reading = "".join(f"<p>{_marked(text)}</p>" for text in [*legend, *shared])
    body.insert(0, f'<details class="notes"><summary>How to read the tables</summary>{reading}</details>')
    body.insert(0, "<p>A click on a header sorts, a click on a cell opens the runs behind it.</p>")
    return Section("results", "Results", "\n".join(body), parts)


def _panel(name: str, columns: Sequence[Column], rows: Sequence[Row], table: Table, of: Runs) -> str:
    heads = [_head("method", words=True), *(_head(title, words=True) for title in table.choices.values()), _head("n")]
    heads += [_head(column.title) for column in columns]
    lines = []
    for row in rows:
        ids = of.ids(row.paths)
        choices = "".join(f'<td class="words">{escape(text)}</td>' for text in row.choices.values())
        cells = "".join(_cell(row, column, ids) for column in columns)
        n = f"<td>{row.n}</td>" if row.n else '<td data-sort="">-</td>'
        kind = ' class="control"' if row.role == "control" else ""
        label = _linked(row.label, ids)
        lines.append(
            f'<tr{kind} data-runs="{" ".join(ids)}"><th scope="row">{_dot(row)}{label}</th>{choices}{n}{cells}</tr>'
        )
    return _table(name, heads, lines, label=f"{name}: {table.title}")


def _cell(row: Row, column: Column, ids: Sequence[str]) -> str:
    cell = row.cells[column.name]
    number = "" if math.isnan(cell.mean) else f"{cell.mean:.10g}"
    kind = ' class="best"' if cell.best else ""
    text = cell.text(column)
    return f'<td{kind} data-sort="{number}">{_linked(text, ids) if text != "-" else "-"}</td>'


def _dot(row: Row) -> str:
    colour = style_of(row.method, row.end_state).colour
    return f'<span class="dot" style="background:{colour}" aria-hidden="true"></span>'


def plots(files: Sequence[Path], missing: Sequence[str]) -> Section:
    """The plots, embedded; and why others were not made."""
    figures = []
    for file in files:
        words = file.stem.replace("_", " ")
        image = base64.b64encode(_small(file)).decode()
        picture = (
            f'<img src="data:image/png;base64,{image}" alt="Plot: {escape(words)}" loading="lazy" decoding="async">'
        )
        figures.append(f"<figure>{picture}<figcaption>{escape(words[:1].upper() + words[1:])}</figcaption></figure>")
    body = f'<div class="plots">{"".join(figures)}</div>' if figures else "<p>None could be made from these runs.</p>"
    if missing:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in missing)
        body += (
            f'<details class="notes"><summary>Plots that these runs do not allow</summary><ul>{items}</ul></details>'
        )
    return Section("plots", "Plots", body)


def _small(file: Path) -> bytes:
    """A PNG with a palette instead of full colour."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").quantize(COLOURS).save(content, "PNG", optimize=True)
    return content.getvalue()


def claims(findings: Sequence[Finding], of: Runs) -> Section:
    """Verdicts on the claims of the papers, the evidence behind each."""
    models = list(dict.fromkeys(model for finding in findings for model in finding.models))
    intro = (
        f"<p>What the papers claim, weighed against these runs. A verdict is about <strong>{escape(', '.join(models))}"
        "</strong>; on the models of the papers it may be another. A tolerance is ours, the papers name none. Verdicts "
        f"on scores rest on p values that are {CONDITION}.</p>"
        if models
        else "<p>What the papers claim. These runs bear on none of it.</p>"
    )
    heads = [_head("paper", words=True), _head("claim", words=True), _head("comparison", words=True)]
    heads += [_head("verdict", words=True), _head("evidence", words=True)]
    lines = []
    for finding in findings:
        claim = finding.claim
        comparison = "-" if claim.comparison == "-" else f"<code>{escape(claim.comparison)}</code>"
        note = f"<br><small>{escape(claim.note)}</small>" if claim.note else ""
        lines.append(
            f'<tr id="claim-{claim.id}"><th scope="row">{_paper(claim.paper)}</th>'
            f'<td class="wrap" title="{escape(claim.place)}">{escape(claim.statement)}{note}</td>'
            f'<td class="wrap">{comparison}</td><td class="words">{_badge(finding.verdict, VERDICT_COLOURS)}</td>'
            f'<td class="wrap broad">{_evidence(finding, of)}</td></tr>'
        )
    return Section("claims", "Claims of the papers", intro + _table("Claims and verdicts", heads, lines))


def _paper(name: str) -> str:
    title, _, number = name.partition(" (")
    return f"{escape(title)}<br><small>{escape(number.removesuffix(')'))}</small>"


def _evidence(finding: Finding, of: Runs) -> str:
    if not finding.evidence:
        return escape(finding.reason)
    items = []
    for pair in finding.evidence:
        ids = of.ids_of_keys(pair.keys)
        cell = ", ".join(str(value) for name, value in pair.cell.items() if name != "mode" or value != "run")
        measured = f"{escape(cell)}: {_linked(pair.measured, ids)}"
        items.append(f'<li data-runs="{" ".join(ids)}">{_badge(pair.state, STATE_COLOURS)} {measured}</li>')
    return f"<details><summary>{escape(finding.reason)}</summary><ul>{''.join(items)}</ul></details>"


def comparison(found: Comparison, of: Runs) -> Section:
    """Ours beside the published numbers, or why there is nothing beside them."""
    body = f"<p>{escape(found.summary)}</p>"
    parts = (
        ("Side by side", "Difference: ours minus published", found.matched),
        ("Same cell, another protocol", "Not compared", found.other_protocol),
    )
    for name, caption, rows in parts:
        if not rows:
            continue
        heads = [_head("model", words=True), _head("cell", words=True), _head("metric", words=True), _head("published")]
        heads += [
            _head("ours"),
            _head("difference"),
            _head("n"),
            _head("protocol", words=True),
            _head("source", words=True),
        ]
        lines = []
        for row in rows:
            ids = of.ids_of_keys(row.keys)
            ours = f"{row.mean:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}")
            difference = "-" if row.difference is None else f"{row.difference:+.2f}"
            protocol = "; ".join(row.differs) or ", ".join(filter(None, ("the same", row.recipe)))
            named = {key: escape(text) for key, text in row.named.items()}
            lines.append(
                f'<tr data-runs="{" ".join(ids)}"><th scope="row">{named["model"]}</th>'
                f'<td class="words">{named["cell"]}</td><td class="words">{named["metric"]}</td>'
                f"<td>{escape(row.number['value'])}</td><td>{_linked(ours, ids)}</td><td>{difference}</td>"
                f'<td>{row.n}</td><td class="wrap">{escape(protocol)}</td><td class="wrap">{named["paper"]}</td></tr>'
            )
        body += f"<h3>{name}</h3>" + _table(caption, heads, lines, label=f"{name}: {caption}")
    body += _missing(found)
    return Section("published", "Published numbers", body)


def _missing(found: Comparison) -> str:
    counts: dict[tuple[str, str, str], int] = {}
    for missing in found.missing:
        key = (missing.number["paper"], missing.number["model"], missing.reason)
        counts[key] = counts.get(key, 0) + 1
    if not counts:
        return ""
    heads = [_head("source", words=True), _head("model", words=True), _head("why", words=True), _head("numbers")]
    lines = [
        f'<tr><th scope="row">{escape(paper)}</th><td class="words">{escape(model)}</td>'
        f'<td class="words">{escape(reason)}</td><td>{n}</td></tr>'
        for (paper, model, reason), n in counts.items()
    ]
    table = _table("Published, not measured here", heads, lines)
    return f"<details><summary>{len(found.missing)} published numbers without a run of ours</summary>{table}</details>"


def runs(of: Runs) -> Section:
    """Every run with its files; the target of every link of the page."""
    words = ("status", "model", "pruned", "mode")
    numbers = ("seed", "average (%)", "perplexity", "zeros kept (%)", "memory (MiB)", "step (ms)")
    heads = [_head("run", words=True), '<th scope="col" class="files words">files</th>']
    heads += [_head(name, words=True) for name in words] + [_head(name) for name in numbers]
    lines = [_run_row(run) for run in of.by_path.values()]
    states = [
        status for status in STATUS_COLOURS if any(run.content["status"] == status for run in of.by_path.values())
    ]
    buttons = "".join(
        f'<button type="button" class="tool" value="{s}" aria-pressed="false">{s}</button>' for s in states
    )
    filters = (
        '<form class="filters" data-table="all-runs" role="search" hidden><input type="search" '
        f'placeholder="method, model, key ..." aria-label="Show runs that contain">{buttons}<output></output></form>'
    )
    table = _table("One row for each run", heads, lines, anchor="all-runs", kind=" tall")
    return Section("runs", "All runs", filters + table)


def _run_row(run: Run) -> str:
    content = run.content
    scores, zeros, memory, time = content["eval"] or {}, content["zeros"] or {}, content["memory"], content["time"]
    ok = content["status"] == "ok"
    perplexity, average = scores.get("perplexity") or {}, scores.get("average") or {}
    kept = 100 * zeros_kept(zeros)
    values = [
        (content["seed"], "{:.0f}"),
        (None if average.get("value") is None else 100 * average["value"], "{:.1f}"),
        (perplexity.get("value"), "{:.2f}"),
        (None if math.isnan(kept) else kept, "{:.2f}"),
        (None if not memory.get("train_peak") else memory["train_peak"] / MEBIBYTE, "{:,.1f}"),
        ((time["step_ms"] or {}).get("p50"), "{:,.1f}"),
    ]
    cells = "".join(
        f'<td data-sort="{value:.10g}">{form.format(value)}</td>' if value is not None and (ok or i == 0)
        else '<td data-sort="">-</td>'
        for i, (value, form) in enumerate(values)
    )  # fmt: skip
    title = "" if content["error"] is None else f' title="{escape(content["error"]["type"])}"'
    dot = f'<span class="dot" style="background:{style_of(run.method).colour}" aria-hidden="true"></span>'
    files = "".join(f'<a href="{escape(href)}">{escape(words.split()[0])}</a>' for words, href in run.files)
    name = _linked(f"{name_of(run.method)} {content['key'][:8]}", [run.id])
    return (
        f'<tr id="{run.id}" data-runs="{run.id}" data-status="{content["status"]}"><th scope="row">{dot}{name}</th>'
        f'<td class="files words">{files}</td>'
        f'<td class="words"{title}>{_badge(content["status"], STATUS_COLOURS)}</td>'
        f'<td class="words">{escape(content["model"])}</td><td class="words">{escape(pruning(content))}</td>'
        f'<td class="words">{escape(content["mode"])}</td>{cells}</tr>'
    )


def _head(title: str, *, words: bool = False) -> str:
    kind = ' class="words"' if words else ""
    name, _, remark = title.partition(" (")
    small = f"<small>({escape(remark)}</small>" if remark else ""
    return f'<th scope="col"{kind} aria-sort="none"><button type="button">{escape(name)}{small}</button></th>'


def _table(
    caption: str,
    heads: Sequence[str],
    lines: Sequence[str],
    *,
    label: str | None = None,
    anchor: str | None = None,
    kind: str = "",
) -> str:
    """A table that sorts, in a frame that scrolls; `label` names the frame where the caption does not suffice."""
    name = f' id="{anchor}"' if anchor else ""
    wide = " wide" if len(heads) > 8 else ""
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    body = "<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return (
        f'<div class="scroll{kind}" tabindex="0" role="region" aria-label="{escape(label or caption)}"><table{name} '
        f'class="sortable{wide}"><caption>{escape(caption)}</caption>{head}{body}</table></div>'
    )


def _linked(text: str, ids: Sequence[str]) -> str:
    """Text that leads to the row of its first run; the script opens all of them."""
    return f'<a href="#{ids[0]}">{escape(text)}</a>' if ids else escape(text)


def _badge(text: str, colours: Mapping[str, str]) -> str:
    return f'<span class="badge {colours[text]}">{escape(text)}</span>'


def _marked(text: str) -> str:
    """Escaped text with **bold** and `code`."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", bold)
