"""The figures of the study of probes: who tells what apart, what is flagged, reliability, learning curves.

Every number is a row's.
"""

import re

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABELS,
    MUTED,
    ORANGE,
    Lane,
    Plot,
    Style,
    across,
    bare_lane,
    counted,
    curve,
    legend,
    name_lanes,
    number_ticks,
    panels,
    share_axis,
    span,
    title,
)
from refusalscope.studies.probes import ATTACKS, BASELINES, COMMON, DENSE, PAIRS, RANDOM

ROLES: Style = {"features": (ORANGE, "o"), "dense": (BLUE, "s"), "baseline": (GREY, "^")}
SHORT = {
    COMMON: "common features",
    "mean-difference features": "difference features",
    "mean-difference direction": "difference direction",
    "projection on the direction": "projection",
    "perplexity of the prompt": "perplexity",
}
SHOWN = (PAIRS["intent"][0], ATTACKS, PAIRS["intent"][4])
CURVES: Style = {COMMON: (ORANGE, "o"), "cosine+attribution": (GREEN, "D"), DENSE: (BLUE, "s")}


def probes(finding: Finding) -> dict[str, Plot]:
    """What there is rows for."""
    guard = str(finding.provenance.get("guard", ""))
    made = {
        "probes-auroc": _telling(finding),
        "probes-flagged": _flagged(finding, guard),
        "probes-reliability": _reliability(finding, guard),
        "probes-learning": _learning(finding),
    }
    return {name: plot for name, plot in made.items() if plot}


def _telling(finding: Finding) -> Plot | None:
    """A panel a comparison, a lane a probe; mass-mean probes stand in the table."""
    drawn = {}
    for pair in SHOWN:
        rows = [row for row in finding.rows if row.dataset == " vs ".join(pair) and row.metric == "auroc" and row.n]
        wanted = [row for row in rows if row.setting in ("intent", "intent mean") and "mass-mean" not in row.method]
        drawn |= {pair: wanted} if wanted else {}
    if not drawn:
        return None
    figure, made = panels([0.3 * len(rows) for rows in drawn.values()], left=LABELS, top=0.8, bottom=0.45, gap=0.55)
    for axes, (pair, rows) in zip(made, drawn.items(), strict=True):
        name_lanes(axes, [_lane(row.method) for row in rows])
        for place, row in enumerate(rows):
            across(axes, row, float(place), *ROLES[_role(row.method)])
        axes.set_xlim(min(0.4, *(row.low or 0.0 for row in rows)) - 0.02, 1.02)
        axes.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        axes.xaxis.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(f"{pair[0]} vs {pair[1]}", loc="left", fontsize=9.5, x=-0.5)
    made[-1].set_xlabel("AUROC")
    title(figure, "who recognises harmful requests")
    legend(figure, ROLES)
    return Plot(
        "AUROC of probes that learned from plain prompts alone, by intent, with 95% intervals; random features are the "
        f"mean of their draws. Dashed: chance. n = {counted(rows for part in drawn.values() for rows in part)}.",
        figure,
    )


def _role(method: str) -> str:
    if method in BASELINES or method == RANDOM:
        return "baseline"
    return "dense" if method in (DENSE, "mean-difference direction") else "features"


def _lane(name: str) -> Lane:
    return bare_lane(SHORT.get(name, name.replace("features of layer", "of layer")))


