"""The learning rate that suits each method best, from the runs of experiment=lr_search.

Every method must have had the same search: the same rates, each with the same seeds. The rate with the best mean
accuracy wins, on items that no table scores; a rate at which a run diverged cannot. A winner at an end of the grid says
that the grid was too narrow. With ``--write`` the winners reach the recipe that the tables use; methods that were not
searched keep the rates that they have there.
"""

import argparse
import re
from pathlib import Path

import pandas as pd
import yaml

from analysis.results import CONTROLS, add_run_arguments, load, output_folder
from analysis.table_writer import Bold, TextTable, markdown
from harness.store import write_text

__all__ = ["add_arguments", "run", "searched", "table_of", "winners", "write_recipe"]

RECIPE = Path(__file__).parents[1] / "conf" / "train" / "default.yaml"


def searched(table: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy in points, a row for each method and a column for each rate; NaN where a run did not end well.

    Raises:
        ValueError: No fine-tuned run, methods that were not searched alike, or no search: a single rate.
    """
    rows = table[table.headline & ~table.method.isin(CONTROLS)]
    if rows.empty:
        raise ValueError("runs: no fine-tuned run below; python run.py -m experiment=lr_search makes them")
    rows = rows.assign(rate=[float(config["train"]["learning_rate"]) for config in rows.config])
    budgets = {method: sorted(zip(group.rate, group.seed, strict=True)) for method, group in rows.groupby("method")}
    (first, budget), *others = budgets.items()
    for method, other in others:
        if other != budget:
            raise ValueError(f"runs: not the same search for {first} ({len(budget)} runs) and {method} ({len(other)})")
    if rows.rate.nunique() == 1:
        raise ValueError(f"runs: only the rate {rows.rate.iloc[0]:g} below; a search has two or more")
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
    rows = []
    for method, row in means.iterrows():
        cells = ["diverged" if pd.isna(value) else f"{value:.1f}" for value in row]
        cells[rates.index(best[method])] = Bold(cells[rates.index(best[method])])
        rows.append([method, *cells])
    text = markdown(TextTable(["method", *(f"{rate:g}" for rate in rates)], rows)) + "\n"
    ends = [method for method, rate in best.items() if rate in (rates[0], rates[-1])]
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
    means = searched(load(options.runs))
    text = table_of(means)
    output = output_folder(options)
    (output / "lr.md").write_text(text, encoding="utf-8")
    if options.write:
        write_recipe(winners(means), options.recipe)
    print(f"{text}\n{options.recipe}: {'written' if options.write else 'not changed; --write sets these rates'}")
    return 0
