"""The learning rate that suits each method best, from the runs of experiment=lr_search.

Every method must have had the same search: the same rates, each with the same seeds. The rate with the best mean
accuracy wins, on items that no table scores; a rate at which a run diverged cannot. A winner at an end of the grid says
that the grid was too narrow. The winners are written into the recipe that the tables use.
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from analysis.results import CONTROLS, add_run_arguments, load, output_folder

__all__ = ["add_arguments", "run", "searched", "table_of", "winners", "write_recipe"]

RECIPE = Path(__file__).parents[1] / "conf" / "train" / "tuned.yaml"


def searched(table: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy in points, a row for each method and a column for each rate; NaN where a run did not end well.

    Raises:
        ValueError: No fine-tuned run, or methods that were not searched alike.
    """
    rows = table[table.headline & ~table.method.isin(CONTROLS)]
    if rows.empty:
        raise ValueError("runs: no fine-tuned run below; python run.py -m experiment=lr_search makes them")
    rows = rows.assign(rate=[float(config["train"]["learning_rate"]) for config in rows.config])
    budgets = {
        method: sorted(zip(group.rate, group.seed, strict=True)) for method, group in rows.groupby("method", sort=True)
    }
    (first, budget), *others = budgets.items()
    for method, other in others:
        if other != budget:
            raise ValueError(f"runs: not the same search for {first} ({len(budget)} runs) and {method} ({len(other)})")
    means = rows.groupby(["method", "rate"]).accuracy.agg(lambda values: values.mean(skipna=False))
    return means.unstack("rate").astype(float)


def winners(means: pd.DataFrame) -> dict[str, float]:
    """Method -> rate with the best mean.

    Raises:
        ValueError: A method that diverged at every rate.
    """
    lost = means.index[means.isna().all(axis=1)]
    if len(lost):
        raise ValueError(f"runs: {lost[0]} ended well at no rate; the grid has to begin lower")
    return {method: float(rate) for method, rate in means.idxmax(axis=1).items()}


def table_of(means: pd.DataFrame) -> str:
    """Markdown: the search, the winners in bold, and which of them lie at an end of the grid."""
    rates, best = list(means.columns), winners(means)
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for method, row in means.iterrows():
        cells = ["diverged" if pd.isna(row[rate]) else f"{row[rate]:.1f}" for rate in rates]
        place = rates.index(best[method])
        cells[place] = f"**{cells[place]}**"
        lines.append(f"| {method} | {' | '.join(cells)} |")
    ends = [method for method, rate in best.items() if rate in (rates[0], rates[-1])]
    if ends:
        lines += ["", f"At an end of the grid, so that a rate beyond it may be better: {', '.join(ends)}."]
    return "\n".join(lines) + "\n"


def write_recipe(best: dict[str, float], file: Path) -> None:
    """Replace the rates (``tuned``) in a recipe like ``conf/train/tuned.yaml``, and nothing else in it.

    Raises:
        ValueError: The file has no such key.
    """
    block = "tuned:\n" + "".join(f"  {method}: {rate!r}\n" for method, rate in sorted(best.items()))
    text, found = re.subn(r"^tuned:.*\n(?:[ ]+.*\n)*", block, file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found != 1:
        raise ValueError(f"--recipe={file}: must have one key tuned, as conf/train/tuned.yaml has")
    file.write_text(text, encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders of runs, and the recipe to write to."""
    add_run_arguments(parser)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"file to write the rates to; default: {RECIPE}")


def run(options: argparse.Namespace) -> int:
    """Print the search and write the winners; ``lr.md`` keeps it beside the runs."""
    means = searched(load(options.runs))
    text = table_of(means)
    output = output_folder(options)
    (output / "lr.md").write_text(text, encoding="utf-8")
    write_recipe(winners(means), options.recipe)
    print(f"{text}\n{options.recipe}: written")
    return 0
