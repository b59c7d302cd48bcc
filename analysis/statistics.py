"""Which difference is more than noise, from few seeds on one set of test items.

No library has this test: the two-way variance of seeds and items, and the p value of a sum of two estimated variances.

**Variance.** Two methods answered the same items i = 1 .. N with the same seeds s = 1 .. n, d_si = a_si - b_si. What a
seed or an item does to both cancels. The rest is estimated by the mean squares of the two-way layout without
replication (means: d_s over i, d_i over s, d over both):

    v_seeds = var(d_s) / n                       n - 1 degrees of freedom
    v_items = var(d_i) / N
    v_rest  = var(d_si - d_s - d_i + d) / (n N)  (n - 1)(N - 1) degrees of freedom; it is in both of the above
    v       = v_seeds + w,   w = max(v_items - v_rest, 0)

A mean over tasks has v_items and v_rest of each task, over the squared number of tasks. The items of the held-out loss
are the windows of the text. That of held-out answers is a ratio of sums, l = sum n_i l_i / sum n_i over answers of n_i
tokens: their items are l + (l_i - l) n_i / mean(n), whose mean is l and whose v_items is that of the ratio. Where
single items are not known, w = e_a^2 + e_b^2 with the standard errors e over the items, an upper bound. The standard
error that is shown is sqrt(v), but not less than sqrt(v_items).

**Pooling.** Rows of one table that are variants of one method (same data, recipe, rate, rank and end state) share one
variance over the seeds. For m >= 3 such rows with the same seeds, y_ks the score of row k with seed s,

    v_seeds = 2 var(y_ks - y_k - y_s + y) / n    (m - 1)(n - 1) degrees of freedom

Different methods are never pooled, since their spreads differ, and claims never are.

**p values.** With f degrees of freedom of v_seeds and g of w (Satterthwaite over the tasks),

    p = P(|sqrt(v_seeds) T_f + sqrt(w) T_g| > |d|)

for independent t variables (Behrens 1929, Fisher 1935). From f = `ENOUGH` on the prior of Ghosh and Kim (Canadian
Journal of Statistics 29, 2001) takes the place of Fisher's; p is then a mixture: with the weight v_seeds / v the p
above, with the weight w / v that of f + 2 degrees of freedom and v_seeds f / (f + 2).
`tests/test_analysis_statistics.py` simulates the sizes.

All pairs of a table are corrected by Holm. *Best* is the row with the best mean if it differs from every other row at
the two-sided level ALPHA; this needs no correction for the choice of the winner (Gutmann and Maymin, Annals of
Statistics 15, 1987). One seed shows no spread and cannot win. Every p is conditional on `CONDITION`.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from typing import TypeVar

import numpy as np
from numpy.polynomial.legendre import leggauss
from scipy import special, stats

__all__ = ["ALPHA", "CONDITION", "Difference", "Sample", "best", "best_range", "between", "difference", "differences"]
__all__ += ["holm", "p_value", "paired_item_error", "pareto_front", "pooled"]

ALPHA = 0.05
CONDITION = "conditional on one pruned checkpoint and on learning rates from one search seed"
# Degrees of freedom from which on p is the matching one; fewer rows than LEAST_POOLED have no more than n - 1.
ENOUGH = 8
LEAST_POOLED = 3
# Points of the quadrature over a chi-square variable, of the seeds and of the items: p is right to 1e-4 of itself down
# to 1e-8.
POINTS, ITEM_POINTS = 128, 32
Key = TypeVar("Key", bound=Hashable)
# The score of each item, in the unit of the score, task by task.
Items = Sequence[np.ndarray]
# Name of the pool of each row.
Pools = Mapping[Key, Hashable | None]


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
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def std(self) -> float:
        """Standard deviation over the seeds (n - 1 in the denominator); NaN for fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else math.nan

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
        p: Two-sided p value of "no difference", of this pair alone.
        degrees: Degrees of freedom f of the variance over the seeds; infinite where there are no seeds.
        pooled: Number of rows that it was pooled over; 0 if it was not.
        holm: p corrected for all pairs of the table; NaN before that.
    """

    mean: float
    error: float
    n: int
    p: float
    degrees: float
    pooled: int = 0
    holm: float = math.nan


def difference(a: Sample, b: Sample, pool: Sequence[Sample] = ()) -> Difference | None:
    """Compare two methods over the seeds that both have; None if fewer than two say how far a seed matters.

    Args:
        a: One of them.
        b: The other.
        pool: The variants of one method, a and b among them, whose variance over the seeds is taken as one.
    """
    pairs = _pairs(a, b)
    known = a.fixed and b.fixed
    n = len(pairs)
    if n < 2 and not known:
        return None
    d_s = np.array([a.values[i] - b.values[j] for i, j in pairs])
    mean = float(d_s.mean())
    rows = pooled(pool)
    rows = rows if {id(a), id(b)} <= set(map(id, rows)) else []
    if known:
        of_seeds, degrees = 0.0, math.inf
    elif rows:
        of_seeds, degrees = _pooled_variance(rows), (len(rows) - 1) * (n - 1)
    else:
        of_seeds, degrees = float(d_s.var(ddof=1)) / n, n - 1
    paired = _item_differences(a, b, pairs)
    if paired is None:
        of_items, of_rest, item_degrees = a.item_error**2 + b.item_error**2, 0.0, math.inf
    else:
        of_items, of_rest, item_degrees = _item_variances(paired)
    error = math.sqrt(max(of_seeds + of_items - of_rest, of_seeds, of_items))
    p = float(p_value(mean, of_seeds, degrees, max(of_items - of_rest, 0.0), item_degrees))
    return Difference(mean, error, n, p, degrees, len(rows))


def paired_item_error(a: Sample, b: Sample) -> float:
    """Standard error of a - b over the test items, for the seeds that there are: sqrt(v_items) of the module's text."""
    pairs = _pairs(a, b)
    paired = _item_differences(a, b, pairs)
    return math.hypot(a.item_error, b.item_error) if paired is None else math.sqrt(_item_variances(paired)[0])


