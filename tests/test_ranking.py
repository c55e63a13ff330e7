"""AUROC and differences within strata equal plain counting and reference libraries, and clusters widen their doubt."""

import math
from collections.abc import Iterator
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score
from statsmodels.regression.linear_model import OLS

from refusalscope.core import ranking

NaN = float("nan")
values = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=25)
Sample = tuple[list[float], list[float], list[str], list[str]]


def names(count: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


@given(values, values)
def test_auroc_counts_pairs(positive: list[float], negative: list[float]) -> None:
    found = ranking.auroc(positive, negative, names(len(positive)), names(len(negative), "n"))
    wins = sum((a > b) + 0.5 * (a == b) for a, b in product(positive, negative))
    assert found.estimate == pytest.approx(wins / len(positive) / len(negative))
    assert found.estimate == pytest.approx(mannwhitneyu(positive, negative).statistic / len(positive) / len(negative))
    assert found.low is not None
    assert found.estimate is not None
    assert found.high is not None
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.n == len(positive) + len(negative)


def samples(seed: int, clusters: int, shift: float, correlation: float) -> Iterator[Sample]:
    """Positives and negatives whose clusters are of one kind each, the case that doubt without clusters gets wrong."""
    rng = np.random.default_rng(seed)
    while True:
        values: tuple[list[float], list[float]] = ([], [])
        names: tuple[list[str], list[str]] = ([], [])
        for cluster in range(clusters):
            shared = math.sqrt(correlation) * rng.normal() + (shift if cluster % 2 else 0)
            values[1 - cluster % 2].extend((shared + math.sqrt(1 - correlation) * rng.normal(size=4)).tolist())
            names[1 - cluster % 2].extend([str(cluster)] * 4)
        yield *values, *names


def test_without_clusters_the_variance_is_delongs() -> None:
    positive, negative, _, _ = next(samples(0, 20, 1.0, 0.0))
    above, below = ranking._placements(np.asarray(positive), np.asarray(negative))
    theirs = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
    ours = ranking._variance(above, below, float(above.mean()), names(len(above)), names(len(below), "n"))
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_auroc_covers_in_clusters(shift: float) -> None:
    hits, plain, runs, truth = 0, 0, 150, norm.cdf(shift / math.sqrt(2))
    for positive, negative, first, second in islice(samples(1, 40, shift, 0.6), runs):
        found = ranking.auroc(positive, negative, first, second)
        alone = ranking.auroc(positive, negative, names(len(positive)), names(len(negative), "n"))
        hits += (found.low or 0) <= truth <= (found.high or 0)
        plain += (alone.low or 0) <= truth <= (alone.high or 0)
    assert hits / runs > 0.91
    assert plain / runs < 0.88


def test_what_does_not_overlap_still_has_doubt() -> None:
    found = ranking.auroc([2.0, 3.0], [0.0, 1.0, NaN], names(2), names(3, "n"))
    assert (found.estimate, found.high, found.n, found.coverage) == (1.0, 1.0, 4, 0.8)
    assert found.low is not None
    assert 0.1 < found.low < 0.9
    assert ranking.auroc([], [1.0], [], ["a"]).n == 0


def test_two_aurocs_are_compared_on_the_same_values() -> None:
    positive, negative, first, second = next(samples(3, 40, 1.5, 0.3))
    noise = np.random.default_rng(0).normal(size=len(positive) + len(negative)).tolist()
    worse = (noise[: len(positive)], noise[len(positive) :])
    found = ranking.auroc_difference((positive, negative), worse, first, second)
    one, other = ranking.auroc(positive, negative, first, second), ranking.auroc(*worse, first, second)
    assert found.estimate == pytest.approx((one.estimate or 0) - (other.estimate or 0))
    assert found.low is not None
    assert found.low > 0
    same = ranking.auroc_difference((positive, negative), (positive, negative), first, second)
    assert (same.estimate, same.low, same.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-15)


table = st.lists(
    st.tuples(st.floats(-3, 3), st.booleans(), st.sampled_from("abc"), st.sampled_from("uvwxyz")),
    min_size=4,
    max_size=40,
)


@settings(max_examples=40)
@given(table)
def test_a_stratified_difference_is_the_weighted_mean_over_strata(rows: list[tuple[float, bool, str, str]]) -> None:
    found = ranking.stratified_difference(*(list(part) for part in zip(*rows, strict=True)))
    total, mass, used = 0.0, 0.0, 0
    for stratum in "abc":
        ones = [v for v, g, s, _ in rows if s == stratum and g]
        zeros = [v for v, g, s, _ in rows if s == stratum and not g]
        if ones and zeros:
            weight = len(ones) * len(zeros) / (len(ones) + len(zeros))
            total, mass = total + weight * (np.mean(ones) - np.mean(zeros)), mass + weight
            used += len(ones) + len(zeros)
    assert found.n == used
    if used:
        assert found.estimate == pytest.approx(total / mass, abs=1e-9)
        p = ranking.stratified_p(*(list(part) for part in zip(*rows, strict=True)))
        assert p is not None
        assert 0 < p <= 1


def grouped(rng: np.random.Generator, effect: float) -> tuple[list[float], list[bool], list[str], list[str]]:
    """Clusters that lean to one group and share what they deviate by, over strata that differ in level and in lean."""
    rows = []
    for cluster in range(40):
        shared, lean = rng.normal(), rng.normal()
        for _ in range(4):
            stratum = int(rng.integers(3))
            group = bool(rng.random() < 1 / (1 + math.exp(1 - stratum - lean)))
            rows.append((stratum + effect * group + shared + rng.normal(), group, str(stratum), str(cluster)))
    return tuple(list(part) for part in zip(*rows, strict=True))  # type: ignore[return-value]


def test_its_error_is_that_of_a_regression_with_clusters() -> None:
    made = grouped(np.random.default_rng(2), 0.5)
    drawn = ranking._tabled(*made)
    assert drawn is not None
    (found,), (error,) = ranking._differences(drawn, np.ones((1, len(drawn.ones))))
    columns = np.column_stack([made[1], *([np.asarray(made[2]) == s for s in "012"])]).astype(float)
    fit = OLS(np.asarray(made[0]), columns).fit(
        cov_type="cluster", cov_kwds={"groups": np.unique(made[3], return_inverse=True)[1], "use_correction": False}
    )
    assert found == pytest.approx(fit.params[0])
    assert error == pytest.approx(fit.bse[0] * math.sqrt(40 / 39))


def test_a_stratified_difference_covers_and_its_p_keeps_its_level() -> None:
    rng, hits, rejected, runs = np.random.default_rng(4), 0, 0, 60
    for _ in range(runs):
        made = grouped(rng, 0.0)
        found = ranking.stratified_difference(*made)
        hits += (found.low or 0) <= 0 <= (found.high or 0)
        rejected += (ranking.stratified_p(*made) or 0) < 0.05
    assert hits / runs > 0.88
    assert rejected / runs < 0.12


def test_strata_of_one_group_say_nothing() -> None:
    found = ranking.stratified_difference([1.0, 2.0, NaN], [True, True, False], ["a", "a", "a"], ["x", "y", "z"])
    assert (found.n, found.estimate) == (0, None)
    assert ranking.stratified_p([1.0, 2.0], [True, False], ["a", "b"], ["x", "y"]) is None
    with pytest.raises(ValueError, match="2 values need as many"):
        ranking.stratified_difference([1.0, 2.0], [True], ["a"], ["x"])


def naive_variance(sample: Sample) -> float:
    """Obuchowski's (1997), written out cluster by cluster."""
    positive, negative, above, below = sample
    m, n = len(positive), len(negative)
    wins = [[(a > b) + 0.5 * (a == b) for b in negative] for a in positive]
    area = sum(map(sum, wins)) / m / n
    v10 = [sum(row) / n for row in wins]
    v01 = [sum(wins[i][j] for i in range(m)) / m for j in range(n)]
    clusters = sorted({*above, *below})
    ups = [sum(v10[i] - area for i in range(m) if above[i] == name) for name in clusters]
    downs = [sum(v01[j] - area for j in range(n) if below[j] == name) for name in clusters]
    first, second, both = len(set(above)), len(set(below)), len(clusters)
    s10 = first / ((first - 1) * m) * sum(up**2 for up in ups)
    s01 = second / ((second - 1) * n) * sum(down**2 for down in downs)
    s11 = both / (both - 1) * sum(up * down for up, down in zip(ups, downs, strict=True))
    return s10 / m + s01 / n + 2 * s11 / m / n


def mixed(seed: int, clusters: int, shift: float) -> Iterator[Sample]:
    """Clusters that hold positives and negatives alike."""
    rng = np.random.default_rng(seed)
    while True:
        shared = np.repeat(rng.normal(size=clusters), 2)
        above, below = (math.sqrt(0.5) * (shared + rng.normal(size=2 * clusters)) for _ in range(2))
        named = [str(at // 2) for at in range(2 * clusters)]
        yield (above + shift).tolist(), below.tolist(), named, named


def test_the_variance_is_obuchowskis_and_the_area_scikit_learns() -> None:
    for sample in (next(samples(5, 30, 1.0, 0.5)), next(mixed(6, 20, 1.0))):
        positive, negative, above, below = sample
        placed = ranking._placements(np.asarray(positive), np.asarray(negative))
        area = float(placed[0].mean())
        labels = [1] * len(positive) + [0] * len(negative)
        assert area == pytest.approx(roc_auc_score(labels, [*positive, *negative]))
        assert ranking._variance(*placed, area, above, below) == pytest.approx(naive_variance(sample))


@pytest.mark.parametrize(
    ("kind", "clusters", "shift"), [("single", 200, 1.0), ("single", 200, 1.5), ("mixed", 120, 1.0)]
)
def test_the_interval_covers_what_it_says(kind: str, clusters: int, shift: float) -> None:
    stream = samples(7, clusters, shift, 0.5) if kind == "single" else mixed(8, clusters, shift)
    runs, truth = 800, norm.cdf(shift / math.sqrt(2))
    found = [ranking.auroc(*sample) for sample in islice(stream, runs)]
    assert 0.93 <= sum((one.low or 0) <= truth <= (one.high or 0) for one in found) / runs <= 0.97


def test_the_mean_of_several_scores_is_the_mean_of_their_areas() -> None:
    positive, negative, above, below = next(samples(9, 40, 1.0, 0.3))
    noise = np.random.default_rng(0)
    scores: list[ranking.Sample] = [
        (
            (np.asarray(positive) + noise.normal(size=80)).tolist(),
            (np.asarray(negative) + noise.normal(size=80)).tolist(),
        )
        for _ in range(5)
    ]
    together = ranking.mean_auroc(scores, above, below)
    single = [ranking.auroc(*score, above, below) for score in scores]
    assert together.estimate == pytest.approx(np.mean([one.estimate or 0.0 for one in single]))
    assert ranking.mean_auroc(scores[:1], above, below) == single[0]
    widths = [(one.high or 0) - (one.low or 0) for one in single]
    assert (together.high or 0) - (together.low or 0) < max(widths)


def test_scores_are_compared_with_means_of_others() -> None:
    positive, negative, above, below = next(samples(10, 60, 1.5, 0.3))
    rng = np.random.default_rng(1)
    noise: list[ranking.Sample] = [(rng.normal(size=120).tolist(), rng.normal(size=120).tolist()) for _ in range(3)]
    found, p = ranking.compared([(positive, negative)], noise, above, below)
    area, chance = ranking.auroc(positive, negative, above, below), ranking.mean_auroc(noise, above, below)
    assert found.estimate == pytest.approx((area.estimate or 0) - (chance.estimate or 0))
    assert p is not None
    assert p < 1e-6
    assert ranking.compared([(positive, negative)], [(positive, negative)], above, below).p == 1.0


def test_a_gap_between_samples_knows_what_they_share() -> None:
    positive, negative, above, below = next(mixed(11, 40, 1.0))
    sample, clusters = (positive, negative), (above, below)
    same = ranking.gap(sample, sample, clusters, clusters).estimate
    assert (same.estimate, same.low, same.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-15)
    other = [f"x{name}" for name in above]
    apart = ranking.gap(sample, sample, clusters, (other, other)).estimate
    assert apart.high is not None
    half = ranking.Z95 * math.sqrt(2 * naive_variance((positive, negative, above, below)))
    assert apart.high == pytest.approx(half, rel=0.05)
    assert ranking.gap(sample, ([], [1.0]), clusters, ([], ["a"])) == (ranking.NOTHING, None)
