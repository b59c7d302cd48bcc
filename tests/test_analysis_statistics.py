"""What counts as a difference, and whether methods look different."""

import math
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtr

from analysis.statistics import (
    ALPHA,
    Sample,
    best,
    best_range,
    between,
    difference,
    differences,
    p_value,
    pareto_front,
    pooled,
)
from analysis.style import END_STATES, METHODS, order_of, style_of

score = st.floats(0, 100)
error = st.floats(0, 5)


@st.composite
def pairs(draw):
    """Two methods with the same seeds."""
    n = draw(st.integers(2, 6))
    return tuple(Sample({seed: draw(score) for seed in range(n)}, draw(error)) for _ in range(2))


@given(pairs())
@example((Sample({0: 0.0, 1: 2.7040992348797322e-269}, 0.0), Sample({0: 0.0, 1: 0.0}, 1.0)))  # p rounds to 1
def test_a_difference_changes_its_sign_with_its_sides(pair):
    there, back = difference(*pair), difference(*reversed(pair))
    assert there.mean == pytest.approx(-back.mean) and there.p == pytest.approx(back.p)
    assert 0 <= there.p <= 1 and there.n == pair[0].n


@given(pairs(), st.lists(st.floats(-50, 50), min_size=6, max_size=6))
def test_what_a_seed_does_to_both_methods_does_not_count(pair, shifts):
    shifted = [Sample({seed: v + shifts[seed] for seed, v in one.values.items()}, one.item_error) for one in pair]
    before, after = difference(*pair), difference(*shifted)
    assert after.mean == pytest.approx(before.mean, abs=1e-9) and after.error == pytest.approx(before.error, abs=1e-6)


def test_without_item_errors_it_is_the_paired_t_test():
    a, b = [70.1, 71.3, 70.8, 72.0], [69.0, 70.9, 70.1, 70.2]
    expected = stats.ttest_rel(a, b)
    ours = difference(Sample(dict(enumerate(a))), Sample(dict(enumerate(b))))
    assert ours.p == pytest.approx(expected.pvalue) and ours.mean / ours.error == pytest.approx(expected.statistic)


def answered(items, error=0.0):
    """The sample of a method whose answers are `items`: by seed, an array for each task."""
    return Sample(
        {seed: float(np.mean([task.mean() for task in tasks])) for seed, tasks in items.items()}, error, items
    )


def drawn(seed, *, seeds=(0, 1, 2), counts=(40, 30), spread=(1.0, 8.0, 12.0)):
    """Two methods with the same truth, whose differences have effects of seeds and items and a rest, as in the text.

    Both also share a large effect of each seed and of each item.
    """
    draw = np.random.default_rng(seed).normal
    common = {s: draw(0, 30) for s in seeds}
    of_item = [draw(0, 40, count) for count in counts]
    effect = [draw(0, spread[1], count) for count in counts]
    a, b = {}, {}
    for s in seeds:
        shift = draw(0, spread[0])
        a[s] = [50 + common[s] + own for own in of_item]
        b[s] = [own + shift + item + draw(0, spread[2], len(own)) for own, item in zip(a[s], effect, strict=True)]
    return answered(a, 5.0), answered(b, 5.0)


def test_items_that_are_known_are_paired():
    """Without effects of a seed the two-way variance is that of the items' mean differences."""
    a, b = drawn(0, counts=(50,), spread=(0.0, 8.0, 0.0))
    d_i = np.mean([a.items[s][0] - b.items[s][0] for s in range(3)], axis=0)
    paired = difference(a, b)
    assert paired.error == pytest.approx(d_i.std(ddof=1) / math.sqrt(50))
    unpaired = difference(Sample(a.values, 5.0), Sample(b.values, 5.0))
    assert unpaired.error >= math.sqrt(50) > paired.error
    control = answered({None: a.items[0]}), answered({None: b.items[0]})
    assert difference(*control).error == pytest.approx((a.items[0][0] - b.items[0][0]).std(ddof=1) / math.sqrt(50))
    assert difference(control[0], b).n == 3


