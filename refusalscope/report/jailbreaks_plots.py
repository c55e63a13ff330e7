"""The figures of the study of attacks: drops by group, family and feature, how they tell, and what restoring does.

Every number is a row's.
"""

from collections.abc import Sequence

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    BLUE,
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
    legend,
    name_lanes,
    panels,
    share_axis,
    span,
    title,
)
from refusalscope.studies.jailbreaks import BOTH, COMMON, FAILED, PROJECTION, RESTORE, SUCCEEDED

GROUPS: Style = {SUCCEEDED: (ORANGE, "o"), FAILED: (BLUE, "^")}


def jailbreaks(finding: Finding) -> dict[str, Plot]:
    """What there is rows for."""
    drops = [row for row in finding.rows if row.metric == "drop" and row.n]
    single = [row for row in drops if "/" in row.method]
    whole = [row for row in drops if row.method.partition(",")[0] in (COMMON, PROJECTION)]
    made = {
        "jailbreaks-drops": _grouped(
            [row for row in whole if "family=" not in row.setting],
            "what attacks silence",
            "Mean relative drop at closing tokens from the plain form to the attack, or to a sham as long as the "
            "attack, by what came of the attack",
        ),
        "jailbreaks-families": _grouped(
            [row for row in whole if "family=" in row.setting and row.method == COMMON],
            "common refusal features by attack family",
            "Mean relative drop of the common refusal features, by attack family and by what came of the attack",
        ),
        "jailbreaks-features": _grouped(
            single,
            "each common feature by itself",
            "Relative drop of each common refusal feature at closing tokens, a ratio of totals, by what came of the "
            "attack",
        ),
        "jailbreaks-telling": _telling(finding),
        "jailbreaks-restored": _restored(finding),
    }
    return {name: plot for name, plot in made.items() if plot}


def _grouped(rows: Sequence[Row], heading: str, caption: str) -> Plot | None:
    """A lane a measure or family, succeeded above failed in each."""
    lanes: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        outcome, _, family = row.setting.partition(" family=")
        lanes.setdefault((row.method, family), {})[outcome] = row
    if not lanes:
        return None
    figure, (axes,) = panels([0.42 * len(lanes)], left=LABELS, top=0.55, bottom=0.45)
    name_lanes(axes, [bare_lane(family or method) for method, family in lanes])
    for place, found in enumerate(lanes.values()):
        for outcome, row in found.items():
            across(axes, row, place + (-0.15 if outcome == SUCCEEDED else 0.15), *GROUPS[outcome])
    low, high = span(rows)
    axes.set_xlim(low - 0.05, max(high, 0.1) + 0.05)
    axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
    axes.xaxis.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("relative drop")
    title(figure, heading)
    legend(figure, GROUPS)
    return Plot(f"{caption}, with 95% intervals; n = {counted(rows)}.", figure)


def _telling(finding: Finding) -> Plot | None:
    """AUROCs of both drops over both scopes, and chance."""
    rows = [row for row in finding.rows if row.metric == "auroc" and row.n]
    if not rows:
        return None
    figure, (axes,) = panels([0.42 * len(rows)], left=LABELS, top=0.4, bottom=0.45)
    name_lanes(axes, [Lane(row.method, row.setting, {"auroc": [row]}) for row in rows])
    for place, row in enumerate(rows):
        across(axes, row, float(place), *((ORANGE, "o") if row.method == COMMON else (BLUE, "s")))
    axes.set_xlim(min(0.45, min(row.low or 0.0 for row in rows) - 0.02), 1.02)
    axes.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    axes.xaxis.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("AUROC")
    title(figure, "does the drop tell success from failure?")
    return Plot(
        "AUROC with which the drop of the common refusal features, and that of the projection on the direction, tell "
        f"attacks that succeeded from those that failed, with 95% intervals; n = {counted(rows)}. Dashed: chance.",
        figure,
    )


def _restored(finding: Finding) -> Plot | None:
    """A lane an arm; the single draws of a control as dots under their mean."""
    rows = [row for row in finding.rows if row.dataset == "restored" and row.metric == BOTH and row.n]
    main = [row for row in rows if " draw=" not in row.setting]
    if not main:
        return None
    figure, (axes,) = panels([0.36 * len(main)], left=LABELS, top=0.4, bottom=0.45)
    name_lanes(axes, [bare_lane(row.method, "" if row.setting == RESTORE else "mean and draws") for row in main])
    for place, row in enumerate(main):
        draws = [other for other in rows if other.method == row.method and " draw=" in other.setting]
        at = [other.estimate or 0.0 for other in draws]
        axes.plot(at, [place + 0.24] * len(at), "|", color=GREY, markersize=7, clip_on=False)
        across(
            axes, row, float(place), *((ORANGE, "o") if row.method == COMMON else (GREY, "s") if at else (BLUE, "^"))
        )
    share_axis(axes.xaxis)
    axes.set_xlim(-0.02, 1.02)
    title(figure, "refused again, coherently")
    return Plot(
        "Share of successful attacks that are refused again, coherently, with features set back at their closing "
        f"tokens, with 95% intervals; n = {counted(row for row in main if row.setting == RESTORE)}. Ticks under a "
        "control are its single draws.",
        figure,
    )
