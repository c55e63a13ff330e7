"""Marks, axes and panels that every figure is made of: SVG whose bytes depend on what is drawn alone.

Computes no statistic: every point and whisker is a row's estimate and interval, and a row that rests on too few scored
prompts is hollow. Knows no study.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from refusalscope.core.types import Row
from refusalscope.report.settings import readable

COVERED = 0.9
"""Share of scored prompts under which a number is flagged."""
INK, MUTED, GRID, GROUND = "#1b2330", "#5f6875", "#d9dde3", "#ffffff"
"""Text, secondary text, grid lines, what is under them; a page may give them its own colours."""
# Okabe and Ito's palette, which colour-blind readers can tell apart; shape says the same again.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8f98"
SKY, AMBER, GREEN, PURPLE = "#56b4e9", "#e69f00", "#009e73", "#cc79a7"
Style = Mapping[str, tuple[str, str]]
"""Name -> colour and marker."""
METHODS: Style = {
    "base": (INK, "P"),
    "direction": (BLUE, "s"),
    "cosine": (SKY, "^"),
    "activation-difference": (AMBER, "v"),
    "attribution": (GREEN, "D"),
    "cosine+gradient": (PURPLE, "X"),
    "cosine+attribution": (ORANGE, "o"),
    "random": (GREY, "h"),
}
"""The methods in the order in which they stand side by side, each the same in every figure that compares them."""
UNKNOWN = (MUTED, "*")
"""A method that has no place there."""
OUTCOMES: Style = {"refused": (BLUE, "o"), "answered": (ORANGE, "^"), "incoherent": (GREY, "s")}
WIDTH = 4.6  # inches, 442 pixels: shrunk to a phone's 350 its letters are still 10 pixels high
LABELS, RIGHT = 1.6, 0.18  # inches left and right of the axes
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "refusalscope",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # outlines that every reader and publisher takes
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

Form = Literal["svg", "png", "pdf"]
FORMS: tuple[Form, ...] = get_args(Form)
# What is left empty here would tie the bytes to a version and a moment.
METADATA: dict[Form, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
DOTS = 200  # per inch of a PNG


@dataclass(frozen=True)
class Plot:
    """A figure and what it shows."""

    caption: str
    figure: Figure

    @cached_property
    def svg(self) -> bytes:
        """The figure as SVG; rendered once for the file and for the page."""
        return render(self.figure, "svg")


class Lane(NamedTuple):
    """What is drawn in one line of a chart: an edit, and its rows by metric (several only for single draws)."""

    method: str
    setting: str
    rows: Mapping[str, list[Row]]


def bare_lane(name: str, below: str = "") -> Lane:
    """A lane by its name alone; its marks are drawn by hand."""
    return Lane(name, below, {"": [Row("", name, "", below, 0, None, None, None, 0.0)]})


@contextmanager
def style() -> Iterator[None]:
    """This file's look, whatever the reader's own matplotlibrc says."""
    # Text stays text, so a name in letters that matplotlib's font lacks is still drawn by the browser.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


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


def panels(
    heights: Sequence[float], *, left: float, top: float, bottom: float, gap: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Panels of these heights under one another; all lengths are inches, so that text never meets text."""
    total = top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure, made, above = Figure(figsize=(WIDTH, total)), [], top
    for height in heights:
        box = (left / WIDTH, 1 - (above + height) / total, (WIDTH - left - RIGHT) / WIDTH, height / total)
        made.append(figure.add_axes(box))
        above += height + gap
    return figure, made


