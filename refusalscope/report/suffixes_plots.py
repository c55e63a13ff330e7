"""The figures of suffixes: the mean curve beside the sham's, single goals' curves, the words that do most.

Every number is a row's.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    BLUE,
    GREY,
    LABELS,
    MUTED,
    ORANGE,
    Lane,
    Plot,
    Style,
    across,
    counted,
    curve,
    legend,
    name_lanes,
    number_ticks,
    panels,
    title,
)
from refusalscope.report.settings import part
from refusalscope.report.suffixes import DIRECTION, REFUSAL, name_of

KINDS: Style = {"suffix": (ORANGE, "o"), "sham": (GREY, "s")}
PANELS = {REFUSAL: "refusal features", DIRECTION: "projection on the direction"}
WORDS = {"word_step": ("added by the word", ORANGE, "o"), "word_left_out": ("missing without it", BLUE, "^")}
DRAWN = 10
"""Words in a panel: those of most effect."""


def suffixes(finding: Finding) -> dict[str, Plot]:
    """The mean curve, the words, and the goals that have rows of their own."""
    made = {"suffixes-curve": _mean_curve(finding), "suffixes-words": _words(finding)}
    goals = dict.fromkeys(part(row.setting, "goal") for row in finding.rows if row.metric == "single")
    for goal in goals:
        rows = [row for row in finding.rows if row.metric == "single" and part(row.setting, "goal") == goal]
        made[f"suffixes-goal-{goal}"] = _goal(rows, rows[0].dataset)
    return {name: plot for name, plot in made.items() if plot}


def _mean_curve(finding: Finding) -> Plot | None:
    rows = [row for row in finding.rows if row.metric == "curve" and row.n and row.method in PANELS]
    if not rows:
        return None
    figure = _panelled(rows, "read", "per cent of the suffix’s words read", "how far a suffix lowers refusal")
    return replace(
        figure,
        caption=f"Mean drop at the closing tokens, as a share of the value on the goal alone, of {counted(rows)} pairs "
        "of goal and suffix that turn the model, against how much of the suffix is read, with 95% intervals by goal. "
        "The sham has as many neutral words.",
    )


def _goal(rows: Sequence[Row], name: str) -> Plot:
    figure = _panelled(rows, "words", "words of the suffix read", "one goal, word by word")
    return replace(figure, caption=f"The drop after each word for {name}; a single prompt has no interval.")


def _panelled(rows: Sequence[Row], step: str, label: str, heading: str) -> Plot:
    """One panel a read-out, suffix and sham in each; the caption is the caller's."""
    shown = [name for name in PANELS if any(row.method == name for row in rows)]
    figure, made = panels([1.55] * len(shown), left=0.62, top=0.82, bottom=0.5, gap=0.6)
    for axes, name in zip(made, shown, strict=True):
        for kind, look in KINDS.items():
            curve(axes, _points([row for row in rows if row.method == name], step, kind), *look)
        _ticks(axes, [at for row in rows if (at := part(row.setting, step)) is not None])
        axes.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
        axes.set_title(PANELS[name], loc="left", fontsize=9.5)
        axes.set_ylabel("drop")
    made[-1].set_xlabel(label)
    title(figure, heading)
    legend(figure, KINDS)
    return Plot("", figure)


def _points(rows: Sequence[Row], step: str, kind: str) -> list[tuple[float, Row]]:
    found = [(part(row.setting, step), row) for row in rows if re.search(rf"(?:^| ){kind}(?: |$)", row.setting)]
    return sorted(((float(at), row) for at, row in found if at is not None), key=lambda point: point[0])


def _ticks(axes: Axes, places: Sequence[int]) -> None:
    """At most eleven, so that numbers stay apart."""
    every = max(1, -(-max(places) // 10))
    number_ticks(axes, (at for at in places if at % every == 0))


def _words(finding: Finding) -> Plot | None:
    """One panel for the words that add most, one for those without which most is missing."""
    by_metric = {metric: _highest(finding, metric) for metric in WORDS}
    by_metric = {metric: rows for metric, rows in by_metric.items() if rows}
    if not by_metric:
        return None
    heights = [0.42 * len(rows) for rows in by_metric.values()]
    figure, made = panels(heights, left=LABELS, top=0.6, bottom=0.5, gap=0.85)
    for axes, (metric, rows) in zip(made, by_metric.items(), strict=True):
        heading, *look = WORDS[metric]
        name_lanes(axes, [_lane(row) for row in rows])
        for place, row in enumerate(rows):
            across(axes, row, float(place), *look)
        axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
        axes.xaxis.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(heading, loc="left", fontsize=9.5, x=0)
    made[-1].set_xlabel("share of the plain sum")
    title(figure, "which words lower the refusal features")
    return Plot(
        f"The {DRAWN} words of largest mean step, and those without which most of the whole drop is missing, of the "
        "words in at least 3 suffixes that turn their goal, with 95% intervals by goal.",
        figure,
    )


def _highest(finding: Finding, metric: str) -> list[Row]:
    rows = [row for row in finding.rows if (row.method, row.metric) == (REFUSAL, metric) and row.n]
    return sorted(rows, key=lambda row: -(row.estimate or 0.0))[:DRAWN]


def _lane(row: Row) -> Lane:
    counted_as = f"{row.n} suffixes"
    return Lane(name_of(row.setting), counted_as, {row.metric: [replace(row, setting=counted_as)]})
