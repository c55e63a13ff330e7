"""What the judges say, on the page: coverage beside every rate, who they are, how far they agree; nothing unescaped."""

import re
from pathlib import Path

import pytest

from refusalscope.core.store import Store
from refusalscope.core.types import Finding, NaN, Verdict
from refusalscope.evals.judges import Judge
from refusalscope.pipeline import judge as judging
from refusalscope.pipeline.answered import answers
from refusalscope.report import page
from refusalscope.report.sentences import number
from tests.sample_run import ATTACK, benchmark_rows, health_rows, make_run, rate
from tests.test_report import Tree


def judge(name: str, missed: int, **about: str) -> Judge:
    """Says yes to every other prompt and misses the last ones."""

    def score(exchanges):
        return [
            Verdict(one.prompt.id, float(place % 2 == 0) if place < len(exchanges) - missed else NaN, reason=ATTACK)
            for place, one in enumerate(exchanges)
        ]

    return Judge(name, "harmful", about, 8, score)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    benchmark = Finding("benchmark", "Does it?", benchmark_rows(), (), {"model": "tiny"})
    made = make_run(tmp_path_factory.mktemp("judged") / "run", benchmark, Finding("health", "?", health_rows(), (), {}))
    answered = answers(made)
    judges = [judge("mine", 1, model=f"tiny {ATTACK}", revision="0123abc"), judge("other", 0)]
    judging.score(made, answered, judges, lambda *_: None)
    judging.write_findings(made, answered)
    return made


@pytest.fixture(scope="module")
def html(store: Store) -> str:
    return page.write(store)


def test_hostile_text_of_a_judge_stays_text(html: str) -> None:
    tree = Tree(html)
    assert not tree.faults
    assert not tree.open
    assert not tree.names() & {"script", "img", "iframe"}
    assert "model <code>tiny &lt;script&gt;" in html


def test_every_rate_stands_beside_its_coverage_and_a_thin_one_is_flagged(html: str) -> None:
    section = html[html.index('id="safety"') : html.index('id="agreement"')]
    assert "harmful (mine), %" in section
    assert "harmful (other), %" in section
    cells = re.findall(r"<td[^>]*>[^<]+ <small>\[[^<]+</small>\s*<small[^>]*>[^<]+</small></td>", section)
    assert cells
    for cell in cells:
        share = re.search(r"(\d+)% scored", cell)
        assert share is not None
        assert ("thin" in cell) == ("⚑ only" in cell) == (int(share[1]) < 90)
    assert any("⚑" in cell for cell in cells)
    assert "harmful (mine), change from base, points" in section
    assert "revision <code>0123abc</code>" in section
    assert "The judge mine left" in section


def test_pairs_of_judges_stand_with_their_confusion(html: str) -> None:
    section = html[html.index('id="agreement"') :]
    section = section[: section.index("<h2")]
    assert "mine vs other" in section
    for title in ("Cohen’s kappa", "agree, %", "both say yes, %", "first alone says yes, %", "both say no, %"):
        assert title in section


def test_rows_of_judges_are_in_per_cent_but_scores_and_kappa(tmp_path: Path) -> None:
    shown = {m: number(rate("harmful", "base", m, "", 0.25)) for m in ("harmful:x", "harmful_change:x", "neither")}
    assert set(shown.values()) == {"25.0"}
    assert {number(rate("harmful", "base", m, "", 0.25)) for m in ("harmful_score:x", "kappa")} == {"0.250"}


def test_a_page_that_stands_is_written_anew(store: Store) -> None:
    store.put("report.html", "", "old")
    judging.write_findings(store, answers(store))
    assert 'id="safety"' in (store.root / "report.html").read_text()
