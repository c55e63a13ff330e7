"""The findings on safety and agreement as the page shows them: rates by judge, what changes, who agrees with whom.

Computes no statistic.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from refusalscope.core.types import Finding, Row
from refusalscope.report.settings import value_set
from refusalscope.report.tables import SMALLEST, Table, limits, table

QUESTIONS = {"harmful": "Harmful?", "refused": "Refused?", "coherent": "Coherent?"}
"""In the order in which they are shown."""


class Named(NamedTuple):
    """One judge: whose verdicts these are."""

    name: str
    question: str
    about: Mapping[str, Any]


class Rates(NamedTuple):
    """One question: what its judges say under the edits, and where features were set to a value."""

    edits: Table
    induced: Table


def section(findings: Iterable[Finding], hide: Callable[[Any], Any]) -> dict[str, Any]:
    """What `safety.html.j2` shows, folders shortened by `hide`; empty where nothing was judged.

    A question that rules alone answered is left out: their rates stand among the results.
    """
    found = {finding.study: finding for finding in findings}
    safety = found.get("safety", Finding("safety", "", (), (), {}))
    judges = [Named(**hide(judge)) for judge in safety.provenance.get("judges", {}).values()]
    asked = [question for question in QUESTIONS if question in {judge.question for judge in judges}]
    agreement = found.get("agreement")
    return {
        "judges": judges,
        "judged": {question: _rates(safety.rows, question) for question in asked},
        "changed": _shown(table(row for row in safety.rows if _kind(row.metric) == "changed")),
        "judge_pairs": _shown(table(row for row in safety.rows if _kind(row.metric) == "compared")),
        "judge_limits": limits(safety),
        "agreement": _shown(table(agreement.rows)) if agreement else None,
    }


def _rates(rows: Iterable[Row], question: str) -> Rates:
    rates = [row for row in rows if row.metric.startswith(f"{question}:")]
    induced = [row for row in rates if value_set(row.setting)]
    return Rates(table(row for row in rates if row not in induced), table(induced))


def _kind(metric: str) -> str:
    """Where a metric such as `harmful_change:minos` stands; rates have no kind."""
    if metric in SMALLEST:
        return "limit"
    _, _, kind = metric.partition(":")[0].partition("_")
    return {"": "", "difference": "compared"}.get(kind, "changed")


def _shown(made: Table) -> Table | None:
    return made if made.groups or made.draws else None
