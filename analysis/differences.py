"""How far every two lines of a table are apart in their average, paired over seeds and test items (`statistics`)."""

from collections.abc import Sequence

import pandas as pd

from analysis.groups import Group
from analysis.lines import Line, lines_of, told_apart
from analysis.measures import ACCURACY
from analysis.notes import title_of
from analysis.statistics import CONDITION, differences

__all__ = ["pairwise"]

COLUMNS = ("table", "a", "b", "difference", "error", "holm", "p", "n", "degrees", "pooled", "condition")


def pairwise(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each pair of lines of a group that have an average, the higher one first.

    Columns: table (its title), a and b (names of the lines), difference (points) and its standard error, holm (p
    corrected for all pairs of the table), p (two-sided, of no difference, of this pair alone), n (seeds that both
    have), degrees (of freedom, of the variance over the seeds), pooled (rows that it was pooled over, 0 if it was not),
    condition (what every p is conditional on).
    """
    records = []
    for group in groups:
        lines = lines_of(group, controls=True)
        samples = [line.sample(ACCURACY) for line in lines]
        rows = {index: sample for index, sample in enumerate(samples) if sample.n}
        for (a, b), found in differences(rows, {index: lines[index].pool for index in rows}).items():
            first, second = (a, b) if found.mean >= 0 else (b, a)
            names = [_name(lines[index], lines) for index in (first, second)]
            tested = (found.holm, found.p, found.n, found.degrees, found.pooled, CONDITION)
            records.append((title_of(group), *names, abs(found.mean), found.error, *tested))
    return pd.DataFrame(records, columns=COLUMNS)


def _name(line: Line, lines: list[Line]) -> str:
    return f"{line.label}{told_apart(line, [other for other in lines if other.role == line.role])}"
