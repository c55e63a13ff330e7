"""The first page says what the rows say, in words for anyone; the contents lead to every chapter and nowhere else."""

import re

import pytest

from refusalscope.core.types import Direction, Finding, Row
from refusalscope.report import page, summary
from refusalscope.report.contents import GROUPS, REST, contents
from tests.sample_run import add_close_up, add_new_rows, benchmark_rows, health_rows, make_run, rate
from tests.tiny import direction

LABELS = {"harmful": "harmful", "harmless": "harmless"}
TABLE = [{"method": "cosine+attribution", "layer": layer} for layer in (3, 3, 5)]


def finding(study: str, *rows: Row) -> Finding:
    return Finding(study, "?", rows, (), {})


def said(*findings: Finding, found: Direction | None = None) -> dict[str, str]:
    """Heading -> its sentences."""
    by_study = {one.study: one for one in findings}
    made = summary.paragraphs(by_study, LABELS, found or direction(), TABLE)
    return {one.anchor: " ".join(filter(None, [*one.sentences, one.folded])) for one in made}


def jailbreaks(*, apart: float = 0.3, width: float = 0.05, back: float = 0.8) -> Finding:
    return finding(
        "jailbreaks",
        rate("pairs", "base", "succeeded", "all pairs", 0.4),
        rate("pairs", "base", "succeeded", "family=poem", 0.7, n=20),
        rate("pairs", "base", "succeeded", "family=<b>", 0.1, n=30),
        rate("pairs", "common", "drop", "succeeded", 0.5, n=20),
        rate("pairs", "common", "drop", "failed", 0.2, n=30),
        rate("pairs", "common", "drop_difference", "within families", apart, width=width),
        rate("restored", "common", "refused_coherently", "restore", back, n=20),
        rate("restored", "random features", "refused_coherently", "restore mean", 0.1, n=100),
    )


def test_four_paragraphs_say_what_was_measured() -> None:
    made = said(finding("benchmark", *benchmark_rows()), finding("health", *health_rows()), jailbreaks())
    assert "Without any edit the model refuses 94.0% [89.0, 99.0] of harmful prompts (n = 50)" in made["refuses"]
    assert "3 features" in made["refuses"]
    assert "2 in layer 3 and 1 in layer 5." in made["refuses"]
    assert "matched random features leave 90.0%" in made["refuses"]
    assert "With their strength multiplied by −1 the model refuses 10.0% [5.0, 15.0] of harmful" in made["refuses"]
    assert "editing them lowers refusal" in made["refuses"]
    assert "80.0% [75.0, 85.0] of harmful prompts are answered coherently" in made["costs"]
    assert "less likely by 0.031 [0.027, 0.035] nats per token (cross-entropy, n = 50; 0 is no change)" in made["costs"]
    assert "40.0% [35.0, 45.0] pass (n = 50)" in made["passes"]
    assert "poem 70.0% [65.0, 75.0] (n = 20)" in made["passes"]
    assert "those that pass lower them more (0.300 [0.250, 0.350], n = 50)" in made["passes"]
    assert "refuse again in 80.0% [75.0, 85.0] of the attacks that had passed (n = 20)" in made["passes"]
    assert "as many random features do so in 10.0%" in made["passes"]


@pytest.mark.parametrize(("apart", "told"), [(0.01, "not measurably more or less"), (-0.2, "lower them less")])
def test_an_absent_or_opposite_effect_is_said(apart: float, told: str) -> None:
    assert told in said(jailbreaks(apart=apart))["passes"]


def test_what_is_missing_is_said_to_be() -> None:
    made = said()
    assert made["refuses"] == made["guarded"] == summary.MISSING
    assert made["costs"].count("was not measured in this run") == 2
    assert made["passes"].count("were not measured in this run") == 2
    nothing = finding("suffixes", rate("suffixes", "base", "turned", "any suffix of a goal", None))
    assert "there was nothing to turn" in said(nothing)["passes"]


def test_words_of_attacks_are_folded() -> None:
    steps = {f"word={word}": at / 10 for at, word in enumerate("abcde")}
    words = [rate("suffixes", "refusal features", "word_step", word, step) for word, step in steps.items()]
    turned = rate("suffixes", "base", "turned", "any suffix of a goal", 0.5)
    made = summary.paragraphs({"suffixes": finding("suffixes", turned, *words)}, LABELS, direction(), ())
    folded = next(one for one in made if one.anchor == "passes")
    assert "“e” by 0.400 [0.350, 0.450] (n = 50), “d”" in folded.folded
    assert "“b”" not in folded.folded
    assert "“e”" not in " ".join(folded.sentences)


def test_what_tasks_cost_is_said_task_by_task() -> None:
    edit = ("cosine+attribution", "scale c=-1 k=20")
    tasks = finding(
        "capability",
        *(rate(f"task{at}", edit[0], "acc:none", edit[1], 0.6) for at in range(6)),
        *(rate(f"task{at}", edit[0], "acc_change:none", edit[1], -0.1) for at in range(6)),
    )
    costs = said(finding("benchmark", *benchmark_rows()), tasks)["costs"]
    assert "task0, acc: 0.600 [0.550, 0.650] (n = 50; change −0.100 [−0.150, −0.050]); task1" in costs
    assert "; 2 more stand under Cost elsewhere." in costs
    assert "task4" not in costs


def test_contents_hold_every_chapter_once(tmp_path) -> None:
    benchmark = add_new_rows(finding("benchmark", *benchmark_rows()))
    full = add_close_up(make_run(tmp_path / "run", benchmark, finding("health", *health_rows())))
    html = page.write(full)
    chapters = re.findall(r'<h2 id="([^"]+)">', html)
    nav = html[html.index("<nav") : html.index("</nav>")]
    links = re.findall(r'href="#([^"]+)"', nav)
    assert sorted(links) == sorted(set(chapters))
    assert len(chapters) == len(set(chapters))
    named = [anchor for group in GROUPS.values() for anchor in group]
    assert len(named) == len(set(named))


def test_a_chapter_nobody_knows_is_listed_by_its_heading() -> None:
    made = contents('<h2 id="new">A <em>new</em> &amp; odd one</h2>', '<h2 id="cost">Cost of it</h2>')
    assert made[REST] == [("new", "A new & odd one")]
    assert made["Edits"] == [("cost", "Cost")]
    assert set(made) == {REST, "Edits"}
