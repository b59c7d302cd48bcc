"""The tables of `analysis.tables` as documents: Markdown, LaTeX (booktabs), and CSV with a line for each number."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis import table_writer
from analysis.notes import LEGEND
from analysis.table_cells import Section, Table

__all__ = ["latex", "markdown", "numbers", "shared_notes"]


def shared_notes(tables: Sequence[Section]) -> list[str]:
    """The notes that all tables have; they are shown once."""
    return [note for note in tables[0].notes if all(note in table.notes for table in tables)] if tables else []


def markdown(tables: Sequence[Section]) -> str:
    """All tables, each with a panel of scores and one of costs, and their legend once."""
    shared = shared_notes(tables)
    parts = ["# Results", *LEGEND, " ".join(shared)]
    for table in tables:
        parts += [f"## {table.title}", *map(table_writer.markdown, table.panels.values())]
        parts.append(" ".join(note for note in [*table.notes, *table.cautions] if note not in shared))
        if table.failures:
            parts += ["Without a result:", "\n".join(f"- {line}" for line in table.failures)]
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(tables: Sequence[Section]) -> str:
    """The same as `table*` environments."""
    parts = [r"% Needs \usepackage{booktabs,graphicx}.", *(f"% {line}" for line in LEGEND)]
    for table in tables:
        notes = " ".join([*table.notes, *table.cautions, *(f"No result: {line}." for line in table.failures)])
        caption = rf"{table_writer.escape_latex(table.title)}. \textmd{{{table_writer.escape_latex(notes)}}}"
        parts += [table_writer.latex(panel, caption) for panel in table.panels.values()]
    return "\n".join(parts)


def numbers(tables: Sequence[Table]) -> pd.DataFrame:
    """A line for each number: table, role, row, choices, column, mean, std (or standard error), n, best, runs."""
    records = []
    for table in tables:
        for row in table.rows:
            of_row = {"table": table.title, "role": row.role, "row": row.label}
            of_row |= {key: row.text(key) for key in table.choices}
            for column in [*table.quality, *table.margins, *table.cost]:
                cell = row.cells[column.name]
                number = {"column": column.name, "mean": cell.mean, "std": cell.std, "n": row.n, "best": cell.best}
                records += [] if math.isnan(cell.mean) else [of_row | number | {"runs": " ".join(row.rows.key)}]
    return pd.DataFrame(records)
