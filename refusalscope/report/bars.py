"""Grouped bars, as section 4.1 of the paper has them: one share of the answers, by data set and method.

A bar is a row's estimate, its whisker the row's interval; every method keeps its place and colour in every figure.
Computes no statistic.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

from matplotlib.axes import Axes

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    COVERED,
    GROUND,
    INK,
    METHODS,
    MUTED,
    UNKNOWN,
    Plot,
    Style,
    counted,
    legend,
    panels,
    share_axis,
    short,
    title,
)
from refusalscope.report.settings import DATASET_OF_STRENGTHS, factor

RATES = {
    "refused": ("refused", "Share of answers that open with a refusal phrase"),
    "answered": ("answered", "Share of answers that are coherent and no refusal"),
    "complied": ("did what was asked", "Share of answers that the testbed’s grammar knows to fit the request"),
}
"""The benchmark's own shares that are drawn: title, and how the caption begins."""
ASKED = {
    "harmful": ("judged harmful by", "Share of answers that are harmful according to"),
    "refused": ("judged refused by", "Share of answers that refuse according to"),
    "coherent": ("judged coherent by", "Share of answers that are coherent according to"),
}
"""The same for what judges are asked, each followed by the judge; a metric is `question:judge`."""
NAMES = {"direction": "direction removed", "random": "random, mean"}
ABREAST, ACROSS = 3, 24
"""Data sets and bars side by side at most: more of them go below, so that a bar stays 11 pixels wide on a phone."""
Group = Mapping[str, Row]
"""Method -> its row on one data set."""


def rates(finding: Finding) -> dict[str, Plot]:
    """A figure for each share that the benchmark itself scores."""
    made = {metric: grouped(finding.rows, metric, *words) for metric, words in RATES.items()}
    return {f"benchmark-{metric}": plot for metric, plot in made.items() if plot}


def safety(finding: Finding) -> dict[str, Plot]:
    """A figure for each judge of harm, then for those of refusal and coherence that the run's own rules are not.

    Of these alone a finding has changes from the unedited model; the rules' stand in the benchmark's.
    """
    made: dict[str, Plot | None] = {}
    metrics = dict.fromkeys(row.metric for row in finding.rows)
    for asked, (heading, caption) in ASKED.items():
        for metric in metrics:
            question, _, judge = metric.partition(":")
            if judge and question == asked and (asked == "harmful" or f"{asked}_change:{judge}" in metrics):
                words = (f"{heading} {judge}", f"{caption} {judge}")
                made[f"safety-{slug(question)}-{slug(judge)}"] = grouped(finding.rows, metric, *words)
    return {name: plot for name, plot in made.items() if plot}


def slug(text: str) -> str:
    """A name that is fit for a file."""
    return re.sub(r"[^\w.-]+", "-", text)


def grouped(rows: Iterable[Row], metric: str, heading: str, caption: str) -> Plot | None:
    """Bars by data set and method for one metric between 0 and 1; None where no edit was evaluated on it."""
    groups = by_dataset([row for row in rows if row.metric == metric])
    methods = ordered({method for group in groups.values() for method in group})
    if not methods:
        return None
    abreast = max(1, min(ABREAST, ACROSS // len(methods), len(groups)))
    lines = [list(groups.items())[start : start + abreast] for start in range(0, len(groups), abreast)]
    figure, made = panels([1.45] * len(lines), left=0.52, top=0.42 + 0.19 * ceil(len(methods) / 3), bottom=0.3, gap=0.4)
    for axes, line in zip(made, lines, strict=True):
        _panel(axes, line, methods, abreast)
    title(figure, heading)
    style: Style = {NAMES.get(method, method): (METHODS.get(method, UNKNOWN)[0], "s") for method in methods}
    legend(figure, style, line=0.0)
    return Plot(caption + _conditions(groups, methods), figure)


def ordered(found: set[str]) -> list[str]:
    """Methods in the order of METHODS, others after them."""
    return [method for method in (*METHODS, *sorted(found - set(METHODS))) if method in found]


def by_dataset(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Data set -> method -> its row: the setting each method was evaluated with, at the largest set size.

    Of the random sets the pooled row; the direction removed, neither affinely nor added.
    """
    largest = max((int(scaled[1]) for row in rows if (scaled := factor(row.setting))), default=0)
    made: dict[str, dict[str, Row]] = {}
    for row in rows:
        scaled = factor(row.setting)
        settled = int(scaled[1]) == largest and "draw=" not in row.setting if scaled else row.setting in ("", "remove")
        if settled and row.dataset != DATASET_OF_STRENGTHS:
            made.setdefault(row.dataset, {}).setdefault(row.method, row)
    return made


def _panel(axes: Axes, line: Sequence[tuple[str, Group]], methods: Sequence[str], abreast: int) -> None:
    """Some data sets side by side, in a panel as wide as `abreast` of them."""
    step = len(methods) + 1.4
    for place, (_, group) in enumerate(line):
        for slot, method in enumerate(methods):
            if method in group:
                _bar(axes, place * step + slot, group[method], METHODS.get(method, UNKNOWN)[0])
    middle = (len(methods) - 1) / 2
    axes.set_xticks([place * step + middle for place in range(len(line))], [short(name) for name, _ in line])
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_xlim(-1.0, abreast * step - 1.4)
    share_axis(axes.yaxis)
    axes.set_ylim(0, 1.03)


def _bar(axes: Axes, x: float, row: Row, colour: str) -> None:
    """One bar and its whisker on a light edge, so that it shows on any colour; hollow where too few were scored."""
    if row.estimate is None or row.low is None or row.high is None:
        axes.text(x, 0.03, "not scored", rotation=90, fontsize=7.5, color=MUTED, ha="center", va="bottom")
        return
    covered = row.coverage >= COVERED
    look = {"facecolor": colour} if covered else {"facecolor": GROUND, "hatch": "//////"}
    # In front of the axis, so that a share of 0 is a line in its method's colour.
    over: dict[str, Any] = {"clip_on": False, "zorder": 3}
    axes.bar(x, row.estimate, width=0.84, edgecolor=colour, linewidth=1.2, **look, **over)
    for shade, width in ((GROUND, 2.6), (INK, 1.1)):
        axes.plot([x, x], [row.low, row.high], color=shade, linewidth=width, solid_capstyle="butt", **over)


def _conditions(groups: Mapping[str, Group], methods: Sequence[str]) -> str:
    """What every caption says: on how many answers, and what a gap and hatching mean where there are any."""
    rows = [row for group in groups.values() for row in group.values()]
    counts = [counted(row for row in rows if row.method != "random")]
    if "random" in methods:
        counts.append(f"{counted(row for row in rows if row.method == 'random')} for random, all draws together")
    notes = [f", by data set and method, with 95% intervals; n = {', '.join(filter(None, counts))}."]
    if any(len(group) < len(methods) for group in groups.values()):
        notes.append("A gap: not evaluated.")
    if any(row.n and row.coverage < COVERED for row in rows):
        notes.append(f"Hatched: fewer than {COVERED:.0%} of the answers could be scored.")
    return " ".join(notes)