@pytest.mark.parametrize(("of_seeds", "most"), [(0.0, 1.3), (3.0, 1.1)])
def test_the_variance_of_a_difference_is_that_of_many_draws(of_seeds, most):
    """Mean of the estimate over draws, and the spread of the differences themselves: S^2/n + I^2/N + R^2/(nN).

    Without an effect of the seeds the lower bound lifts the estimate.
    """
    found = [difference(*drawn(seed, spread=(of_seeds, 8.0, 12.0))) for seed in range(600)]
    truth = of_seeds**2 / 3 + (8.0**2 + 12.0**2 / 3) * (1 / 40 + 1 / 30) / 4
    assert np.var([one.mean for one in found]) == pytest.approx(truth, rel=0.2)
    assert 0.9 * truth < np.mean([one.error**2 for one in found]) < most * truth
    assert ALPHA / 10 < np.mean([one.p < ALPHA for one in found]) < ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 600)


def test_p_is_that_of_student_and_of_the_items_where_there_is_nothing_else():
    for degrees in (1, 2, 8, 14):
        for level in (0.5, 1e-3, 1e-7):
            assert p_value(stats.t.isf(level / 2, degrees), 1.0, degrees) == pytest.approx(level, rel=1e-4)
            assert p_value(stats.norm.isf(level / 2), 0.0, degrees, 1.0) == pytest.approx(level, rel=1e-4)
            assert p_value(stats.t.isf(level / 2, 99), 0.0, degrees, 1.0, 99) == pytest.approx(level, rel=1e-3)
    assert p_value(0.0, 0.0, 2) == 1 and p_value(1.0, 0.0, 2) == 0 and p_value(0.0, 1.0, 2, 1.0) == 1


@pytest.mark.parametrize(("degrees", "power"), [(2, 1), (14, 2)])
def test_p_is_the_integral_over_the_unknown_variance(degrees, power):
    """Of the tail of a normal d with the variance V + w, weighed by the likelihood of V and its prior."""
    d, of_seeds, of_items = 2.5, 0.4, 0.7
    V = np.geomspace(1e-4, 1e6, 200_001)
    prior = 1 / V if power == 1 else (V + of_items) / V**2
    weight = prior * V ** (-degrees / 2) * np.exp(-degrees * of_seeds / (2 * V)) * V  # dV = V d(log V)
    expected = np.sum(weight * 2 * stats.norm.sf(d / np.sqrt(V + of_items))) / np.sum(weight)
    assert p_value(d, of_seeds, degrees, of_items) == pytest.approx(expected, rel=1e-4)


def variants(*spreads, n=3, seed=0, items=0.0):
    """Rows of one truth by number, each with its spread over the seeds and its own error of the items."""
    draw = np.random.default_rng(seed).normal
    common = draw(0, 2, n)
    rows = [draw(0, items) + common + spread * draw(0, 1, n) for spread in spreads]
    return {row: Sample(dict(enumerate(values)), items) for row, values in enumerate(rows)}


def test_variants_share_the_mean_of_the_variances_of_their_pairs():
    rows = variants(0.5, 1.0, 1.5, 0.2)
    together = between(0, 1, rows, dict.fromkeys(rows, "lors"))
    alone = differences(rows).values()
    assert (together.degrees, together.pooled) == (6, 4)
    assert together.error**2 == pytest.approx(np.mean([one.error**2 for one in alone]))
    assert {(one.degrees, one.pooled) for one in alone} == {(2, 0)}
    assert together.p == pytest.approx(2 * stats.t.sf(abs(together.mean) / together.error, 6))


def test_only_variants_of_one_method_with_the_same_seeds_are_pooled():
    rows = variants(1.0, 1.0, 1.0, 1.0)
    pools = {0: "a", 1: "a", 2: "b", 3: None}
    assert {one.pooled for one in differences(rows, pools).values()} == {0}  # two rows have no more than their pair
    pools |= {2: "a"}
    assert {pair: one.pooled for pair, one in differences(rows, pools).items()} == {
        (0, 1): 3, (0, 2): 3, (1, 2): 3, (0, 3): 0, (1, 3): 0, (2, 3): 0
    }  # fmt: skip
    fewer = rows | {2: Sample({0: 1.0, 1: 2.0})}
    assert {one.pooled for one in differences(fewer, pools).values()} == {0} and pooled(list(fewer.values())) != []
    assert pooled([Sample({0: 1.0})] * 4) == pooled([]) == []


