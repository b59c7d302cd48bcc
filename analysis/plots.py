"""Plots of all that the results hold, as PNG and PDF; says which were not made and why."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from analysis import cost_plots, quality_plots
from analysis.figures import look, save
from analysis.groups import Group, groups_of
from analysis.quality_plots import Drawn
from analysis.results import add_run_arguments, load

__all__ = ["draw"]

KINDS: tuple[Callable[[list[Group], bool], Iterator[Drawn]], ...] = (
    quality_plots.accuracy_by_sparsity,
    quality_plots.perplexity_by_sparsity,
    quality_plots.recovery,
    quality_plots.loss_curves,
    cost_plots.pareto_memory,
    cost_plots.pareto_time,
    cost_plots.pareto_trainable,
    cost_plots.cost_by_sequence_length,
    cost_plots.cost_by_rank,
)


def draw(results: pd.DataFrame, output: Path, *, mix: bool = False) -> tuple[list[Path], list[str]]:
    """Make every plot for which the data is there.

    Args:
        results: What `results.load` returns.
        output: Folder for the files.
        mix: Allow several devices or library versions in one plot.

    Returns:
        The files, and for every plot that was not made its name and the reason.

    Raises:
        ValueError: A plot would mix devices or library versions, and `mix` is false.
    """
    output.mkdir(parents=True, exist_ok=True)
    groups = groups_of(results, mix=mix)
    files, missing = [], []
    with look():
        for kind in KINDS:
            plots = list(kind(groups, mix))
            for name, drawn in plots or [(kind.__name__, "no such runs")]:
                if isinstance(drawn, str):
                    missing.append(f"{name}: {drawn}")
                else:
                    files += save(drawn, output / name)
    return files, missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, and whether machines may be mixed."""
    add_run_arguments(parser)
    parser.add_argument("--mix", action="store_true", help="allow several devices or library versions in one plot")


def run(options: argparse.Namespace) -> int:
    """Write the plots to `plots/` below the output folder, and say which there are."""
    files, missing = draw(load(options.runs), (options.output or options.runs[0]) / "plots", mix=options.mix)
    print("".join(f"{file}\n" for file in files) + "".join(f"not made: {line}\n" for line in missing), end="")
    return 0
