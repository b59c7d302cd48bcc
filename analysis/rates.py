"""The learning rate that suits each method best, from the runs of experiment=lr_search or real_lr_search.

Every method must have had the same search: as many rates, a constant factor apart, each with the same seeds. The rate
with the best mean accuracy wins, on items that no table scores, or where no task was scored the one with the least loss
of held-out answers; a rate at which a run diverged cannot. A winner at an end of the grid says that the grid was too
narrow: there it may be continued, rate by rate. With ``--write`` the winners reach the recipe that the tables use;
methods that were not searched keep the rates that they have there.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd
import yaml

from analysis.results import CONTROLS, add_run_arguments, load, publish
from analysis.table_writer import Bold, TextTable, markdown
from harness.files import write_text

__all__ = ["Search", "add_arguments", "run", "searched", "table_of", "winners", "write_recipe"]

# Factors between neighbours that are one: a grid has round numbers, 3 and 10/3 among them.
SAME_FACTOR = 1.2
RECIPE = Path(__file__).parents[1] / "conf" / "train" / "default.yaml"


@dataclass(frozen=True)
class Search:
    """What was tried.

    Attributes:
        grids: By method the mean score at each rate, more is better; NaN where a run did not end well.
        least: Number of rates that every method was given.
        answers: Whether the score is the loss of held-out answers, its sign turned, instead of the accuracy in points.
    """

    grids: Mapping[str, pd.Series]
    least: int
    answers: bool

    def shown(self, score: float) -> str:
        """Points, or a perplexity."""
        return "diverged" if pd.isna(score) else f"{math.exp(-score):.2f}" if self.answers else f"{score:.1f}"


def searched(table: pd.DataFrame) -> Search:
    """The search in some results.

    Raises:
        ValueError: No fine-tuned run, methods that were not searched alike, or no search: a single rate.
    """
    rows = table[table.headline & ~table.method.isin(CONTROLS)]
    if rows.empty:
        raise ValueError("runs: no fine-tuned run below; python run.py -m experiment=lr_search makes them")
    answers = rows.accuracy.isna().all()
    rows = rows.assign(
        rate=[float(config["train"]["learning_rate"]) for config in rows.config],
        score=-rows.answers_loss if answers else rows.accuracy,
    )
    means = rows.groupby(["method", "rate"]).score.agg(lambda values: values.mean(skipna=False))
    grids = {method: of_one.droplevel(0).astype(float) for method, of_one in means.groupby("method")}
    if rows.rate.nunique() == 1:
        raise ValueError(f"runs: only the rate {rows.rate.iloc[0]:g} below; a search has two or more")
    shortest = min(grids, key=lambda method: len(grids[method]))
    least = len(grids[shortest])
    for method, grid in grids.items():
        if not _is_continued(grid, least):
            raise ValueError(
                f"runs: not the same search for {shortest} ({least} rates) and {method} ({len(grid)}); "
                "a longer one must go on from an end at which the best rate lay"
            )
    steps = [b / a for grid in grids.values() for a, b in pairwise(grid.index)]
    if max(steps, default=1) > SAME_FACTOR * min(steps, default=1):
        raise ValueError(f"runs: rates must be a constant factor apart, here {min(steps):.3g} to {max(steps):.3g}")
    seeds = rows.groupby(["method", "rate"]).seed.agg(lambda values: ", ".join(f"{seed:g}" for seed in sorted(values)))
    if seeds.nunique() > 1:
        raise ValueError(f"runs: every rate must have the same seeds, here {' or '.join(sorted(set(seeds)))}")
    return Search(grids, least, answers)


def _is_continued(grid: pd.Series, least: int) -> bool:
    """Whether a grid grew from `least` rates, each time by one beyond the end at which the best lay.

    Where all diverged that is the lower end.
    """
    if len(grid) == least:
        return True
    below, above = grid.fillna(-math.inf).iloc[:-1], grid.fillna(-math.inf).iloc[1:]
    upwards = below.argmax() == len(below) - 1 and _is_continued(grid.iloc[:-1], least)
    return upwards or (above.argmax() == 0 and _is_continued(grid.iloc[1:], least))


def winners(search: Search) -> dict[str, float]:
    """Method -> rate with the best mean.

    Raises:
        ValueError: A method that diverged at every rate.
    """
    lost = [method for method, grid in search.grids.items() if grid.isna().all()]
    if lost:
        raise ValueError(f"runs: {lost[0]} ended well at no rate; the grid has to begin lower")
    return {method: float(grid.idxmax()) for method, grid in search.grids.items()}


def table_of(search: Search) -> str:
    """Markdown: the search, the winners in bold, and which of them lie at an end of their grid."""
    best, rates = winners(search), sorted(set().union(*(grid.index for grid in search.grids.values())))
    rows = []
    for method, grid in search.grids.items():
        cells = {rate: search.shown(value) for rate, value in grid.items()}
        cells[best[method]] = Bold(cells[best[method]])
        rows.append([method, *(cells.get(rate, "-") for rate in rates)])
    text = markdown(TextTable(["method", *(f"{rate:g}" for rate in rates)], rows)) + "\n"
    if search.answers:
        text += "\nPerplexity of held-out answers; the least wins.\n"
    longer = [f"{method} ({len(grid)} rates)" for method, grid in search.grids.items() if len(grid) > search.least]
    if longer:
        text += f"\nContinued beyond {search.least} rates, since the best lay at an end: {', '.join(longer)}.\n"
    ends = [method for method, grid in search.grids.items() if best[method] in (grid.index[0], grid.index[-1])]
    if ends:
        text += f"\nAt an end of the grid, so that a rate beyond it may be better: {', '.join(ends)}.\n"
    return text


def write_recipe(best: dict[str, float], file: Path) -> None:
    """Set the rates of these methods (``tuned``) in a recipe like ``conf/train/default.yaml``, and nothing else in it.

    Raises:
        ValueError: The file has no such key.
    """
    text = file.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^tuned:.*\n(?:[ ]+.*\n?)*", text, flags=re.MULTILINE))
    known = yaml.safe_load(blocks[0][0])["tuned"] if len(blocks) == 1 else None
    if not isinstance(known, dict):
        raise ValueError(f"--recipe={file}: must have one key tuned with a rate for each method, as {RECIPE.name} has")
    rates = "".join(f"  {method}: {rate!r}\n" for method, rate in sorted((known | best).items()))
    start, end = blocks[0].span()
    write_text(file, f"{text[:start]}tuned:\n{rates}{text[end:]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders of runs, and the recipe."""
    add_run_arguments(parser)
    parser.add_argument("--write", action="store_true", help="write the rates that were found into the recipe")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"file that has the rates; default: {RECIPE}")


def run(options: argparse.Namespace) -> int:
    """Print the search, and write the winners if asked to; ``lr.md`` keeps the search beside the runs."""
    search = searched(load(options.runs))
    publish(table_of(search), options, "lr.md")
    if options.write:
        write_recipe(winners(search), options.recipe)
    print(f"{options.recipe}: {'written' if options.write else 'not changed; --write sets these rates'}")
    return 0
