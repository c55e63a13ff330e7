"""Every number's doubt is right: intervals equal the reference libraries' and hold what they promise in simulation.

Clusters widen an interval, and an unscored value (NaN) costs coverage instead of counting as 0.
"""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm, spearmanr
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.proportion import proportion_confint

from refusalscope.core import stats

NaN = float("nan")
counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
scores = st.lists(st.sampled_from([0.0, 1.0, NaN]), max_size=60)
pairs = st.lists(st.tuples(st.sampled_from([0.0, 1.0, NaN]), st.sampled_from([0.0, 1.0, NaN])), max_size=60)


def paired(yes_yes: int, yes_no: int, no_yes: int, no_no: int) -> tuple[list[float], list[float]]:
    """Pairs (after, before) with these four counts."""
    table = [(1.0, 1.0)] * yes_yes + [(1.0, 0.0)] * yes_no + [(0.0, 1.0)] * no_yes + [(0.0, 0.0)] * no_no
    return [after for after, _ in table], [before for _, before in table]


def numbers(found: stats.Estimate) -> tuple[float, float, float]:
    """Low, estimate and high of a number that there is."""
    assert found.low is not None
    assert found.estimate is not None
    assert found.high is not None
    return found.low, found.estimate, found.high


def width(found: stats.Estimate) -> float:
    low, _, high = numbers(found)
    return high - low


def holds(found: stats.Estimate, truth: float) -> bool:
    low, _, high = numbers(found)
    return low <= truth <= high


@given(counts)
def test_wilson_equals_statsmodels(count: tuple[int, int]) -> None:
    ones, n = map(float, count)
    assert stats.wilson(ones, n) == pytest.approx(proportion_confint(ones, n, method="wilson"), abs=1e-12)


def test_wilson_needs_an_n() -> None:
    with pytest.raises(ValueError, match="n > 0"):
        stats.wilson(0.0, 0.0)


@given(scores)
def test_a_rate_counts_ones_among_the_scored(values: list[float]) -> None:
    scored = [value for value in values if not math.isnan(value)]
    found = stats.rate(values)
    assert found.n == len(scored)
    assert found.coverage == (len(scored) / len(values) if scored else 0)
    if scored:
        assert found.estimate == pytest.approx(sum(scored) / len(scored))
        assert (found.low, found.high) == pytest.approx(stats.wilson(sum(scored), float(len(scored))))


@pytest.mark.parametrize("values", [[], [NaN], [NaN, NaN, NaN]])
def test_nothing_scored_gives_none(values: list[float]) -> None:
    nothing = (0, None, None, None, 0)
    assert stats.rate(values) == nothing
    assert stats.mean(values) == nothing
    assert stats.paired_difference(values, values) == nothing
    assert stats.mcnemar(values, values) == 1


@given(scores, st.integers(0, 60))
def test_an_unscored_value_changes_coverage_alone(values: list[float], at: int) -> None:
    before, after = stats.rate(values), stats.rate([*values[:at], NaN, *values[at:]])
    assert before[:4] == after[:4]
    assert after.coverage < before.coverage or before.n == 0


def test_clusters_of_one_are_no_clusters() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert stats.rate(values, list("abcde")) == stats.rate(values)
    assert stats.mean(values, list("abcde")) == stats.mean(values)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12), st.integers(2, 5))
def test_repeating_every_draw_adds_nothing(values: list[float], times: int) -> None:
    # The cluster variance divides by clusters - 1, so the repeated rate may only be the more careful.
    once, repeated = stats.rate(values), stats.rate(values * times, [str(i) for i in range(len(values))] * times)
    assert repeated.estimate == pytest.approx(once.estimate)
    assert width(repeated) >= width(once) - 1e-12
    assert width(repeated) > width(stats.rate(values * times))


def test_clusters_widen_a_mean() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=12), 10) + 0.1 * rng.normal(size=120)
    clusters = [str(i // 10) for i in range(120)]
    assert width(stats.mean(list(values), clusters)) > 2 * width(stats.mean(list(values)))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        stats.rate([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="pairs need equal lengths, got 1 and 2"):
        stats.paired_difference([1.0], [1.0, 0.0])


def test_clustered_rates_cover_the_truth() -> None:
    rng, hits, naive_hits, runs = np.random.default_rng(1), 0, 0, 400
    clusters = [str(i // 8) for i in range(30 * 8)]
    for _ in range(runs):
        share = rng.beta(1.2, 2.8, size=30)  # mean 0.3, correlation within a cluster 0.2
        values = (rng.random((30, 8)) < share[:, None]).astype(float).ravel().tolist()
        hits += holds(stats.rate(values, clusters), 0.3)
        naive_hits += holds(stats.rate(values), 0.3)
    assert 0.92 <= hits / runs <= 0.98
    assert naive_hits / runs < 0.85


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_mean_equals_scipy_bca(draw: str) -> None:
    values = getattr(np.random.default_rng(2), draw)(size=60)
    ours = stats.mean(values.tolist(), resamples=20_000)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(3)).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * (theirs.high - theirs.low))


def test_mean_is_deterministic_by_seed() -> None:
    values = np.random.default_rng(4).normal(size=20).tolist()
    assert stats.mean(values, seed=5) == stats.mean(values, seed=5) != stats.mean(values, seed=6)


def test_weights_count_values_as_often() -> None:
    weighted = stats.mean([1.0, 5.0, NaN], weights=[3.0, 1.0, 100.0])
    assert weighted.estimate == pytest.approx(2)
    assert (weighted.n, weighted.coverage) == (2, pytest.approx(2 / 3))


def test_a_constant_has_no_width() -> None:
    assert stats.mean([0.7] * 9)[1:4] == pytest.approx((0.7, 0.7, 0.7))


def newcombe_10(yes_yes: int, yes_no: int, no_yes: int, no_no: int) -> tuple[float, float]:
    """Written from the formulas of the paper, apart from the code under test."""
    z, n = float(norm.ppf(0.975)), yes_yes + yes_no + no_yes + no_no

    def roots(successes: int) -> tuple[float, float]:
        half = z * math.sqrt(z * z + 4 * successes * (1 - successes / n))
        return (2 * successes + z * z - half) / (2 * (n + z * z)), (2 * successes + z * z + half) / (2 * (n + z * z))

    first, second = yes_yes + yes_no, yes_yes + no_yes
    (l2, u2), (l3, u3) = roots(first), roots(second)
    p2, p3, cross = first / n, second / n, yes_yes * no_no - yes_no * no_yes
    corrected = cross if cross < 0 else max(0, cross - n / 2)
    margins = first * (n - first) * second * (n - second)
    phi = corrected / math.sqrt(margins) if margins else 0
    below = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u3 - p3) + (u3 - p3) ** 2
    above = (u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p3 - l3) + (p3 - l3) ** 2
    return p2 - p3 - math.sqrt(max(0, below)), p2 - p3 + math.sqrt(max(0, above))


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any))
def test_paired_difference_is_newcombes_method_10(table: tuple[int, int, int, int]) -> None:
    found = stats.paired_difference(*paired(*table))
    assert found.n == sum(table)
    assert found.estimate == pytest.approx((table[1] - table[2]) / sum(table))
    assert (found.low, found.high) == pytest.approx(newcombe_10(*table), abs=1e-7)


