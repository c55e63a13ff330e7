"""Writes docs/performance.md and its figures from the results of the benchmarks and the prose beside them.

    python benchmarks/document.py

`benchmarks/performance.md.in` is the prose; `{{ claims() }}` is every number that is promised, met or not, and
`{{ benchmark("scaling") }}` what the results of that name hold. What was not measured is said to be. The same results
give the same bytes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from refusalscope.core.fingerprint import fingerprint
from refusalscope.report.drawing import AMBER, BLUE, GREEN, GREY, INK, METADATA, ORANGE, PURPLE, SKY, style

HERE = Path(__file__).resolve().parent
RESULTS, PROSE, PAGE = HERE / "results", HERE / "performance.md.in", HERE.parent / "docs" / "performance.md"
LOOKS = [(BLUE, "o", "-"), (ORANGE, "s", "-"), (GREEN, "^", "-")]
LOOKS += [(PURPLE, "D", "--"), (SKY, "v", "--"), (AMBER, "X", "--"), (INK, "P", ":"), (GREY, "h", ":")]
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
LIBRARIES = ("python", "torch", "transformers")
FEW = 8
"""Positions of points on an axis up to which each has its own tick."""

Results = Mapping[str, Mapping[str, Any]]
"""File name without its ending -> the result in it."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prose", type=Path, default=PROSE)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    write(read(options.results), options.prose, options.page)


def read(folder: Path) -> Results:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def write(results: Results, prose: Path, page: Path) -> None:
    """The page, and in a folder of its name beside it one figure per curve and no other."""
    figures = page.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.svg"):
        old.unlink()
    for name, result in results.items():
        for number, curve in enumerate(result["curves"]):
            draw(curve, figures / figure_name(name, number))
    page.write_text(rendered(results, prose.read_text(), figures.name))


def rendered(results: Results, prose: str, figures: str) -> str:
    """The prose with its slots filled; `figures` is where the page finds them."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    slots = {"claims": lambda: claims(results), "benchmark": lambda name: benchmark(results, name, figures)}
    return environment.from_string(prose).render(slots)


def claims(results: Results) -> str:
    """Every bar of every result."""
    rows = [
        [bar["claim"], promised(bar), bar["found"], "met" if bar["met"] else "**not met**", f"`{result['command']}`"]
        for result in results.values()
        for bar in result["bars"]
    ]
    return grid(["claim", "bar", "found", "", "command"], rows) if rows else "Nothing has been measured yet."


def promised(bar: Mapping[str, Any]) -> str:
    parts = [("at least", bar["least"]), ("at most", bar["most"])]
    return ", ".join(f"{word} {number(value)}" for word, value in parts if value is not None)


def benchmark(results: Results, name: str, figures: str) -> str:
    """All results of one benchmark: command, machine, ratios, tables, curves."""
    found = {stem: result for stem, result in results.items() if result["benchmark"] == name}
    return (
        "\n\n".join(section(stem, result, figures) for stem, result in found.items())
        or f"Unmeasured: there is no result of `benchmarks/{name}.py` yet."
    )


def section(stem: str, result: Mapping[str, Any], figures: str) -> str:
    parts = [f"`{result['command']}` on {machine(result['machine'])}."]
    if result["ratios"]:
        parts.append(grid(["ratio", ""], list(result["ratios"].items())))
    for table in result["tables"]:
        parts.append(
            "\n\n".join(filter(None, [f"{table['title']}:", grid(table["columns"], table["rows"]), table["note"]]))
        )
    images = [f"![{curve['title']}]({figures}/{figure_name(stem, n)})" for n, curve in enumerate(result["curves"])]
    return "\n\n".join([*parts, *(["\n".join(images)] if images else [])])


def machine(found: Mapping[str, Any]) -> str:
    """A result's machine in words, from the most to the least telling."""
    cores = f"{found['cores']} cores (threads used: {found['threads']})"
    card = [found["card"], f"CUDA {found['cuda']}"] if "card" in found else []
    rest = [
        found["memory"],
        found["system"],
        *(f"{name} {found[name]}" for name in ("python", "torch", "transformers")),
    ]
    return ", ".join([*card, found["processor"], cores, *rest])


def grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers alone are set to the right."""
    right = [all(not isinstance(row[at], str) for row in rows) for at in range(len(columns))]
    lines = [columns, ["--:" if flag else "---" for flag in right], *([number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(cell: Any) -> str:
    """A cell as it is printed: three digits of a number that is not whole."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.0f}" if 100 <= abs(cell) < 1e6 else f"{cell:.3g}"
    return str(cell)


def figure_name(stem: str, number: int) -> str:
    return f"{stem}-{number + 1}.svg"


def draw(curve: Mapping[str, Any], file: Path) -> None:
    """One curve per series; what is drawn is named in the file by its content."""
    with style():
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes: Axes = figure.subplots()
        for (name, points), (colour, marker, line) in zip(curve["series"].items(), cycle(LOOKS), strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=name, markersize=4)
        scale(axes, curve)
        axes.set(xlabel=curve["x"], ylabel=curve["y"])
        axes.set_title(curve["title"], loc="left", fontsize=10)
        axes.grid(True)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(file, format="svg", metadata={**METADATA["svg"], "Description": mark(curve)})


def mark(curve: Mapping[str, Any]) -> str:
    """What tells a figure of this curve from one of another."""
    return fingerprint(json.dumps(curve, sort_keys=True))


def scale(axes: Axes, curve: Mapping[str, Any]) -> None:
    """Both axes logarithmic where the curve is, with plain numbers at few ticks."""
    if not curve["log"]:
        return
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(PLAIN)
        axis.set_minor_formatter(NullFormatter())
    places = sorted({point[0] for points in curve["series"].values() for point in points})
    if len(places) <= FEW:
        axes.set_xticks(places)
        axes.minorticks_off()


if __name__ == "__main__":
    main()
