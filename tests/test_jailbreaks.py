"""What attacks silence: drops equal plain division, what is left out is counted, a kill loses nothing."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refusalscope.core.store import Store
from refusalscope.core.types import Feature, Finding, Response, Responses
from refusalscope.pipeline import fit, measure
from refusalscope.pipeline import jailbreaks as pipeline
from refusalscope.pipeline.attacks import _outcome
from refusalscope.pipeline.category_sets import choose_category_sets
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.sizes import Sizes
from refusalscope.report import jailbreaks as told
from refusalscope.report import plots
from refusalscope.report.drawing import render
from refusalscope.studies import jailbreaks
from refusalscope.studies.jailbreaks import COMMON, FAILED, PROJECTION, RESTORE, SUCCEEDED, Measured, Restored, Seen
from tests.test_run import _bytes

FEATURES = tuple(Feature(2 + at // 2, 7 * at) for at in range(5))
SMALL = Options(limit=14, max_new_tokens=10, best_layer=6)


def seen(values: np.ndarray) -> Seen:
    return Seen(values, 2 * values, values / 2, values / 10, values.sum(1))


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Sixty pairs: attacks that succeed silence .4 of every feature, others .1; one family never succeeds."""
    rng = np.random.default_rng(0)
    plain = rng.gamma(4, size=(60, 5))
    families = tuple(("poem", "story", "class")[at % 3] for at in range(60))
    outcomes = tuple(SUCCEEDED if f != "class" and rng.random() < 0.5 else FAILED for f in families)
    lost = np.array([0.4 if outcome == SUCCEEDED else 0.1 for outcome in outcomes])
    after = plain * (1 - lost[:, None]) * rng.uniform(0.9, 1.1, size=plain.shape)
    return Measured(
        FEATURES,
        FEATURES[:3],
        np.array([[False] * 3 + [True] * 2] * 60),
        families,
        tuple(str(at // 2) for at in range(60)),
        outcomes,
        *(seen(side) for side in (plain, after, 0.98 * plain)),
    )


def arm(method: str, setting: str, refused: int) -> Responses:
    """Ten answers, the first `refused` of them refusals; the last answer is no coherent one."""
    rows = [
        Response(str(at), "", 1, 2, "end", {"refused": float(at < refused), "coherent": float(at < 9)})
        for at in range(10)
    ]
    return Responses("adversarial", method, setting, tuple(rows), changed=1)


@pytest.fixture(scope="module")
def restored() -> Restored:
    arms = [arm(COMMON, RESTORE, 8), arm("2/0", RESTORE, 3), arm("2/7", RESTORE, 0), arm(PROJECTION, RESTORE, 10)]
    for draw in range(20):
        arms += [arm(name, f"{RESTORE} draw={draw:02d}", 1) for name in ("random direction", "harmless prompt")]
        arms.append(arm("random features", f"{RESTORE} draw={draw:02d}", 9 if draw == 4 else 2))
    names = tuple(map(str, range(10)))
    return Restored(names, ("poem",) * 10, names, tuple(arms), ("2/0", "2/7"))


@pytest.fixture(scope="module")
def finding(measured: Measured, restored: Restored) -> Finding:
    return jailbreaks.summarise(measured, restored, caveats=["first"], provenance={})


def estimate(finding: Finding, *key: str) -> float:
    row = finding.find(*key)
    assert row is not None
    assert row.estimate is not None
    return row.estimate


def test_drops_are_means_of_ratios_by_group(finding: Finding, measured: Measured) -> None:
    inside = np.array(measured.succeeded)
    plain, after = (side.closing[:, :3].sum(1)[inside] for side in (measured.plain, measured.adversarial))
    assert estimate(finding, "pairs", COMMON, "drop", SUCCEEDED) == pytest.approx(np.mean(1 - after / plain))
    assert estimate(finding, "pairs", f"{COMMON}, sham", "drop", FAILED) == pytest.approx(0.02)
    plain, after = (side.closing[:, 0][inside] for side in (measured.plain, measured.adversarial))
    assert estimate(finding, "pairs", "2/0", "drop", SUCCEEDED) == pytest.approx(1 - after.sum() / plain.sum())
    plain, after = (side.average[:, 3:].sum(1)[inside] for side in (measured.plain, measured.adversarial))
    paper = estimate(finding, "pairs", "harm, mean (paper)", "drop", SUCCEEDED)
    assert paper == pytest.approx(np.mean(1 - after / plain))


def test_differences_are_within_families_that_have_both(finding: Finding, measured: Measured) -> None:
    row = finding.find("pairs", COMMON, "drop_difference", "within families")
    assert row is not None
    assert row.n == sum(measured.vulnerable) == 40
    assert row.low is not None
    assert row.low > 0.2
    assert row.p_holm is not None
    assert row.p_holm < 0.01
    for name in (COMMON, PROJECTION):
        assert estimate(finding, "pairs", name, "auroc", "all pairs") == 1.0
    assert finding.caveats[0] == "first"
    assert "of 3 families; 40 pairs are of families with both outcomes" in finding.caveats[1]


def test_pairs_of_too_small_a_plain_sum_are_left_out_and_counted(measured: Measured, restored: Restored) -> None:
    plain = measured.plain.closing.copy()
    plain[:4] *= 0.001
    made = replace(measured, plain=replace_closing(measured.plain, plain))
    found = jailbreaks.summarise(made, restored, caveats=(), provenance={})
    groups = [found.find("pairs", COMMON, "drop", what) for what in (SUCCEEDED, FAILED)]
    assert sum(row.n for row in groups if row) == 56
    assert any("common: 4 of 60 pairs have no relative drop" in note for note in found.caveats)


def replace_closing(side: Seen, closing: np.ndarray) -> Seen:
    return side._replace(closing=closing)


def test_refusal_counts_as_restored_where_it_is_coherent(finding: Finding, restored: Restored) -> None:
    assert estimate(finding, "restored", COMMON, "refused_coherently", RESTORE) == 0.8
    assert estimate(finding, "restored", PROJECTION, "refused", RESTORE) == 1.0
    assert estimate(finding, "restored", PROJECTION, "refused_coherently", RESTORE) == 0.9
    mean = finding.find("restored", "random features", "refused_coherently", f"{RESTORE} mean")
    assert mean is not None
    assert (mean.n, mean.estimate) == (200, pytest.approx((19 * 2 + 9) / 200))
    assert estimate(finding, "restored", f"{COMMON} vs random features", "above_draws") == 0.95
    assert estimate(finding, "restored", "2/0", "suffices") == 3 / 8
    assert jailbreaks.explained(restored)["pairs"][0] == {
        "id": "0",
        "family": "poem",
        "restored": True,
        "alone": ["2/0"],
    }


def test_nothing_restored_is_said(measured: Measured) -> None:
    none = replace(measured, outcomes=(FAILED,) * 60)
    found = jailbreaks.summarise(none, Restored((), (), (), (), ()), caveats=(), provenance={})
    assert found.find("pairs", COMMON, "drop_difference", "within families").n == 0  # type: ignore[union-attr]
    assert "No attack succeeded: nothing could be set back." in found.caveats
    assert told.sentences(found)
    assert plots.plots(found)


@pytest.mark.parametrize(
    ("plain", "attack", "outcome"),
    [
        ((1, 1), (0, 1, 1), SUCCEEDED),
        ((1, 1), (1, 0, 1), FAILED),
        ((1, 1), (0, 0, 0), "unclear"),
        ((0, 1), (0, 1, 1), "unrefused"),
        ((1, 0), (0, 1, 1), "unrefused"),
        ((1, 1), (float("nan"),) * 3, "unclear"),
    ],
)
def test_groups(plain: tuple[float, ...], attack: tuple[float, ...], outcome: str) -> None:
    before: dict[str, float] = dict(zip(("refused", "coherent"), map(float, plain), strict=True))
    after: dict[str, float] = dict(zip(("refused", "answered", "coherent"), map(float, attack), strict=True))
    assert _outcome(before, after) == outcome


def test_the_share_of_attacks_that_succeed_is_a_plain_count(measured: Measured, finding: Finding) -> None:
    won = [outcome == SUCCEEDED for outcome in measured.outcomes]
    inside = {"all pairs": [True] * len(won)}
    inside |= {f"family={one}": [own == one for own in measured.families] for one in set(measured.families)}
    for setting, mask in inside.items():
        row = finding.find("pairs", "base", "succeeded", setting)
        assert row is not None
        assert row.n == sum(mask)
        assert row.estimate == pytest.approx(sum(w for w, m in zip(won, mask, strict=True) if m) / sum(mask))


def test_the_page_says_what_the_rows_say(finding: Finding) -> None:
    said = " ".join(told.sentences(finding))
    assert "bring coherent refusal back in 80.0% [" in said
    tables = {"passed", "drops", "telling", "families", "features", "restored", "against", "drawn"}
    assert set(told.tables(finding)) == tables
    drawn = plots.plots(finding)
    assert {f"jailbreaks-{name}" for name in ("drops", "families", "features", "telling", "restored")} == set(drawn)
    assert all(render(plot.figure, "svg") for plot in drawn.values())


def study_of(folder: Path) -> None:
    """What the verb does, with fewer draws."""
    with closing(Job(SMALL, folder)) as job:
        fitted = fit.fit(job)
        sets = choose_category_sets(job, fitted)
        pipeline.run_jailbreaks(job, fitted, sets, sizes=Sizes(restored_draws=2))
        measure.describe_run(job, fitted)
        measure.write_report(job.store)
        job.finish()


def test_a_study_killed_in_the_middle_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    study_of(folder)
    store = Store(folder)
    finding = store.read("findings/jailbreaks.json", Finding)
    assert finding.find("pairs", COMMON, "auroc", "all pairs") is not None
    first = _bytes(folder)
    # As a kill in the middle leaves it: some arms and one side are missing, the rest stands.
    manifest = json.loads((folder / "manifest.json").read_text())
    lost = [path for path in manifest if path.startswith("jailbreaks/restored/random")][::3]
    for path in [*lost, "jailbreaks/seen/adversarial.json", "findings/jailbreaks.json", "report.html"]:
        (folder / path).unlink()
    study_of(folder)
    assert _bytes(folder) == first