def test_all_pairs_of_a_table_are_corrected_by_holm():
    means = {"a": 0, "b": 1, "c": 3}
    rows = {name: Sample({0: mean, 1: mean + 0.1, 2: mean - 0.1}, 0.4) for name, mean in means.items()}
    rows |= {"one seed": Sample({0: 9.0})}
    found = differences(rows)
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    ordered = sorted(found.values(), key=lambda one: one.p)
    corrected = [3 * ordered[0].p, max(3 * ordered[0].p, 2 * ordered[1].p), ordered[2].p]
    assert [one.holm for one in ordered] == pytest.approx(np.minimum(1, np.maximum.accumulate(corrected)))
    assert differences({"a": rows["a"]}) == {}


LEVELS = (0.05, 0.01, 0.001)


@cache
def borders(f, g):
    """|d| / sqrt(v) from which on p is below each of LEVELS, at shares of the seeds in v, on which alone it depends."""
    shares = np.sin(np.linspace(0, math.pi / 2, 33)) ** 2
    low, high = np.zeros((len(LEVELS), len(shares))), np.full((len(LEVELS), len(shares)), 1e3)
    for _ in range(30):
        middle = (low + high) / 2
        rejected = p_value(middle, shares, f, 1 - shares, g) < np.array(LEVELS)[:, None]
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return shares, high


def true_sizes(n, rows, of_seeds, of_items, of_rest, items, draws=200_000):
    """How often p is below each of LEVELS where nothing differs, over the nominal level.

    The mean squares of a two-way layout of normal effects are independent chi-square variables, and independent of the
    mean d (Cochran). They are drawn; over d, which is normal, the rest is exact, so that the draws suffice for 0.001.

    Args:
        n: Seeds.
        rows: Rows that are pooled; 2 for a pair by itself.
        of_seeds: S of a difference; `of_items` I, `of_rest` R.
        items: N.
        draws: Tables.
    """
    f, g, h = (rows - 1) * (n - 1), items - 1, (n - 1) * (items - 1)
    rng = np.random.default_rng(n + rows + items)
    a, b, c = of_seeds**2 / n, of_items**2 / items, of_rest**2 / (n * items)
    v_seeds = (a + c) * rng.chisquare(f, draws) / f
    v_items, v_rest = (b + c) * rng.chisquare(g, draws) / g, c * rng.chisquare(h, draws) / h
    v = v_seeds + np.maximum(v_items - v_rest, 0)
    shares, of_levels = borders(f, g)
    scale, share = np.sqrt(v / (a + b + c)), v_seeds / v
    found = [np.mean(2 * ndtr(-scale * np.interp(share, shares, border))) for border in of_levels]
    return np.array(found) / LEVELS


