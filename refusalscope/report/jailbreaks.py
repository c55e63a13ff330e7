"""What the study of attacks came to: in words, and in tables with succeeded and failed attacks side by side.

Computes no statistic.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from refusalscope.core.store import Store
from refusalscope.core.types import Finding, Row
from refusalscope.report.sentences import spelled
from refusalscope.report.tables import Line, Table
from refusalscope.studies.jailbreaks import BOTH, COMMON, CONTROLS, FAILED, PROJECTION, RESTORE, SUCCEEDED

NAMES = {
    COMMON: "common refusal features",
    PROJECTION: "projection on the direction",
    "any single feature": "any of them alone",
}
"""Methods that are called otherwise on the page."""
WITHIN = "within families"
EXPLAINED = "jailbreaks/explained.json"


def section(findings: Iterable[Finding], store: Store) -> dict[str, Any]:
    """Sentences, tables and what explains the flips; empty where the run has no such study."""
    made = next((finding for finding in findings if finding.study == "jailbreaks"), None)
    if made is None:
        return {}
    told = flips(store.read(EXPLAINED, dict)) if EXPLAINED in store.paths("jailbreaks", ".json") else []
    return {"attacks": sentences(made), "attacked": tables(made), "flips": told}


def sentences(finding: Finding) -> tuple[str, ...]:
    """What attacks silence, whether that tells success from failure, and what bringing it back does."""
    drops = {what: finding.find("pairs", COMMON, "drop", what) for what in (SUCCEEDED, FAILED)}
    within = finding.find("pairs", COMMON, "drop_difference", WITHIN)
    made = [
        f"Attacks that succeed lower the common refusal features by {spelled(drops[SUCCEEDED])} of their value on the "
        f"plain form (n = {_count(drops[SUCCEEDED])}), attacks that fail by {spelled(drops[FAILED])} "
        f"(n = {_count(drops[FAILED])}); within attack families the difference is {spelled(within)}."
    ]
    told, beside = (finding.find("pairs", name, "auroc", "vulnerable families") for name in (COMMON, PROJECTION))
    if told is not None and told.n:
        made.append(
            f"Where attacks of a family both succeed and fail, that drop tells which with an AUROC of "
            f"{spelled(told)}; the drop of the projection on the direction with {spelled(beside)}."
        )
    whole = finding.find("restored", COMMON, BOTH, RESTORE)
    if whole is not None and whole.n:
        controls = [(name, finding.find("restored", name, BOTH, f"{RESTORE} mean")) for name in CONTROLS]
        said = ", ".join(f"{name} {spelled(row, '%')}" for name, row in controls if row is not None)
        upper = finding.find("restored", PROJECTION, BOTH, RESTORE)
        made.append(
            f"Set back at the closing tokens of successful attacks, the common features bring coherent refusal back in "
            f"{spelled(whole, '%')} (n = {whole.n}), the component along the direction in {spelled(upper, '%')}; "
            f"controls: {said or 'none could be made'}."
        )
    return tuple(made)


def tables(finding: Finding) -> dict[str, Table]:
    """Drops by measure, by family and by feature; how well they tell; what restoring brings back."""
    passed = [row for row in finding.rows if row.metric == "succeeded"]
    rows = [row for row in finding.rows if row.dataset == "pairs" and row.metric != "succeeded"]
    restored = [row for row in finding.rows if row.dataset == "restored"]
    single = {row.method for row in finding.rows if "/" in row.method}
    made = {
        "passed": _pivoted(passed, column=lambda row: row.metric),
        "drops": _pivoted(
            row for row in rows if row.method not in single and row.metric == "drop" and "family=" not in row.setting
        ),
        "telling": _pivoted(row for row in rows if row.method not in single and row.metric != "drop"),
        "families": _pivoted(_by_family(rows), column=lambda row: row.setting.partition(" ")[0]),
        "features": _pivoted(row for row in rows if row.method in single),
        "restored": _restored(row for row in restored if " vs " not in row.method and " draw=" not in row.setting),
        "against": _restored(row for row in restored if " vs " in row.method),
        "drawn": _restored(row for row in restored if " draw=" in row.setting),
    }
    return {name: made[name] for name in made if made[name].groups}


def _column(row: Row) -> str:
    """Under which heading a row stands: what was measured, and of which attacks."""
    if row.metric == "drop":
        return f"drop, {row.setting}"
    what = {"drop_difference": "difference", "auroc": "AUROC", "auroc_difference": "AUROC difference"}[row.metric]
    return f"{what}, {row.setting}"


def _by_family(rows: Iterable[Row]) -> Iterable[Row]:
    return (row for row in rows if "family=" in row.setting)


def _pivoted(rows: Iterable[Row], *, column: Callable[[Row], str] = _column) -> Table:
    """A line a measure, or a measure and family; the groups side by side."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        family = row.setting.partition("family=")[2]
        columns[column(row)] = None
        lines.setdefault((NAMES.get(row.method, row.method), family), {})[column(row)] = row
    shown = [Line(*key, by_column) for key, by_column in lines.items()]
    return Table(tuple(columns), {"pairs": shown} if shown else {}, {})


def _restored(rows: Iterable[Row]) -> Table:
    """A line an arm, its rates side by side."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        columns[row.metric] = None
        setting = row.setting.removeprefix(RESTORE).strip()
        lines.setdefault((NAMES.get(row.method, row.method), setting), {})[row.metric] = row
    shown = [Line(*key, by_metric) for key, by_metric in lines.items()]
    return Table(tuple(columns), {"successful attacks": shown} if shown else {}, {})


def _count(row: Row | None) -> int:
    return 0 if row is None else row.n


def flips(explained: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Which single features turn an attack back, and of how many attacks that is so."""
    counts: dict[str, int] = {}
    for pair in explained["pairs"]:
        if pair["restored"]:
            alone = ", ".join(pair["alone"]) or "none alone"
            counts[alone] = counts.get(alone, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
