"""Holds the report to its promises on a run folder of made-up nouns: escaped, stable, self-contained and honest."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest

from refusalscope.core.types import Finding
from refusalscope.report import page, plots, sentences
from tests.sample_run import benchmark_rows, health_rows, make_run, rate

VOID = {"meta", "br", "img", "input", "link", "hr"}


@pytest.fixture(scope="module")
def benchmark():
    provenance = {"model": "tiny", "direction": "00ff", "features": {"cosine": "ab12"}, "versions": {"torch": "2"}}
    return Finding("benchmark", "Does it & why?", benchmark_rows(), ("Mind the <gap>.",), provenance)


@pytest.fixture(scope="module")
def health():
    return Finding("health", "Are they faithful?", health_rows(), ("Layer 1 is poor.",), {"model": "tiny"})


class Tree(HTMLParser):
    """Every tag with its attributes, and the faults of nesting."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.faults = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"{self.getpos()}: </{tag}>")

    def names(self):
        return {tag for tag, _ in self.tags}


@pytest.fixture
def store(tmp_path, benchmark, health):
    return make_run(tmp_path / "run", benchmark, health)


@pytest.fixture(scope="module")
def html(tmp_path_factory, benchmark, health):
    return page.write(make_run(tmp_path_factory.mktemp("report"), benchmark, health))


def visible(html):
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_hostile_text_stays_text(html):
    tree = Tree(html)
    assert not tree.faults
    assert not tree.open
    assert not tree.names() & {"script", "img", "iframe", "object", "embed", "link"}
    assert not [attrs for _, attrs in tree.tags for name in attrs if name.startswith("on")]
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&lt;/details&gt;") > 5
    assert "{{ 7*7 }}" in html


def test_answers_to_harmful_prompts_are_folded(html):
    before = html[: html.index("edit said ")]
    assert before.count("<details>") == before.count("</details>") + 1
    assert "may they be" in before[before.rindex("<details>") :]


def test_nothing_is_fetched(html):
    tree = Tree(html)
    addresses = [
        attrs[name] for _, attrs in tree.tags for name in ("src", "href", "xlink:href", "data") if attrs.get(name)
    ]
    assert {address for address in addresses if not address.startswith("#")} == {"https://arxiv.org/abs/2505.23556"}
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_bytes_depend_on_the_results_alone(store, html):
    assert page.write(store) == html


def test_no_time_no_folder_no_user(html, tmp_path_factory):
    assert not re.search(r"\b\d{1,2}:\d{2}\b|\b20\d\d-\d\d-\d\d\b|\d{4}/\d\d/\d\d", visible(html))
    assert str(tmp_path_factory.getbasetemp()) not in html
    assert "ada" not in visible(html)
    assert "secret" not in html
    assert "p.csv" in html


@pytest.mark.parametrize(
    "path", ["run.json", "findings/benchmark.json", "direction.safetensors", "features/table.json"]
)
def test_a_missing_artifact_is_named(store, path):
    (store.root / path).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(path)} is missing"):
        page.write(store)


def test_a_run_without_health_has_a_report(store):
    (store.root / "manifest.json").write_text(
        (store.root / "manifest.json").read_text().replace("findings/health.json", "elsewhere/health.json")
    )
    assert "SAE health" not in page.write(store)


def test_unscored_is_said_not_counted(html):
    body = html[html.index(">never heard of<") :]
    line = body[body.index('<th scope="row">base') :]
    line = line[: line.index("</tr>")]
    assert line.count("not scored") == 3
    assert "0.0" not in line


def test_thin_coverage_is_flagged(html):
    line = html[html.index("a new &lt;method&gt;") :]
    line = line[: line.index("</tr>")]
    assert line.count("only 62% scored") == 3
    assert html.count("only 62% scored") == 3


def test_every_caveat_stands_before_the_results(html):
    first = html[: html.index('id="results"')]
    for caveat in ("Mind the &lt;gap&gt;.", "Layer 1 is poor.", "Few prompts.", "tiny refuses 3 of 50 of p.csv."):
        assert caveat in first


def test_single_draws_are_apart_from_their_mean(html):
    assert html.index("k = 20, mean") < html.index("The single random draws") < html.index("k = 20, draw 1")


def test_tables_and_figures_are_accessible(html):
    tree = Tree(html)
    count = [tag for tag, _ in tree.tags].count
    assert count("table") == count("caption") > 5
    assert all("scope" in attrs for tag, attrs in tree.tags if tag == "th")
    assert dict(tree.tags)["html"] == {"lang": "en"}
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    # A marker that occurs twice in one figure is defined twice, with one content.
    captions = [name for name in ids if name.startswith("caption-")]
    named = [attrs["aria-labelledby"] for _, attrs in tree.tags if attrs.get("role") == "img"]
    assert named == captions
    assert len(set(captions)) == len(captions) == count("figure")
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_answer_says_how_large_and_how_specific(benchmark):
    first, second = sentences.answer(benchmark, {"harmful": "harmful"})
    assert "scaling the 20 features of cosine+attribution by −1 lowers refusal" in first
    assert "a paired change of −84.0 points [−89.0, −79.0]" in first
    assert "matched random features leave 90.0% [85.0, 95.0] refused" in first
    assert "specific" not in first
    assert "80.0% [75.0, 85.0] are answered coherently" in second
    assert "0.031 [0.027, 0.035] nats per token" in second


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({("cosine+attribution", "refused_change"): -0.02}, "does not measurably change refusal"),
        ({("cosine+attribution", "refused_change"): 0.2}, "raises refusal"),
        ({("random", "refused"): 0.12}, "no effect specific to the chosen features is shown"),
        ({("random", "refused"): 0.5}, "part of the effect is not specific"),
    ],
)
def test_the_answer_is_honest_about_a_weak_effect(benchmark, changes, expected):
    rows = tuple(
        rate(row.dataset, row.method, row.metric, row.setting, changes[row.method, row.metric])
        if (row.method, row.metric) in changes and row.dataset == "harmful"
        else row
        for row in benchmark.rows
    )
    assert expected in sentences.answer(replace(benchmark, rows=rows), {"harmful": "harmful"})[0]


def test_without_harmful_prompts_there_is_no_answer(benchmark):
    assert sentences.answer(benchmark, {"harmful": "harmless"})[0].startswith("No harmful data set was answered")


def test_figures_are_stable_and_name_what_they_show(benchmark, health, monkeypatch):
    made = plots.figures(benchmark)
    assert list(made) == [
        "benchmark-outcomes-harmful",
        "benchmark-outcomes-harmless",
        "benchmark-outcomes-never-heard-of",
        "benchmark-strength-harmful-validation",
        "benchmark-cost-harmless",
    ]
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    assert plots.figures(benchmark) == made
    assert list(plots.figures(health)) == ["health-reconstruction"]
    for svg in made.values():
        ElementTree.fromstring(svg)
        assert b"date" not in svg
        assert b"Matplotlib v" not in svg


def test_figures_escape_names_and_leave_dollars_alone(benchmark):
    name = "<b>$x$</b> 拒絕"
    rows = tuple(replace(row, dataset=name) if row.dataset == "harmful" else row for row in benchmark.rows)
    (svg, *_) = plots.figures(replace(benchmark, rows=rows)).values()
    texts = [item.text for item in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{name} prompts" in texts


def test_a_study_without_figures_is_still_shown(store, health):
    store.put("findings/probes.json", "", replace(health, study="probes", question="Do probes work?"))
    html = page.write(store)
    assert "Do probes work?" in html
    assert plots.figures(replace(health, study="probes")) == {}
