"""Holds the report to its promises on a run folder of made-up nouns: escaped, stable, self-contained and honest."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

from refusalscope.core.store import Store
from refusalscope.core.types import Direction, Finding, LayerScores, NaN, Prompt, Prompts, Response, Responses, Row
from refusalscope.report import page, plots

ATTACK = (
    "<script>alert('x')</script></details><img src=http://evil.example/x.png onerror=\"alert(1)\"> \u202e& {{ 7*7 }}"
)
EDIT = "scale c=-1 k=20"
VOID = {"meta", "br", "img", "input", "link", "hr"}


def rate(dataset, method, metric, setting, estimate, n=50, coverage=1.0, width=0.05):
    if estimate is None:
        return Row(dataset, method, metric, setting, 0, None, None, None, 0.0)
    return Row(dataset, method, metric, setting, n, estimate, estimate - width, estimate + width, coverage)


def outcomes(dataset, method, setting, refused, answered, **details):
    shares = {"refused": refused, "answered": answered, "incoherent": 1 - refused - answered}
    return [rate(dataset, method, metric, setting, share, **details) for metric, share in shares.items()]


def benchmark_rows():
    rows = outcomes("harmful", "base", "", 0.94, 0.06)
    rows += [*outcomes("harmful", "cosine+attribution", EDIT, 0.1, 0.8)]
    rows += [rate("harmful", "cosine+attribution", "refused_change", EDIT, -0.84)]
    for draw in (0, 1):
        rows += outcomes("harmful", "random", f"{EDIT} draw={draw}", 0.9, 0.1)
    rows += outcomes("harmful", "random", f"{EDIT} mean", 0.9, 0.1, n=100)
    rows += outcomes("harmless", "base", "", 0.0, 1.0)
    rows += outcomes("harmless", "a new <method>", "", 0.02, 0.9, coverage=0.62)
    rows += [rate("never heard of", "base", metric, "", None) for metric in plots.OUTCOMES]
    rows += outcomes("harmful-validation", "base", "", 0.95, 0.05)
    for factor, refused in ((0.5, 0.9), (-1, 0.1)):
        rows += outcomes("harmful-validation", "cosine+attribution", f"scale c={factor:g} k=20", refused, 1 - refused)
    rows += [rate("harmless", "cosine+attribution", metric, EDIT, 0.031, width=0.004) for metric in plots.COSTS]
    return tuple(rows)


@pytest.fixture(scope="module")
def benchmark():
    provenance = {"model": "tiny", "direction": "00ff", "features": {"cosine": "ab12"}, "versions": {"torch": "2"}}
    return Finding("benchmark", "Does it & why?", benchmark_rows(), ("Mind the <gap>.",), provenance)


@pytest.fixture(scope="module")
def health():
    rows = [
        rate("harmless", "sae", metric, f"layer={layer}", 0.9 - layer / 10)
        for layer in (0, 1)
        for metric in (*plots.QUALITIES, "l0")
    ]
    return Finding("health", "Are they faithful?", tuple(rows), ("Layer 1 is poor.",), {"model": "tiny"})


def answered(dataset, method, setting, text):
    scores, reasons = {"refused": 0.0, "answered": 1.0, "incoherent": 0.0}, {"answered": f"because {ATTACK}"}
    row = Response("p0", text, 1, 5, "length", scores, reasons)
    unscored = Response("p1", "nothing to see", None, 0, "end", dict.fromkeys(scores, NaN))
    return Responses(dataset, method, setting, (row, unscored), changed=1)


def make_run(folder, benchmark, health):
    store = Store(folder)
    options = {
        "model": "tiny",
        "prompts": "/home/ada lovelace/secret/p.csv",
        "limit": None,
        "derived": {"batch_size": 8},
    }
    about = {
        "model": f"tiny {ATTACK}",
        "title": f"Why does tiny refuse? {ATTACK}",
        "command": "refusalscope run tiny --prompts '/home/ada lovelace/secret/p.csv'",
        "options": options,
        "notices": ["tiny refuses 3 of 50 of /home/ada lovelace/secret/p.csv."],
        "versions": {"torch": "2.9"},
        "limit_tokens": 64,
        "refusal_token_texts": [" I", "</code>"],
    }
    store.put("run.json", "", about)
    store.put("findings/benchmark.json", "", benchmark)
    store.put("findings/health.json", "", health)
    scores = (LayerScores(1, 0.02, -3.5, 2.0, 0.01, -3.0), LayerScores(2, 0.5, 1.0, -1.0, 0.4, 1.5))
    direction = Direction(torch.ones(4), 1, torch.zeros(2), (7,), scores, {"harmful_train": 20}, ("Few prompts.",))
    store.put("direction.safetensors", "", direction)
    feature = {"layer": 1, "index": 9, "rank": 1, "score": 0.5, "promoted": [" sorry", ATTACK], "suppressed": []}
    chosen = {**feature, "method": "cosine+attribution", "chosen": 0.75, "stability": 1.0}
    plain = {**feature, "method": "cosine", "chosen": None, "stability": None}
    store.put("features/table.json", "", {"rows": [chosen, plain]})
    for dataset in ("harmful", "harmless"):
        rows = tuple(Prompt(f"p{i}", f"{dataset} prompt {i} {ATTACK}", dataset) for i in range(6))
        store.put(f"prompts/{dataset}.jsonl", "", Prompts(dataset, rows))
    for name, arm in {"base": ("base", ""), "edit": ("cosine+attribution", EDIT)}.items():
        store.put(f"responses/harmful/{name}.jsonl", "", answered("harmful", *arm, f"{name} said {ATTACK}"))
    return store


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
    first, second = page.answer(benchmark, {"harmful": "harmful"})
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
    assert expected in page.answer(replace(benchmark, rows=rows), {"harmful": "harmful"})[0]


def test_without_harmful_prompts_there_is_no_answer(benchmark):
    assert page.answer(benchmark, {"harmful": "harmless"})[0].startswith("No harmful data set was answered")


def test_figures_are_stable_and_name_what_they_show(benchmark, health, monkeypatch):
    made = plots.figures(benchmark)
    assert list(made) == [
        "benchmark-outcomes-harmful",
        "benchmark-outcomes-harmless",
        "benchmark-outcomes-never-heard-of",
        "benchmark-strength-harmful-validation",
        "benchmark-cost-harmless",
    ]
    monkeypatch.setitem(plots.matplotlib.rcParams, "font.size", 30)
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
