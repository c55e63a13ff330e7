"""Holds the grouped bars to what they show: which rows, in which place and colour, and what captions own up to."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from refusalscope.core.types import Finding, Row
from refusalscope.report import bars, plots
from refusalscope.report.drawing import GROUND, METHODS, UNKNOWN
from tests.sample_run import benchmark_rows, new_benchmark_rows, rate

SCALED = ("cosine+attribution", "attribution", "cosine")
EDITS = {"base": "", "direction": "remove", **dict.fromkeys(SCALED, "scale c=-1 k=20")}


def rows(metric: str, datasets: int) -> list[Row]:
    """Every edit on every data set, each at a height of its own, and rows that no bar is drawn for."""
    made = []
    for place in range(datasets):
        name = f"set {place}"
        made.append(rate(name, "cosine", metric, "scale c=0 k=5", 0.99))
        for height, (method, setting) in enumerate(EDITS.items(), start=1):
            made.append(rate(name, method, metric, setting, height / 10))
        made += [rate(name, "random", metric, f"scale c=-1 k=20 draw={draw}", 0.9) for draw in (0, 1)]
        made.append(rate(name, "random", metric, "scale c=-1 k=20 mean", 0.8, n=100))
        made += [rate(name, "direction", metric, setting, 0.99) for setting in ("remove-affine", "add")]
    return [*made, rate("harmful-validation", "cosine", metric, "scale c=-1 k=20", 0.99)]


def heights(plot) -> list[list[tuple[str, float]]]:
    """Colour and height of every bar, from left to right, panel by panel."""
    return [
        [(to_hex(bar.get_edgecolor()), round(bar.get_height(), 2)) for bar in axes.patches] for axes in plot.figure.axes
    ]


def test_every_method_keeps_its_place_and_colour() -> None:
    made = bars.rates(Finding("benchmark", "", tuple(rows("refused", 4)), (), {}))
    above, below = heights(made["benchmark-refused"])
    order = ("base", "direction", "cosine", "attribution", "cosine+attribution", "random")
    expected = dict(zip(EDITS, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)) | {"random": 0.8}
    drawn = [(METHODS[method][0], expected[method]) for method in order]
    # Three data sets stand side by side, the fourth below them.
    assert (above, below) == (3 * drawn, drawn)
    assert made["benchmark-refused"].figure.axes[1].get_xlim() == pytest.approx((-1.0, 20.8))


def test_colours_are_distinct_and_no_method_is_left_out() -> None:
    from refusalscope.pipeline.options import METHODS as CHOSEN

    assert set(METHODS) == {"base", "direction", *CHOSEN}
    assert len({colour for colour, _ in METHODS.values()} | {UNKNOWN[0]}) == len(METHODS) + 1


def test_captions_own_up_to_what_is_thin_or_missing() -> None:
    (full,) = bars.rates(Finding("benchmark", "", tuple(rows("refused", 1)), (), {})).values()
    assert full.caption.endswith("n = 50, 100 for random, all draws together.")
    (thin, *_) = bars.rates(Finding("benchmark", "", benchmark_rows(), (), {})).values()
    assert "n = 0 to 50, 100 for random" in thin.caption
    assert "A gap: not evaluated. Hatched: fewer than 90%" in thin.caption
    hollow = [bar for axes in thin.figure.axes for bar in axes.patches if bar.get_hatch()]
    assert [(to_hex(bar.get_facecolor()), to_hex(bar.get_edgecolor())) for bar in hollow] == [(GROUND, UNKNOWN[0])]
    assert "not scored" in {text.get_text() for axes in thin.figure.axes for text in axes.texts}


def test_each_judge_has_a_figure_harm_first() -> None:
    metrics = ["refused:minos", "refused_change:minos", "refused:phrase", "refused", "harmful:harmbench"]
    metrics += ["harmful_change:harmbench", "harmful_score:harmbench", "harmful:my.judge/x"]
    made = plots.plots(Finding("safety", "", tuple(row for metric in metrics for row in rows(metric, 1)), (), {}))
    assert list(made) == ["safety-harmful-harmbench", "safety-harmful-my.judge-x", "safety-refused-minos"]
    assert made["safety-refused-minos"].caption.startswith("Share of answers that refuse according to minos, by")


def test_all_sets_share_the_panels_of_induction() -> None:
    finding = Finding("benchmark", "", (*benchmark_rows(), *new_benchmark_rows()), (), {})
    few = tuple(replace(row, setting=row.setting.replace("k=20", "k=5")) for row in new_benchmark_rows())
    panels = plots.plots(finding)["benchmark-induced-harmless"].figure.axes
    assert [axes.get_title("left") for axes in panels] == ["refused, k = 20", "coherent, refused or not, k = 20"]
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["0.25", "0.5", "1", "2"]
    curves = {line.get_color() for line in panels[0].lines if np.size(line.get_xdata()) == 4}
    assert curves == {METHODS[method][0] for method in ("cosine+attribution", "random")}
    both = plots.plots(replace(finding, rows=(*finding.rows, *few)))["benchmark-induced-harmless"]
    assert len(both.figure.axes) == 4


def test_many_values_are_marked_by_round_ones() -> None:
    values = (0.7, 1.1, 1.3, 2.4, 3.9, 6.6, 9.1, 12, 23)
    made = [rate("harmless", "cosine", "refused", f"set v={value:g} k=20", 0.5) for value in values]
    (plot,) = (p for name, p in plots.plots(Finding("benchmark", "", tuple(made), (), {})).items() if "induced" in name)
    assert [tick.get_text() for tick in plot.figure.axes[0].get_xticklabels()] == ["1", "2", "5", "10", "20"]