def _flagged(finding: Finding, guard: str) -> Plot | None:
    """A lane a group of prompts, the guard above the dense probe, at the strictest rate there is."""
    metrics = sorted({row.metric for row in finding.rows if row.metric.startswith("flagged_at_")})
    if not metrics:
        return None
    rows = [row for row in finding.rows if row.metric == metrics[0] and row.setting == "intent" and row.n]
    shown = {name: [row for row in rows if row.method == name] for name in dict.fromkeys((guard, DENSE))}
    groups = list(dict.fromkeys(row.dataset for row in rows))
    figure, (axes,) = panels([0.42 * len(groups)], left=LABELS, top=0.62, bottom=0.4)
    name_lanes(axes, [_lane(group) for group in groups])
    colours = {guard: (ORANGE, "o"), DENSE: (BLUE, "s")}
    for at, (name, found) in enumerate(shown.items()):
        for row in found:
            across(axes, row, groups.index(row.dataset) + (0.3 * at - 0.15) * (len(shown) > 1), *colours[name])
    share_axis(axes.xaxis)
    axes.set_xlim(-0.02, 1.02)
    rate = metrics[0].removeprefix("flagged_at_")
    title(figure, f"what is flagged at {rate} false positives")
    legend(figure, {SHORT.get(name, name): colours[name] for name in shown})
    return Plot(
        f"Share of each group above a threshold that lets {rate} of plain benign validation prompts pass it, with 95% "
        f"intervals; of benign groups it is the realised false positive rate. n = {counted(rows)}.",
        figure,
    )


def _reliability(finding: Finding, guard: str) -> Plot | None:
    """Positives over probability, plain and adversarial prompts one under the other."""
    wanted = [row for row in finding.rows if row.metric == "reliability" and row.setting.startswith("intent ")]
    shown: Style = {guard: (ORANGE, "o"), DENSE: (BLUE, "s")}
    parts = [part for part in ("plain", "adversarial") if any(row.dataset == part for row in wanted)]
    if not parts:
        return None
    figure, made = panels([1.7] * len(parts), left=0.75, top=0.8, bottom=0.5, gap=0.6)
    for axes, part in zip(made, parts, strict=True):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        for name, colours in shown.items():
            rows = [row for row in wanted if row.dataset == part and row.method == name and row.n]
            if rows:
                curve(axes, sorted(((_probability(row), row) for row in rows), key=lambda point: point[0]), *colours)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(f"{part} prompts", loc="left", fontsize=9.5)
        axes.set_ylabel("share harmful")
    made[-1].set_xlabel("probability, calibrated on plain prompts")
    title(figure, "does a probability mean what it says?")
    legend(figure, {SHORT.get(name, name): style for name, style in shown.items()})
    return Plot(
        "Share of harmful prompts by the probability that they are, in bins of equal mass, with 95% intervals; n = "
        f"{counted(wanted)} a bin. Dashed: what a calibrated probe gives.",
        figure,
    )


def _probability(row: Row) -> float:
    found = re.search(r" p=([\d.]+)", row.setting)
    return float(found[1]) if found else 0.0


def _learning(finding: Finding) -> Plot | None:
    rows = [row for row in finding.rows if row.metric == "learning_curve" and row.dataset == " vs ".join(ATTACKS)]
    rows = [row for row in rows if row.n]
    if not rows:
        return None
    figure, (axes,) = panels([2.1], left=0.75, top=0.62, bottom=0.5)
    counts: set[float] = set()
    for name, colours in CURVES.items():
        points = [(float(row.setting.partition("n=")[2]), row) for row in rows if row.method == name]
        counts |= {count for count, _ in points}
        if points:
            curve(axes, sorted(points, key=lambda point: point[0]), *colours)
    axes.set_xscale("log")
    axes.minorticks_off()
    number_ticks(axes, sorted(counts)[::2])
    low, _ = span([row for row in rows if row.low is not None])
    axes.set_ylim(max(low, min(row.low or 0.0 for row in rows)) - 0.02, 1.01)
    axes.yaxis.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("plain training prompts")
    axes.set_ylabel("AUROC on attacks")
    title(figure, "how much there is to learn from")
    legend(figure, {SHORT.get(name, name): style for name, style in CURVES.items()})
    return Plot(
        "AUROC on successful attacks against benign adversarial prompts over the number of plain prompts learned from, "
        f"one draw of them; 95% intervals are those of the test prompts, n = {counted(rows)}.",
        figure,
    )
