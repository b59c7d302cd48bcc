"""Every table of the analysis as Markdown and as LaTeX (booktabs); the report shows the same tables as HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bold", "TextTable", "escape_latex", "latex", "markdown"]

NOTHING = ("-", "", "OOM")  # no value; says nothing about the kind of a column
NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?( .*)?$")
LATEX_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
    "±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "³": r"$^3$", "≥": r"$\ge$", "≤": r"$\le$",
}  # fmt: skip


class Bold(str):
    """The text of a cell that is set in bold."""


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        columns: Titles, which may repeat.
        rows: The cells, row by row.
        runs: Keys of the runs behind each row, to which the report links; empty where there are none.
        methods: The method of each row, whose colour the report shows; empty where there are none.
        controls: How many rows come first that are no method under test; a line parts them from the others.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    runs: Sequence[Sequence[str]] = ()
    methods: Sequence[str] = ()
    controls: int = 0

    def is_numeric(self, column: int) -> bool:
        """Whether a column has numbers only, with or without a unit or a spread; it is aligned to the right then."""
        values = [row[column] for row in self.rows if row[column] not in NOTHING]
        return column > 0 and all(map(NUMBER.match, values))


def markdown(table: TextTable) -> str:
    """The table with pipes; "None." without a row."""
    if not table.rows:
        return "None."
    rule = ["---:" if table.is_numeric(column) else "---" for column in range(len(table.columns))]
    rows = [[_markdown_cell(cell) for cell in row] for row in (table.columns, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _markdown_cell(text: str) -> str:
    escaped = text.replace("|", "\\|") or "-"
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


def latex(table: TextTable, caption: str) -> str:
    """The table as a `table*`, shrunk to the width of the text where it is wider; the caption is LaTeX."""
    alignment = "".join("r" if table.is_numeric(column) else "l" for column in range(len(table.columns)))
    header, *rows = (" & ".join(map(_latex_cell, row)) + r" \\" for row in (table.columns, *table.rows))
    if 0 < table.controls < len(rows):
        rows.insert(table.controls, r"\midrule")
    lines = [
        r"\begin{table*}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{caption}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        header,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(text: str) -> str:
    return rf"\textbf{{{escape_latex(text)}}}" if isinstance(text, Bold) else escape_latex(text)


def escape_latex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(LATEX_SIGNS.get(sign, sign) for sign in text)
