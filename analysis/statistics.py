"""Which difference is more than noise, from few seeds on one set of test items.

A score has two sources of error. *Seeds*: another seed of the fine-tuning gives another model. *Items*: another draw of
test questions gives another score, and more seeds do not help, because all of them answer the same questions. Both are
in the difference d of two methods a and b that answered the same items i = 1 .. N with the same seeds s = 1 .. n:

    d_si = a_si - b_si,    d_s = mean over i,    d_i = mean over s,    d = mean over both

Pairing takes out what a seed or an item does to both. What is left are a seed's effect, an item's effect and a rest,
Var(d) = S^2 / n + I^2 / N + R^2 / (n N), estimated by the mean squares of the two-way layout without replication:

    v_seeds = var(d_s) / n                   has the expectation  S^2 / n + R^2 / (n N)
    v_items = var(d_i) / N                                        I^2 / N + R^2 / (n N)
    v_rest  = var(d_si - d_s - d_i + d) / (n N)                   R^2 / (n N)          (n - 1)(N - 1) degrees of freedom

    v = v_seeds + v_items - v_rest, but not less than v_seeds or v_items: each of them is in it

A mean over tasks has v_items and v_rest of each task, over the squared number of tasks. The items of the held-out loss
are the windows of the text. Where a score comes without its items, their errors e are taken as independent, v = v_seeds
+ e_a^2 + e_b^2: an upper bound, since models that come from the same pruned one err on the same questions. Then

    t = d / sqrt(v)    with    (n - 1) v^2 / v_seeds^2

degrees of freedom (Welch 1947, Satterthwaite 1946: v_seeds is estimated from n - 1, the rest from hundreds of items).
With three seeds and no item error this is Student's t with two degrees; with the item error it is milder, as it should
be. A method that was run with one seed shows no spread and cannot win; a control has no seed and therefore none.

*Best* is the row with the best mean if it differs from every other row at the two-sided level ALPHA. Picking the winner
first and testing it afterwards needs no further correction: the two-sided p-value of the winner against the runner-up
is valid for any number of rows (Gutmann and Maymin, Annals of Statistics 15, 1987; Hung and Fithian, arXiv 1610.03944).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from scipy import stats

__all__ = ["ALPHA", "Difference", "Sample", "best", "best_range", "difference", "pareto_front"]

ALPHA = 0.05
Key = TypeVar("Key", bound=Hashable)
# The score of each item, in the unit of the score, task by task.
Items = Sequence[np.ndarray]


@dataclass(frozen=True)
class Sample:
    """Scores of one method by seed.

    Attributes:
        values: Score by seed. One score under the key None is that of a model without a seed: it is exact but for the
            items.
        item_error: Standard error over the test items, mean over the seeds; 0 for what is not a mean over items.
        items: By seed the scores of single items, where they are known; the score is the mean over tasks of their
            means.
    """

    values: Mapping[int | None, float]
    item_error: float = 0.0
    items: Mapping[int | None, Items] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN without any."""
        return sum(self.values.values()) / self.n if self.values else math.nan

    @property
    def std(self) -> float:
        """Standard deviation over the seeds (n - 1 in the denominator); NaN for fewer than two."""
        return math.sqrt(_variance(list(self.values.values()))) if self.n > 1 else math.nan

    @property
    def fixed(self) -> bool:
        """Whether this is a model without a seed."""
        return set(self.values) == {None}


@dataclass(frozen=True)
class Difference:
    """a - b.

    Attributes:
        mean: d, see the module's text.
        error: Its standard error from seeds and items.
        n: Seeds that both have.
        p: Two-sided p-value of "no difference".
    """

    mean: float
    error: float
    n: int
    p: float


