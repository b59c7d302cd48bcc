"""Figures that fit one column of a paper and the screen of a phone: size, type, labels, and how they are saved.

3.3 inches wide and nothing below 7 points. Lines and points have their names beside them instead of a legend. Every
figure has a title, and below it a note that says what was averaged and what a bar is. PNG for the screen and PDF for
the paper, without the date in it, so that the same results give the same file.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style as styles
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy.optimize import isotonic_regression

from analysis.style import Style

__all__ = ["FORMATS", "LINE", "Label", "caption_of", "curve", "finish", "label_at_the_right", "level", "new_figure"]
__all__ += ["plain_ticks", "plot_style", "save", "split", "spread_out"]

WIDTH = 3.3  # inches: one column of the usual two-column formats
PANEL_HEIGHT = 1.9
SMALL = 7  # points, of labels and notes
LINE = 0.115  # inches, of a line of small letters
LABEL_LETTERS, NOTE_LETTERS, TITLE_LETTERS = 18, 62, 44
DOTS_PER_INCH = 300
FORMATS = ("png", "pdf")
# More lines than this in one panel are a tangle.
LINES_PER_PANEL = 8
GREY = "#666666"
# Signs of the same nominal size do not look equally large.
SIZES = {"*": 7.0, "D": 3.4, "s": 3.6, "d": 4.6, "P": 4.8, "X": 4.8, "p": 4.8, "h": 4.8}


@dataclass(frozen=True)
class Label:
    """A name with the point (in data; x may be infinite: the right edge) that it belongs to."""

    text: str
    x: float
    y: float
    colour: str


def plot_style() -> AbstractContextManager[None]:
    """The context in which figures are drawn and saved."""
    return styles.context(Path(__file__).with_name("paper.mplstyle"))


def new_figure(panels: int = 1, *, height: float = PANEL_HEIGHT, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes, one above the other, with a common horizontal axis; `height` of each in inches."""
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
    looks = {
        "color": style.colour,
        "marker": style.marker,
        "linestyle": style.line,
        "markersize": SIZES.get(style.marker, 4.0),
        "markerfacecolor": style.colour if style.filled else "white",
        "markeredgewidth": 0.8,
        "label": style.name,
    }
    axes.errorbar(x, y, **bars, **looks, elinewidth=0.7, capsize=1.5, capthick=0.7, **options)


def level(axes: Axes, style: Style, y: float) -> Label:
    """A horizontal line, and the label for it."""
    axes.axhline(y, color=style.colour, linestyle=style.line, label=style.name, zorder=1)
    return Label(style.name, math.inf, y, style.colour)


def label_at_the_right(axes: Axes, labels: Iterable[Label], *, letters: int = LABEL_LETTERS) -> None:
    """Names in a column at the right of the axes, each at the height of its point or as near as the others let it be.

    The figure grows if it is too low for them. The limits of the axes must not change afterwards.
    """
    labels = [label for label in labels if not math.isnan(label.y)]
    texts = [textwrap.fill(label.text, letters) for label in labels]
    heights = LINE * np.array([text.count("\n") + 1 for text in texts])
    figure, share = axes.figure, axes.get_position().height
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, heights.sum() / share))
    heights /= share * figure.get_size_inches()[1]
    edge = axes.get_xlim()[1]
    points = [(min(label.x, edge), label.y) for label in labels]
    at = [axes.transAxes.inverted().transform(axes.transData.transform(point)) for point in points]
    for text, label, point, y in zip(texts, labels, points, spread_out([y for _, y in at], heights), strict=True):
        line = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
        axes.annotate(
            text, point, (1.06, y), textcoords="axes fraction", color=label.colour, fontsize=SMALL, va="center",
            arrowprops=line | {"color": label.colour}, annotation_clip=False, linespacing=0.95,
        )  # fmt: skip


def spread_out(places: Sequence[float], heights: Sequence[float]) -> np.ndarray:
    """The nearest places (least squares) in 0 to 1 at which intervals of these heights do not overlap, in order."""
    order = np.argsort(places, kind="stable")
    stacked = np.cumsum(np.asarray(heights)[order]) - np.asarray(heights)[order] / 2
    moved = np.empty(len(order))
    free = isotonic_regression(np.asarray(places)[order] - stacked).x
    moved[order] = np.clip(free, 0, max(0, 1 - np.sum(heights))) + stacked
    return moved


def plain_ticks(axis: Axis) -> None:
    """On a logarithmic axis: a few round numbers, without powers of ten."""
    low, high = axis.get_view_interval()
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else EngFormatter(sep="")(value))
    )
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def split(items: Sequence[Any], most: int = LINES_PER_PANEL) -> list[list[Any]]:
    """The items in their order, in as few lists of about equal length as hold at most `most` each."""
    parts = math.ceil(len(items) / most)
    size = math.ceil(len(items) / parts)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def finish(figure: Figure, title: str, note: str) -> Figure:
    """Put a title above and a note below, and make the figure as much higher."""
    title, note = textwrap.fill(title, TITLE_LETTERS), textwrap.fill(note, NOTE_LETTERS)
    width, height = figure.get_size_inches()
    lines = title.count("\n") + note.count("\n") + 2
    figure.set_size_inches(width, height + 1.2 * LINE * lines)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=SMALL, color=GREY)
    return figure


def caption_of(figure: Figure) -> tuple[str, str]:
    """Title and note of a figure, each in one line."""
    return " ".join(figure.get_suptitle().split()), " ".join(figure.get_supxlabel().split())


def save(figure: Figure, path: Path, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Write the figure in each of the formats; `path` is without an ending."""
    files = [path.with_name(f"{path.name}.{ending}") for ending in formats]
    for file in files:
        metadata = {"CreationDate": None} if file.suffix == ".pdf" else {}
        figure.savefig(file, dpi=DOTS_PER_INCH, metadata=metadata)
    return files
