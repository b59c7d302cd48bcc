"""The columns of the tables: where each number comes from, how it is shown, and what makes one the best."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import pandas as pd

from analysis.measures import ACCURACY, ANSWERS_LOSS, HELDOUT_LOSS, Measure, number, task_accuracy, task_margin

__all__ = ["Column", "chance_level", "cost_columns", "margin_columns", "memory_unit", "quality_columns"]

MEBIBYTE, GIBIBYTE, GIGA = 2**20, 2**30, 1e9
# Tasks whose items have two choices; those of the others have four.
TWO_CHOICES = ("boolq", "rte", "winogrande")
# Less than this is shown in MiB.
LEAST_IN_GIBIBYTES = 4 * GIBIBYTE
# Less than this is shown with one decimal.
LEAST_IN_WHOLE_MILLISECONDS = 100
TENTHS, RATIO, COUNT = "{:.1f}".format, "{:.2f}".format, "{:,.0f}".format
TEXTS = {"wikitext": "WikiText-2 perplexity"}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: In CSV files, with the unit.
        title: In the header.
        show: A number as text.
        measure: The number of one run.
        tested: What the test compares, where that is not the shown number.
        bounds: The range (low, high) of one run's number: of a cost, which has no test but `statistics.best_range`.
        better: Whether more or less is better; None: neither, nothing is ever bold.
        relative: For a column without a number of its own: how it compares `base` with that of LoRA. A difference is
            one of what the test compares.
        base: The column that is compared.
        spread: Whether the standard deviation is worth showing.
    """

    name: str
    title: str
    show: Callable[[float], str]
    measure: Measure | None = None
    tested: Measure | None = None
    bounds: tuple[Measure, Measure] | None = None
    better: Literal["more", "less"] | None = None
    relative: Literal["difference", "ratio"] | None = None
    base: "Column | None" = None
    spread: bool = True


def quality_columns(rows: pd.DataFrame) -> list[Column]:
    """A column for each task that was scored in `rows`, average, perplexity and zeros; none if nothing was scored."""
    metrics = {task: metric for of_row in rows.task_metric for task, metric in of_row.items()}
    columns = [_task(task, metric) for task, metric in metrics.items()]
    average = next((metric for metric in rows.accuracy_metric if metric is not None), None)
    if average is not None:
        base = Column("average", f"average ({average})", TENTHS, ACCURACY, better="more")
        columns += [base, Column("average_minus_lora", "Δ LoRA", _signed, relative="difference", base=base)]
    columns += _perplexities(rows)
    if columns:
        percent = Measure(lambda row: 100 * row.zeros_kept)
        columns.append(Column("zeros_kept_percent", "zeros kept (%)", _floored, percent, spread=False))
    return columns


def _perplexities(rows: pd.DataFrame) -> Iterator[Column]:
    """Perplexities, each beside its difference from LoRA where held-out answers were scored."""
    texts = {"perplexity": HELDOUT_LOSS, "answers_perplexity": ANSWERS_LOSS}
    titles = {"answers_perplexity": "held-out answers (perplexity)"}
    titles |= {"perplexity": TEXTS.get(next(filter(None, rows.perplexity_text), ""), "perplexity")}
    for name, loss in texts.items():
        if rows[name].notna().any():
            base = Column(name, titles[name], _hundredths, number(name), tested=loss, better="less")
            yield base
            if rows.answers_perplexity.notna().any():
                yield Column(f"{name}_log_minus_lora", "Δ LoRA (nats)", _nats, relative="difference", base=base)


def margin_columns(rows: pd.DataFrame) -> list[Column]:
    """A column for each task whose margins are recorded."""
    tasks = dict.fromkeys(task for of_row in rows.margin for task in of_row)
    return [Column(f"{task}_margin", f"{_short(task)} margin (nats)", RATIO, task_margin(task), better="more")
            for task in tasks]  # fmt: skip


def cost_columns(rows: pd.DataFrame) -> list[Column]:
    """Size, memory and time of a training, absolute and relative to LoRA; what nobody has measured is left out."""
    unit, size = memory_unit(rows.train_peak.max())
    whole = rows.step_ms.max() >= LEAST_IN_WHOLE_MILLISECONDS

    def in_units(value: float) -> str:
        return f"{value / size:,.{2 if size == GIBIBYTE else 1}f}"

    measured = {
        "trainable": Column("trainable", "trainable", COUNT, number("trainable"), spread=False),
        "train_peak": Column("train_peak_bytes", f"memory ({unit})", in_units, number("train_peak"), better="less",
                              bounds=(number("train_peak"), number("train_peak"))),
        "step_ms": Column("step_ms", "step (ms)", COUNT if whole else TENTHS, number("step_ms"), better="less",
                          bounds=(number("step_ms_p10"), number("step_ms_p90"))),
        "tokens_per_second": Column("tokens_per_second", "tokens/s", COUNT, number("tokens_per_second"), better="more",
                                    bounds=(_tokens_when("step_ms_p90"), _tokens_when("step_ms_p10"))),
        "flops": Column("flops", "GFLOP/step", lambda value: f"{value / GIGA:,.1f}", number("flops"), spread=False),
    }  # fmt: skip
    columns = []
    for source, column in measured.items():
        if rows[source].notna().any():
            columns.append(column)
            if source not in ("trainable", "flops"):
                title, name = "× LoRA", f"{column.name}_over_lora"
                columns.append(Column(name, title, RATIO, relative="ratio", base=column, spread=False))
    return columns


def chance_level(tasks: Iterable[str]) -> float:
    """Average accuracy of guessing, in per cent."""
    return fmean(50.0 if task.removeprefix("microworld_") in TWO_CHOICES else 25.0 for task in tasks)


def memory_unit(largest: float) -> tuple[str, int]:
    """Name and bytes of the unit in which memory is shown, given the largest amount."""
    return ("GiB", GIBIBYTE) if largest >= LEAST_IN_GIBIBYTES else ("MiB", MEBIBYTE)


def _task(task: str, metric: str) -> Column:
    return Column(task, f"{_short(task)} ({metric})", TENTHS, task_accuracy(task), better="more")


def _short(task: str) -> str:
    return task.removeprefix("microworld_")


def _tokens_when(step: str) -> Measure:
    """Tokens per second if every step took as long as one at this percentile."""
    return Measure(lambda row: row.tokens_per_second * row.step_ms / row[step])


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


def _nats(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"


def _hundredths(value: float) -> str:
    """Two decimals, or none where the number is so large that they mean nothing."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _floored(percent: float) -> str:
    """100 only where it is exactly that: one lost zero must be seen."""
    return "100" if percent == 100 else f"{math.floor(percent * 100) / 100:.2f}"
