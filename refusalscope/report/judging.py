"""The findings on safety and agreement as the page shows them: rates by judge, what changes, who agrees with whom.

Computes no statistic.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from refusalscope.core.types import Finding
from refusalscope.report.tables import Table, table

QUESTIONS = {"harmful": "Harmful?", "refused": "Refused?", "coherent": "Coherent?"}
"""In the order in which they are shown."""


class Named(NamedTuple):
    """One judge: whose verdicts these are."""

    name: str
    question: str
    about: Mapping[str, Any]


def section(findings: Iterable[Finding]) -> dict[str, Any]:
    """What `safety.html.j2` shows; empty where nothing was judged."""
    found = {finding.study: finding for finding in findings}
    safety = found.get("safety")
    if safety is None:
        return {"judged": {}, "judges": [], "changed": None, "judge_pairs": None, "agreement": None}
    by_kind = {kind: [row for row in safety.rows if _kind(row.metric) == kind] for kind in ("", "changed", "compared")}
    rates = {q: table(row for row in by_kind[""] if row.metric.startswith(f"{q}:")) for q in QUESTIONS}
    agreement = found.get("agreement")
    return {
        "judged": {question: made for question, made in rates.items() if made.groups},
        "judges": [Named(**judge) for judge in safety.provenance.get("judges", {}).values()],
        "changed": _shown(table(by_kind["changed"])),
        "judge_pairs": _shown(table(by_kind["compared"])),
        "agreement": _shown(table(agreement.rows)) if agreement else None,
    }


def _kind(metric: str) -> str:
    """Where a metric such as `harmful_change:minos` stands; rates have no kind."""
    _, _, kind = metric.partition(":")[0].partition("_")
    return {"": "", "difference": "compared"}.get(kind, "changed")


def _shown(made: Table) -> Table | None:
    return made if made.groups or made.draws else None
