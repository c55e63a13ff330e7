"""The benchmark's figures: outcomes and costs of every edit, strengths tried, refusal induced by setting features.

A share is drawn from 0 to 1, a cost from 0. Computes no statistic.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, log10

from matplotlib.axes import Axes

from refusalscope.core.types import Finding, Row
from refusalscope.report import bars
from refusalscope.report.drawing import (
    BLUE,
    COVERED,
    INK,
    LABELS,
    METHODS,
    MUTED,
    OUTCOMES,
    UNKNOWN,
    Lane,
    Plot,
    Style,
    across,
    counted,
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
INDUCED = {"refused": "refused", "coherent": "coherent, refused or not"}
Series = dict[tuple[str, str], dict[str, list[tuple[float, Row]]]]
"""Method and set size -> metric -> where and what to draw."""


def benchmark(finding: Finding) -> dict[str, Plot]:
    """Methods side by side first, then every edit's outcomes, strengths tried, refusal induced and costs."""
    made: dict[str, Plot | None] = {**bars.rates(finding)}
    for dataset in dict.fromkeys(row.dataset for row in finding.rows):
        rows = [row for row in finding.rows if row.dataset == dataset]
        name = bars.slug(dataset)
        if dataset == DATASET_OF_STRENGTHS:
            made[f"benchmark-strength-{name}"] = _strength(finding, rows)
            continue
        edits = [row for row in rows if value_set(row.setting) is None]
        made[f"benchmark-outcomes-{name}"] = _outcomes(dataset, lanes(edits, OUTCOMES))
        made[f"benchmark-induced-{name}"] = _induced(dataset, rows)
        made[f"benchmark-cost-{name}"] = _cost(dataset, lanes(edits, COSTS))
    kinds = (*(f"benchmark-{metric}" for metric in bars.RATES), "benchmark-outcomes-", "benchmark-strength-")
    order = (*kinds, "benchmark-induced-", "benchmark-cost-")
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
    n = counted(row for lane in drawn for rows in lane.rows.values() for row in rows)
    return Plot(
        f"Share of {dataset} prompts refused, answered and incoherent under each edit, with 95% intervals (n = {n}). "
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
        f"intervals: the rise of their cross-entropy, and the KL divergence of the next-token distribution "
        f"(n = {counted(row for lane in drawn for rows in lane.rows.values() for row in rows)}).",
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
    n = counted(row for by_metric in series.values() for points in by_metric.values() for _, row in points)
    return Plot(
        f"Share of {DATASET_OF_STRENGTHS} prompts refused, answered and incoherent against the factor c that the "
        f"features are scaled by, with 95% intervals (n = {n}); c = 1 is the unedited model, the dashed line the "
        f"factor chosen.",
        figure,
    )


def _induced(dataset: str, rows: Sequence[Row]) -> Plot | None:
    """All sets in one panel, the share refused against the value that their features are held at; below, coherent.

    Panels of their own for every set size.
    """
    series: dict[tuple[str, str], dict[str, list[tuple[float, Row]]]] = {}
    pooled = {(row.method, row.metric) for row in rows if value_set(row.setting) and row.setting.endswith(" mean")}
    for row in rows:
        parsed = value_set(row.setting)
        single = " draw=" in row.setting and (row.method, row.metric) in pooled
        if parsed and row.metric in INDUCED and row.n and not single:
            series.setdefault((parsed[1], row.metric), {}).setdefault(row.method, []).append((parsed[0], row))
    if not series:
        return None
    ordered = sorted(series.items(), key=lambda item: (-int(item[0][0]), list(INDUCED).index(item[0][1])))
    found = {method for drawn in series.values() for method in drawn}
    styles = {method: METHODS.get(method, UNKNOWN) for method in bars.ordered(found)}
    references = {row.metric: row for row in rows if (row.method, row.setting) == ("direction", "add") and row.n}
    beside: Style = {"direction added": (METHODS["direction"][0], "")} if references else {}
    top = 0.4 + 0.19 * ceil(len({**styles, **beside}) / 3)
    figure, made = panels([1.45] * len(series), left=0.62, top=top + 0.2, bottom=0.5, gap=0.55)
    for axes, ((k, metric), by_method) in zip(made, ordered, strict=True):
        axes.set_title(f"{INDUCED[metric]}, k = {k}", loc="left", fontsize=9.5)
        if metric in references:
            _level(axes, references[metric], METHODS["direction"][0])
        if all(value > 0 for points in by_method.values() for value, _ in points):
            axes.set_xscale("log")  # small values matter most, and lie close together
            axes.minorticks_off()
        _shares(axes, by_method, styles)
    made[-1].set_xlabel("value v that every feature of the set is held at")
    title(figure, f"refusal induced on {dataset}")
    legend(figure, {**styles, **beside})
    return Plot(
        f"Share of {dataset} prompts refused, and of answers coherent (not empty, not looping, not cut off; a refusal "
        f"may be coherent), against the value v that the features of each set are held at, with 95% intervals "
        f"(n = {counted(row for drawn in series.values() for points in drawn.values() for _, row in points)})"
        f"{'; dashed lines with bands: the refusal direction added instead' if references else ''}.",
        figure,
    )


def _shares(axes: Axes, curves: Mapping[str, Sequence[tuple[float, Row]]], styles: Style) -> None:
    """Named curves of shares, a tick for each number below them, or for round ones where these are too many."""
    for name, points in curves.items():
        curve(axes, sorted(points, key=lambda point: point[0]), *styles[name])
    number_ticks(axes, _few({x for points in curves.values() for x, _ in points}))
    share_axis(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)


def _few(numbers: set[float]) -> Iterable[float]:
    """The numbers; where more than eight would run into each other, round ones between the least and the largest."""
    low, high = min(numbers), max(numbers)
    if len(numbers) <= 8 or low <= 0:
        return numbers
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    return [tick for decade in decades for step in (1, 2, 5) if low <= (tick := step * 10.0**decade) <= high]


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
