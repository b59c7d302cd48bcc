"""Tables as text: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis.notes import LEGEND

if TYPE_CHECKING:
    from analysis.columns import Column
    from analysis.table_parts import Cell, Row, Table

__all__ = ["comma_separated", "latex", "markdown"]

LATEX_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
    "±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "³": r"$^3$",
}  # fmt: skip


def markdown(tables: Sequence[Table]) -> str:
    """All tables, each with a panel of scores and one of costs, and their legend once."""
    shared = [note for note in tables[0].notes if all(note in table.notes for table in tables)]
    parts = ["# Results", *LEGEND, *([" ".join(shared)] if shared else [])]
    for table in tables:
        parts.append(f"## {table.title}")
        parts += [_pipes(_grid(table, *panel, bold="**{}**".format)) for panel in _panels(table)]
        own = [note for note in table.remarks if note not in shared]
        parts += [*([" ".join(own)] if own else []), *_failures(table)]
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """The same as `table*` environments, shrunk to the width of the text where they are wider."""
    legend = "".join(f"% {line}\n" for line in LEGEND)
    return f"% Needs \\usepackage{{booktabs,graphicx}}.\n{legend}" + "".join(
        _environment(table, *panel) for table in tables for panel in _panels(table)
    )


def comma_separated(tables: Sequence[Table]) -> str:
    """One line for each row of each table: axes, choices, and mean, std, n, item error and best of every column."""
    records = [_record(table, row) for table in tables for row in table.rows]
    header = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="-", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _panels(table: Table) -> list[tuple[Sequence[Column], Sequence[Row]]]:
    panels = [(table.quality, table.rows), (table.cost, table.trainings)]
    return [(columns, rows) for columns, rows in panels if columns and rows]


def _grid(table: Table, columns: Sequence[Column], rows: Sequence[Row], bold: Callable[[str], str]) -> list[list[str]]:
    """Header and cells as text."""
    grid = [["method", *table.choices.values(), "n", *(column.title for column in columns)]]
    for row in rows:
        cells = [bold(text) if cell.best else text for text, cell in _texts(row, columns)]
        grid.append([row.label, *row.choices.values(), str(row.n) if row.n else "-", *cells])
    return grid


def _texts(row: Row, columns: Sequence[Column]) -> list[tuple[str, Cell]]:
    return [(row.cells[column.name].text(column), row.cells[column.name]) for column in columns]


def _pipes(grid: list[list[str]]) -> str:
    names = grid[0].index("n")
    rule = ["---"] * names + ["---:"] * (len(grid[0]) - names)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (grid[0], rule, *grid[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _failures(table: Table) -> list[str]:
    return ["Without a result:\n\n" + "\n".join(f"- {line}" for line in table.failures)] if table.failures else []


def _environment(table: Table, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    escaped = [[_escape(cell) for cell in line] for line in _grid(table, columns, rows, bold="\x01{}\x02".format)]
    header, *body = ([cell.replace("\x01", r"\textbf{").replace("\x02", "}") for cell in line] for line in escaped)
    names = header.index("n")
    lines = [" & ".join(line) + r" \\" for line in body]
    controls = sum(row.role == "control" for row in rows)
    if 0 < controls < len(rows):
        lines.insert(controls, r"\midrule")
    notes = " ".join([*table.remarks, *(f"No result: {line}." for line in table.failures)])
    return "\n".join(
        [
            r"\begin{table*}[t]",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{_escape(table.title)}. \textmd{{{_escape(notes)}}}}}",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * names}{'r' * (len(header) - names)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


def _escape(text: str) -> str:
    return "".join(LATEX_SIGNS.get(sign, sign) for sign in text)


def _record(table: Table, row: Row) -> dict[str, Any]:
    record = {
        **table.axes,
        "role": row.role,
        "name": row.label,
        "method": row.method,
        "end_state": row.end_state or "-",
    }
    record |= {**row.choices, "n": row.n}
    for column in [*table.quality, *table.cost]:
        cell = row.cells[column.name]
        record[column.name] = _exact(cell.mean, "OOM" if cell.out_of_memory else "-")
        if not column.relative:
            record[f"{column.name}_std"] = _exact(cell.std)
            record[f"{column.name}_best"] = int(cell.best)
        elif column.relative == "difference":
            record[f"{column.name}_error"] = _exact(cell.std)
        if column.measure and column.measure.item_error:
            record[f"{column.name}_item_error"] = _exact(cell.item_error)
    return record | {"runs": " ".join(row.keys)}


def _exact(value: float, missing: str = "-") -> str:
    return missing if math.isnan(value) else repr(float(value))
