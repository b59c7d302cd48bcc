"""Figures that fit one column of a paper: their size, their type, and how they are saved.

3.3 inches wide and nothing below 7 points, so that a print can be read; the legend is below the axes, where it hides no
data; PNG for the screen and PDF for the paper, without the date in it, so that the same results give the same file.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["SMALL", "curve", "finish", "look", "mark", "new_figure", "plain_ticks", "save", "split"]

WIDTH = 3.3  # inches: one column of the usual two-column formats
PANEL_HEIGHT = 1.9
SMALL, NORMAL = 7, 8  # points
DOTS_PER_INCH = 300
# More lines than this in one panel are a tangle.
LINES_PER_PANEL = 8
# Inches: a line of the legend, one of its letters, and the sign with the space around it.
LEGEND_LINE, LETTER, LEGEND_SIGN = 0.155, 0.058, 0.36
LOOK = {
    "font.size": NORMAL,
    "axes.labelsize": NORMAL,
    "axes.titlesize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # letters stay letters
    "svg.hashsalt": "lors",
}
# Signs of the same nominal size do not look equally large.
SIZES = {"*": 7.0, "D": 3.4, "s": 3.6, "d": 4.6, "P": 4.8, "X": 4.8, "p": 4.8, "h": 4.8}


def look() -> AbstractContextManager[None]:
    """The context in which figures are drawn and saved."""
    import matplotlib as mpl

    return mpl.rc_context(LOOK)


def new_figure(panels: int = 1, *, height: float = PANEL_HEIGHT, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes, one above the other, with a common horizontal axis; `height` of each in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * panels + 0.2), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, sharey=share_y, squeeze=False)
    return figure, list(axes[:, 0])


def curve(
    axes: Axes,
    style: Style,
    x: Sequence[float],
    y: Sequence[float],
    error: Sequence[float] | None = None,
    *,
    error_x: Sequence[float] | None = None,
    **options: Any,
) -> None:
    """A line with markers, and bars of one standard deviation where they are known (not NaN)."""
    bars = {"yerr": error, "xerr": error_x}
    bars = {name: values for name, values in bars.items() if values is not None and not all(map(math.isnan, values))}
    axes.errorbar(x, y, **bars, **_look_of(style), elinewidth=0.7, capsize=1.5, capthick=0.7, **options)


def mark(axes: Axes, style: Style, x: float, y: float) -> None:
    """A single marker."""
    axes.plot(x, y, **_look_of(style) | {"linestyle": "none"})


def plain_ticks(axis: Axis) -> None:
    """On a logarithmic axis: a few round numbers, without powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    narrow = high < 10 * low
    axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)) if narrow else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _look_of(style: Style) -> dict[str, Any]:
    """matplotlib's words for a style."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "linestyle": style.line,
        "markersize": SIZES.get(style.marker, 4.0),
        "markerfacecolor": style.colour if style.filled else "white",
        "markeredgewidth": 0.8,
        "label": style.name,
    }


def split(items: Sequence[Any], most: int = LINES_PER_PANEL) -> list[list[Any]]:
    """The items in their order, in as few lists of about equal length as hold at most `most` each."""
    parts = math.ceil(len(items) / most)
    size = math.ceil(len(items) / parts)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def finish(figure: Figure, axes: Iterable[Axes]) -> Figure:
    """Put one legend of all axes below them, and make the figure as much higher."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            # Of a line with error bars, the line alone.
            entries.setdefault(label, handle[0] if isinstance(handle, tuple) else handle)
    if not entries:
        return figure
    widest = int((WIDTH - LEGEND_SIGN) / LETTER)
    entries = {"\n".join(textwrap.wrap(label, widest)): handle for label, handle in entries.items()}
    columns = next(n for n in range(len(entries), 0, -1) if n == 1 or _legend_width(list(entries), n) <= WIDTH)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_LINE * _legend_lines(list(entries), columns) + 0.05)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False,
                  handlelength=2.2, handletextpad=0.5, columnspacing=1.0, labelspacing=0.35, borderpad=0.1)  # fmt: skip
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write the figure as PNG and as PDF; `path` is without an ending."""
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "pdf")]
    for file in files:
        metadata = {"CreationDate": None} if file.suffix == ".pdf" else {}
        figure.savefig(file, dpi=DOTS_PER_INCH, metadata=metadata)
    return files


def _legend_width(labels: list[str], columns: int) -> float:
    """About how wide a legend is, in inches."""
    longest = [max(len(line) for label in column for line in label.split("\n")) for column in _filled(labels, columns)]
    return sum(LETTER * length + LEGEND_SIGN for length in longest)


def _legend_lines(labels: list[str], columns: int) -> int:
    """How many lines of text are one above the other."""
    return max(sum(label.count("\n") + 1 for label in column) for column in _filled(labels, columns))


def _filled(labels: list[str], columns: int) -> list[list[str]]:
    """The columns of a legend: matplotlib fills one after the other, the first ones with one more."""
    short, longer = divmod(len(labels), columns)
    ends = list(accumulate([short + 1] * longer + [short] * (columns - longer), initial=0))
    return [labels[start:end] for start, end in pairwise(ends)]


def _short(value: float) -> str:
    """1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
