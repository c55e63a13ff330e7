"""Own, common and transferred features by category: the arithmetic by hand, held features, and a run that is killed."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape

from refusalscope.core import stats
from refusalscope.core.store import Store
from refusalscope.core.types import Feature, FeatureSet, Finding, Response, Responses
from refusalscope.inputs.chat import Given
from refusalscope.mechanism.effects import contrast, metric_under
from refusalscope.mechanism.interventions import editor
from refusalscope.pipeline import categories as pipeline
from refusalscope.pipeline import fit, measure
from refusalscope.pipeline.category_sets import choose_category_sets
from refusalscope.pipeline.job import Job, Progress
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.sizes import WHOLE
from refusalscope.report import categories as report
from refusalscope.report import plots
from refusalscope.studies import benchmark
from refusalscope.studies import categories as study
from refusalscope.studies.categories import Arm, Effect, Kind, Measured, Rest, Served
from tests import tiny
from tests.test_run import _bytes

NAMES = ("one", "two", "three")
CLUSTERS = [str(n // 2) for n in range(16)]
REFUSED = [1.0] * 15 + [0.0]


def features(*indices: int) -> FeatureSet:
    return FeatureSet("chosen", tuple(Feature(1, n) for n in indices), (1.0,) * len(indices))


def answers(method: str, setting: str, refused: list[float], changed: int = 5) -> Responses:
    rows = [
        Response(f"p{n}", "so", 1, 1, "end", {"refused": score, "answered": 1 - score})
        for n, score in enumerate(refused)
    ]
    return Responses("", method, setting, tuple(rows), changed)


def arm(method: str, kind: Kind, rest: Rest, *indices: int, draw: int | None = None) -> Arm:
    return Arm(method, kind, features(*indices), 0.0, features(9) if rest == "held" else None, rest, draw)


def measured(name: str, own: float, *others: float, exclusive: bool = True) -> Measured:
    """A category whose sets move every prompt by these amounts, give or take the same noise."""
    noise = np.random.default_rng(0).normal(size=16) * 0.1

    def effect(made: Arm, by: float) -> Effect:
        return Effect(made, [] if not len(made.scaled) else (by + noise).tolist())

    effects = [effect(arm("all", "all", "", 1, 2), 5.0)]
    kinds: tuple[Kind, ...] = ("specific", "exclusive")
    for kind in kinds:
        chosen = (1, 2) if kind == "specific" or exclusive else ()
        for rest in pipeline.BOTH:
            effects += [effect(arm(kind, kind, rest, *chosen), own * (1 + noise[3]))]
            effects += [effect(arm(f"from {n}", kind, rest, 3), by) for n, by in enumerate(others)]
            effects += [effect(arm(f"from {len(others)}", kind, rest), 1.0)]
    effects += [effect(arm("random", "common", "free", 5, draw=n), n / 10) for n in range(3)]
    half = [0.0] * 8 + REFUSED[8:]
    said = [
        (arm("all", "all", "", 1, 2), answers("all", "", [0.0] * 16)),
        (arm("specific", "specific", "held", 1), answers("specific", "", half)),
        *((arm("random", "common", "free", 5, draw=n), answers("random", "", REFUSED, changed=0)) for n in range(2)),
    ]
    return Measured(name, name, 20, 18, CLUSTERS, effects, answers("base", "", REFUSED), said)


def summarised(*made: Measured, size: int = 2) -> Finding:
    served = [
        Served(
            one.dataset,
            features(1, 2) if one.dataset != "one" else features(1),
            CLUSTERS,
            {Feature(1, 2): [1.0] * 4 + [0.0] * 12},
        )
        for one in made
    ]
    return study.summarise(made, served=served, size=size, caveats=["before"], provenance={})


@pytest.fixture
def finding() -> Finding:
    made = [measured("one", 2.0, 0.5, 1.5), measured("two", 1.0, 1.5), measured("three", 1.0, 1.0, exclusive=False)]
    return summarised(*made)


def test_own_features_are_compared_with_the_mean_of_the_others_that_have_any(finding: Finding) -> None:
    rows = {row.dataset: row for row in report.compared(finding, "specific", "held")}
    own = 2.0 * (1 + np.random.default_rng(0).normal(size=16)[3] * 0.1)
    assert rows["one"].estimate == pytest.approx(own - 1.0)
    assert (rows["one"].n, rows["one"].setting) == (16, "c=0 n=2 held")
    p = [rows[name].p for name in NAMES]
    # Eight clusters, all one way: of 256 ways to flip their signs two are as far from 0.
    assert p == [pytest.approx(2 / 256)] * 3
    assert [rows[name].p_holm for name in NAMES] == pytest.approx([6 / 256] * 3)
    assert [report.is_significant(rows[name]) for name in NAMES] == [True] * 3
    alone = {row.dataset: row for row in report.compared(finding, "exclusive", "free")}
    assert (alone["three"].n, alone["three"].estimate, alone["three"].p) == (0, None, None)
    assert alone["one"].p_holm == pytest.approx(4 / 256)


def test_drops_are_normalised_prompt_by_prompt_and_draws_are_pooled(finding: Finding) -> None:
    row = finding.find("one", "specific", "normalised_drop")
    assert row is not None
    assert (row.estimate, row.n) == (pytest.approx(8 / 15), 16)
    none = finding.find("one", "random", "normalised_drop", "c=0 n=1 common free mean")
    assert none is not None
    assert (none.estimate, none.low, none.high) == (0, 0, 0)
    pooled = finding.find("two", "random", "metric_change", "c=0 n=1 common free mean")
    single = [finding.find("two", "random", "metric_change", f"c=0 n=1 common free draw={n}") for n in range(3)]
    assert pooled is not None
    assert pooled.estimate == pytest.approx(
        np.mean([row.estimate for row in single if row and row.estimate is not None])
    )
    rate = finding.find("two", "random", "refused", "c=0 n=1 common free mean")
    assert rate is not None
    assert (rate.n, rate.estimate) == (32, 15 / 16)


def test_shares_and_overlaps_are_rows(finding: Finding) -> None:
    share = finding.find("two", "1/2", "share")
    pairs = {other: finding.find("two", f"with {other}", "jaccard") for other in NAMES}
    assert share is not None
    assert (share.n, share.estimate) == (16, 0.25)
    assert {o: (r.n, r.estimate, r.setting) for o, r in pairs.items() if r} == {
        "one": (2, 0.5, "shared=1"),
        "two": (2, 1.0, "shared=2"),
        "three": (2, 1.0, "shared=2"),
    }


def test_what_was_left_out_is_said(finding: Finding) -> None:
    usable = finding.find("one", "base", "usable")
    assert usable is not None
    assert (usable.n, usable.estimate, usable.setting) == (20, 16 / 20, "refused=18 intents=8")
    said = " ".join(finding.caveats)
    assert finding.caveats[:2] == ("before", "Compared subsets hold 2 features: an effect may be a single one's.")
    assert "one: 18 of 20 held-out prompts are refused by the unedited model, and 16 of these" in said
    assert "three: no feature is in its set alone" in said
    assert "changed no position at all: random c=0 n=1 common free draw=0 on one" in said
    assert "No feature is common to all" in " ".join(summarised(measured("one", 1.0, 1.0), size=0).caveats)


def test_a_ratio_of_paired_totals() -> None:
    whole = np.random.default_rng(1).uniform(1, 3, size=40)
    clusters = [str(n // 2) for n in range(40)]
    assert stats.ratio((whole / 4).tolist(), whole.tolist(), clusters) == (40, *[pytest.approx(0.25)] * 3, 1.0)
    part = (whole * np.random.default_rng(2).uniform(size=40)).tolist()
    found = stats.ratio(part, whole.tolist(), clusters)
    assert found.low is not None
    assert found.estimate is not None
    assert found.high is not None
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(sum(part) / whole.sum())
    gaps = stats.ratio([*part, float("nan")], [*whole.tolist(), 1.0], [*clusters, "x"])
    assert (gaps.estimate, gaps.n, gaps.coverage) == (found.estimate, 40, 40 / 41)
    assert stats.ratio([1.0, 0.0], [0.0, 0.0]) == stats.NOTHING._replace(coverage=1.0)
    assert stats.ratio([], []) == stats.NOTHING


def test_the_words_say_what_the_rows_say(finding: Finding) -> None:
    rows = [{"role": role} for role in ("common", "exclusive", "specific")]
    matrix = {"categories": dict.fromkeys(NAMES), "features": rows}
    shared, specific, exclusive, does = report.sentences(finding, matrix)
    assert shared.startswith("Of the 3 features in the sets of 3 categories, 1 are common to all and 1 are in one set")
    assert "by measurably more than those of other categories in 2 of 3 categories" in specific
    assert specific.endswith("and by measurably less in 1.")
    assert "of 2 categories" in exclusive
    assert "Whole sets leave 0.0% refused" in does
    absent = replace(finding, rows=tuple(replace(row, p_holm=0.5 if row.p else None) for row in finding.rows))
    assert "in none of 3 categories" in report.sentences(absent, matrix)[1]
    nothing = replace(finding, rows=())
    assert report.sentences(nothing, matrix)[1:] == (
        "No category has specific features to compare with those of another.",
        "No category has exclusive features to compare with those of another.",
        "No edit could be measured on any category.",
    )
    assert plots.plots(nothing) == {}
    assert list(plots.plots(finding)) == [f"categories-{name}" for name in ("own", "transfer", "overlap", "shares")]


def test_held_features_win_where_scaled_ones_are_edited_too(tmp_path: Path) -> None:
    model, saes = tiny.chat_model(), tiny.bank(tmp_path)
    rows = tiny.prompts(texts=tiny.TEXTS[:2])
    slices = saes.slices({1: [3, 5, 9]})
    made = Arm("specific", "specific", features(9, 3), 0.0, features(5), "held")
    held = pipeline._recorded(model, rows, [made], slices, batch_size=len(rows), render=model.answer_tokens)
    edits = editor(pipeline._intervention(made, held), layers=4, slices=slices).edits
    tokens = model.tokens(rows)
    clean, edited = (model.run(tokens, edits=e, keep=[1]).residuals[1] for e in ({}, edits))
    scaled, kept = slices[1].take([3, 9]), slices[1].take([5])
    between = clean - scaled.encode(clean) @ scaled.decoder
    expected = between + (kept.encode(clean) - kept.encode(between)) @ kept.decoder
    inside = tokens.roles != 0
    torch.testing.assert_close(edited[inside], expected[inside], atol=1e-5, rtol=1e-5)


def test_a_metric_that_goes_on_from_the_first_scaled_layer_is_that_of_a_whole_pass(tmp_path: Path) -> None:
    model, saes = tiny.chat_model(), tiny.bank(tmp_path)
    rows = tiny.prompts()
    slices = saes.slices({1: [5], 2: [4]})
    made = Arm("specific", "specific", FeatureSet("s", (Feature(2, 4),), (1.0,)), 3.0, features(5), "held")
    held = pipeline._recorded(model, rows, [made], slices, batch_size=len(rows), render=model.tokens)
    edits = editor(pipeline._intervention(made, held), layers=4, slices=slices).edits
    tokens = model.tokens(rows)
    seen = contrast(model, tokens, tiny.direction())
    clean = model.run(tokens, keep=[2], offload=False).residuals
    assert pipeline._first(made) == 2
    assert sorted(edits) == [1, 2]
    found = metric_under(model, seen, edits, Given(2, clean[2])).metric
    torch.testing.assert_close(found, metric_under(model, seen, edits).metric, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, seen.clean, atol=1e-3)
    # What changes nothing leaves every bit in its place.
    assert torch.equal(metric_under(model, seen, {}, Given(2, clean[2])).metric, seen.clean)


def test_edits_that_are_answered_together_are_those_answered_alone(tmp_path: Path) -> None:
    model, saes = tiny.chat_model(), tiny.bank(tmp_path)
    rows = tiny.prompts()
    slices = saes.slices({1: [3, 5, 9], 2: [4]})
    edits = [
        Arm(
            "specific",
            "specific",
            FeatureSet("s", (Feature(1, 3), Feature(2, 4)), (1.0, 1.0)),
            3.0,
            features(5),
            "held",
        ),
        Arm("common", "common", features(9, 3), -2.0, None, "free"),
    ]
    held = pipeline._recorded(model, rows, edits, slices, batch_size=len(rows), render=model.answer_tokens)
    arms = [
        *(benchmark.Arm(one.method, one.setting, pipeline._intervention(one, held)) for one in edits),
        benchmark.BASE,
    ]
    # Fewer at once than there are rows: rows of one arm take the places of another's.
    given: dict[str, Any] = {"slices": slices, "batch_size": len(rows) + 1, "max_new_tokens": 12}
    together = benchmark.answer_each(model, rows, arms, **given)
    assert together == [benchmark.answer(model, rows, arm, **given) for arm in arms]
    assert [made.changed > 0 for made in together] == [True, True, False]
    assert len({tuple(row.text for row in made.rows) for made in together}) > 1


SMALL = Options(
    limit=12, k=8, max_new_tokens=8, best_layer=6, categories=("Malware", "Privacy Violation"), batch_size=64
)


class Killed(Exception):
    """Stands for a kill: nothing catches it."""


def study_of(folder: Path, progress: Progress = lambda *_: None) -> Store:
    """What the verb does, without the graph."""
    job = Job(SMALL, folder, progress)
    try:
        fitted = fit.fit(job)
        pipeline.run_categories(job, fitted, choose_category_sets(job, fitted))
        measure.describe_run(job, fitted)
        measure.write_report(job.store)
        job.finish()
    finally:
        job.close()
    return job.store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing befell, copied before the first edit to where another is killed."""
    folder = tmp_path_factory.mktemp("categories") / "demo"

    def copying(stage: str, done: int, _of: int) -> None:
        if stage.startswith("categories: edits") and done == 0:
            shutil.copytree(folder, folder.parent / "killed" / "demo")

    study_of(folder, copying)
    return folder


