"""One Finding in, its figures out: SVG whose bytes depend on the finding alone.

Computes no statistic: every point and whisker is a row's estimate and interval. A share is drawn from 0 to 1, a cost
from 0, and a row that rests on too few scored prompts is hollow. Knows nothing of files and pages.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from refusalscope.core.types import Finding, Row

COVERED = 0.9
"""Share of scored prompts under which a number is flagged."""
STRENGTH_DATASET = "harmful-validation"
"""The data set on which every scaling factor is tried."""
COSTS = {"cross_entropy_change": "cross-entropy change", "kl": "KL divergence"}
QUALITIES = {"variance_explained": "variance explained", "cross_entropy_recovered": "cross-entropy recovered"}
INK, MUTED, GRID = "#1b2330", "#5f6875", "#d9dde3"
"""Text, secondary text and grid lines; a page may give them its own colours."""
# Okabe and Ito's palette, which colour-blind readers can tell apart; shape says the same again.
OUTCOMES = {"refused": ("#0072b2", "o"), "answered": ("#d55e00", "^"), "incoherent": ("#8a8f98", "s")}
WIDTH = 4.6  # inches, 442 pixels: shrunk to a phone's 350 its letters are still 10 pixels high
LABELS, RIGHT = 1.6, 0.18  # inches left and right of the axes
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "refusalscope",
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.labelcolor": MUTED,
}


class Plot(NamedTuple):
    """A figure and what it shows."""

    caption: str
    svg: bytes


class Lane(NamedTuple):
    """What is drawn in one line of a chart: an edit, and its rows by metric (several only for single draws)."""

    method: str
    setting: str
    rows: Mapping[str, list[Row]]


def figures(finding: Finding) -> dict[str, bytes]:
    """The figures of a finding as SVG, by name; none for a study this file does not know."""
    return {name: plot.svg for name, plot in plots(finding).items()}


def plots(finding: Finding) -> dict[str, Plot]:
    """The figures of a finding with their captions, by name."""
    draw = DRAWERS.get(finding.study)
    if draw is None:
        return {}
    # The reader's own matplotlibrc must not change the bytes. Text stays text, so a name in letters that matplotlib's
    # font lacks is still drawn by the browser.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        return draw(finding)


def factor(setting: str) -> tuple[float, str] | None:
    """Scaling factor and set size of a setting such as `scale c=-1 k=20 draw=0`; None for any other."""
    found = re.match(r"scale c=(\S+) k=(\d+)", setting)
    return (float(found[1]), found[2]) if found else None


def readable(setting: str) -> str:
    """A setting in the notation of a paper: `scale c=-1 k=20` becomes `c = −1, k = 20`."""
    found = re.match(r"scale c=(\S+) k=(\d+)(.*)", setting)
    if not found:
        return setting.replace("=", " ")
    return f"c = {found[1]}, k = {found[2]}{found[3].replace(' ', ', ').replace('=', ' ')}".replace("-", "−")


def lanes(rows: Iterable[Row], metrics: Iterable[str]) -> list[Lane]:
    """Rows by edit, in order of first appearance; single draws are left out where the finding pooled them."""
    wanted = [row for row in rows if row.metric in set(metrics)]
    pooled = {(r.method, r.setting.removesuffix(" mean"), r.metric) for r in wanted if r.setting.endswith(" mean")}
    made: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in wanted:
        setting, drawn, _ = row.setting.removesuffix(" mean").partition(" draw=")
        if not (drawn and (row.method, setting, row.metric) in pooled):
            made.setdefault((row.method, setting), {}).setdefault(row.metric, []).append(row)
    return [Lane(method, setting, by_metric) for (method, setting), by_metric in made.items()]


def _benchmark(finding: Finding) -> dict[str, Plot]:
    made: dict[str, Plot | None] = {}
    for dataset in dict.fromkeys(row.dataset for row in finding.rows):
        rows = [row for row in finding.rows if row.dataset == dataset]
        name = re.sub(r"[^\w.-]+", "-", dataset)
        if dataset == STRENGTH_DATASET:
            made[f"benchmark-strength-{name}"] = _strength(finding, rows)
            continue
        made[f"benchmark-outcomes-{name}"] = _outcomes(dataset, lanes(rows, OUTCOMES))
        made[f"benchmark-cost-{name}"] = _cost(dataset, lanes(rows, COSTS))
    # Outcomes first, then how strong an edit is, then what it costs, whatever order the rows have.
    order = ("benchmark-outcomes", "benchmark-strength", "benchmark-cost")
    return {name: plot for start in order for name, plot in made.items() if plot and name.startswith(start)}


def _outcomes(dataset: str, drawn: Sequence[Lane]) -> Plot | None:
    """Three marks and whiskers per edit."""
    if not drawn:
        return None
    figure, (axes,) = _figure([0.46 * len(drawn)], left=LABELS, top=0.62, bottom=0.4)
    _name_lanes(axes, drawn)
    for place, lane in enumerate(drawn):
        for offset, (metric, (colour, marker)) in zip((-0.24, 0.0, 0.24), OUTCOMES.items(), strict=True):
            for row in lane.rows.get(metric, []):
                _across(axes, row, place + offset, colour, marker)
    _share_axis(axes.xaxis)
    axes.set_xlim(-0.02, 1.02)
    _title(figure, f"{dataset} prompts")
    _outcome_legend(figure)
    return Plot(
        f"Share of {dataset} prompts refused, answered and incoherent under each edit, with 95% intervals. "
        f"Hollow marks rest on fewer than {COVERED:.0%} of the prompts.",
        _svg(figure),
    )


def _cost(dataset: str, drawn: Sequence[Lane]) -> Plot | None:
    """One panel a metric, one mark and whisker an edit, the value written beside it."""
    metrics = [metric for metric in COSTS if any(metric in lane.rows for lane in drawn)]
    if not metrics:
        return None
    figure, panels = _figure([0.4 * len(drawn)] * len(metrics), left=LABELS, top=0.5, bottom=0.45, gap=0.85)
    for axes, metric in zip(panels, metrics, strict=True):
        _name_lanes(axes, drawn)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        rows = [row for lane in drawn for row in lane.rows.get(metric, [])]
        low, high = _span(rows)
        axes.set_xlim(low - 0.03 * (high - low), high + 0.24 * (high - low))  # room for the last number
        for place, lane in enumerate(drawn):
            for row in lane.rows.get(metric, []):
                _across(axes, row, float(place), OUTCOMES["refused"][0], "o", write=len(lane.rows[metric]) == 1)
        axes.set_title(f"{COSTS[metric]}, nats per token", loc="left", fontsize=9.5, x=0)
    _title(figure, f"cost on {dataset} prompts")
    return Plot(
        f"What each edit costs on the unedited model’s own answers to {dataset} prompts, in nats per token, with 95% "
        f"intervals: the rise of their cross-entropy, and the KL divergence of the next-token distribution.",
        _svg(figure),
    )


def _strength(finding: Finding, rows: Sequence[Row]) -> Plot | None:
    """One panel a feature set: the three shares against the scaling factor; c = 1 is the unedited model."""
    series: dict[tuple[str, str], dict[str, list[tuple[float, Row]]]] = {}
    base = {row.metric: row for row in rows if row.method == "base"}
    for row in rows:
        parsed = factor(row.setting)
        if parsed and row.metric in OUTCOMES and row.n:
            begun = [(1.0, base[row.metric])] if row.metric in base and base[row.metric].n else []
            series.setdefault((row.method, parsed[1]), {}).setdefault(row.metric, begun).append((parsed[0], row))
    if not series:
        return None
    figure, panels = _figure([1.45] * len(series), left=0.62, top=0.78, bottom=0.5, gap=0.55)
    for axes, ((method, k), by_metric) in zip(panels, series.items(), strict=True):
        chosen = _chosen_factor(finding, method, k)
        note = "" if chosen is None else f": c = {chosen:g} chosen".replace("-", "−")
        axes.set_title(f"{method}, k = {k}{note}", loc="left", fontsize=9.5)
        if chosen is not None:
            axes.axvline(chosen, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        for metric, points in by_metric.items():
            _curve(axes, sorted(points, key=lambda point: point[0]), *OUTCOMES[metric])
        factors = sorted({c for points in by_metric.values() for c, _ in points})
        axes.set_xticks(factors, [f"{c:g}".replace("-", "−") for c in factors])
        _share_axis(axes.yaxis)
        axes.set_ylim(-0.03, 1.03)
    panels[-1].set_xlabel("scaling factor c (1 = unedited)")
    _title(figure, f"strength, tried on {STRENGTH_DATASET}")
    _outcome_legend(figure)
    return Plot(
        f"Share of {STRENGTH_DATASET} prompts refused, answered and incoherent against the factor c that the features "
        f"are scaled by, with 95% intervals; c = 1 is the unedited model, the dashed line the factor chosen.",
        _svg(figure),
    )


def _health(finding: Finding) -> dict[str, Plot]:
    """One panel a measure, one mark and whisker a layer."""
    by_metric: dict[str, list[tuple[float, Row]]] = {}
    for row in finding.rows:
        layer = re.fullmatch(r"layer=(\d+)", row.setting)
        if layer and row.metric in QUALITIES and row.n:
            by_metric.setdefault(row.metric, []).append((float(layer[1]), row))
    if not by_metric:
        return {}
    figure, panels = _figure([1.45] * len(by_metric), left=0.62, top=0.55, bottom=0.5, gap=0.55)
    for axes, (metric, points) in zip(panels, by_metric.items(), strict=True):
        low, high = _span([row for _, row in points])
        _curve(axes, points, OUTCOMES["refused"][0], "o")
        axes.set_title(QUALITIES[metric], loc="left", fontsize=9.5)
        axes.set_ylim(low - 0.03 * (max(high, 1) - low), max(high, 1) + 0.03 * (max(high, 1) - low))
        axes.set_xticks([layer for layer, _ in points], [f"{layer:g}" for layer, _ in points])
        axes.axhline(1, color=GRID, linewidth=0.8, zorder=0)
        axes.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
    panels[-1].set_xlabel("layer")
    _title(figure, "reconstruction by the SAEs")
    return {
        "health-reconstruction": Plot(
            "What each layer’s SAE keeps of the residual stream, with 95% intervals; 1 is everything.", _svg(figure)
        )
    }


DRAWERS: dict[str, Callable[[Finding], dict[str, Plot]]] = {"benchmark": _benchmark, "health": _health}


def _figure(
    heights: Sequence[float], *, left: float, top: float, bottom: float, gap: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Panels of these heights under one another; all lengths are inches, so that text never meets text."""
    total = top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure, panels, above = Figure(figsize=(WIDTH, total)), [], top
    for height in heights:
        box = (left / WIDTH, 1 - (above + height) / total, (WIDTH - left - RIGHT) / WIDTH, height / total)
        panels.append(figure.add_axes(box))
        above += height + gap
    return figure, panels


