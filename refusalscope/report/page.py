"""A run folder in, one self-contained HTML page out: everything escaped, harmful text folded, nothing fetched.

Says what the findings' rows say, in the order in which they first appear, whatever their data sets and methods are
called. Computes no statistic; the page holds no time and no folder name, so its bytes depend on the results alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Direction, Finding, Prompts, Responses
from refusalscope.report import (
    capability,
    categories,
    drawing,
    features,
    graph,
    health,
    jailbreaks,
    judging,
    labels,
    minimal,
    probes,
    prompts,
    strength,
    suffixes,
    summary,
    verdict,
)
from refusalscope.report.benchmark_plots import COSTS
from refusalscope.report.contents import contents
from refusalscope.report.drawing import Plot
from refusalscope.report.examples import examples
from refusalscope.report.network import GRAPH
from refusalscope.report.plots import Drawn, drawn
from refusalscope.report.sentences import PERCENT, after_holm, answer, can_show, interval, number
from refusalscope.report.settings import readable
from refusalscope.report.tables import benchmark_tables, limits, smallest, table
from refusalscope.report.tokens import visible


def write(store: Store, figures: Drawn | None = None) -> str:
    """The report of a run folder as HTML, with its `figures` where they are drawn already.

    A study that has not run leaves its sections out. Raises ValueError naming the file when `run.json` or the direction
    is missing, or when any file is unreadable, and when there is no finding at all.
    """
    found = {finding.study: finding for finding in (store.read(p, Finding) for p in store.paths("findings", ".json"))}
    if not found:
        raise ValueError(f"{store.root} holds no finding: is it a finished run?")
    figures = drawn(store) if figures is None else figures
    benchmarked = "benchmark" in found
    benchmark = found.pop("benchmark", Finding("benchmark", "", (), (), {}))
    findings = [*([benchmark] if benchmarked else []), *found.values()]
    about = store.read("run.json", dict)
    direction = store.read("direction.safetensors", Direction)
    asked = {rows.name: rows for rows in (store.read(p, Prompts) for p in store.paths("prompts", ".jsonl"))}
    responses = [store.read(path, Responses) for path in store.paths("responses", ".jsonl")]
    hide = hidden_folders([about["options"], [finding.provenance.get("judges", {}) for finding in findings]])
    kinds = {name: rows[0].label for name, rows in asked.items() if len(rows)}
    table_of_features = feature_table(store)
    notes = [*about["notices"], *(note for finding in findings for note in finding.caveats), *direction.caveats]
    return (
        environment(labels.read(store))
        .get_template("page.html.j2")
        .render(
            about=hide(about),
            question=findings[0].question,
            benchmarked=benchmarked,
            answer=answer(benchmark, kinds) if benchmarked else (),
            paragraphs=summary.paragraphs(
                {finding.study: finding for finding in findings},
                kinds,
                direction,
                table_of_features or (),
            ),
            notes=hide(list(dict.fromkeys(notes))),
            tables=benchmark_tables(benchmark),
            smallest=smallest(benchmark),
            findings={finding.study: finding for finding in findings},
            direction=direction,
            features=table_of_features,
            examples=examples(benchmark, asked, responses),
            toml=tomli_w.dumps(hide(without_none(about["options"]))),
            provenance=hide(provenance(findings)),
            capability=capability.cost_table(found["capability"]) if "capability" in found else None,
            **illustrated(figures),
            **trusted(findings),
            **judging.section(findings, hide),
            **swept(findings),
            **minimal.section(findings, store),
            **graphed(findings, figures, store),
            **jailbreaks.section(findings, store),
            **suffixes.section(found, store),
            **categories.section(store, found.get("categories")),
            **health.section(found, store),
            **probes.section(found),
            **close_up(store),
        )
    )


def feature_table(store: Store) -> list[dict[str, Any]] | None:
    """The rows of the feature table; None where no features were chosen yet."""
    path = "features/table.json"
    return store.read(path, dict)["rows"] if path in store.paths("features", ".json") else None


def illustrated(figures: Drawn) -> dict[str, Any]:
    """The figures of every study, those of induced refusal apart."""
    made = {"benchmark": {}, **figures}
    induced = {name: plot for name, plot in made["benchmark"].items() if "-induced-" in name}
    made["benchmark"] = {name: plot for name, plot in made["benchmark"].items() if name not in induced}
    return {"figures": made, "induced": induced}


def trusted(findings: Iterable[Finding]) -> dict[str, Any]:
    """What the findings on the attributions come to; empty where the run has none."""
    by_study = {finding.study: finding for finding in findings}
    made: dict[str, Any] = {}
    if checked := by_study.get("verification"):
        made |= {"verdict": verdict.verdict(checked), "claims": verdict.claims(checked)}
        correlations = [row for row in checked.rows if row.metric in verdict.CORRELATIONS]
        errors = [row for row in checked.rows if row.metric not in verdict.CORRELATIONS]
        named = {"Correlations with measured effects.": correlations, "Errors of the computation.": errors}
        made["checked"] = {name: table(rows) for name, rows in named.items()}
    if layers := by_study.get("attribution"):
        made["blind"] = verdict.blind_layers(layers)
    return made


def swept(findings: Iterable[Finding]) -> dict[str, Any]:
    """What the sweep came to, in words and tables; empty where the run has none."""
    made = next((finding for finding in findings if finding.study == "sweep"), None)
    return (
        {}
        if made is None
        else {"strength": strength.sentences(made), "swept": strength.tables(made), "sweep_limits": limits(made)}
    )


def graphed(findings: Iterable[Finding], figures: Drawn, store: Store) -> dict[str, Any]:
    """What drives what, in words, tables and the graph itself; empty where the run has none."""
    made = next((finding for finding in findings if finding.study == "graph"), None)
    if made is None:
        return {}
    found = figures.get(GRAPH, {})
    nodes = store.read(GRAPH, dict)["nodes"] if GRAPH in store.paths("graph", ".json") else []
    return {"driving": graph.sentences(made), "graph_tables": graph.tables(made), "network": found, "nodes": nodes}


def close_up(store: Store) -> dict[str, Any]:
    """Features and prompts one by one, linked with each other; empty where the folder has no such artifact."""
    held = {*store.paths("features", ".json"), *store.paths("prompts", ".json")}
    layers = features.by_layer(store.read(features.FILE, dict)) if features.FILE in held else {}
    views = prompts.views(store.read(prompts.FILE, dict)) if prompts.FILE in held else None
    return {
        "layers": layers,
        "linked": features.anchors(layers),
        "views": views,
        "seen": prompts.seen_in(views or []),
    }


def environment(known: labels.Labels) -> Environment:
    """Jinja with escaping always on, an error for every name that is missing, and the filters of this folder.

    Labels are known to every template, the macros included.
    """
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "interval": interval, "readable": readable, "inline": inline}
    made.filters |= {"after_holm": after_holm, "can_show": can_show}
    made.filters |= {"visible": visible, "signed": signed, "plain": plain, "anchor": row_anchor}
    made.globals |= {
        "questions": judging.QUESTIONS,
        "table": table,
        "contents": contents,
        "covered": drawing.COVERED,
        "percent": PERCENT,
        "costs": tuple(COSTS),
        "labels": known,
    }
    return made


def signed(value: float | None, digits: int, small: str | None = None) -> str:
    """A number with its sign; `small` in place of one that rounds to 0, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:] if small is None else small
    return text.replace("-", "−")


