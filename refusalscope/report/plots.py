"""One Finding in, its figures out; which study is drawn how. Computes no statistic, knows nothing of files and pages.

The benchmark's figures stand in `benchmark_plots.py` and `bars.py`; here are the small ones: curves over layers and
nodes, and how well attributions predict effects.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib.axes import Axes

from refusalscope.core.store import Store
from refusalscope.core.types import Finding, Row
from refusalscope.report import bars
from refusalscope.report.benchmark_plots import benchmark
from refusalscope.report.categories_plots import categories
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
    curve,
    legend,
    name_lanes,
    number_ticks,
    panels,
    render,
    span,
    style,
    title,
)
from refusalscope.report.graph_plots import graph
from refusalscope.report.health_plots import health
from refusalscope.report.jailbreaks_plots import jailbreaks
from refusalscope.report.minimal_plots import minimal
from refusalscope.report.network import GRAPH, network
from refusalscope.report.probes_plots import probes
from refusalscope.report.settings import part
from refusalscope.report.suffixes_plots import suffixes
from refusalscope.report.sweep_plots import sweep
from refusalscope.report.verdict import CORRELATIONS, MOST, least

Drawn = Mapping[str, Mapping[str, Plot]]
"""Study -> name of a figure -> the figure."""
TERMS: Style = {"features": (BLUE, "o"), "candidates": (ORANGE, "^"), "error": (GREY, "s")}


def drawn(store: Store) -> Drawn:
    """Study -> the figures of its finding in a run folder; the graph of features under the path of its file."""
    findings = [store.read(path, Finding) for path in store.paths("findings", ".json")]
    made = {finding.study: plots(finding) for finding in findings}
    return made | {path: network(store.read(path, dict)) for path in store.paths("graph", ".json") if path == GRAPH}


def figures(finding: Finding) -> dict[str, bytes]:
    """The figures of a finding as SVG, by name; none for a study this file does not know."""
    return {name: render(plot.figure, "svg") for name, plot in plots(finding).items()}


def plots(finding: Finding) -> dict[str, Plot]:
    """The figures of a finding with their captions, by name."""
    draw = DRAWERS.get(finding.study)
    if draw is None:
        return {}
    with style():
        return draw(finding)


def by_part(rows: Iterable[Row], name: str, metrics: Iterable[str]) -> dict[str, list[tuple[float, Row]]]:
    """Metric -> scored rows with the number that their setting gives to `name`, ascending; metrics in this order."""
    made: dict[str, list[tuple[float, Row]]] = {metric: [] for metric in metrics}
    for row in rows:
        at = part(row.setting, name)
        if row.metric in made and at is not None and row.n:
            made[row.metric].append((float(at), row))
    return {metric: sorted(points, key=lambda point: point[0]) for metric, points in made.items() if points}


def _attribution(finding: Finding) -> dict[str, Plot]:
    """Three curves over the layers: all features, the candidates, the SAE's error term."""
    by_metric = by_part(finding.rows, "layer", TERMS)
    if not by_metric:
        return {}
    figure, (axes,) = panels([1.9], left=0.62, top=0.62, bottom=0.5)
    for metric, points in by_metric.items():
        curve(axes, points, *TERMS[metric])
    number_ticks(axes, (layer for points in by_metric.values() for layer, _ in points))
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("logits")
    title(figure, "attribution by layer, summed over positions")
    legend(figure, {metric: TERMS[metric] for metric in by_metric})
    caption = (
        "Attribution of refusal to each layer’s SAE features, to the candidates among them and to what the SAE leaves "
        "out (its error term), in logits, mean over prompts with 95% intervals. Layers overlap: do not add them up."
    )
    return {"attribution-terms": Plot(caption, figure)}


def _verification(finding: Finding) -> dict[str, Plot]:
    made = {"verification-nodes": _nodes(finding.rows), "verification-correlations": _correlations(finding.rows)}
    return {name: plot for name, plot in made.items() if plot}


def _nodes(rows: Sequence[Row]) -> Plot | None:
    """How the error shrinks with the nodes of the integration; both axes logarithmic."""
    by_metric = by_part(rows, "nodes", ("riemann_error", "completeness_error"))
    named: Style = {"riemann_error": (BLUE, "o"), "completeness_error": (ORANGE, "^")}
    points = [(at, row) for drawn in by_metric.values() for at, row in drawn if (row.estimate or 0) > 0]
    if not points:
        return None
    figure, (axes,) = panels([1.9], left=0.72, top=0.62, bottom=0.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for metric, drawn in by_metric.items():
        colour, marker = named[metric]
        joined = "-" if metric == "riemann_error" else "none"
        above = [(at, row.estimate) for at, row in drawn if (row.estimate or 0) > 0]
        axes.plot(*zip(*above, strict=True), marker, linestyle=joined, linewidth=1.1, color=colour, markersize=5.5)
    axes.axhline(MOST["completeness_error"], color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the usual one writes mathematics
    number_ticks(axes, (at for at, _ in points))
    axes.set_xlabel("nodes of the integration")
    axes.set_ylabel("share of the gap")
    title(figure, "what the layerwise sum misses")
    legend(figure, {name.replace("_", " ").replace(" error", ""): named[name] for name in by_metric})
    return Plot(
        "How far the attributions of one layer are from adding up to the change of the metric, as a share of that "
        "change: a Riemann sum by its number of nodes, and the rule that is used. Below the dashed line passes.",
        figure,
    )


def _correlations(rows: Sequence[Row]) -> Plot | None:
    """One panel for features edited alone, one for sets; the tick is what was expected of each method."""
    by_metric = {metric: [row for row in rows if row.metric == metric and row.method] for metric in CORRELATIONS}
    by_metric = {metric: drawn for metric, drawn in by_metric.items() if drawn}
    if not by_metric:
        return None
    heights = [0.4 * len(drawn) for drawn in by_metric.values()]
    figure, made = panels(heights, left=LABELS, top=0.55, bottom=0.45, gap=0.75)
    low = min(span(row for drawn in by_metric.values() for row in drawn)[0], 0.0)
    for axes, (metric, drawn) in zip(made, by_metric.items(), strict=True):
        name_lanes(axes, [Lane(row.method, row.setting, {metric: [row]}) for row in drawn])
        for place, row in enumerate(drawn):
            across(axes, row, float(place), BLUE, "o")
            _expectation(axes, least(row, drawn), place)
        axes.set_xlim(low - 0.02, 1.03)
        axes.xaxis.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(CORRELATIONS[metric], loc="left", fontsize=9.5, x=0)
    title(figure, "do scores predict effects?")
    return Plot(
        "Spearman correlation over features between each method’s attribution and the effect measured by editing, on "
        "held-out prompts, with 95% intervals. The upright tick is what was expected at least.",
        figure,
    )


def _expectation(axes: Axes, limit: float | None, place: int) -> None:
    if limit is not None:
        axes.plot([limit, limit], [place - 0.32, place + 0.32], color=INK, linewidth=1.4, zorder=2)


DRAWERS: Mapping[str, Callable[[Finding], dict[str, Plot]]] = {
    "benchmark": benchmark,
    "safety": bars.safety,
    "health": health,
    "attribution": _attribution,
    "verification": _verification,
    "sweep": sweep,
    "minimal": minimal,
    "graph": graph,
    "jailbreaks": jailbreaks,
    "suffixes": suffixes,
    "categories": categories,
    "probes": probes,
}
