"""Calibration equals scikit-learn and plain counting, its intervals know of clusters, thresholds keep their rates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from refusalscope.core import calibration

NaN = float("nan")


def drawn(seed: int, count: int, heat: float = 1.0) -> tuple[list[float], list[float]]:
    """Probabilities and labels; at `heat` 1 they agree."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=count)
    labels = (rng.random(count) < calibration.sigmoid(logits)).astype(float)
    return calibration.sigmoid(logits / heat).tolist(), labels.tolist()


def alone(count: int) -> list[str]:
    return [str(at) for at in range(count)]


def test_brier_is_scikit_learns() -> None:
    p, y = drawn(0, 200)
    found = calibration.brier([*p, NaN], [*y, 1.0], alone(201))
    assert found.estimate == pytest.approx(brier_score_loss(y, p))
    assert (found.n, found.coverage) == (200, pytest.approx(200 / 201))


@pytest.mark.parametrize("heat", [1.0, 0.4])
def test_the_calibration_error_is_that_of_bins_of_equal_mass(heat: float) -> None:
    p, y = drawn(1, 500, heat)
    order = np.argsort(p)
    parts = zip(np.array_split(np.asarray(p)[order], 10), np.array_split(np.asarray(y)[order], 10), strict=True)
    plain = sum(abs(a.mean() - b.mean()) * len(a) for a, b in parts) / 500
    found = calibration.expected_error(p, y, alone(500))
    assert found.estimate == pytest.approx(plain)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= plain <= found.high
    assert (found.low == 0) == (heat == 1.0)


def test_the_reliability_figure_shows_the_bins_of_the_error() -> None:
    p, y = drawn(2, 300, 0.5)
    bins = calibration.reliability(p, y, alone(300))
    error = sum(one.n * abs(one.probability - (one.positive.estimate or 0.0)) for one in bins) / 300
    assert sum(one.n for one in bins) == 300
    assert calibration.expected_error(p, y, alone(300)).estimate == pytest.approx(error)


def test_equal_probabilities_share_a_bin() -> None:
    bins = calibration.equal_mass(np.array([0.1] * 50 + [0.9] * 50))
    assert bins.tolist() == [0] * 50 + [1] * 50
    assert calibration.equal_mass(np.full(7, 0.5)).tolist() == [0] * 7


def test_repeated_prompts_are_no_more_certain() -> None:
    p, y = drawn(3, 100, 0.5)
    once = calibration.expected_error(p, y, alone(100))
    again = calibration.expected_error(p * 4, y * 4, alone(100) * 4)
    assert again.estimate == pytest.approx(once.estimate)
    assert again.high == pytest.approx(once.high, abs=0.02)
    apart = calibration.expected_error(p * 4, y * 4, alone(400))
    assert (apart.high or 1) - (apart.low or 0) < 0.7 * ((again.high or 1) - (again.low or 0))


def test_nothing_scored_is_nothing() -> None:
    assert calibration.expected_error([NaN], [1.0], ["a"]).n == 0
    assert calibration.reliability([0.5], [NaN], ["a"]) == []


def test_the_temperature_makes_the_labels_likeliest() -> None:
    rng = np.random.default_rng(4)
    logits = 3 * rng.normal(size=4000)
    labels = (rng.random(4000) < calibration.sigmoid(logits / 2.5)).astype(float)
    found = calibration.temperature(logits.tolist(), labels.tolist())
    assert found == pytest.approx(2.5, rel=0.1)
    ones, zeros = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))

    def loss(log_t: float) -> float:
        p = calibration.sigmoid(logits / math.exp(log_t))
        return -float((targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean())

    # The loss is convex in 1 / T: a least place beside which it is larger is the least of all.
    for step in (1e-4, 1e-3, 1e-1, 1.0):
        assert loss(math.log(found)) < min(loss(math.log(found) - step), loss(math.log(found) + step))


def test_classes_that_do_not_overlap_have_a_temperature() -> None:
    found = calibration.temperature([-1.0, -2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0])
    assert 1 / calibration.HOTTEST < found < calibration.HOTTEST
    with pytest.raises(ValueError, match="both classes"):
        calibration.temperature([1.0], [1.0])


@given(st.lists(st.integers(0, 30).map(float), min_size=20, max_size=200), st.sampled_from([0.05, 0.1, 0.5]))
@settings(deadline=None)
def test_a_threshold_keeps_its_rate_and_no_lower_one_does(scores: list[float], rate: float) -> None:
    bound = calibration.threshold(scores, rate)
    above = sum(score > bound for score in scores)
    assert above <= rate * len(scores)
    lower = [score for score in scores if score < bound]
    if lower:
        assert sum(score > max(lower) for score in scores) > math.floor(rate * len(scores) + 1e-9)


def test_too_few_negatives_for_a_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 100 negatives"):
        calibration.threshold([0.0] * 99, 0.01)


def test_sigmoid_overflows_at_no_end() -> None:
    assert calibration.sigmoid([-1e4, 0.0, 1e4]).tolist() == [0.0, 0.5, 1.0]
