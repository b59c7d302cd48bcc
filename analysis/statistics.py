"""Which difference is more than noise, from few seeds on one set of test items.

A score has two sources of error. *Seeds*: another seed of the fine-tuning gives another model; n runs show this spread.
*Items*: another draw of test questions gives another score; the standard error that comes with every score says how
far, and it does not shrink with more seeds, because all of them answer the same questions. Both are in the difference
of two methods a and b, measured with the same seeds s = 1 .. n (same data order, same items):

    d_s = a_s - b_s,    d = mean(d_s),    v_seeds = var(d_s) / n,    v_items = e_a^2 + e_b^2

Pairing over seeds takes out what a seed does to both methods. v_items is an upper bound: result files hold standard
errors but no answers to single questions, and models that come from the same pruned one err on the same questions, so
that the true variance of the difference is smaller (McNemar's test would use it). Then

    t = d / sqrt(v_seeds + v_items)    with    (n - 1) (v_seeds + v_items)^2 / v_seeds^2

degrees of freedom (Welch 1947, Satterthwaite 1946: v_seeds is estimated from n - 1, v_items is known from hundreds of
items). With three seeds and no item error this is Student's t with two degrees; with the item error it is milder, as it
should be. A method that was run with one seed shows no spread and cannot win; a control has no seed and therefore none.

*Best* is the row with the best mean if it differs from every other row at the two-sided level ALPHA. Picking the winner
first and testing it afterwards needs no further correction: the two-sided p-value of the winner against the runner-up
is valid for any number of rows (Gutmann and Maymin, Annals of Statistics 15, 1987; Hung and Fithian, arXiv 1610.03944).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy import stats

__all__ = ["ALPHA", "Difference", "Sample", "best", "best_range", "difference", "pareto_front"]

ALPHA = 0.05
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Sample:
    """Scores of one method by seed.

    Attributes:
        values: Score by seed. One score under the key None is that of a model without a seed: it is exact but for the
            items.
        item_error: Standard error over the test items, mean over the seeds; 0 for what is not a mean over items.
    """

    values: Mapping[int | None, float]
    item_error: float = 0.0

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
    mean = sum(pairs) / n
    of_seeds = 0.0 if known else _variance(pairs) / n
    of_items = a.item_error**2 + b.item_error**2
    return Difference(mean, math.sqrt(of_seeds + of_items), n, _p_value(mean, of_seeds, of_items, n))


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


def _pairs(a: Sample, b: Sample) -> list[float]:
    """d_s of every seed that both have; a model without a seed stands against each seed of the other."""
    if a.fixed and not b.fixed:
        return [a.mean - value for value in b.values.values()]
    if b.fixed:
        return [value - b.mean for value in a.values.values()]
    return [a.values[seed] - b.values[seed] for seed in a.values if seed in b.values]


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _p_value(mean: float, of_seeds: float, of_items: float, n: int) -> float:
    total = of_seeds + of_items
    if total == 0:
        return 1.0 if mean == 0 else 0.0
    share = (of_seeds / total) ** 2
    degrees = math.inf if share == 0 else (n - 1) / share
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(total), degrees))
