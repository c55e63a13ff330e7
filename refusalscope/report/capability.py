"""The capability finding as one table: edits down, tasks and costs across. Computes no statistic."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from refusalscope.core.types import Finding, Row
from refusalscope.studies.capability import change_of


class Column(NamedTuple):
    """One metric of one data set."""

    dataset: str
    metric: str


class Cell(NamedTuple):
    """A metric under one edit, and what it changed by."""

    row: Row
    change: Row | None
    """None where nothing was to be compared with."""


class Line(NamedTuple):
    """One edit."""

    method: str
    setting: str
    cells: Mapping[Column, Cell]


class CostTable(NamedTuple):
    """Columns and lines in the order in which they first appear, those of one data set together."""

    columns: Sequence[Column]
    lines: Sequence[Line]


def cost_table(finding: Finding) -> CostTable:
    """Every row in its place; single random draws are left out, since the finding holds them together as well."""
    rows = {Column(row.dataset, row.metric): None for row in finding.rows if not _is_change(row.metric)}
    datasets = dict.fromkeys(column.dataset for column in rows)
    columns = [column for dataset in datasets for column in rows if column.dataset == dataset]
    edits = dict.fromkeys((row.method, row.setting) for row in finding.rows if " draw=" not in row.setting)
    lines = [Line(*edit, dict(_cells(finding, *edit, columns))) for edit in edits]
    return CostTable(columns, lines)


def _cells(finding: Finding, method: str, setting: str, columns: Sequence[Column]) -> list[tuple[Column, Cell]]:
    made = []
    for column in columns:
        row = finding.find(column.dataset, method, column.metric, setting)
        if row is not None:
            change = finding.find(column.dataset, method, change_of(column.metric), setting)
            made.append((column, Cell(row, change)))
    return made


def _is_change(metric: str) -> bool:
    return metric.partition(":")[0].endswith("_change")
