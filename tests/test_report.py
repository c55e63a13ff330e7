"""Holds the report to its promises on a run folder of made-up nouns: escaped, stable, self-contained and honest."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest

from refusalscope.core.types import Finding
from refusalscope.report import page, plots, sentences, tokens, verdict
from tests.sample_run import (
    ATTACK,
    add_close_up,
    add_new_rows,
    answered,
    attribution_rows,
    benchmark_rows,
    health_rows,
    make_run,
    rate,
    verification_rows,
)

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


@pytest.fixture(scope="module")
def full_html(tmp_path_factory, benchmark, health):
    """The page of a run that has everything: close-ups of features and prompts, and findings on the attributions."""
    return page.write(add_close_up(make_run(tmp_path_factory.mktemp("full"), add_new_rows(benchmark), health)))


def visible(html):
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("fixture", ["html", "full_html"])
def test_hostile_text_stays_text(fixture, request):
    html = request.getfixturevalue(fixture)
    tree = Tree(html)
    assert not tree.faults
    assert not tree.open
    assert not tree.names() & {"script", "img", "iframe", "object", "embed", "link"}
    assert not [attrs for _, attrs in tree.tags for name in attrs if name.startswith("on")]
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&lt;/details&gt;") > 5
    assert "{{ 7*7 }}" in html


def test_reasoning_is_folded_and_what_has_no_answer_says_why(store):
    reasoned = answered("harmful", "base", "", "base said")
    rows = (
        replace(reasoned.rows[0], reasoning=f"\nfirst {ATTACK}\n"),
        replace(reasoned.rows[1], reasoning="and on", reasons={"refused": "no answer: still reasoning"}),
    )
    store.put("responses/harmful/base.jsonl", "", replace(reasoned, rows=rows))
    html = page.write(store)
    tree = Tree(html)
    assert not tree.faults
    assert not tree.names() & {"script", "img"}
    before = html[: html.index("first &lt;script&gt;")]
    assert before.endswith('<summary>What it wrote before the answer</summary>\n<p class="said" dir="auto">')
    assert '<p class="outcome not-scored">not scored: <span>no answer: still reasoning</span>' in html


def test_answers_to_harmful_prompts_are_folded(html):
    before = html[: html.index("edit said ")]
    assert before.count("<details>") == before.count("</details>") + 1
    assert "evidence only" in before[before.rindex("<details>") :]


@pytest.mark.parametrize("fixture", ["html", "full_html"])
def test_nothing_is_fetched(fixture, request):
    html = request.getfixturevalue(fixture)
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


@pytest.mark.parametrize("fixture", ["html", "full_html"])
def test_tables_and_figures_are_accessible(fixture, request):
    html = request.getfixturevalue(fixture)
    tree = Tree(html)
    count = [tag for tag, _ in tree.tags].count
    assert count("table") == count("caption") > 5
    assert all("scope" in attrs for tag, attrs in tree.tags if tag == "th")
    assert dict(tree.tags)["html"] == {"lang": "en"}
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    inside = {attrs["href"][1:] for _, attrs in tree.tags if attrs.get("href", "").startswith("#")}
    assert inside <= set(ids)
    # A marker that occurs twice in one figure is defined twice, with one content.
    captions = [name for name in ids if name.startswith("caption-")]
    drawn = [attrs for _, attrs in tree.tags if attrs.get("role") == "img"]
    named = [attrs["aria-labelledby"] for attrs in drawn if "aria-label" not in attrs]
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
        "benchmark-refused",
        "benchmark-answered",
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
    svg = next(svg for made, svg in plots.figures(replace(benchmark, rows=rows)).items() if "outcomes" in made)
    texts = [item.text for item in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{name} prompts" in texts


def test_a_study_without_figures_is_still_shown(store, health):
    store.put("findings/manners.json", "", replace(health, study="manners", question="Do manners help?"))
    html = page.write(store)
    assert "Do manners help?" in html
    assert plots.figures(replace(health, study="manners")) == {}


@pytest.mark.parametrize("path", ["features/details.json", "prompts/why.json"])
def test_a_damaged_close_up_is_named(store, path):
    kind = path.split("/")[0]
    store.put(path, "", {kind: [{"layer": 1}]})
    with pytest.raises(ValueError, match=f"{re.escape(path)} does not hold {kind} as expected"):
        page.write(store)


def test_what_a_run_lacks_is_absent(html):
    for heading in ('id="feature-pages"', 'id="why"', 'id="trust"', 'id="layers"', 'id="compared"', 'id="induced"'):
        assert heading not in html
        assert heading.replace("id=", "href=").replace('="', '="#') not in html


def test_harmful_prompts_are_folded_once_more(full_html):
    entry = full_html[full_html.index('id="feature-1-10"') : full_html.index('id="feature-1-11"')]
    folded = entry[entry.index("<details>") :]
    assert folded.index("Show the 1 harmful prompt") < folded.index("harmful p0 · harmful") < folded.index("</details>")
    assert "harmful p0 · harmful" not in entry[: entry.index("<details>")]
    view = full_html[: full_html.index('id="why-0"')]
    assert view.rindex('<details class="why">') > view.rindex("</details>")


def test_a_feature_links_to_its_prompts_and_back(full_html):
    entry = full_html[full_html.index('id="feature-1-9"') : full_html.index('id="feature-1-10"')]
    assert 'href="#why-0"' in entry
    view = full_html[full_html.index('id="why-0"') : full_html.index('id="why-1"')]
    assert 'href="#feature-1-9"' in view
    assert "It is flipped by cosine+attribution, c = −1, k = 20." in view
    assert "3.25 logits below" in view
    assert "2.12 logits above" in view


def test_only_prompts_with_edits_say_what_flips_them(full_html):
    view = full_html[full_html.index('id="why-1"') : full_html.index('id="why-2"')]
    assert "flip" not in view


def test_values_set_stand_apart_from_the_outcomes(full_html):
    outcomes = full_html[full_html.index('id="results"') : full_html.index('id="compared"')]
    assert "v = 0.25" not in outcomes
    induced = full_html[full_html.index('id="induced"') : full_html.index('id="cost"')]
    assert induced.index("<figure>") < induced.index("<details>") < induced.index("v = 0.25, k = 20")
    compared = full_html[full_html.index('id="compared"') : full_html.index('id="induced"')]
    assert "cosine+attribution vs random" in compared
    assert "30.0 <small>[20.0, 40.0]</small> <small>p = 0.024</small>" in compared


def test_the_smallest_difference_stands_under_its_table(html, full_html):
    line = "harmful: with n = 150 and Holm over 6 comparisons it takes 8 discordant prompts, all one way (5.3 points)."
    outcomes, compared = (full_html.index(f'id="{name}"') for name in ("results", "compared"))
    assert full_html.index("</table>", compared) < full_html.index(line) < full_html.index('id="induced"')
    few = "harmful: too few prompts to show any difference with Holm over 9 comparisons."
    assert full_html.index("</table>", outcomes) < full_html.index(few) < compared
    assert full_html.count("smallest_") == 0
    assert "The smallest difference" not in html


@pytest.mark.parametrize(("p", "said"), [(None, ""), (0.0004, "p < 0.001"), (0.0301, "p = 0.030"), (1.0, "p = 1.00")])
def test_a_p_value_is_said_in_three_figures(p, said):
    assert sentences.after_holm(replace(rate("d", "m", "refused_change", "", 0.1), p_holm=p)) == said


def test_figures_of_the_new_studies(benchmark):
    induced = plots.plots(add_new_rows(benchmark))["benchmark-induced-harmless"]
    assert "the refusal direction added instead" in induced.caption
    assert list(plots.figures(Finding("attribution", "", attribution_rows(), (), {}))) == ["attribution-terms"]
    made = plots.figures(Finding("verification", "", verification_rows(), (), {}))
    assert list(made) == ["verification-nodes", "verification-correlations"]
    assert b"mathdefault" not in made["verification-nodes"]
    assert plots.figures(Finding("verification", "", (), (), {})) == {}


def judged(provenance=None, **changes):
    return verdict.verdict(Finding("verification", "", verification_rows(**changes), (), provenance or {}))


def test_the_verdict_says_what_holds():
    (only,) = judged()
    assert only.startswith("Yes, as far as tested on held-out prompts: the scores agree with a plain")
    assert only.endswith("and predict what a feature adds when many are edited together.")


def test_the_verdict_says_what_not_to_believe():
    first, second = judged(alone_correlation=0.2)
    assert first.startswith("Only in part: on held-out prompts the scores agree")
    assert "but they do not predict what editing one feature does." in first
    assert second == "So do not read a feature’s score as what editing it alone would do."


def test_the_verdict_names_the_way_of_scoring_that_fails():
    rows = tuple(
        replace(row, estimate=0.5, low=0.4) if (row.method, row.metric) == ("paper", "marginal_correlation") else row
        for row in verification_rows()
    )
    first, _ = verdict.verdict(Finding("verification", "", rows, (), {}))
    assert "edited together (scored by paper)." in first


def test_sets_must_be_predicted_better_than_by_the_gradient():
    rows = tuple(replace(row, estimate=0.98) if row.method == "gradient" else row for row in verification_rows())
    last = verdict.claims(Finding("verification", "", rows, (), {}))[-1]
    assert {check.row.method for check in last.failed} == {"sound", "paper"}


@pytest.mark.parametrize(("dtype", "holds"), [("float32", False), ("torch.bfloat16", True), ("unheard of", False)])
def test_the_limit_of_the_computation_depends_on_its_precision(dtype, holds):
    assert ("take none of the scores" in judged({"dtype": dtype}, factored_error=0.005)[-1]) != holds


def test_what_was_not_tested_is_said():
    rows = tuple(row for row in verification_rows() if row.metric == "alone_correlation")
    first, second = verdict.verdict(Finding("verification", "", rows, (), {}))
    assert first.startswith("Yes, as far as tested")
    assert second.startswith("Not tested: whether they agree with")
    assert "not put to the test" in verdict.verdict(Finding("verification", "", (), (), {}))[0]


def _is_second(row):
    return (row.setting, row.metric) == ("layer=2", "error")


def test_layers_where_the_sae_misses_much_are_named():
    finding = Finding("attribution", "", attribution_rows(), (), {})
    rows = tuple(
        replace(r, estimate=0.01, low=0.0) if "=2" in r.setting and r.metric == "error" else r for r in finding.rows
    )
    assert verdict.blind_layers(finding) == [1, 2, 3]
    assert verdict.blind_layers(replace(finding, rows=rows)) == [1, 3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n", "↵"),
        (" ", "␣"),
        (" sorry", " sorry"),
        ("", "∅"),
        ("\t", "␉"),
        ("a\u202eb", "a[U+202E]b"),
        ("مرحبا", "مرحبا"),
    ],
)
def test_no_token_is_invisible(text, shown):
    assert tokens.visible(text) == shown


def test_tokens_without_colour_are_one_piece():
    made = tokens.spans(["a", "b", "c", "d"], [0.0, None, 4.0, 0.01], ["header", *["instruction"] * 3], 4.0)
    assert [(piece.text, piece.level) for piece in made] == [("a", 0), ("b", 0), ("c", 8), ("d", 0)]
    assert [tokens.level(value, 4.0) for value in (-4.0, 2.0, 0.5, float("nan"))] == [-8, 4, 1, 0]
    with pytest.raises(ValueError, match="argument"):
        tokens.spans(["a"], [], ["header"], 1.0)
