"""How far every two lines of a table are apart in their average, paired over seeds and test items (`statistics`)."""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from analysis.groups import Group
from analysis.lines import Line, lines_of, told_apart
from analysis.measures import ACCURACY
from analysis.notes import title_of
from analysis.statistics import difference

__all__ = ["pairwise"]

COLUMNS = ("table", "a", "b", "difference", "error", "p", "n")


def pairwise(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each pair of lines of a group that have an average, the higher one first.

    Columns: table (its title), a and b (names of the lines), difference (points) and its standard error, p (two-sided,
    of no difference; not corrected for the number of pairs), n (seeds that both have).
    """
    records = []
    for group in groups:
        lines = lines_of(group, controls=True)
        samples = [(_name(line, lines), line.sample(ACCURACY)) for line in lines]
        for (a, of_a), (b, of_b) in combinations([one for one in samples if one[1].n], 2):
            found = difference(of_a, of_b)
            if found is not None:
                sign, first, second = (1, a, b) if found.mean >= 0 else (-1, b, a)
                records.append((title_of(group), first, second, sign * found.mean, found.error, found.p, found.n))
    return pd.DataFrame(records, columns=COLUMNS)


def _name(line: Line, lines: list[Line]) -> str:
    return f"{line.label}{told_apart(line, [other for other in lines if other.role == line.role])}"
