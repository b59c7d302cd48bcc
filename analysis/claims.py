"""The headline claims of the papers, each with our evidence and a verdict.

A claim (`analysis/published/claims.yaml`) compares one quantity of two sides, as in `lors.accuracy ≥ spp.accuracy`. Its
evidence are pairs of results that differ in nothing else; `analysis/evidence.py` finds them and says whether the claim
holds in each, fails, or neither beyond noise. The verdict is

- **reproduced** if it holds in every pair,
- **not reproduced** if it fails in one beyond noise, at a level divided by the number of pairs,
- **not distinguishable** otherwise: noise may have done it,
- **not testable here** if there is no pair, or if the suite lacks what the claim needs; the reason stands beside it.

It is a verdict on the models that were run here, which are named. On the models of the paper it may be another.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from analysis.claim_file import Claim, name_of, read_claims
from analysis.evidence import FAILS, HOLDS, OPEN, Evidence, evidence, prepared, rows_of
from analysis.results import add_run_arguments as add_arguments
from analysis.results import load, publish
from analysis.statistics import CONDITION
from analysis.table_writer import Bold, TextTable
from analysis.table_writer import markdown as markdown_table

__all__ = ["Finding", "add_arguments", "judge", "judge_all", "markdown", "run"]

REPRODUCED, WRONG = "reproduced", "not reproduced"
UNCLEAR, UNTESTABLE = "not distinguishable", "not testable here"


@dataclass(frozen=True)
class Finding:
    """A claim with its verdict, the reason for it, and the evidence."""

    claim: Claim
    verdict: str
    reason: str
    evidence: tuple[Evidence, ...] = ()

    @property
    def models(self) -> list[str]:
        """Models that the verdict is about."""
        return list(dict.fromkeys(pair.cell["model"] for pair in self.evidence))


def judge(claim: Claim, rows: pd.DataFrame) -> Finding:
    """Weigh a claim against results.

    Args:
        claim: The claim.
        rows: As `analysis.evidence.prepared` returns them.
    """
    if claim.not_testable is not None:
        return Finding(claim, UNTESTABLE, claim.not_testable)
    sides = rows_of(claim, rows)
    if absent := [name_of(side) for side, found in zip(claim.sides, sides, strict=True) if found.empty]:
        words = {"label": "at", "pruner": "pruned by"}
        scope = "".join(f" {words[axis]} {' or '.join(allowed)}" for axis, allowed in claim.scope.items())
        return Finding(claim, UNTESTABLE, f"no finished run of {' or '.join(absent)} with {claim.metric}{scope}")
    pairs = evidence(claim, sides)
    if not pairs:
        reason = "both sides were run, but not on the same model, data, recipe and machine"
        return Finding(claim, UNTESTABLE, reason)
    states = [pair.state for pair in pairs]
    verdict = WRONG if FAILS in states else UNCLEAR if OPEN in states else REPRODUCED
    counts = [f"{state} in {states.count(state)}" for state in (HOLDS, FAILS, OPEN) if state in states]
    return Finding(claim, verdict, f"{', '.join(counts)} of {len(states)}", pairs)


def judge_all(table: pd.DataFrame) -> list[Finding]:
    """All claims of `claims.yaml`, in their order, against what `analysis.results.load` returns."""
    rows = prepared(table)
    return [judge(claim, rows) for claim in read_claims()]


def markdown(findings: Iterable[Finding]) -> str:
    """The verdicts in one table, then the evidence of each claim that has some."""
    findings = list(findings)
    models = list(dict.fromkeys(model for finding in findings for model in finding.models))
    verdicts = Counter(finding.verdict for finding in findings)
    counts = [f"{verdicts[verdict]} {verdict}" for verdict in (REPRODUCED, WRONG, UNCLEAR, UNTESTABLE)]
    summary = [
        (finding.claim.paper, finding.claim.statement, finding.claim.comparison, Bold(finding.verdict), finding.reason)
        for finding in findings
    ]
    parts = [
        "# Claims of the papers",
        f"{len(findings)} claims: {', '.join(counts)}.",
        f"Verdicts are on what was run here ({', '.join(models) or 'nothing yet'}), not on the models of the papers.\n"
        "Those on scores rest on p values with n - 1 degrees of freedom for the variance over the seeds (not pooled), "
        f"{CONDITION}.",
        markdown_table(TextTable(("paper", "claim", "comparison", "verdict", "evidence"), summary)),
        *(part for finding in findings if finding.evidence for part in _details(finding)),
    ]
    return "\n\n".join(parts) + "\n"


def _details(finding: Finding) -> list[str]:
    claim = finding.claim
    theirs = set(finding.models) <= set(claim.models)
    where = "a model of the paper" if theirs else f"the paper used {', '.join(claim.models) or 'others'}"
    note = f"\nNote: {claim.note}." if claim.note else ""
    rows = [
        (*map(str, pair.cell.values()), pair.measured, pair.state, ", ".join(pair.keys)) for pair in finding.evidence
    ]
    return [
        f"## {claim.id}: {finding.verdict}",
        f"{claim.statement} ({claim.paper}, {claim.place}.){note}",
        f"`{claim.comparison}`, on {', '.join(finding.models)}; {where}.",
        markdown_table(TextTable(("mode", "model", "pruner", "sparsity", "measured", "claim", "runs"), rows)),
    ]


def run(options: argparse.Namespace) -> int:
    """Print the verdicts and write `claims.md`."""
    publish(markdown(judge_all(load(options.runs))), options, "claims.md")
    return 0
