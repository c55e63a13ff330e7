"""A finding's rows in tables: data sets, edits and metrics in the order in which they first appear.

Knows which rows belong together; computes no statistic.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from refusalscope.core.types import Finding, Row
from refusalscope.report.benchmark_plots import COSTS
from refusalscope.report.settings import DATASET_OF_STRENGTHS, value_set

DIFFERENCES = ("refused_difference", "answered_difference", "complied_difference")
"""Metrics of a pair of methods, `A vs B`, on the same prompts."""
SMALLEST = ("smallest_change", "smallest_difference")
"""Metrics that say what the comparisons of a whole table can show."""


class Line(NamedTuple):
    """One edit on one data set: its rows by metric."""

    method: str
    setting: str
    rows: Mapping[str, Row]


class Table(NamedTuple):
    """Lines by data set under common columns; single random draws apart where the finding pooled them."""

    metrics: tuple[str, ...]
    groups: Mapping[str, Sequence[Line]]
    draws: Mapping[str, Sequence[Line]]


def table(rows: Iterable[Row]) -> Table:
    """Every row in its place."""
    groups: dict[str, dict[tuple[str, str], dict[str, Row]]] = {}
    metrics: dict[str, None] = {}
    for row in rows:
        metrics[row.metric] = None
        groups.setdefault(row.dataset, {}).setdefault((row.method, row.setting), {})[row.metric] = row
    main: dict[str, list[Line]] = {}
    draws: dict[str, list[Line]] = {}
    for dataset, lines in groups.items():
        for (method, setting), by_metric in lines.items():
            head, drawn, _ = setting.partition(" draw=")
            pooled = bool(drawn) and (method, f"{head} mean") in lines
            (draws if pooled else main).setdefault(dataset, []).append(Line(method, setting, by_metric))
    return Table(tuple(metrics), main, draws)


def benchmark_tables(finding: Finding) -> dict[str, Table]:
    """The benchmark's rows by what they tell.

    Outcomes and costs of the edits, methods compared in pairs, and apart, since they are many, the factors tried on
    validation prompts and the values that features were set to.
    """
    made: dict[str, list[Row]] = {name: [] for name in ("outcomes", "compared", "costs", "strength", "induced")}
    for row in finding.rows:
        if row.metric in SMALLEST:
            continue  # says something of a whole table
        if row.metric in DIFFERENCES:
            made["compared"].append(row)
        elif value_set(row.setting):
            made["induced"].append(row)
        elif row.metric in COSTS:
            made["costs"].append(row)
        else:
            made["strength" if row.dataset == DATASET_OF_STRENGTHS else "outcomes"].append(row)
    return {name: table(rows) for name, rows in made.items()}


def limits(finding: Finding) -> list[Row]:
    """The rows that say how small a difference each family of a finding can show."""
    return [row for row in finding.rows if row.metric in SMALLEST]


def smallest(finding: Finding) -> dict[str, list[Row]]:
    """Table -> the rows that say how small a difference it can show; factors are chosen from, not tested."""
    made: dict[str, list[Row]] = {"outcomes": [], "compared": [], "induced": []}
    for row in limits(finding):
        if row.dataset != DATASET_OF_STRENGTHS:
            against_base = "induced" if row.setting.startswith("set ") else "outcomes"
            made["compared" if row.metric == "smallest_difference" else against_base].append(row)
    return made