def between(a: Key, b: Key, samples: Mapping[Key, Sample], pools: Pools | None = None) -> Difference | None:
    """Compare two rows of a table.

    Args:
        a: One of them.
        b: The other.
        samples: The rows.
        pools: For each row the name of the variants that it is one of, or None; without it nothing is pooled.
    """
    name = None if pools is None else pools[a]
    pool = [] if name is None else [sample for key, sample in samples.items() if pools[key] == name]
    return difference(samples[a], samples[b], pool)


def differences(samples: Mapping[Key, Sample], pools: Pools | None = None) -> dict[tuple[Key, Key], Difference]:
    """All pairs of a table that can be compared, in the order of the rows, corrected by Holm; see `between`."""
    of_pairs = {(a, b): between(a, b, samples, pools) for a, b in combinations(samples, 2)}
    found = {pair: one for pair, one in of_pairs.items() if one is not None}
    corrected = holm([one.p for one in found.values()])
    return {pair: replace(one, holm=p) for (pair, one), p in zip(found.items(), corrected, strict=True)}


def holm(of_pairs: Sequence[float]) -> list[float]:
    """p values corrected for all of them (Holm, Scandinavian Journal of Statistics 6, 1979), in their order."""
    p, corrected = 0.0, [1.0] * len(of_pairs)
    for rank, place in enumerate(np.argsort(of_pairs, kind="stable")):
        corrected[place] = p = max(p, min(1.0, (len(of_pairs) - rank) * of_pairs[place]))
    return corrected


def best(samples: Mapping[Key, Sample], *, higher: bool, pools: Pools | None = None) -> Key | None:
    """The method that is better than every other one, or None if noise may have put it first.

    Args:
        samples: Two or more methods; with fewer nothing can be the best.
        higher: Whether more is better.
        pools: As `between` takes them.
    """
    measured = {key: sample for key, sample in samples.items() if sample.values}
    if len(measured) < 2:
        return None
    sign = 1 if higher else -1
    first = max(measured, key=lambda key: sign * measured[key].mean)
    for key in measured:
        if key != first:
            lead = between(first, key, measured, pools)
            if lead is None or lead.p >= ALPHA or sign * lead.mean <= 0:
                return None
    return first


