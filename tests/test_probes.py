"""Probes equal scikit-learn's, are chosen on plain prompts alone, and the study says of them what is true."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from refusalscope.cli import app
from refusalscope.core.calibration import sigmoid
from refusalscope.core.store import Store
from refusalscope.core.types import Finding, Prompts
from refusalscope.evals import probes
from refusalscope.guard import Guard
from refusalscope.report.probes import headline, sentences, tables
from refusalscope.studies import probes as study
from refusalscope.studies.probes import ATTACKS, COMMON, DENSE, RANDOM, Item, Scored


def data(seed: int, count: int = 300, width: int = 6) -> tuple[np.ndarray, list[int], list[str]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    inputs = 3 * rng.normal(size=(count, width)) + 5
    inputs[:, 0] += 4 * labels
    return inputs, labels.tolist(), [str(at // 3) for at in range(count)]


def test_a_logistic_probe_is_scikit_learns_on_standardised_inputs() -> None:
    inputs, labels, groups = data(0)
    made = probes.logistic(inputs, labels, probes.grouped_folds(labels, groups))
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=made.strength or 0.0, tol=1e-8, max_iter=10_000))
    assert made.score(inputs) == pytest.approx(theirs.fit(inputs, labels).decision_function(inputs), abs=1e-3)
    assert made.strength in probes.STRENGTHS


def test_regularisation_is_chosen_on_groups_that_were_not_fitted_on() -> None:
    """Columns that name the group are no use for others: torn groups would make them look good."""
    rng = np.random.default_rng(1)
    groups = [str(at // 10) for at in range(200)]
    labels = [int(at // 10) % 2 for at in range(200)]
    named = np.eye(20)[[int(name) for name in groups]] + 0.01 * rng.normal(size=(200, 20))
    folds = probes.grouped_folds(labels, groups)
    for inside, outside in folds:
        assert not {groups[at] for at in inside} & {groups[at] for at in outside}
    assert probes.logistic(named, labels, folds).strength == min(probes.STRENGTHS)
    torn = probes.grouped_folds(labels, [str(at) for at in range(200)])
    assert probes.logistic(named, labels, torn).strength == max(probes.STRENGTHS)


def test_a_constant_column_weighs_nothing_and_one_class_is_refused() -> None:
    inputs, labels, groups = data(2)
    inputs[:, 3] = 7.0
    folds = probes.grouped_folds(labels, groups)
    assert probes.logistic(inputs, labels, folds).weights[3] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(probes.Unfit):
        probes.logistic(inputs, [1] * 300, [])
    assert probes.grouped_folds([0, 1, 1], ["a", "b", "c"]) == []


def test_a_mass_mean_probe_points_along_the_difference_of_means() -> None:
    inputs, labels, _ = data(3)
    made = probes.mass_mean(inputs, labels)
    y = np.asarray(labels)
    apart = inputs[y == 1].mean(0) - inputs[y == 0].mean(0)
    assert made.weights / np.linalg.norm(made.weights) == pytest.approx(apart / np.linalg.norm(apart))
    assert (made.score(inputs) > 0).astype(int) == pytest.approx(y, abs=1)
    assert roc_auc_score(labels, made.score(inputs)) > 0.7


def test_a_sparse_probe_keeps_the_columns_that_tell() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(2, size=400)
    inputs = rng.random((400, 200)) * (rng.random((400, 200)) < 0.05)
    inputs[:, 17] = labels * (1 + rng.random(400))
    groups = [str(at) for at in range(400)]
    made = probes.sparse(csr_matrix(inputs), labels.tolist(), probes.grouped_folds(labels.tolist(), groups))
    assert np.argmax(np.abs(made.weights)) == 17
    assert (made.weights != 0).sum() < 60
    again = probes.sparse(csr_matrix(inputs), labels.tolist(), probes.grouped_folds(labels.tolist(), groups))
    assert np.array_equal(made.weights, again.weights)


def items(part: study.Part, count: int, *, outcomes: bool = False) -> list[Item]:
    """Harmful and benign in turn; of adversarial harmful ones every other succeeds."""
    made = []
    for at in range(count):
        harmful = at % 2 == 0
        outcome = ("succeeded" if at % 4 == 0 else "failed") if outcomes and harmful else ""
        refused = float(harmful and outcome != "succeeded")
        made.append(Item(part, harmful, refused, outcome, f"{part}{at // 4}"))
    return made


VALIDATION = items("validation", 240)
TEST = [
    *items("plain", 120),
    *items("adversarial", 120, outcomes=True),
    *[i for i in items("look-alikes", 80) if not i.harmful],
]


def scored(method: str, noise: float, size: int, *, role: study.Role = "features", **more: Any) -> Scored:
    """Logits that follow intent, with noise; successful attacks are half as plain to see."""
    rng = np.random.default_rng(size)

    def logits(rows: Sequence[Item]) -> list[float]:
        strength = [0.5 if item.outcome == "succeeded" else 1.0 for item in rows]
        signs = [part * (1 if item.harmful else -1) for part, item in zip(strength, rows, strict=True)]
        return (np.asarray(signs) + noise * rng.normal(size=len(rows))).tolist()

    return Scored(method, role, "intent", size, logits(VALIDATION), logits(TEST), 1.0, **more)


def test_the_guard_is_the_smallest_probe_that_is_level_with_the_best_on_plain_prompts() -> None:
    exact, small, poor = scored("exact", 0.05, 128), scored("small", 0.06, 9), scored("poor", 3.0, 2)
    baseline, lucky = scored("length", 0.01, 1, role="baseline"), scored(RANDOM, 0.01, 3, role="random", draw=0)
    other = scored("by refusal", 0.01, 1)._replace(scheme="refusal")
    assert study.chosen_guard([exact, small, poor, baseline, lucky, other], VALIDATION) is small
    # What it does on test prompts has no say.
    blind = small._replace(test=[0.0] * len(TEST))
    assert study.chosen_guard([exact, blind, poor], VALIDATION) is blind


@pytest.fixture(scope="module")
def toy() -> Finding:
    made = [
        scored(COMMON, 0.4, 9),
        scored(DENSE, 0.9, 128, role="dense"),
        scored("prompt length", 9.0, 1, role="baseline"),
    ]
    made += [scored(RANDOM, 20.0, 8 + draw, role="random", draw=draw) for draw in range(3)]
    made += [one._replace(scheme="refusal") for one in made]
    return study.summarise(
        made, [], validation=VALIDATION, test=TEST, guard=COMMON, paper=True, caveats=(), provenance={}
    )


def test_every_auroc_is_that_of_its_own_positives_and_negatives(toy: Finding) -> None:
    one = scored(COMMON, 0.4, 9)
    for scheme, pairs in study.PAIRS.items():
        for pair in pairs:
            inside = [at for at, item in enumerate(TEST) if any(study.GROUPS[name](item) for name in pair)]
            labels = [int(study.GROUPS[pair[0]](TEST[at])) for at in inside]
            row = toy.find(" vs ".join(pair), COMMON, "auroc", scheme)
            assert row is not None
            assert row.estimate == pytest.approx(roc_auc_score(labels, [one.test[at] for at in inside]))
            assert row.n == len(inside)


def test_random_features_stand_as_one_and_as_draws(toy: Finding) -> None:
    rows = [
        row
        for row in toy.rows
        if row.method == RANDOM and row.metric == "auroc" and row.dataset == " vs ".join(ATTACKS)
    ]
    draws = [row.estimate or 0.0 for row in rows if row.setting.startswith("intent draw=")]
    mean = next(row for row in rows if row.setting == "intent mean")
    assert len(draws) == 3
    assert mean.estimate == pytest.approx(np.mean(draws))


def test_comparisons_are_paired_and_corrected_together(toy: Finding) -> None:
    rows = [row for row in toy.rows if row.metric == "auroc_difference" and row.dataset == " vs ".join(ATTACKS)]
    mine = [row for row in rows if row.setting == "intent"]
    assert {row.method for row in mine} == {
        *(f"{COMMON} vs {other}" for other in (DENSE, "prompt length", RANDOM)),
        *(f"{DENSE} vs {other}" for other in ("prompt length", RANDOM)),
    }
    for row in mine:
        one, other = row.method.split(" vs ")
        found = [
            toy.find(row.dataset, name, "auroc", f"intent{' mean' if name == RANDOM else ''}") for name in (one, other)
        ]
        assert found[0] is not None
        assert found[1] is not None
        assert row.estimate == pytest.approx((found[0].estimate or 0) - (found[1].estimate or 0))
        assert row.p is not None
        assert row.p_holm is not None
        assert row.p <= row.p_holm


def test_rates_hold_on_validation_and_are_told_where_they_were_not_set(toy: Finding) -> None:
    row = toy.find("plain benign", COMMON, "flagged_at_5%", "intent")
    assert row is not None
    assert row.n == 60
    assert (row.low or 0) <= 0.05 <= (row.high or 0)
    assert toy.find("plain benign", COMMON, "flagged_at_1%") is None
    assert any("1% false positives" in note for note in toy.caveats)


def test_the_papers_labels_call_a_successful_attack_harmless(toy: Finding) -> None:
    one = scored(COMMON, 0.4, 9)
    inside = [at for at, item in enumerate(TEST) if item.outcome]
    right = np.mean([(one.test[at] > 0) == (TEST[at].outcome == "failed") for at in inside])
    row = toy.find("adversarial", COMMON, "accuracy", "paper")
    assert row is not None
    assert row.estimate == pytest.approx(right)
    dense = scored(DENSE, 0.9, 128, role="dense")
    others = np.mean([(dense.test[at] > 0) == (TEST[at].outcome == "failed") for at in inside])
    change = toy.find("adversarial", f"{COMMON} vs {DENSE}", "accuracy_difference", "paper")
    assert change is not None
    assert change.estimate == pytest.approx(right - others)
    assert change.p_holm is not None
    told = next(sentence for sentence in sentences(toy) if "paper’s labels" in sentence)
    assert "both paired" in told


def test_what_was_not_seen_is_not_claimed() -> None:
    plain = items("plain", 120)
    made = [scored(COMMON, 0.4, 9), scored(DENSE, 0.9, 128, role="dense")]
    cut = [one._replace(test=one.test[:120]) for one in made]
    found = study.summarise(
        cut, [], validation=VALIDATION, test=plain, guard=COMMON, paper=False, caveats=(), provenance={}
    )
    row = found.find(" vs ".join(ATTACKS), COMMON, "auroc", "intent")
    assert row is not None
    assert (row.n, row.estimate) == (0, None)
    assert any("no successful attacks" in note for note in found.caveats)
    assert "not known" in headline(found)[0]
    assert "auroc-paper" not in tables(found)


SMALL = ("--limit", "40", "--max-new-tokens", "40", "--category", "Malware", "--category", "Harassment")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    result = CliRunner().invoke(app, ["probe", "testbed", "--runs", str(runs), "--paper-labels", *SMALL])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(runs / "testbed" / "report.html")
    return runs / "testbed"


def test_the_testbeds_report_shows_every_representation(run: Path) -> None:
    finding = Store(run).read("findings/probes.json", Finding)
    methods = {row.method for row in finding.rows if row.metric == "auroc"}
    assert methods >= {COMMON, DENSE, RANDOM, "cosine+attribution", "mean-difference features", *study.BASELINES}
    assert methods >= {"mean-difference direction", f"{COMMON}, mass-mean", "all features of layer 6"}
    draws = {row.setting for row in finding.rows if row.method == RANDOM and " draw=" in row.setting}
    assert len(draws) == 20 * 3
    page = (run / "report.html").read_text()
    for wanted in ('id="probes"', 'href="#probes"', "Brier", "mean-difference direction", "the negatives stand after"):
        assert wanted in page
    guard = str(finding.provenance["guard"])
    row = finding.find(" vs ".join(ATTACKS), guard, "auroc", "intent")
    assert row is not None
    assert row.estimate is not None
    assert row.estimate > 0.85
    assert len(Store(run).paths("figures", ".svg")) >= 3


def test_the_same_command_again_changes_no_byte(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    CliRunner().invoke(app, ["probe", "testbed", "--runs", str(run.parent), "--paper-labels", *SMALL])
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pooling", "sum"], "--pooling"),
        (["--detection", "nowhere.csv"], "--detection nowhere.csv"),
        (["--protocol", "paper"], "--protocol paper"),
        (["--look-alikes", "nowhere.csv"], "--look-alikes nowhere.csv"),
    ],
)
def test_bad_input_ends_with_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["probe", "testbed", "--runs", str(tmp_path), *words])
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_run_leaves_a_guard_that_scores_as_the_study_did(run: Path, tmp_path: Path) -> None:
    guard, store = Guard.from_run(run), Store(run)
    rows = store.read("prompts/probe-plain.jsonl", Prompts)
    fitted = store.read("probes/intent.json", dict)["probes"]
    chosen = next(one for one in fitted if one["method"] == guard.content.method)
    logits = np.asarray(chosen["test"][: len(rows)]) / chosen["temperature"]
    found = guard.score(rows)
    # What was captured is rounded to half precision.
    assert [one.probability for one in found] == pytest.approx(sigmoid(logits), abs=2e-3)
    negatives = [item for item in store.read("prompts/probe-validation.jsonl", Prompts) if item.label == "harmless"]
    flagged = sum(one.flagged for one in guard.score([row.text for row in negatives]))
    assert flagged <= guard.content.false_positive_rate * len(negatives) + 1
    assert all(reason.label.startswith("promotes ") for one in found for reason in one.reasons if "/" in reason.feature)
    result = CliRunner().invoke(app, ["guard", "save", str(run), str(tmp_path / "guard")])
    assert result.exit_code == 0
    assert Guard.load(tmp_path / "guard").score(rows[:3]) == guard.score(rows[:3])