def across(axes: Axes, row: Row, y: float, colour: str, marker: str, *, write: bool = False) -> None:
    """One estimate with its interval, lying; words instead where nothing was scored."""
    if row.estimate is None or row.low is None or row.high is None:
        axes.text(0.02, y, "not scored", fontsize=8, color=MUTED, va="center", transform=axes.get_yaxis_transform())
        return
    axes.plot([row.low, row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", clip_on=False)
    _point(axes, row.estimate, y, row, colour, marker)
    if write:
        text = f"{row.estimate:.3f}".replace("-", "−")
        axes.annotate(text, (row.high, y), (6, 0), textcoords="offset points", va="center", fontsize=8.5)


def curve(axes: Axes, points: Sequence[tuple[float, Row]], colour: str, marker: str) -> None:
    """Estimates joined by a line, each with its interval, standing."""
    estimates = [row.estimate or 0.0 for _, row in points]
    axes.plot([x for x, _ in points], estimates, color=colour, linewidth=1.1)
    for (x, row), estimate in zip(points, estimates, strict=True):
        axes.plot([x, x], [row.low or 0.0, row.high or 0.0], color=colour, linewidth=1.6, alpha=0.55)
        _point(axes, x, estimate, row, colour, marker)


def _point(axes: Axes, x: float, y: float, row: Row, colour: str, marker: str) -> None:
    fill = colour if row.coverage >= COVERED else GROUND
    axes.plot([x], [y], marker, color=colour, markerfacecolor=fill, markersize=5.5, clip_on=False, zorder=3)


def name_lanes(axes: Axes, drawn: Sequence[Lane]) -> None:
    """Method and setting left of each lane, and a faint line between lanes."""
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
    for place, lane in enumerate(drawn):
        settings = {row.setting for rows in lane.rows.values() for row in rows}
        note = ", mean" if f"{lane.setting} mean" in settings else "" if lane.setting in settings else ", draws"
        axes.text(-0.05, place - (0.17 if lane.setting else 0), short(lane.method), **beside)
        setting = short(readable(lane.setting) + note)
        axes.text(-0.05, place + 0.21, setting, fontsize=8, color=MUTED, **beside)
        if place:
            axes.axhline(place - 0.5, color=GRID, linewidth=0.6, zorder=0)


def short(text: str) -> str:
    """A name that fits beside or below its marks."""
    return text if len(text) <= 21 else f"{text[:20]}…"


def share_axis(axis: Any) -> None:
    """Ticks in per cent from 0 to 100."""
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axis.grid(True, linewidth=0.6)
    axis.axes.set_axisbelow(True)


def number_ticks(axes: Axes, values: Iterable[float]) -> None:
    """One tick below for each of these numbers."""
    places = sorted(set(values))
    axes.set_xticks(places, [f"{place:g}".replace("-", "−") for place in places])


def span(rows: Iterable[Row]) -> tuple[float, float]:
    """From 0, or below it, to the highest end of an interval."""
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (low, low + 1.0)


def counted(rows: Iterable[Row]) -> str:
    """On how many values rows rest: `40`, or `38 to 40`; of random draws the pooled row counts all of them."""
    found = sorted({row.n for row in rows})
    return " to ".join(str(n) for n in dict.fromkeys((found[0], found[-1]))) if found else ""


def legend(figure: Figure, named: Style, *, line: float = 1.6) -> None:
    """What each colour and marker stands for, under the title, in three columns; smaller where names are many."""
    many = len(named) > 3
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=line, markersize=5.5, label=name)
        for name, (colour, marker) in named.items()
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 1 - 0.27 / figure.get_figheight()),
        ncols=3,
        frameon=False,
        borderpad=0,
        borderaxespad=0.3,
        handlelength=1.4 if line else 0.8,
        handletextpad=0.4,
        columnspacing=0.9 if many else 1.2,
        fontsize=8.8 if many else 9.5,
    )


def title(figure: Figure, text: str) -> None:
    figure.text(0.01, 1 - 0.06 / figure.get_figheight(), text, va="top", fontweight="bold")


def render(figure: Figure, form: Form) -> bytes:
    """A figure as the content of a file, whose bytes depend on what is drawn alone."""
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format=form, metadata=METADATA[form], dpi=DOTS)
    return stream.getvalue()
