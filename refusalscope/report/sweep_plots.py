"""The sweep's figures: refusal, answers and cost over set size and factor, effect against cost, refusal induced.

Every number is a row's; which cells are Pareto-optimal is the study's to say.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    BLUE,
    COVERED,
    GREY,
    INK,
    MUTED,
    ORANGE,
    Plot,
    Style,
    counted,
    curve,
    legend,
    number_ticks,
    panels,
    share_axis,
    title,
)
from refusalscope.report.settings import factor, value_set
from refusalscope.report.strength import by_setting, chosen
from refusalscope.studies import sweep as study

# Not the page's own ink and ground, which dark mode turns round: these stand on a colour that stays.
DARK, LIGHT = "#101010", "#fcfcfc"
UNKNOWN = (0.8, 0.8, 0.8, 1.0)
INDUCED: Style = {"refused": (BLUE, "o"), "coherent": (ORANGE, "^"), "refused_coherently": (GREY, "s")}
MARKERS = "o^sDvP*X"
LABELLED = {"refused": "refused, %", "answered": "answered coherently, %", "kl": "KL divergence, nats per token"}


class Strength(NamedTuple):
    """A cell of the grid: how many features, what factor, and its rows by metric."""

    setting: str
    k: int
    c: float
    rows: Mapping[str, Row]


def sweep(finding: Finding) -> dict[str, Plot]:
    """The grid, effect against cost, refusal induced; what was not tried is left out."""
    cells = [
        Strength(setting, int(found[1]), found[0], rows)
        for setting, rows in by_setting(finding).items()
        if (found := factor(setting))
    ]
    made = {"sweep-grid": _grid(finding, cells), "sweep-pareto": _pareto(finding, cells)}
    made["sweep-induced"] = _induced(finding)
    return {name: plot for name, plot in made.items() if plot}


def _grid(finding: Finding, cells: list[Strength]) -> Plot | None:
    """One panel a measure: set size downwards, factor to the right, the number in every cell."""
    if not cells:
        return None
    sizes, factors = sorted({cell.k for cell in cells}), sorted({cell.c for cell in cells}, reverse=True)
    figure, made = panels([0.36 * len(sizes)] * len(LABELLED), left=0.62, top=0.6, bottom=0.5, gap=0.55)
    taken = chosen(finding, "scale")
    for axes, (metric, label) in zip(made, LABELLED.items(), strict=True):
        shown = [cell for cell in cells if metric in cell.rows]
        high = 1.0 if metric != "kl" else max((cell.rows["kl"].estimate or 0.0 for cell in shown), default=0.0) or 1.0
        for cell in shown:
            place = (factors.index(cell.c), sizes.index(cell.k))
            _paint(axes, place, cell.rows[metric], high, framed=cell.setting == taken)
        axes.set(xlim=(-0.5, len(factors) - 0.5), ylim=(len(sizes) - 0.5, -0.5))
        axes.set_xticks(range(len(factors)), [f"{c:g}".replace("-", "−") for c in factors])
        axes.set_yticks(range(len(sizes)), [str(k) for k in sizes])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("features K*")
        axes.set_title(label, loc="left", fontsize=9.5)
    made[-1].set_xlabel("scaling factor c (1 = unedited)")
    title(figure, "refusal, answers and cost by strength")
    return Plot(
        f"Every set size and factor: shares of {cells[0].rows['refused'].dataset} prompts (n = {_counts(cells)}) that "
        f"are refused and answered coherently, and the KL divergence on harmless answers. Brighter is more, grey is "
        f"unknown. 95% intervals of the shares are at most {100 * max(map(_width, cells)):.0f} points wide; the table "
        f"has each.{' The framed cell is the one chosen.' if taken else ''} Hatched cells rest on fewer than "
        f"{COVERED:.0%} of the prompts.",
        figure,
    )


def _counts(cells: Iterable[Strength]) -> str:
    """On how many prompts the shares rest."""
    return counted(cell.rows[metric] for cell in cells for metric in ("refused", "answered") if metric in cell.rows)


def _width(cell: Strength) -> float:
    """From the lower to the upper end of the widest interval of a share."""
    rows = (cell.rows[metric] for metric in ("refused", "answered") if metric in cell.rows)
    return max(((row.high or 0.0) - (row.low or 0.0) for row in rows), default=0.0)


def _paint(axes: Axes, place: tuple[int, int], row: Row, high: float, *, framed: bool) -> None:
    """One cell: its colour, its number, hatched where too few prompts were scored, framed where chosen."""
    x, y = place
    # No colour of the scale where nothing is known: the darkest would say none.
    share = None if row.estimate is None else min(1.0, max(0.0, row.estimate / high))
    red, green, blue, _ = colour = UNKNOWN if share is None else matplotlib.colormaps["cividis"](share)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    ink = DARK if bright else LIGHT
    hatch = "////" if row.coverage < COVERED else None
    axes.add_patch(
        Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor=ink, linewidth=0, hatch=hatch)
    )
    text = "–" if row.estimate is None else f"{row.estimate:.2g}" if row.metric == "kl" else f"{100 * row.estimate:.0f}"
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9.5)
    if framed:
        box = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor=ORANGE, linewidth=2.4, clip_on=False)
        axes.add_patch(box).set_zorder(4)


def _pareto(finding: Finding, cells: list[Strength]) -> Plot | None:
    """Answered coherently against KL, one marker a factor; the cells that no other one beats are joined."""
    shown = {
        c.setting: c for c in cells if {"answered", "kl"} <= set(c.rows) and c.rows["answered"].n and c.rows["kl"].n
    }
    if not shown:
        return None
    factors = sorted({cell.c for cell in shown.values()}, reverse=True)
    figure, (axes,) = panels([2.7], left=0.62, top=0.74 + 0.2 * (len(factors) > 3), bottom=0.5)
    styles = {c: (_shade(at, len(factors)), MARKERS[at % len(MARKERS)]) for at, c in enumerate(factors)}
    front = study.pareto({name: (_estimate(c.rows["answered"]), _estimate(c.rows["kl"])) for name, c in shown.items()})
    joined = [(_estimate(shown[name].rows["kl"]), _estimate(shown[name].rows["answered"])) for name in front]
    axes.plot(*zip(*joined, strict=True), color=MUTED, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    for cell in shown.values():
        _cross(axes, cell, *styles[cell.c], bold=cell.setting in front)
    taken = chosen(finding, "scale")
    if taken in shown:
        place = ([_estimate(shown[taken].rows["kl"])], [_estimate(shown[taken].rows["answered"])])
        axes.plot(*place, "o", color=ORANGE, markersize=13, markerfacecolor="none", markeredgewidth=1.8, clip_on=False)
    if all((cell.rows["kl"].low or 0) > 0 for cell in shown.values()):
        _logarithmic(axes)
    share_axis(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("KL divergence on harmless answers, nats per token")
    title(figure, "answered coherently, against cost")
    legend(figure, {f"c = {c:g}".replace("-", "−"): style for c, style in styles.items()})
    dataset = next(iter(shown.values())).rows["answered"].dataset
    return Plot(
        f"Share of {dataset} prompts (n = {_counts(shown.values())}) answered coherently against the KL divergence on "
        f"the unedited model’s own harmless answers, every set size and factor, with 95% intervals both ways. Joined, "
        f"in full colour and with their set size K* are the strengths that none beats in both."
        f"{' The ring marks the one chosen.' if taken in shown else ''} Hollow marks rest on fewer than {COVERED:.0%} "
        f"of the prompts.",
        figure,
    )


def _logarithmic(axes: Axes) -> None:
    """The x axis in powers, with ticks at 1 and 3 times each."""
    axes.set_xscale("log")
    axes.minorticks_off()
    low, high = axes.get_xlim()
    ticks = [t for power in range(-6, 3) for t in (10.0**power, 3 * 10.0**power) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _estimate(row: Row) -> float:
    return row.estimate or 0.0


def _shade(at: int, count: int) -> str:
    """Dark for the mildest factor to bright for the strongest, never so bright that it vanishes on white."""
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["viridis"](0.85 * at / max(1, count - 1)))


def _cross(axes: Axes, cell: Strength, colour: str, marker: str, *, bold: bool) -> None:
    """A mark with an interval along each axis; those on the front carry their set size."""
    cost, effect = cell.rows["kl"], cell.rows["answered"]
    x, y = _estimate(cost), _estimate(effect)
    shade = 1.0 if bold else 0.35
    axes.plot([cost.low or 0.0, cost.high or 0.0], [y, y], color=colour, linewidth=1.2, alpha=shade)
    axes.plot([x, x], [effect.low or 0.0, effect.high or 0.0], color=colour, linewidth=1.2, alpha=shade)
    fill = colour if min(cost.coverage, effect.coverage) >= COVERED else "#ffffff"
    axes.plot(
        [x], [y], marker, color=colour, markerfacecolor=fill, markersize=5.5, alpha=shade, clip_on=False, zorder=3
    )
    if bold:
        axes.annotate(str(cell.k), (x, y), (5, -11), textcoords="offset points", fontsize=8.5)


def _induced(finding: Finding) -> Plot | None:
    """Refused, coherent and both at once against the value that the features are set to."""
    points: dict[str, list[tuple[float, Row]]] = {}
    for setting, rows in by_setting(finding).items():
        found = value_set(setting)
        for metric in INDUCED if found else ():
            if found and metric in rows and rows[metric].n:
                points.setdefault(metric, []).append((found[0], rows[metric]))
    if not points:
        return None
    figure, (axes,) = panels([1.9], left=0.62, top=0.62, bottom=0.5)
    values = sorted({value for drawn in points.values() for value, _ in drawn})
    if values[0] > 0:
        axes.set_xscale("log")  # small values matter most, and lie close together
        axes.minorticks_off()
    for metric, drawn in points.items():
        curve(axes, sorted(drawn, key=lambda point: point[0]), *INDUCED[metric])
    number_ticks(axes, values)
    share_axis(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("value v that every feature of the set is held at")
    taken = value_set(chosen(finding, "set") or "")
    if taken is not None:
        axes.axvline(taken[0], color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    row = next(iter(points.values()))[0][1]
    title(figure, f"refusal induced on {row.dataset}")
    legend(figure, {("both" if name == study.JOINT else name): style for name, style in INDUCED.items()})
    return Plot(
        f"Share of {row.dataset} prompts (n = {row.n}) refused, of answers coherent, and of both at once, against "
        f"the value v that the features are set to, with 95% intervals"
        f"{'; the dashed line marks the value chosen' if taken is not None else ''}.",
        figure,
    )
