"""The benchmark's figures: outcomes and costs of every edit, strengths tried, refusal induced by setting features.

A share is drawn from 0 to 1, a cost from 0. Computes no statistic.
"""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    BLUE,
    COVERED,
    GREY,
    INK,
    LABELS,
    MUTED,
    ORANGE,
    OUTCOMES,
    Lane,
    Plot,
    Style,
    across,
    curve,
    lanes,
    legend,
    name_lanes,
    number_ticks,
    panels,
    share_axis,
    span,
    title,
)
from refusalscope.report.settings import DATASET_OF_STRENGTHS, factor, value_set

COSTS = {"cross_entropy_change": "cross-entropy change", "kl": "KL divergence"}
INDUCED: Style = {"refused": (BLUE, "o"), "coherent": (ORANGE, "^")}
Series = dict[tuple[str, str], dict[str, list[tuple[float, Row]]]]
"""Method and set size -> metric -> where and what to draw."""


def benchmark(finding: Finding) -> dict[str, Plot]:
    """Outcomes first, then strengths tried, refusal induced and costs, whatever order the rows have."""
    made: dict[str, Plot | None] = {}
    for dataset in dict.fromkeys(row.dataset for row in finding.rows):
        rows = [row for row in finding.rows if row.dataset == dataset]
        name = re.sub(r"[^\w.-]+", "-", dataset)
        if dataset == DATASET_OF_STRENGTHS:
            made[f"benchmark-strength-{name}"] = _strength(finding, rows)
            continue
        edits = [row for row in rows if value_set(row.setting) is None]
        made[f"benchmark-outcomes-{name}"] = _outcomes(dataset, lanes(edits, OUTCOMES))
        made[f"benchmark-induced-{name}"] = _induced(dataset, rows)
        made[f"benchmark-cost-{name}"] = _cost(dataset, lanes(edits, COSTS))
    order = ("benchmark-outcomes", "benchmark-strength", "benchmark-induced", "benchmark-cost")
    return {name: plot for start in order for name, plot in made.items() if plot and name.startswith(start)}


def _outcomes(dataset: str, drawn: Sequence[Lane]) -> Plot | None:
    """Three marks and whiskers per edit."""
    if not drawn:
        return None
    figure, (axes,) = panels([0.46 * len(drawn)], left=LABELS, top=0.62, bottom=0.4)
    name_lanes(axes, drawn)
    for place, lane in enumerate(drawn):
        for offset, (metric, (colour, marker)) in zip((-0.24, 0.0, 0.24), OUTCOMES.items(), strict=True):
            for row in lane.rows.get(metric, []):
                across(axes, row, place + offset, colour, marker)
    share_axis(axes.xaxis)
    axes.set_xlim(-0.02, 1.02)
    title(figure, f"{dataset} prompts")
    legend(figure, OUTCOMES)
    return Plot(
        f"Share of {dataset} prompts refused, answered and incoherent under each edit, with 95% intervals. "
        f"Hollow marks rest on fewer than {COVERED:.0%} of the prompts.",
        figure,
    )


def _cost(dataset: str, drawn: Sequence[Lane]) -> Plot | None:
    """One panel a metric, one mark and whisker an edit, the value written beside it."""
    metrics = [metric for metric in COSTS if any(metric in lane.rows for lane in drawn)]
    if not metrics:
        return None
    figure, made = panels([0.4 * len(drawn)] * len(metrics), left=LABELS, top=0.5, bottom=0.45, gap=0.85)
    for axes, metric in zip(made, metrics, strict=True):
        name_lanes(axes, drawn)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        low, high = span(row for lane in drawn for row in lane.rows.get(metric, []))
        axes.set_xlim(low - 0.03 * (high - low), high + 0.24 * (high - low))  # room for the last number
        for place, lane in enumerate(drawn):
            for row in lane.rows.get(metric, []):
                across(axes, row, float(place), BLUE, "o", write=len(lane.rows[metric]) == 1)
        axes.set_title(f"{COSTS[metric]}, nats per token", loc="left", fontsize=9.5, x=0)
    title(figure, f"cost on {dataset} prompts")
    return Plot(
        f"What each edit costs on the unedited model’s own answers to {dataset} prompts, in nats per token, with 95% "
        f"intervals: the rise of their cross-entropy, and the KL divergence of the next-token distribution.",
        figure,
    )