# Effects (S, I, R) in points, N items: of a seed none, a small one, as large as that of the items, and alone.
EFFECTS = [(0.0, 15.0, 25.0, 4200), (0.2, 15.0, 25.0, 4200), (0.5, 15.0, 25.0, 4200), (1.7, 15.0, 25.0, 4200),
           (1.0, 0.0, 25.0, 4200), (1.0, 0.0, 0.0, 4200), (1.0, 10.0, 20.0, 300), (0.0, 15.0, 0.0, 300)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(("of_seeds", "of_items", "of_rest", "items"), EFFECTS)
def test_the_true_size_is_the_nominal_one(n, of_seeds, of_items, of_rest, items):
    """A pair by itself has any two variances, of which S^2 is the sum; variants that are pooled have one."""
    for rows in (2, 3, 5, 6):
        sizes = true_sizes(n, rows, of_seeds, of_items, of_rest, items)
        assert (sizes <= 1.2).all(), (rows, sizes)
        assert rows < 6 or (sizes >= 0.8).all(), (rows, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("items", [0.0, 0.4])
@pytest.mark.parametrize("spreads", [(0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.2, 1.7), (0.5,) * 8, (1.7, 1.7, 0.1, 0.1)])
def test_in_a_table_of_equal_methods_nothing_is_found_more_often_than_the_level_says(spreads, items):
    """Holm over all pairs, and the winner against all others, with spreads that differ as those of methods do."""
    trials, pairs = 1000, list(combinations(range(len(spreads)), 2))
    tables = [variants(*spreads, seed=seed, items=items) for seed in range(trials)]
    # Holm finds something if and only if Bonferroni does.
    least = np.array([min(between(*pair, rows).p for pair in pairs) for rows in tables])
    limit = 1.2 * ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / trials)
    assert np.mean(least * len(pairs) < ALPHA) <= limit
    assert np.mean([best(rows, higher=True) is not None for rows in tables]) <= limit


@given(st.integers(0, 50), st.floats(-50, 50))
def test_what_an_item_does_to_both_methods_does_not_count(seed, effect):
    pair = drawn(seed)
    effects = [effect * np.arange(len(task)) for task in pair[0].items[0]]
    moved = [
        answered({s: [x + e for x, e in zip(tasks, effects, strict=True)] for s, tasks in one.items.items()})
        for one in pair
    ]
    before, after = difference(*pair), difference(*moved)
    assert after.mean == pytest.approx(before.mean, abs=1e-6) and after.error == pytest.approx(before.error, rel=1e-6)


def test_items_of_another_exam_or_of_one_side_only_are_not_paired():
    a, b = drawn(1)
    unpaired = difference(Sample(a.values, 5.0), Sample(b.values, 5.0)).error
    shorter = Sample(b.values, 5.0, {s: [task[1:] for task in tasks] for s, tasks in b.items.items()})
    partly = Sample(b.values, 5.0, {0: b.items[0]})
    assert {difference(a, other).error for other in (shorter, partly, Sample(b.values, 5.0))} == {unpaired}


def test_a_control_has_no_seeds_and_one_seed_says_nothing():
    dense, tuned = Sample({None: 80.0}, 0.1), Sample({0: 70.0, 1: 70.2, 2: 69.9}, 0.1)
    assert difference(tuned, dense).n == 3 and difference(tuned, dense).p < 1e-3
    assert difference(dense, tuned).mean == pytest.approx(-difference(tuned, dense).mean)
    assert difference(dense, Sample({None: 60.0}, 0.1)).p < 1e-6
    assert difference(Sample({0: 70.0}, 0.1), tuned) is None
    assert difference(Sample({5: 70.0, 6: 71.0}, 0.1), tuned) is None


def test_the_best_must_beat_every_other_one():
    clear = {name: Sample({s: mean + 0.1 * s for s in range(3)}, 0.1) for name, mean in (("a", 75), ("b", 70))}
    assert best(clear, higher=True) == "a" and best(clear, higher=False) == "b"
    assert best(clear | {"c": Sample({0: 74.9, 1: 75.2, 2: 75.1}, 0.1)}, higher=True) is None
    assert best(clear | {"c": Sample({0: 60.0}, 0.1)}, higher=True) is None
    assert best({"a": clear["a"]}, higher=True) is None
    zero = Sample(dict.fromkeys(range(3), 0.0))
    assert best({"a": Sample({0: 1.0, 1: 2.0, 2: 3.4}), "b": zero}, higher=True) is None  # p is 0.09


def test_ranges_win_only_if_they_do_not_overlap():
    assert best_range({"a": (1, 2), "b": (2.1, 3)}) == "a"
    assert best_range({"a": (1, 2), "b": (2, 3)}) is None
    assert best_range({"a": (1, 1), "b": (1, 1)}) is None
    assert best_range({"a": (1, 2)}) is None


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30))
def test_the_front_is_what_no_point_beats(points):
    front = set(pareto_front(*zip(*points, strict=True)))
    for i, (cost, gain) in enumerate(points):
        beaten = any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
        assert (i in front) == (not beaten)


def test_every_method_has_a_name_and_no_two_look_alike():
    configured = {file.stem for file in (Path(__file__).parents[1] / "conf" / "method").glob("*.yaml")} - {"none"}
    assert configured <= METHODS.keys()
    assert len({(style.colour, style.marker) for style in METHODS.values()}) == len(METHODS)
    assert len({style.name for style in METHODS.values()}) == len(METHODS)
    looks = {(style_of("lora", state).line, style_of("lora", state).filled) for state in END_STATES}
    assert len(looks) == 3
    unknown = style_of("my_method")
    assert unknown == style_of("my_method") and unknown.marker not in {style.marker for style in METHODS.values()}
    assert order_of("my_method") > order_of("shira")
