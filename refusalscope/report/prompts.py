"""`prompts/why.json` as what the page shows: why was this prompt refused? Tokens by features, and what flips it.

Reads the plain data of the artifact, names the file where it does not fit, and computes no statistic but sums of the
attributions of one token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refusalscope.core.types import NaN
from refusalscope.report.features import anchor
from refusalscope.report.tokens import Span, largest, level, spans

FILE = "prompts/why.json"
NAMED = 3
"""Features named in the sentence above a table."""


class Cell(NamedTuple):
    """One attribution and its step on the colour scale."""

    value: float
    level: int


class Column(NamedTuple):
    """One feature of the table."""

    name: str
    anchor: str
    total: float


class TokenLine(NamedTuple):
    """One token of the table: an attribution per feature, then that of the set's other features."""

    text: str
    role: str
    cells: list[Cell]


class Why(NamedTuple):
    """One prompt, as the prompt view shows it."""

    anchor: str
    id: str
    dataset: str
    label: str
    refusal_token: str
    answer_token: str
    metric_clean: float
    metric_removed: float
    columns: list[Column]
    rest: float
    lines: list[TokenLine]
    spans: list[Span]
    """The tokens coloured by the sum of their line."""
    edits: Sequence[Mapping[str, Any]]

    @property
    def strongest(self) -> list[Column]:
        """The features that hold the refusal up most."""
        return [column for column in self.columns if column.total > 0][:NAMED]

    @property
    def flips(self) -> list[str]:
        """The edits under which the first token no longer refuses."""
        return [str(edit["edit"]) for edit in self.edits if not edit["refused"]]


def views(why: Mapping[str, Any]) -> list[Why]:
    """Every prompt of the artifact, in its order. Raises ValueError naming the file where it is damaged."""
    try:
        return [_view(f"why-{place}", item) for place, item in enumerate(why["prompts"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{FILE} does not hold prompts as expected: {error!r}") from error


def _view(name: str, item: Mapping[str, Any]) -> Why:
    values = [[_number(value) for value in feature["values"]] for feature in item["features"]]
    rest = [_number(value) for value in item["rest"]]
    rows = [list(row) for row in zip(*values, rest, strict=True)]
    sums = [sum(row) for row in rows]
    top = largest(value for row in rows for value in row)
    texts = zip(item["tokens"], item["roles"], rows, strict=True)
    return Why(
        name,
        item["id"],
        item["dataset"],
        item["label"],
        item["refusal_token"],
        item["answer_token"],
        _number(item["metric_clean"]),
        _number(item["metric_removed"]),
        [_column(feature) for feature in item["features"]],
        sum(rest),
        [TokenLine(text, role, [Cell(v, level(v, top)) for v in row]) for text, role, row in texts],
        spans(item["tokens"], sums, item["roles"], largest(sums)),
        item["edits"],
    )


def _column(feature: Mapping[str, Any]) -> Column:
    layer, index = int(feature["layer"]), int(feature["index"])
    return Column(f"{layer}/{index}", anchor(layer, index), _number(feature["total"]))


def _number(value: float | None) -> float:
    """JSON has no NaN: null was one."""
    return NaN if value is None else float(value)


def seen_in(views: Sequence[Why]) -> dict[str, list[Why]]:
    """Feature anchor -> the prompt views that have it as a column: the links back."""
    made: dict[str, list[Why]] = {}
    for view in views:
        for column in view.columns:
            made.setdefault(column.anchor, []).append(view)
    return made
