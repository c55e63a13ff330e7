"""The verification finding, judged: which claims about the attributions hold on held-out prompts, and which do not.

The limits are those of docs/findings.md. Compares estimates with limits and computes no statistic.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from refusalscope.core.types import Finding, Row
from refusalscope.report.sentences import listed
from refusalscope.report.settings import part

CORRELATIONS = {
    "alone_correlation": "one feature edited alone",
    "marginal_correlation": "features edited together, in random order",
}
LEAST = {
    "alone_correlation": {"gradient": 0.95, "layerwise": 0.85, "sound": 0.75},
    "marginal_correlation": {"sound": 0.95, "paper": 0.95},
}
"""Spearman correlations expected at least, by metric and method; the marginal ones must also exceed the gradient's."""
MOST = {"completeness_error": 1e-3, "node_error": 0.02}
FACTORED = {"float32": 1e-4, "bfloat16": 1e-2}
"""`factored_error` accepted at most, by the type the model computes in."""


class Check(NamedTuple):
    """One row against what was expected of it."""

    row: Row
    limit: float
    at_least: bool
    """Whether the estimate must reach the limit, or stay within it."""

    @property
    def margin(self) -> float:
        """By how much the row passes; negative where it fails."""
        estimate = self.row.estimate or 0.0
        return estimate - self.limit if self.at_least else self.limit - estimate


class Claim(NamedTuple):
    """Something said of the scores, and the rows that it rests on."""

    says: str
    """Goes on from “the scores …” and from “the scores do not …”."""
    otherwise: str
    """What not to believe where it fails."""
    metrics: tuple[str, ...]
    checks: tuple[Check, ...] = ()

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.margin < 0)

    @property
    def worst(self) -> list[Check]:
        """Of every metric and method the check that passes by least."""
        made: dict[tuple[str, str], Check] = {}
        for check in sorted(self.checks, key=lambda check: check.margin, reverse=True):
            made[check.row.metric, check.row.method] = check
        return sorted(made.values(), key=lambda check: self.metrics.index(check.row.metric))


CLAIMS = (
    Claim(
        "agree with a plain, slow computation of them",
        "take none of the scores on this page for what the method defines",
        ("factored_error", "node_error"),
    ),
    Claim(
        "add up to the whole change where each layer is scored by itself",
        "do not read a layer’s scores as the parts of a whole",
        ("completeness_error",),
    ),
    Claim(
        "predict what editing one feature does",
        "do not read a feature’s score as what editing it alone would do",
        ("alone_correlation",),
    ),
    Claim(
        "predict what a feature adds when many are edited together",
        "do not expect the features scored highest to be the set whose edit changes most",
        ("marginal_correlation",),
    ),
)


def claims(finding: Finding) -> list[Claim]:
    """Every claim with its checks; a claim without any was not measured."""
    dtype = str(finding.provenance.get("dtype", "float32")).removeprefix("torch.")
    return [
        claim._replace(checks=tuple(_checks([row for row in finding.rows if row.metric in claim.metrics], dtype)))
        for claim in CLAIMS
    ]


def _checks(rows: Sequence[Row], dtype: str) -> Iterable[Check]:
    for row in rows:
        lower, upper = least(row, rows), most(row, dtype)
        if row.n and lower is not None:
            yield Check(row, lower, True)
        elif row.n and upper is not None:
            yield Check(row, upper, False)


def least(row: Row, rows: Iterable[Row]) -> float | None:
    """The correlation expected of a row, given the others; None where nothing was expected."""
    limit = LEAST.get(row.metric, {}).get(row.method)
    if limit is None or row.metric != "marginal_correlation":
        return limit
    same = (row.dataset, "gradient", row.metric, row.setting)
    rivals = [r.estimate for r in rows if (r.dataset, r.method, r.metric, r.setting) == same and r.estimate is not None]
    return max([limit, *rivals])


def most(row: Row, dtype: str = "float32") -> float | None:
    """The error accepted of a row; None where nothing was agreed."""
    return FACTORED.get(dtype, FACTORED["float32"]) if row.metric == "factored_error" else MOST.get(row.metric)


def verdict(finding: Finding) -> tuple[str, ...]:
    """One or two sentences for a reader who knows what an attribution is and nothing of how this one was tested."""
    made = claims(finding)
    held = [claim.says for claim in made if claim.checks and not claim.failed]
    failed = [claim for claim in made if claim.failed]
    untested = [claim.says for claim in made if not claim.checks]
    if not held and not failed:
        return ("These attributions were not put to the test in this run: read them as a ranking and no more.",)
    does, fails = listed(held), " and do not ".join(f"{claim.says}{_methods(claim)}" for claim in failed)
    if not failed:
        first = f"Yes, as far as tested on held-out prompts: the scores {does}."
    elif held:
        first = f"Only in part: on held-out prompts the scores {does}, but they do not {fails}."
    else:
        first = f"No: on held-out prompts the scores do not {fails}."
    second = f"So {listed([claim.otherwise for claim in failed])}" if failed else ""
    if untested:
        whether = " or ".join(untested)
        second = f"{second}; not tested: whether they {whether}" if second else f"Not tested: whether they {whether}"
    return (first, f"{second}.") if second else (first,)


def _methods(claim: Claim) -> str:
    """Which ways of scoring fail, where not all do."""
    failing = list(dict.fromkeys(check.row.method for check in claim.failed))
    all_methods = {check.row.method for check in claim.checks}
    return f" (scored by {listed(failing)})" if len(failing) < len(all_methods) else ""


def blind_layers(finding: Finding) -> list[int]:
    """Layers of an attribution finding where the SAE's error term scores at least half as much as the features."""
    found = set()
    for row in finding.rows:
        error = finding.find(row.dataset, row.method, "error", row.setting) if row.metric == "features" else None
        layer = part(row.setting, "layer")
        if error is None or layer is None or not (error.n and row.n):
            continue
        if 2 * abs(error.estimate or 0.0) >= abs(row.estimate or 0.0):
            found.add(layer)
    return sorted(found)
