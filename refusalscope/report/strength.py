"""What a sweep came to: the strength chosen and why, in words, and every strength in two tables.

Computes no statistic.
"""

from collections.abc import Mapping, Sequence

from refusalscope.core.types import Finding, Row
from refusalscope.report.sentences import interval, number
from refusalscope.report.settings import factor, readable, value_set
from refusalscope.report.tables import SMALLEST, Line, Table

SCALED = ("refused", "refused_change", "answered", "coherent", "complied", "cross_entropy_change", "kl")
INDUCED = ("refused", "refused_change", "refused_coherently", "coherent", "cross_entropy_change", "kl")


def by_setting(finding: Finding) -> dict[str, dict[str, Row]]:
    """Setting -> metric -> row, of every strength tried; a cost stands with the answers, whatever it was read on."""
    made: dict[str, dict[str, Row]] = {}
    for row in finding.rows:
        if row.setting and row.metric not in SMALLEST:
            made.setdefault(row.setting, {})[row.metric] = row
    return made


def chosen(finding: Finding, kind: str) -> str | None:
    """The setting chosen for scaling (`scale`) or setting (`set`) features; None where none works."""
    found = finding.provenance.get("chosen", {}).get(kind)
    return None if found is None else found["setting"]


def sentences(finding: Finding) -> tuple[str, ...]:
    """Where the most prompts are answered coherently, which strength was chosen, and what induces refusal."""
    cells = by_setting(finding)
    return (*_scaling(finding, cells), *_induction(finding, cells))


def _scaling(finding: Finding, cells: Mapping[str, Mapping[str, Row]]) -> list[str]:
    found = finding.provenance.get("chosen", {}).get("scale")
    if found is None:
        return ["No strength tried makes the model answer discernibly more validation prompts coherently."]
    best, taken = cells[found["best"]], cells[found["setting"]]
    base = finding.find(best["answered"].dataset, "base", "answered")
    tried = [setting for setting in cells if factor(setting)]
    said = (
        f"Most {best['answered'].dataset} prompts are answered coherently at {readable(found['best'])}: "
        f"{_rate(best['answered'])} (n = {best['answered'].n}; unedited {_rate(base)}), at a KL divergence of "
        f"{_plain(best['kl'])} nats per token on harmless answers; {_place(found['best'], tried)}."
    )
    near = f"{len(found['near'])} strengths, of {len(tried)} tried,"
    if found["setting"] == found["best"]:
        return [said, f"It is chosen: the cheapest by KL divergence of the {near} that are not discernibly worse."]
    return [
        said,
        f"Chosen is {readable(found['setting'])}, the cheapest by KL divergence of the {near} that are not discernibly "
        f"worse: {_rate(taken['answered'])} answered, {_rate(taken['refused'])} refused, {_plain(taken['kl'])} nats.",
    ]


def _induction(finding: Finding, cells: Mapping[str, Mapping[str, Row]]) -> list[str]:
    if not any(value_set(setting) for setting in cells):
        return []
    setting = chosen(finding, "set")
    if setting is None:
        return ["No value tried makes the model refuse discernibly more harmless validation prompts coherently."]
    row = cells[setting]
    return [
        f"Set to {readable(setting)}, the features make it refuse {_rate(row['refused_coherently'])} of "
        f"{row['refused'].dataset} prompts coherently (n = {row['refused'].n}); chosen by the same rule."
    ]


def _place(best: str, tried: Sequence[str]) -> str:
    """Whether a strength lies inside those tried, where a turning point has been seen, or at the edge of one axis."""
    strengths = [(found[0], float(found[1])) for setting in (best, *tried) if (found := factor(setting))]
    edges = [
        name
        for name, tried_here in zip(("factor", "set size"), zip(*strengths, strict=True), strict=True)
        if len(set(tried_here)) > 1 and tried_here[0] in (min(tried_here), max(tried_here))
    ]
    return f"at the edge of what was tried in {' and '.join(edges)}" if edges else "inside what was tried"


def _rate(row: Row | None) -> str:
    return "an unscored share" if row is None or not row.n else f"{number(row)}% {interval(row)}"


def _plain(row: Row) -> str:
    if row.estimate is None or row.low is None or row.high is None:
        return "an unmeasured number of"
    return f"{row.estimate:.2g} [{row.low:.2g}, {row.high:.2g}]".replace("-", "−")


def tables(finding: Finding) -> dict[str, Table]:
    """Every strength's rates and costs in one line: scaling, and setting; first the unedited model."""
    cells = by_setting(finding)
    made = {}
    for name, parsed, metrics in (("scaled", factor, SCALED), ("induced", value_set, INDUCED)):
        lines = [
            Line(rows["refused"].method, setting, {metric: rows[metric] for metric in metrics if metric in rows})
            for setting, rows in cells.items()
            if parsed(setting)
        ]
        if lines:
            dataset = lines[0].rows["refused"].dataset
            base = {r.metric: r for r in finding.rows if (r.dataset, r.method) == (dataset, "base")}
            first = Line("base", "", {metric: base[metric] for metric in metrics if metric in base})
            shown = tuple(metric for metric in metrics if any(metric in line.rows for line in lines))
            made[name] = Table(shown, {dataset: [first, *lines]}, {})
    return made
