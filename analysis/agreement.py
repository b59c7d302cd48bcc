"""Do two models agree on which methods are better? Rank correlations of the methods that two experiments share.

A row for each way of pruning and pair of scores: held-out answers, text and average accuracy where a model has the
first, else the average; losses count with the opposite sign. A method is what it ended as, LoRA with its adapter and
re-masked (with its zeros lost it is the first once more). Rates and ranks may differ, options of a method may not.
Seeds are those that all methods of a model have. The bootstrap draws seeds, and items task by task, the same for all
methods of a model. It is rough: n seeds show (n - 1) / n of their variance, and each draw adds to the noise that the
scores have already.
"""

import argparse
import math
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis.groups import WHEN, configs, varying
from analysis.lines import short_name
from analysis.measures import ACCURACY, ANSWERS_LOSS, HELDOUT_LOSS
from analysis.results import CONTROLS, load, publish
from analysis.statistics import Sample
from analysis.style import name_of, order_of
from analysis.table_writer import TextTable, markdown

__all__ = ["add_arguments", "agreement", "run"]

# Of a score: how it is measured, and the sign with which more is better.
SCORES = {"held-out answers": (ANSWERS_LOSS, -1), "text": (HELDOUT_LOSS, -1), "average": (ACCURACY, 1)}
LEAST, EXACT, DRAWS = 3, 8, 2000
NOTE = f"""Spearman's rank correlation of the methods that both have, +1 for the same order; the 95 % interval of a
bootstrap over seeds and items ({DRAWS} draws), which is rough; the two-sided p of all permutations for up to {EXACT}
methods, else of Student's t."""


def agreement(first: pd.DataFrame, second: pd.DataFrame) -> TextTable:
    """The table, from what `results.load` returns of each experiment.

    Raises:
        ValueError: Several runs of a method with one seed, or too few methods that both have.
    """
    rows = pd.concat([first.assign(side=0), second.assign(side=1)], ignore_index=True)
    rows = rows[~rows.method.isin(CONTROLS) & (rows.status == "ok") & (rows["mode"] == "run") & (rows.sparsity > 0)]
    values = configs(rows)
    options = [key for key in varying(values) if key.startswith("method.")]
    chosen = ["".join(f", {short_name(key)} {of_row[key]}" for key in options if key in of_row) for of_row in values]
    first_pruned = [of_row.get(WHEN) != "after" for of_row in values]
    rows = rows.assign(options=chosen, pruned=rows.pruner + " " + rows.label)[first_pruned]
    rows = rows[rows.end_state != "dense"]
    named = ["side", "pruned", "method", "end_state", "options"]
    if (twice := rows[rows.duplicated([*named, "seed"])]).size:
        row = twice.iloc[0]
        raise ValueError(f"runs: several of {row.method}, {row.pruned}, seed {row.seed:g} for {row.model}")
    found = []
    for pruned, same in rows.groupby("pruned", sort=False):
        sides = [dict(list(of_one.groupby(named[2:]))) for _, of_one in same.groupby("side")]
        methods = sorted(set.intersection(*map(set, sides)), key=lambda one: (order_of(one[0]), one))
        if len(sides) == 2 and len(methods) >= LEAST:  # fewer have no order to speak of
            ends = [(method, None if end == "merged" else end, options) for method, end, options in methods]
            names = "; ".join(f"{name_of(method, end)}{options}" for method, end, options in ends)
            a, b = (_scores(number, [side[one] for one in methods]) for number, side in enumerate(sides))
            for of_a, of_b in product(a, b):
                found.append([pruned, of_a, of_b, str(len(methods)), *_correlation(a[of_a], b[of_b]), names])
    if not found:
        raise ValueError(f"runs: no pruned model with {LEAST} methods that both experiments have scored")
    models = [f"score of {table.model.iloc[0]}" for table in (first, second)]
    return TextTable(["pruned", *models, "methods", "rank correlation", "95 %", "p", "which"], found)


def _scores(number: int, methods: list[pd.DataFrame]) -> dict[str, np.ndarray]:
    """By name of the score its mean for each method, more is better, then the same of DRAWS draws; draws x methods."""
    names = list(SCORES) if methods[0].answers_loss.notna().any() else ["average"]
    samples = {name: [SCORES[name][0].sample(rows) for rows in methods] for name in names}
    rng = np.random.default_rng(number)  # the models are drawn apart
    seeds = {name: set.intersection(*(set(sample.values) for sample in known)) for name, known in samples.items()}
    return {name: SCORES[name][1] * _drawn(samples[name], sorted(seeds[name]), rng) for name in names if seeds[name]}


def _drawn(samples: list[Sample], seeds: list[int], rng: np.random.Generator) -> np.ndarray:
    items = [[sample.items.get(seed) or [np.full(1, sample.values[seed])] for seed in seeds] for sample in samples]
    means = 0.0
    for task in range(len(items[0][0])):
        scores = np.array([[of_seed[task] for of_seed in of_method] for of_method in items])  # methods x seeds x items
        means = means + np.einsum("mst,bt->bms", scores, _weights(scores.shape[2], rng), optimize=True)
    return np.einsum("bms,bs->bm", means / len(items[0][0]), _weights(len(seeds), rng))


def _weights(n: int, rng: np.random.Generator) -> np.ndarray:
    """First equal weights, then how often each of n is drawn, over n."""
    return np.vstack([np.full(n, 1 / n), rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n])


def _correlation(a: np.ndarray, b: np.ndarray) -> list[str]:
    """Rho, its interval, and p."""
    x, y = (stats.zscore(stats.rankdata(scores, axis=1), axis=1) for scores in (a, b))
    rho, *drawn = (x * y).mean(1)
    p = stats.spearmanr(a[0], b[0]).pvalue
    if len(a[0]) <= EXACT:
        p = np.mean(np.abs(np.array(list(permutations(x[0]))) @ y[0]) >= abs(x[0] @ y[0]) - 1e-9)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return ["-", "-", "-"] if math.isnan(rho) else [f"{rho:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.2g}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two experiments."""
    parser.add_argument("runs", type=Path, nargs=2, help="folder of runs or packed file of each experiment")
    parser.add_argument("--output", type=Path, help="folder for what is written; default: that of the first experiment")


def run(options: argparse.Namespace) -> int:
    """Print the table and write `agreement.md`."""
    options.output = options.output or options.runs[0].parent
    table = agreement(*(load([place]) for place in options.runs))
    publish(f"{markdown(table)}\n\n{NOTE}\n", options, "agreement.md")
    return 0
