"""The figures of a run folder as files: drawn from its findings, without the model."""

from collections.abc import Sequence
from functools import partial

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.report.drawing import FORMS, Form, Plot, render
from refusalscope.report.plots import Drawn, drawn


def write_figures(store: Store, wanted: Sequence[str] = FORMS, figures: Drawn | None = None) -> list[str]:
    """Every figure of every finding as `figures/<name>.<format>`; returns their paths in the run folder.

    `figures` are those of the folder, where they are drawn already.

    Raises ValueError for a format in which no figure can be written.
    """
    if unknown := sorted(set(wanted) - set(FORMS)):
        raise ValueError(f"figures cannot be written as {unknown[0]!r}: choose from {', '.join(FORMS)}")
    paths = []
    figures = drawn(store) if figures is None else figures
    for name, plot in [pair for made in figures.values() for pair in made.items()]:
        # By what is drawn, not from what: a figure is drawn anew when the drawing has changed.
        key = fingerprint(plot.svg.decode())
        for form in filter(set(wanted).__contains__, FORMS):
            paths.append(f"figures/{name}.{form}")
            store.ensure(paths[-1], key, partial(_content, plot, form))
    return paths


def _content(plot: Plot, form: Form) -> bytes:
    return plot.svg if form == "svg" else render(plot.figure, form)
