"""A run folder in, one self-contained HTML page out: everything escaped, harmful text folded, nothing fetched.

Says what the findings' rows say, in the order in which they first appear, whatever their data sets and methods are
called. Computes no statistic; the page holds no time and no folder name, so its bytes depend on the results alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Direction, Finding, Prompt, Prompts, Response, Responses, Row
from refusalscope.report import plots
from refusalscope.report.sentences import PERCENT, answer, interval, number

EXAMPLES = 4
"""Prompts shown per data set."""


class Line(NamedTuple):
    """One edit on one data set: its rows by metric."""

    method: str
    setting: str
    rows: Mapping[str, Row]


class Table(NamedTuple):
    """Lines by data set under common columns; single random draws apart where the finding pooled them."""

    metrics: tuple[str, ...]
    groups: Mapping[str, Sequence[Line]]
    draws: Mapping[str, Sequence[Line]]


class Answer(NamedTuple):
    """What the model said under one edit, and what the judges made of it."""

    method: str
    setting: str
    response: Response
    outcome: str


class Example(NamedTuple):
    """One prompt and its answers side by side."""

    prompt: Prompt
    answers: Sequence[Answer]


def write(store: Store) -> str:
    """The report of a run folder as HTML.

    Raises ValueError naming the file when `run.json`, the benchmark finding, the direction or the feature table is
    missing or unreadable.
    """
    benchmark = store.read("findings/benchmark.json", Finding)
    paths = [path for path in store.paths("findings", ".json") if path != "findings/benchmark.json"]
    findings = [benchmark, *(store.read(path, Finding) for path in paths)]
    about = store.read("run.json", dict)
    direction = store.read("direction.safetensors", Direction)
    features = store.read("features/table.json", dict)["rows"]
    prompts = {rows.name: rows for rows in (store.read(p, Prompts) for p in store.paths("prompts", ".jsonl"))}
    responses = [store.read(path, Responses) for path in store.paths("responses", ".jsonl")]
    hide = hidden_folders(about["options"])
    notes = [*about["notices"], *(note for finding in findings for note in finding.caveats), *direction.caveats]
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            about=hide(about),
            answer=answer(benchmark, {name: rows[0].label for name, rows in prompts.items() if len(rows)}),
            notes=hide(list(dict.fromkeys(notes))),
            tables=benchmark_tables(benchmark),
            findings={finding.study: finding for finding in findings},
            figures={finding.study: plots.plots(finding) for finding in findings},
            direction=direction,
            features=features,
            examples=examples(benchmark, prompts, responses),
            toml=tomli_w.dumps(hide(without_none(about["options"]))),
            provenance=hide(provenance(findings)),
        )
    )


def environment() -> Environment:
    """Jinja with escaping always on, an error for every name that is missing, and the filters of this file."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "interval": interval, "readable": plots.readable, "inline": inline}
    made.globals |= {"table": table, "covered": plots.COVERED, "percent": PERCENT, "costs": tuple(plots.COSTS)}
    return made


def table(rows: Iterable[Row], *, without: Sequence[str] = ()) -> Table:
    """Every row in its place: data sets, edits and metrics in the order in which they first appear."""
    groups: dict[str, dict[tuple[str, str], dict[str, Row]]] = {}
    metrics: dict[str, None] = {}
    for row in rows:
        if row.metric not in without:
            metrics[row.metric] = None
            groups.setdefault(row.dataset, {}).setdefault((row.method, row.setting), {})[row.metric] = row
    main: dict[str, list[Line]] = {}
    draws: dict[str, list[Line]] = {}
    for dataset, lines in groups.items():
        for (method, setting), by_metric in lines.items():
            head, drawn, _ = setting.partition(" draw=")
            pooled = bool(drawn) and (method, f"{head} mean") in lines
            (draws if pooled else main).setdefault(dataset, []).append(Line(method, setting, by_metric))
    return Table(tuple(metrics), main, draws)


def benchmark_tables(finding: Finding) -> dict[str, Table]:
    """The benchmark's rows by what they tell: outcomes, costs, and how each factor did on validation prompts."""
    tried = [row for row in finding.rows if row.dataset == plots.STRENGTH_DATASET]
    final = [row for row in finding.rows if row.dataset != plots.STRENGTH_DATASET]
    return {
        "outcomes": table(final, without=tuple(plots.COSTS)),
        "costs": table(row for row in finding.rows if row.metric in plots.COSTS),
        "strength": table(tried, without=tuple(plots.COSTS)),
    }


def examples(
    finding: Finding, prompts: Mapping[str, Prompts], responses: Sequence[Responses]
) -> dict[str, list[Example]]:
    """The first prompts of every data set with what each edit made of them; of random draws only the first."""
    by_arm = {(made.dataset, made.method, made.setting): made for made in responses}
    shown: dict[str, list[Example]] = {}
    for dataset in dict.fromkeys(row.dataset for row in finding.rows if row.dataset in prompts):
        arms = dict.fromkeys((row.method, row.setting) for row in finding.rows if row.dataset == dataset)
        made = [by_arm[dataset, *arm] for arm in arms if (dataset, *arm) in by_arm and not _later_draw(arm[1])]
        if made and dataset != plots.STRENGTH_DATASET:
            shown[dataset] = [Example(prompt, _answers(prompt, made)) for prompt in prompts[dataset][:EXAMPLES]]
    return shown


def _later_draw(setting: str) -> bool:
    return re.search(r" draw=0*[1-9]", setting) is not None


def _answers(prompt: Prompt, responses: Iterable[Responses]) -> list[Answer]:
    """One answer for each edit under which this prompt was answered."""
    return [
        Answer(made.method, made.setting, row, _outcome(row))
        for made in responses
        for row in made.rows
        if row.prompt_id == prompt.id
    ]


def _outcome(response: Response) -> str:
    return next((name for name in plots.OUTCOMES if response.scores.get(name) == 1), "not scored")


def inline(svg: bytes, prefix: str) -> Markup:
    """An SVG of `plots` as part of a page: ids of its own, the page's colours for ink and grid, no ground.

    The only text that enters the page unescaped; matplotlib has escaped the names in it.
    """
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{prefix}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    for colour, name in ((plots.INK, "ink"), (plots.MUTED, "muted"), (plots.GRID, "rule"), ("#ffffff", "ground")):
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