def pooled(pool: Sequence[Sample]) -> list[Sample]:
    """The rows of a pool whose variance over the seeds is taken as one: those with the same seeds as most others.

    Empty if these are fewer than `LEAST_POOLED`, or have fewer than two seeds.
    """
    by_seeds = defaultdict(list)
    for one in pool:
        by_seeds[frozenset(one.values)].append(one)
    rows = max(by_seeds.values(), key=len, default=[])
    return rows if len(rows) >= LEAST_POOLED and rows[0].n > 1 else []


def p_value(
    mean: np.ndarray | float,
    of_seeds: np.ndarray | float,
    degrees: float,
    of_items: np.ndarray | float = 0.0,
    item_degrees: float = math.inf,
) -> np.ndarray:
    """Two-sided p of a mean difference d whose variance is a sum of two estimates; see the module's text.

    Args:
        mean: d.
        of_seeds: v_seeds.
        degrees: f.
        of_items: w.
        item_degrees: g; infinite for a variance that is known.

    Returns:
        p, in the common shape of the arrays.
    """
    d, s, w = (np.asarray(value, float) for value in (mean, of_seeds, of_items))
    p = _tail(d, s, degrees, w, item_degrees)
    if ENOUGH <= degrees < math.inf:
        wider = _tail(d, s * degrees / (degrees + 2), degrees + 2, w, item_degrees)
        share = np.divide(s, s + w, out=np.ones(np.broadcast(s, w).shape), where=s + w > 0)
        p = share * p + (1 - share) * wider
    return p


def _tail(d: np.ndarray, of_seeds: np.ndarray, f: float, of_items: np.ndarray, g: float) -> np.ndarray:
    """P(|sqrt(of_seeds) T_f + sqrt(of_items) T_g| > |d|): a mean over the chi-square variables below T_f and T_g."""
    seeds, weights = _chi_square(f, POINTS)
    items, item_weights = _chi_square(g, ITEM_POINTS)
    spread = np.sqrt(of_seeds[..., None, None] / seeds[:, None] + of_items[..., None, None] / items)
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.abs(d)[..., None, None] / spread
    p = np.einsum("...ij,i,j", 2 * special.ndtr(-far), weights, item_weights)
    return np.where(d == 0, 1.0, np.minimum(p, 1.0))  # 1 also where nothing spreads, and not above it by rounding


@lru_cache(maxsize=256)
def _chi_square(degrees: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights that stand for a chi-square variable over its degrees of freedom."""
    if math.isinf(degrees):
        return np.ones(1), np.ones(1)
    x, weights = leggauss(points)
    u = (x + 1) / 2  # its fourth power is the probability below the value: the far tail of t is in the smallest ones
    return stats.chi2.ppf(u**4, degrees) / degrees, 2 * weights * u**3


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


def _item_variances(differences: Items) -> tuple[float, float, float]:
    """v_items and v_rest of a mean over tasks, from d_si (n x N) of each, and the degrees of freedom of v_items."""
    of_items = of_rest = spread = 0.0
    for d in differences:
        n, count = d.shape
        d_i = d.mean(axis=0)
        of_task = d_i.var(ddof=1) / count
        of_items += of_task
        spread += of_task**2 / (count - 1)
        if n > 1:
            of_rest += _rest_square(d) / (n * count)
    tasks = len(differences) ** 2
    return of_items / tasks, of_rest / tasks, of_items**2 / spread if spread else math.inf


def _pooled_variance(rows: Sequence[Sample]) -> float:
    """v_seeds of a difference of two of these rows, from all of them; they have the same seeds."""
    y = np.array([[row.values[seed] for seed in rows[0].values] for row in rows])  # m x n
    return 2 * _rest_square(y) / y.shape[1]


def _rest_square(x: np.ndarray) -> float:
    """Mean square of what the means of rows and columns of a two-way layout do not explain."""
    rest = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    rows, columns = x.shape
    return float((rest**2).sum()) / ((rows - 1) * (columns - 1))
