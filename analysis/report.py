"""One page with everything: summary, tables that sort, plots, claims, and every run one click away.

The page needs no network and no other file; only the links to the files of a run (config, log, result) lead outside,
relative to the page. The same results give the same page, to the byte: it carries no date of its own.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import pandas as pd

from analysis import claims, compare, plots, report_html, tables
from analysis.averages import AVERAGE, side_by_side
from analysis.notes import LEGEND
from analysis.report_html import Section
from analysis.report_runs import Runs, gather
from analysis.results import CONTROLS, MACHINE, add_run_arguments, load, output_folder
from analysis.table_parts import Row, Table

__all__ = ["page"]

PARTS = Path(__file__).parent
TITLE = "Fine-tuning pruned language models"


def page(results: pd.DataFrame, output: Path, *, mix: bool = False) -> str:
    """The page as HTML.

    Args:
        results: As `analysis.results.load` returns them.
        output: Folder in which the page will lie; links are relative to it.
        mix: Allow several devices or library versions in one table.

    Raises:
        ValueError: A table would mix devices or versions, and `mix` is false.
    """
    of = gather(results, output)
    built = tables.build(results, mix=mix)
    built = [*side_by_side(built), *built]
    findings = claims.judge_all(results)
    compared = compare.compare(results)
    sections = [
        _summary(results, built, findings, compared),
        report_html.results(built, of, LEGEND),
        _plots(results, mix),
        report_html.claims(findings, of),
        report_html.comparison(compared, of),
        report_html.runs(of),
    ]
    newest = max(run.content["environment"]["end"] or "" for run in of.by_path.values())
    return _filled(sections, of, f"{len(of.by_path)} runs, the newest of {newest[:10] or 'an unknown date'}")


def _filled(sections: Sequence[Section], of: Runs, subtitle: str) -> str:
    # A script element ends at the first "</", wherever it stands: no "<" may be left in the data.
    data = json.dumps(of.payload(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template((PARTS / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(TITLE),
        subtitle=escape(subtitle),
        style=(PARTS / "report.css").read_text(encoding="utf-8").strip(),
        script=(PARTS / "report.js").read_text(encoding="utf-8").strip(),
        contents=_contents(sections),
        sections="\n".join(section.html for section in sections),
        data=data,
    )


def _contents(sections: Sequence[Section]) -> str:
    items = []
    for section in sections:
        items.append(f'<li><a href="#{section.id}">{escape(section.title)}</a></li>')
        items += [f'<li class="deep"><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title in section.parts]
    return f"<ul>{''.join(items)}</ul>"


def _plots(results: pd.DataFrame, mix: bool) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        files, missing = plots.draw(results, Path(folder), mix=mix)
        return report_html.plots([file for file in files if file.suffix == ".png"], missing)


def _summary(
    results: pd.DataFrame, built: Sequence[Table], findings: Sequence[claims.Finding], compared: compare.Comparison
) -> Section:
    statuses = Counter(row.status for row in results.drop_duplicates("path").itertuples())
    methods = sorted(set(results.method) - set(CONTROLS))
    broken = ", ".join(f"{n} {status}" for status, n in statuses.items() if status != "ok") or "all finished"
    verdicts = Counter(finding.verdict for finding in findings)
    weighed = len(findings) - verdicts[claims.UNTESTABLE]
    cards = [
        ("Runs", str(sum(statuses.values())), broken),
        ("Methods", str(len(methods)), f"on {', '.join(sorted(set(results.model)))}"),
        ("Seeds", _seeds(results), "of the fine-tuning"),
        ("Claims weighed", f"{weighed} of {len(findings)}", f"{verdicts[claims.REPRODUCED]} reproduced, "
         f"{verdicts[claims.WRONG]} not, {verdicts[claims.UNCLEAR]} not distinguishable"),
        ("Published numbers beside ours", f"{compared.beside} of {compared.total}", "same model, method, protocol"),
    ]  # fmt: skip
    body = report_html.facts(cards) + _overview(built) + _machines(results)
    return Section("summary", "Summary", body)


def _seeds(results: pd.DataFrame) -> str:
    counts = sorted({len(seeds) for table in [results[~results.method.isin(CONTROLS)]] for _, seeds in
                     table.groupby(["model", "method", "pruner", "label"]).seed.unique().items()})  # fmt: skip
    return "-" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _overview(built: Sequence[Table]) -> str:
    """One row for each table with an average: where the model starts, and what the highest fine-tuning reaches."""
    columns = ("average score of", "dense", "pruned", "highest after fine-tuning", "against the others")
    rows = [cells for number, table in enumerate(built, 1) if (cells := _glance(number, table)) is not None]
    return f"<h3>At a glance</h3>{report_html.overview(columns, rows)}" if rows else ""


def _glance(number: int, table: Table) -> tuple[str, ...] | None:
    column = next((column for column in table.quality if column.name == AVERAGE), None)
    scored = [row for row in table.rows if column and not math.isnan(row.cells[AVERAGE].mean)]
    if not scored:
        return None
    shown = {id(row): escape(row.cells[AVERAGE].text(column)) for row in scored}
    starts = [next((shown[id(row)] for row in scored if row.method == name), "-") for name in CONTROLS]
    trained = [row for row in scored if row.role == "method"]
    ahead = max(trained, key=lambda row: row.cells[AVERAGE].mean, default=None)
    reached = "-" if ahead is None else f"<strong>{escape(ahead.label)}</strong> {shown[id(ahead)]}"
    return (f'<a href="#table-{number}">{escape(table.title)}</a>', *starts, reached, _standing(ahead, trained))


def _standing(ahead: Row | None, trained: Sequence[Row]) -> str:
    if ahead is None:
        return "-"
    if ahead.cells[AVERAGE].best:
        return "beyond noise"
    if len(trained) == 1:
        return "no other method"
    return "within noise" if ahead.n > 1 else "one seed, which ranks nothing"


def _machines(results: pd.DataFrame) -> str:
    found = results[list(MACHINE)].astype(str).drop_duplicates().to_dict("records")
    dirty = sorted({str(row.git_commit)[:10] + (", changed" if row.git_dirty else "") for row in results.itertuples()})
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) for machine in found]
    lines.append(f"code at {'; '.join(dirty)}")
    return "".join(f'<p class="notes">{escape(line)}</p>' for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders of runs, where to write, and whether machines may be mixed."""
    add_run_arguments(parser)
    parser.add_argument("--mix", action="store_true", help="allow several devices or library versions in one table")


def run(options: argparse.Namespace) -> int:
    """Write `report.html`."""
    output = output_folder(options)
    file = output / "report.html"
    file.write_text(page(load(options.runs), output, mix=options.mix), encoding="utf-8")
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    return 0