def plain(value: float | None) -> str:
    """A number at three figures, a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}".replace("-", "−")


def row_anchor(row: Mapping[str, Any]) -> str:
    """Where a row of the feature table leads to."""
    return features.anchor(row["layer"], row["index"])


def inline(plot: Plot, prefix: str) -> Markup:
    """A figure of `plots` as part of a page, in SVG: ids of its own, the page's colours for ink and grid, no ground.

    The only text that enters the page unescaped; matplotlib has escaped the names in it.
    """
    text = plot.svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{prefix}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    colours = {drawing.INK: "ink", drawing.MUTED: "muted", drawing.GRID: "rule", drawing.GROUND: "ground"}
    for colour, name in colours.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    return Markup(text)


def hidden_folders(options: Any) -> Callable[[Any], Any]:
    """A function that shortens the paths among the options to their last part, wherever data quotes them."""
    outside = [text for text in _texts(options) if re.match(r"([/\\~]|\.\.|[A-Za-z]:[/\\]).*\w", text)]
    # The longest first: one path may be the beginning of another.
    names = {text: PureWindowsPath(text).name for text in sorted(outside, key=lambda text: (-len(text), text))}

    def hide(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [hide(item) for item in value]
        for path, name in names.items() if isinstance(value, str) else ():
            value = value.replace(path, name)
        return value

    return hide


def _texts(value: Any) -> list[str]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [value] if isinstance(value, str) else [text for item in items for text in _texts(item)]


def without_none(value: Any) -> Any:
    """TOML has no null: what was left to be derived is left out."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value if item is not None] if isinstance(value, (list, tuple)) else value


def provenance(findings: Iterable[Finding]) -> dict[str, str]:
    """Fingerprints of the findings and of what they were made from, flat; versions stand in a table of their own."""
    flat: dict[str, str] = {}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                flatten(f"{name} {key}".strip(), item)
        else:
            flat[name] = str(value)

    for finding in findings:
        flatten("", {key: item for key, item in finding.provenance.items() if key != "versions"})
        flat[f"finding {finding.study}"] = fingerprint(finding)
    return flat