def _strength(finding: Finding, rows: Sequence[Row]) -> Plot | None:
    """One panel a feature set: the three shares against the scaling factor; c = 1 is the unedited model."""
    series: Series = {}
    base = {row.metric: row for row in rows if row.method == "base"}
    for row in rows:
        parsed = factor(row.setting)
        if parsed and row.metric in OUTCOMES and row.n:
            begun = [(1.0, base[row.metric])] if row.metric in base and base[row.metric].n else []
            series.setdefault((row.method, parsed[1]), {}).setdefault(row.metric, begun).append((parsed[0], row))
    if not series:
        return None
    figure, made = panels([1.45] * len(series), left=0.62, top=0.78, bottom=0.5, gap=0.55)
    for axes, ((method, k), by_metric) in zip(made, series.items(), strict=True):
        chosen = _chosen_factor(finding, method, k)
        note = "" if chosen is None else f": c = {chosen:g} chosen".replace("-", "−")
        axes.set_title(f"{method}, k = {k}{note}", loc="left", fontsize=9.5)
        if chosen is not None:
            axes.axvline(chosen, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        _shares(axes, by_metric, OUTCOMES)
    made[-1].set_xlabel("scaling factor c (1 = unedited)")
    title(figure, f"strength, tried on {DATASET_OF_STRENGTHS}")
    legend(figure, OUTCOMES)
    return Plot(
        f"Share of {DATASET_OF_STRENGTHS} prompts refused, answered and incoherent against the factor c that the "
        f"features are scaled by, with 95% intervals; c = 1 is the unedited model, the dashed line the factor chosen.",
        figure,
    )


def _induced(dataset: str, rows: Sequence[Row]) -> Plot | None:
    """One panel a feature set: the shares refused and coherent against the value that its features are set to."""
    series: Series = {}
    pooled = {(row.method, row.metric) for row in rows if value_set(row.setting) and row.setting.endswith(" mean")}
    for row in rows:
        parsed = value_set(row.setting)
        single = " draw=" in row.setting and (row.method, row.metric) in pooled
        if parsed and row.metric in INDUCED and row.n and not single:
            series.setdefault((row.method, parsed[1]), {}).setdefault(row.metric, []).append((parsed[0], row))
    if not series:
        return None
    references = {row.metric: row for row in rows if (row.method, row.setting) == ("direction", "add") and row.n}
    figure, made = panels([1.45] * len(series), left=0.62, top=0.78, bottom=0.5, gap=0.55)
    for axes, ((method, k), by_metric) in zip(made, series.items(), strict=True):
        axes.set_title(f"{method}, k = {k}", loc="left", fontsize=9.5)
        for metric, (colour, _) in INDUCED.items():
            if metric in references:
                _level(axes, references[metric], colour)
        if all(value > 0 for points in by_metric.values() for value, _ in points):
            axes.set_xscale("log")  # small values matter most, and lie close together
            axes.minorticks_off()
        _shares(axes, by_metric, INDUCED)
    made[-1].set_xlabel("value v that every feature of the set is held at")
    title(figure, f"refusal induced on {dataset}")
    beside: Style = {"direction added": (GREY, "")} if references else {}
    legend(figure, {**INDUCED, **beside})
    return Plot(
        f"Share of {dataset} prompts refused, and of answers coherent (not empty, not looping, not cut off; a refusal "
        f"may be coherent), against the value v that the features are set to, with 95% intervals"
        f"{'; dashed lines with bands: the refusal direction added instead' if references else ''}.",
        figure,
    )


def _shares(axes: Axes, by_metric: dict[str, list[tuple[float, Row]]], styles: Style) -> None:
    for metric, points in by_metric.items():
        curve(axes, sorted(points, key=lambda point: point[0]), *styles[metric])
    number_ticks(axes, (x for points in by_metric.values() for x, _ in points))
    share_axis(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)


def _level(axes: Axes, row: Row, colour: str) -> None:
    """What does not depend on x: a dashed line within the band of its interval."""
    axes.axhspan(row.low or 0.0, row.high or 0.0, color=colour, alpha=0.12, linewidth=0, zorder=0)
    axes.axhline(row.estimate or 0.0, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _chosen_factor(finding: Finding, method: str, k: str) -> float | None:
    """The factor with which this set was then used on the other data sets."""
    for row in finding.rows:
        parsed = factor(row.setting)
        if row.method == method and row.dataset != DATASET_OF_STRENGTHS and parsed and parsed[1] == k:
            return parsed[0]
    return None
