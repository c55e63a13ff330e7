"""The figure of SAE health: kinds of text downwards, what is kept and what is recovered beside each other, set by set.

Every number is a row's.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refusalscope.core.types import Finding, Row
from refusalscope.report.drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    RIGHT,
    WIDTH,
    Plot,
    Style,
    curve,
    legend,
    number_ticks,
    title,
)
from refusalscope.report.settings import part
from refusalscope.studies.health import DIRECTION, TRUSTED

QUALITIES = {"variance_explained": "variance explained", "cross_entropy_recovered": "cross-entropy recovered"}
COSINE = "direction_cosine"
HEIGHT, LEFT, TOP, GAP, BELOW = 1.0, 0.5, 1.05, 0.8, 0.5  # inches, as everywhere in the figures
NARROWEST = 0.05
"""An axis spans at least this much, so that differences of no account stay small."""
Points = Mapping[str, Sequence[tuple[float, Row]]]
"""SAE set -> its rows by layer."""


def health(finding: Finding) -> dict[str, Plot]:
    """One row of panels a kind of text, one curve an SAE set; below them the direction's cosine."""
    kinds = list(dict.fromkeys(row.dataset for row in finding.rows if row.metric in QUALITIES and row.n))
    cosines = _points(finding, DIRECTION, COSINE)
    if not kinds:
        return {}
    figure, panels = _grid(len(kinds), last=bool(cosines))
    for place, kind in enumerate(kinds):
        for axes, (metric, name) in zip(panels[place], QUALITIES.items(), strict=True):
            # The first kind of text is the chats that the verdicts go by.
            _panel(axes, _points(finding, kind, metric), name, None if place else TRUSTED[metric])
        _above(panels[place][0], kind if place else f"chats ({kind})")
    if cosines:
        _panel(panels[-1][0], cosines, "cosine after reconstruction", TRUSTED[COSINE])
        _above(panels[-1][0], DIRECTION)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    title(figure, "what the SAEs keep")
    sets = dict.fromkeys(name for kind in kinds for name in _points(finding, kind, next(iter(QUALITIES))))
    legend(figure, _style(sets))
    caption = (
        "What each layer’s SAE keeps of the residual stream, by kind of text, with 95% intervals; 1 is everything. "
        "Axes differ from panel to panel. Cross-entropy recovered is read against a residual of zero. Dashed: what a "
        "trusted layer reaches on chats."
    )
    return {"health-reconstruction": Plot(caption, figure)}


def _points(finding: Finding, dataset: str, metric: str) -> dict[str, list[tuple[float, Row]]]:
    """Set -> scored rows with their layer, ascending."""
    made: dict[str, list[tuple[float, Row]]] = {}
    for row in finding.rows:
        layer = part(row.setting, "layer")
        if (row.dataset, row.metric) == (dataset, metric) and layer is not None and row.n:
            made.setdefault(row.method, []).append((float(layer), row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in made.items()}


def _style(sets: Mapping[str, None] | Points) -> Style:
    """The run's own SAEs first, a second set beside them."""
    return dict(zip(sets, ((BLUE, "o"), (ORANGE, "^")), strict=False))


def _grid(rows: int, *, last: bool) -> tuple[Figure, list[list[Axes]]]:
    """Rows of two panels, and one as wide as both under them; all lengths are inches."""
    total = TOP + (rows + last) * HEIGHT + (rows + last - 1) * GAP + BELOW
    figure, made = Figure(figsize=(WIDTH, total)), []
    half = (WIDTH - 2 * LEFT - RIGHT) / 2
    for row in range(rows + last):
        bottom = 1 - (TOP + row * (HEIGHT + GAP) + HEIGHT) / total
        wide = row == rows
        lefts, width = ([LEFT], WIDTH - LEFT - RIGHT) if wide else ([LEFT, 2 * LEFT + half], half)
        made.append([figure.add_axes((x / WIDTH, bottom, width / WIDTH, HEIGHT / total)) for x in lefts])
    return figure, made


def _panel(axes: Axes, points: Points, name: str, least: float | None) -> None:
    """One curve a set, on an axis from just below the lowest interval to 1 or just above; dashed at `least`."""
    for sae_set, (colour, marker) in _style(points).items():
        curve(axes, points[sae_set], colour, marker)
    rows = [row for curves in points.values() for _, row in curves]
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    low, high = min(1 - NARROWEST, *ends, 1.0 if least is None else least), max(1.0, *ends)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_title(name, loc="left", fontsize=8.5, color=MUTED)
    layers = sorted({layer for curves in points.values() for layer, _ in curves})
    number_ticks(axes, layers[:: 1 + len(layers) // 10])
    axes.yaxis.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    if least is not None:
        axes.axhline(least, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)


def _above(axes: Axes, name: str) -> None:
    """What a row of panels is about, over the titles of the panels."""
    axes.annotate(name, (0, 1), (0, 21), xycoords="axes fraction", textcoords="offset points", fontweight="bold")