def difference(a: Sample, b: Sample) -> Difference | None:
    """Compare two methods over the seeds that both have; None if fewer than two say how far a seed matters."""
    pairs = _pairs(a, b)
    known = a.fixed and b.fixed
    n = len(pairs)
    if n < 2 and not known:
        return None
    differences = [a.values[i] - b.values[j] for i, j in pairs]
    mean = sum(differences) / n
    of_seeds = 0.0 if known else _variance(differences) / n
    paired = _item_differences(a, b, pairs)
    if paired is None:
        variance = of_seeds + a.item_error**2 + b.item_error**2
    else:
        of_items, of_rest = _item_variances(paired)
        variance = max(of_seeds + of_items - of_rest, of_seeds, of_items)
    return Difference(mean, math.sqrt(variance), n, _p_value(mean, of_seeds, variance, n))


def best(samples: Mapping[Key, Sample], *, higher: bool) -> Key | None:
    """The method that is better than every other one, or None if noise may have put it first.

    Args:
        samples: Two or more methods; with fewer nothing can be the best.
        higher: Whether more is better.
    """
    measured = {key: sample for key, sample in samples.items() if sample.values}
    if len(measured) < 2:
        return None
    sign = 1 if higher else -1
    first = max(measured, key=lambda key: sign * measured[key].mean)
    for key, sample in measured.items():
        if key != first:
            lead = difference(measured[first], sample)
            if lead is None or lead.p >= ALPHA or sign * lead.mean <= 0:
                return None
    return first


def best_range(ranges: Mapping[Key, tuple[float, float]]) -> Key | None:
    """The key whose range (low, high) ends below where every other one begins; None if ranges overlap.

    For costs, where less is better and every run shows its own spread: steps from p10 to p90 of their times, exact byte
    counts from the smallest to the largest over the seeds.
    """
    if len(ranges) < 2:
        return None
    first = min(ranges, key=lambda key: ranges[key][1])
    return first if all(ranges[first][1] < low for key, (low, _) in ranges.items() if key != first) else None


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices, by rising cost, of the points that no other one beats.

    One point beats another if it costs no more and gains no less, and is better in one of the two.
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not front or gains[i] > gains[front[-1]] or (costs[i], gains[i]) == (costs[front[-1]], gains[front[-1]]):
            front.append(i)
    return front


def _pairs(a: Sample, b: Sample) -> list[tuple[int | None, int | None]]:
    """The seeds of a and b that are compared; a model without a seed stands against each seed of the other."""
    if a.fixed or b.fixed:
        return [(i, j) for i in a.values for j in b.values]
    return [(seed, seed) for seed in a.values if seed in b.values]


def _item_differences(a: Sample, b: Sample, pairs: Sequence[tuple[int | None, int | None]]) -> Items | None:
    """d_si of each task, n x N; None if the items of one are not known or not those of the other."""
    if not pairs or any(i not in a.items or j not in b.items for i, j in pairs):
        return None
    first = [len(task) for task in a.items[pairs[0][0]]]
    sizes = [[len(task) for task in tasks] for i, j in pairs for tasks in (a.items[i], b.items[j])]
    if any(size != first for size in sizes) or not first or min(first) < 2:
        return None
    rows = [[own - other for own, other in zip(a.items[i], b.items[j], strict=True)] for i, j in pairs]
    return [np.stack(task) for task in zip(*rows, strict=True)]


def _item_variances(differences: Items) -> tuple[float, float]:
    """v_items and v_rest of a mean over tasks, from d_si (n x N) of each."""
    of_items = of_rest = 0.0
    for d in differences:
        n, count = d.shape
        d_i = d.mean(axis=0)
        of_items += d_i.var(ddof=1) / count
        if n > 1:
            rest = d - d_i - d.mean(axis=1, keepdims=True) + d.mean()
            of_rest += (rest**2).sum() / ((n - 1) * (count - 1)) / (n * count)
    return of_items / len(differences) ** 2, of_rest / len(differences) ** 2


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _p_value(mean: float, of_seeds: float, variance: float, n: int) -> float:
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    share = (of_seeds / variance) ** 2
    degrees = math.inf if share == 0 else (n - 1) / share
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), degrees))
