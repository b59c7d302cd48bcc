"""Plots of all that the results hold, as PNG and PDF; says which were not made and why."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from analysis import cost_plots, quality_plots
from analysis.figures import FORMATS, caption_of, plot_style, save
from analysis.groups import Group, groups_of
from analysis.quality_plots import Drawn
from analysis.results import load, output_folder
from analysis.tables import add_arguments

__all__ = ["Plot", "add_arguments", "draw", "run"]

KINDS: dict[str, Callable[[list[Group], bool], Iterator[Drawn]]] = {
    "accuracy_by_sparsity": partial(quality_plots.by_sparsity, "accuracy", "average accuracy (%)"),
    "perplexity_by_sparsity": partial(quality_plots.by_sparsity, "perplexity", "perplexity"),
    "recovery": quality_plots.recovery,
    "against_lora": quality_plots.against_lora,
    "pareto_memory": partial(cost_plots.pareto, "memory"),
    "pareto_time": partial(cost_plots.pareto, "time"),
    "accuracy_by_compute": partial(cost_plots.budget, "compute"),
    "accuracy_by_data": partial(cost_plots.budget, "data"),
    "accuracy_by_memory": partial(cost_plots.budget, "memory"),
    "cost_by_sequence_length": partial(cost_plots.cost_against, cost_plots.LENGTH, cost_plots.RANK),
    "cost_by_rank": partial(cost_plots.cost_against, cost_plots.RANK, cost_plots.LENGTH),
}


@dataclass(frozen=True)
class Plot:
    """The files of one figure, its title, and the note below it."""

    files: list[Path]
    title: str
    note: str


def draw(
    results: pd.DataFrame, output: Path, *, mix: bool = False, formats: Iterable[str] = FORMATS, captions: bool = True
) -> tuple[list[Plot], list[str]]:
    """Make every plot for which the data is there.

    Args:
        results: What `results.load` returns.
        output: Folder for the files.
        mix: Allow several devices or library versions in one plot.
        formats: Endings of the files.
        captions: Whether title and note are in the picture.

    Returns:
        The plots, and for every one that was not made its name and the reason.

    Raises:
        ValueError: A plot would mix devices or library versions, and `mix` is false.
    """
    output.mkdir(parents=True, exist_ok=True)
    groups = groups_of(results, mix=mix)
    plots, missing = [], []
    with plot_style():
        for kind, draw_kind in KINDS.items():
            for name, drawn in list(draw_kind(groups, mix)) or [(kind, "no such runs")]:
                if isinstance(drawn, str):
                    missing.append(f"{name}: {drawn}")
                    continue
                for text in drawn.texts:
                    text.set_visible(captions)
                plots.append(Plot(save(drawn, output / name, formats), *caption_of(drawn)))
    return plots, missing


def run(options: argparse.Namespace) -> int:
    """Write the plots to `plots/` below the output folder, and say which there are."""
    plots, missing = draw(load(options.runs), output_folder(options) / "plots", mix=options.mix)
    print("".join(f"{file}\n" for plot in plots for file in plot.files), end="")
    print("".join(f"not made: {line}\n" for line in missing), end="")
    return 0