def _across(axes: Axes, row: Row, y: float, colour: str, marker: str, *, write: bool = False) -> None:
    """One estimate with its interval, lying; words instead where nothing was scored."""
    if row.estimate is None or row.low is None or row.high is None:
        axes.text(0.02, y, "not scored", fontsize=8, color=MUTED, va="center", transform=axes.get_yaxis_transform())
        return
    axes.plot([row.low, row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", clip_on=False)
    _point(axes, row.estimate, y, row, colour, marker)
    if write:
        text = f"{row.estimate:.3f}".replace("-", "−")
        axes.annotate(text, (row.high, y), (6, 0), textcoords="offset points", va="center", fontsize=8.5)


def _curve(axes: Axes, points: Sequence[tuple[float, Row]], colour: str, marker: str) -> None:
    estimates = [row.estimate or 0.0 for _, row in points]
    axes.plot([x for x, _ in points], estimates, color=colour, linewidth=1.1)
    for (x, row), estimate in zip(points, estimates, strict=True):
        axes.plot([x, x], [row.low or 0.0, row.high or 0.0], color=colour, linewidth=1.6, alpha=0.55)
        _point(axes, x, estimate, row, colour, marker)


def _point(axes: Axes, x: float, y: float, row: Row, colour: str, marker: str) -> None:
    fill = colour if row.coverage >= COVERED else "#ffffff"
    axes.plot([x], [y], marker, color=colour, markerfacecolor=fill, markersize=5.5, clip_on=False, zorder=3)


def _name_lanes(axes: Axes, drawn: Sequence[Lane]) -> None:
    """Method and setting left of each lane, and a faint line between lanes."""
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
    for place, lane in enumerate(drawn):
        settings = {row.setting for rows in lane.rows.values() for row in rows}
        note = ", mean" if f"{lane.setting} mean" in settings else "" if lane.setting in settings else ", draws"
        axes.text(-0.05, place - (0.17 if lane.setting else 0), _short(lane.method), **beside)
        setting = _short(readable(lane.setting) + note)
        axes.text(-0.05, place + 0.21, setting, fontsize=8, color=MUTED, **beside)
        if place:
            axes.axhline(place - 0.5, color=GRID, linewidth=0.6, zorder=0)


def _short(text: str) -> str:
    return text if len(text) <= 21 else f"{text[:20]}…"


def _share_axis(axis: Any) -> None:
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axis.grid(True, linewidth=0.6)
    axis.axes.set_axisbelow(True)


def _span(rows: Sequence[Row]) -> tuple[float, float]:
    """From 0, or below it, to the highest end of an interval."""
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (low, low + 1.0)


def _chosen_factor(finding: Finding, method: str, k: str) -> float | None:
    """The factor with which this set was then used on the other data sets."""
    for row in finding.rows:
        parsed = factor(row.setting)
        if row.method == method and row.dataset != STRENGTH_DATASET and parsed and parsed[1] == k:
            return parsed[0]
    return None


def _outcome_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.6, markersize=5.5, label=metric)
        for metric, (colour, marker) in OUTCOMES.items()
    ]
    top = 1 - 0.27 / figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, top),
        ncols=3,
        frameon=False,
        borderpad=0,
        borderaxespad=0.3,
        handlelength=1.4,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def _title(figure: Figure, text: str) -> None:
    figure.text(0.01, 1 - 0.06 / figure.get_figheight(), text, va="top", fontweight="bold")


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Creator and date would tie the bytes to a version and a moment.
    metadata: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(stream, metadata=metadata)
    return stream.getvalue()