def test_paired_difference_gives_the_published_example() -> None:
    # Airway hyper-responsiveness in 21 children (Bentur et al. 2009), as in Fagerland, Lydersen and Laake 2014.
    found = stats.paired_difference(*paired(1, 1, 7, 12))
    assert found[1:4] == pytest.approx((-0.286, -0.507, -0.026), abs=5e-4)


def test_paired_difference_covers_the_truth() -> None:
    rng, hits, runs = np.random.default_rng(7), 0, 1000
    for table in rng.multinomial(60, [0.25, 0.05, 0.3, 0.4], size=runs):
        hits += holds(stats.paired_difference(*paired(*table)), -0.25)
    assert 0.93 <= hits / runs <= 0.98


@given(pairs)
def test_exchanging_the_sides_turns_the_sign(table: list[tuple[float, float]]) -> None:
    after, before = [a for a, _ in table], [b for _, b in table]
    there, back = stats.paired_difference(after, before), stats.paired_difference(before, after)
    assert (there.n, there.coverage) == (back.n, back.coverage)
    if there.n:
        assert numbers(there) == pytest.approx([-number for number in reversed(numbers(back))])
        assert sorted([-1.0, *numbers(there), 1.0]) == [-1.0, *numbers(there), 1.0]


@given(pairs)
def test_a_pair_with_one_side_unscored_is_left_out(table: list[tuple[float, float]]) -> None:
    complete = [pair for pair in table if not any(map(math.isnan, pair))]
    found = stats.paired_difference([a for a, _ in table], [b for _, b in table])
    alone = stats.paired_difference([a for a, _ in complete], [b for _, b in complete])
    assert found[:4] == alone[:4]
    assert found.coverage == (len(complete) / len(table) if complete else 0)


@given(st.tuples(*[st.integers(0, 40)] * 4), st.integers(0, 5))
def test_mcnemar_equals_statsmodels(table: tuple[int, int, int, int], unscored: int) -> None:
    after, before = paired(*table)
    reference: Any = reference_mcnemar([table[:2], table[2:]], exact=True)
    expected = reference.pvalue if table[1] + table[2] else 1.0
    found = stats.mcnemar([*after, *[NaN] * unscored], [*before, *[1.0] * unscored])
    assert found == pytest.approx(expected)


@given(st.integers(0, 50), st.integers(1, 50))
def test_an_estimate_lies_in_its_interval(ones: int, zeros: int) -> None:
    values = [1.0] * ones + [0.0] * zeros
    for found in (stats.rate(values), stats.mean(values, resamples=200)):
        assert list(numbers(found)) == sorted(numbers(found))


values = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=4, max_size=30)


@given(values)
def test_rank_correlation_equals_scipys(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(ValueError, match="that vary"):
            stats.rank_correlation(x, y)
        return
    found = stats.rank_correlation(x, y)
    assert found.n == len(pairs)
    assert found.estimate == pytest.approx(spearmanr(x, y)[0], abs=1e-9)
    assert -1.0000001 <= numbers(found)[1] <= numbers(found)[2] <= 1.0000001


def test_rank_correlation_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(100):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)
        truth = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a bivariate normal with correlation 0.6
        hits += holds(stats.rank_correlation(x.tolist(), y.tolist()), truth)
    assert 0.88 <= hits / 100 <= 0.99


def test_no_difference_at_all_still_carries_doubt() -> None:
    names = [f"c{i}" for i in range(20)]
    alone = stats.paired_difference([0.0] * 20, [0.0] * 20)
    for found in (
        stats.mean_difference([0.0] * 20, names),
        stats.paired_difference([1.0] * 40, [1.0] * 40, [*names, *names]),
    ):
        assert (found.estimate, found.low, found.high) == pytest.approx((0, alone.low, alone.high))
    some = stats.mean_difference([0.0] * 19 + [0.5], names)
    assert some == stats.mean([0.0] * 19 + [0.5], names)
