"""The SAEs' health in words and tables: a verdict for every layer, what a second set does better, what rests on it.

Says what the rows say; computes no statistic.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refusalscope.core.stats import SIGNIFICANT
from refusalscope.core.store import Store
from refusalscope.core.types import Finding, Row
from refusalscope.report.sentences import number
from refusalscope.report.tables import Table, table
from refusalscope.studies.health import (
    BAD,
    BEARING,
    DIRECTION,
    FIRST,
    TEMPLATE,
    TESTED,
    TRUSTED,
    WORDS,
    Trust,
    verdicts,
)

TITLES = {
    "variance_explained": "variance explained",
    "cross_entropy_recovered": "cross-entropy recovered from zero",
    "cross_entropy_recovered_mean": "cross-entropy recovered from the mean",
    "direction_cosine": "direction’s cosine",
}
"""What a verdict goes by, in a table's head."""


class Line(NamedTuple):
    """One layer of one set."""

    trust: Trust
    rows: Sequence[Row | None]
    """One per entry of `TITLES`; None where it was not measured."""


def section(findings: Mapping[str, Finding], store: Store) -> dict[str, Any]:
    """What the template shows; empty where nothing was measured."""
    finding = findings.get("health")
    if finding is None:
        return {}
    bears = store.read(BEARING, dict)["sentences"] if BEARING in store.paths("health", ".json") else []
    return {
        "healthy": sentences(finding),
        "health_lines": lines(finding),
        "health_table": measures(finding),
        "health_bears": bears,
        "health_titles": TITLES,
        "health_trusted": TRUSTED,
        "health_bad": BAD,
    }


def sentences(finding: Finding) -> tuple[str, ...]:
    """The verdicts of every set, and how the second differs from the first on each kind of text."""
    sets = dict.fromkeys(trust.sae_set for trust in verdicts(finding))
    compared = dict.fromkeys(row.dataset for row in finding.rows if " vs " in row.method and row.dataset != DIRECTION)
    made = [_judged(finding, name) for name in sets]
    made += [_compared(finding, name, dataset) for name in sets if name != FIRST for dataset in compared]
    return tuple(made)


def lines(finding: Finding) -> list[Line]:
    """Every verdict with the figures it goes by."""
    chats = _chats(finding)
    return [
        Line(
            trust,
            [
                finding.find(DIRECTION if metric == "direction_cosine" else chats, trust.sae_set, metric, setting)
                for metric in TITLES
            ],
        )
        for trust in verdicts(finding)
        for setting in (f"layer={trust.layer}",)
    ]


def measures(finding: Finding) -> Table:
    """Every row in its place."""
    return table(finding.rows)


def _chats(finding: Finding) -> str:
    """The data set whose rows the verdicts go by."""
    return next((row.dataset for row in finding.rows if row.dataset not in (TEMPLATE, DIRECTION)), "")


def _judged(finding: Finding, name: str) -> str:
    trusts = [trust for trust in verdicts(finding) if trust.sae_set == name]
    counts = [(word, sum(trust.word == word for trust in trusts)) for word in WORDS]
    said = ", ".join(f"{count} {word}" for word, count in counts if count)
    what = "The SAEs that this run reads" if name == FIRST else f"The set {name}"
    places = {_chats(finding), DIRECTION}
    figures = {
        title: [r for r in finding.rows if (r.method, r.metric) == (name, metric) and r.dataset in places and r.n]
        for metric, title in TITLES.items()
    }
    ranges = "; ".join(f"{title} {_range(rows)}" for title, rows in figures.items() if rows)
    layers = "layer" if len(trusts) == 1 else "layers"
    return f"{what}: of {len(trusts)} {layers} {said}. On {_chats(finding)} chats: {ranges}."


def _compared(finding: Finding, name: str, dataset: str) -> str:
    """In how many layers the second set is measurably better or worse on one kind of text."""
    parts = []
    for metric in TESTED:
        rows = [
            row
            for row in finding.rows
            if (row.dataset, row.method, row.metric) == (dataset, f"{name} vs {FIRST}", f"{metric}_difference")
            and row.n
        ]
        shown = [row for row in rows if row.p_holm is not None and row.p_holm < SIGNIFICANT]
        more = sum((row.estimate or 0) > 0 for row in shown)
        if rows:
            parts.append(
                f"{TITLES[metric]} is measurably higher in {more} and lower in {len(shown) - more} "
                f"of {len(rows)} layers (differences {_range(rows)})"
            )
    return f"Set {name} against the run’s own SAEs on {dataset}: {'; '.join(parts) or 'nothing could be compared'}."


def _range(rows: Sequence[Row]) -> str:
    """The lowest and the highest estimate."""
    ordered = sorted(rows, key=lambda row: row.estimate or 0.0)
    return " to ".join(dict.fromkeys(number(row) for row in (ordered[0], ordered[-1])))