def test_a_kill_in_the_middle_of_a_category_loses_nothing_finished(whole: Path) -> None:
    folder = whole.parent / "killed" / "demo"

    def killing(stage: str, done: int, _of: int) -> None:
        if stage.startswith("categories: answering privacy-violation") and done == 2:
            raise Killed

    with pytest.raises(Killed):
        study_of(folder, killing)
    before = Store(folder).paths("categories", "effects.json")
    assert before == ["categories/malware/effects.json", "categories/privacy-violation/effects.json"]
    made = study_of(folder).made
    assert not [path for path in made if "/malware/" in path or path.endswith("effects.json")]
    assert _bytes(folder) == _bytes(whole)


def test_a_finished_study_loads_no_model(whole: Path) -> None:
    before = _bytes(whole)
    assert study_of(whole).made == []
    assert _bytes(whole) == before


def test_answers_under_sets_of_an_earlier_command_are_not_kept(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "demo")
    store = Store(folder)
    mine = store.paths("responses/malware", ".jsonl")
    store.put("responses/malware/specific c=0 n=99 held.jsonl", "", store.read(mine[-1], Responses))
    assert study_of(folder).paths("responses/malware", ".jsonl") == mine
    assert not (folder / "responses/malware/specific c=0 n=99 held.jsonl").exists()
    assert _bytes(folder) == _bytes(whole)


def test_the_report_has_every_part(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    finding = Store(whole).read("findings/categories.json", Finding)
    assert "Features by kind of harm" in page
    assert "from malware" in page
    assert page.count("<svg") == len(plots.plots(finding)) >= 2
    for sentence in report.sentences(finding, Store(whole).read(report.MATRIX, dict)):
        assert escape(sentence) in page
    draws = [r for r in finding.rows if r.metric == "metric_change" and "draw=" in r.setting and r.dataset == "malware"]
    assert len(draws) % WHOLE.edit_draws == 0
