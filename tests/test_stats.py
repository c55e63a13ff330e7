"""Every number's doubt is right: intervals equal the reference libraries' and hold what they promise in simulation.

Clusters widen an interval, and an unscored value (NaN) costs coverage instead of counting as 0.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import binom, bootstrap, multinomial, permutation_test, spearmanr, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from refusalscope.core import intervals, stats
from refusalscope.core.types import Row

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
    assert intervals.wilson(ones, n) == pytest.approx(proportion_confint(ones, n, method="wilson"), abs=1e-12)


def test_wilson_needs_an_n() -> None:
    with pytest.raises(ValueError, match="n > 0"):
        intervals.wilson(0.0, 0.0)


@given(scores)
def test_a_rate_counts_ones_among_the_scored(values: list[float]) -> None:
    scored = [value for value in values if not math.isnan(value)]
    found = stats.rate(values)
    assert found.n == len(scored)
    assert found.coverage == (len(scored) / len(values) if scored else 0)
    if scored:
        assert found.estimate == pytest.approx(sum(scored) / len(scored))
        assert (found.low, found.high) == pytest.approx(intervals.wilson(sum(scored), float(len(scored))))


@pytest.mark.parametrize("values", [[], [NaN], [NaN, NaN, NaN]])
def test_nothing_scored_gives_none(values: list[float]) -> None:
    nothing = (0, None, None, None, 0)
    assert stats.rate(values) == nothing
    assert stats.mean(values) == nothing
    assert stats.paired_difference(values, values) == nothing
    assert stats.kappa(values, values) == nothing
    assert stats.paired_p(values, values) is None


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


@pytest.mark.parametrize("n", [100, 117, 150, 250, 400, 1000])
def test_wilson_covers_every_share(n: int) -> None:
    # Exact: the binomial is summed over the counts whose interval holds the share.
    counts, shares = np.arange(n + 1), np.linspace(0.01, 0.99, 1961)
    ends = np.array([intervals.wilson(float(count), float(n)) for count in counts])
    inside = (ends[:, :1] <= shares) & (shares <= ends[:, 1:])
    covered = (binom.pmf(counts[:, None], n, shares) * inside).sum(0)
    assert covered.min() >= 0.9
    assert 0.94 <= covered.mean() <= 0.96


SIZES = np.resize([2, 3, 4, 5, 6], 45)
CLUSTERS = [f"intent {i}" for i, size in enumerate(SIZES) for _ in range(size)]
RUNS = 800


def categories(rng: np.random.Generator, shares: list[float], correlation: float) -> Iterator[NDArray[np.int64]]:
    """One category a prompt; prompts of one of 45 clusters of two to six correlate as said (Dirichlet-multinomial)."""
    for _ in range(RUNS):
        own = rng.dirichlet(np.array(shares) * (1 / correlation - 1), size=len(SIZES))
        edges = np.repeat(own.cumsum(1)[:, :-1], SIZES, axis=0)
        yield (rng.random((len(edges), 1)) > edges).sum(1)


@pytest.mark.parametrize("correlation", [0.3, 0.6])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_clustered_rates_cover_the_truth(share: float, correlation: float) -> None:
    hits = plain = 0
    for drawn in categories(np.random.default_rng(1), [1 - share, share], correlation):
        values = drawn.astype(float).tolist()
        hits += holds(stats.rate(values, CLUSTERS), share)
        plain += holds(stats.rate(values), share)
    assert 0.93 <= hits / RUNS <= 0.97
    assert plain / RUNS < 0.88


@pytest.mark.parametrize("correlation", [0.3, 0.6])
@pytest.mark.parametrize(("gained", "lost"), [(0.07, 0.02), (0.3, 0.05)])
def test_clustered_paired_differences_cover_the_truth(gained: float, lost: float, correlation: float) -> None:
    hits = plain = 0
    for drawn in categories(np.random.default_rng(2), [gained, lost, 1 - gained - lost], correlation):
        after, before = (drawn == 0).astype(float).tolist(), (drawn == 1).astype(float).tolist()
        hits += holds(stats.paired_difference(after, before, CLUSTERS), gained - lost)
        plain += holds(stats.paired_difference(after, before), gained - lost)
    assert 0.93 <= hits / RUNS <= 0.97
    assert plain / RUNS < 0.88


@pytest.mark.parametrize("correlation", [0.3, 0.6])
@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_clustered_means_cover_the_truth(draw: str, correlation: float) -> None:
    rng, hits, plain, runs = np.random.default_rng(3), 0, 0, 1000
    shared, own = math.sqrt(correlation), math.sqrt(1 - correlation)
    for _ in range(runs):
        values = shared * np.repeat(getattr(rng, draw)(size=len(SIZES)), SIZES) + own * getattr(rng, draw)(size=180)
        truth = shared + own if draw == "exponential" else 0.0
        hits += holds(stats.mean(values.tolist(), CLUSTERS, resamples=600), truth)
        plain += abs(values.mean() - truth) <= intervals.Z95 * values.std() / math.sqrt(180)
    assert 0.93 <= hits / runs <= 0.97
    assert plain / runs < 0.88


@pytest.mark.parametrize("clusters", [2, 3, 5, 7])
def test_means_of_few_clusters_cover_the_truth(clusters: int) -> None:
    names = [str(i) for i in range(clusters) for _ in range(3)]
    rng, runs = np.random.default_rng(5), 2000
    values = np.repeat(rng.normal(size=(runs, clusters)), 3, axis=1) + 0.5 * rng.normal(size=(runs, 3 * clusters))
    hits = sum(holds(stats.mean(row.tolist(), names), 0.0) for row in values)
    assert 0.93 <= hits / runs <= 0.97
    low, high = ttest_1samp(values[0].reshape(clusters, 3).mean(1), 0.0).confidence_interval()
    assert numbers(stats.mean(values[0].tolist(), names))[::2] == pytest.approx((low, high), rel=1e-3)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_bca_equals_scipys(draw: str) -> None:
    values = getattr(np.random.default_rng(2), draw)(size=60)
    drawn = values[np.random.default_rng(4).integers(60, size=(20_000, 60))].mean(1)
    low, high = intervals.bca(values, np.ones(60), drawn)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(3)).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * (theirs.high - theirs.low))


def test_mean_agrees_with_scipys_bca_where_there_are_many() -> None:
    values = np.random.default_rng(2).exponential(size=1500)
    ours = stats.mean(values.tolist(), resamples=5000)
    theirs = bootstrap((values,), np.mean, n_resamples=5000, rng=np.random.default_rng(3)).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * (theirs.high - theirs.low))


@pytest.mark.parametrize("differing", [1, 3, 5])
def test_a_mean_of_few_values_other_than_zero_is_bounded_on_both_sides(differing: int) -> None:
    low, estimate, high = numbers(stats.mean([0.0] * (100 - differing) + [1.0] * differing))
    assert 0 <= low < estimate < high < 3 * estimate + 0.03


def test_mean_is_deterministic_by_seed() -> None:
    values = np.random.default_rng(4).normal(size=20).tolist()
    assert stats.mean(values, seed=5) == stats.mean(values, seed=5) != stats.mean(values, seed=6)


def test_weights_count_values_as_often() -> None:
    weighted = stats.mean([1.0, 5.0, NaN], weights=[3.0, 1.0, 100.0])
    assert weighted.estimate == pytest.approx(2)
    assert (weighted.n, weighted.coverage) == (2, pytest.approx(2 / 3))


def test_a_constant_has_no_width() -> None:
    assert stats.mean([0.7] * 9)[1:4] == pytest.approx((0.7, 0.7, 0.7))


def tango_distance(difference: float, gained: int, lost: int, n: int) -> float:
    """The score statistic from its definition: the likeliest table with this difference found numerically."""

    def unlikely(share: float) -> float:
        agree = 1 - 2 * share - difference
        return -(gained * math.log(share + difference) + lost * math.log(share) + (n - gained - lost) * math.log(agree))

    bounds = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    share = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))


@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_paired_difference_is_tangos(table: tuple[int, int, int, int]) -> None:
    found, n = stats.paired_difference(*paired(*table)), sum(table)
    assert found.n == n
    assert found.estimate == pytest.approx((table[1] - table[2]) / n)
    low, _, high = numbers(found)
    distances = [tango_distance(end, table[1], table[2], n) for end in (low, high)]
    assert distances == pytest.approx([intervals.Z95, -intervals.Z95], abs=1e-3)


def test_paired_difference_gives_the_published_example() -> None:
    # Airway hyper-responsiveness in 21 children (Bentur et al. 2009), as in Fagerland, Lydersen and Laake 2014.
    found = stats.paired_difference(*paired(1, 1, 7, 12))
    assert found[1:4] == pytest.approx((-0.286, -0.517, -0.026), abs=5e-4)


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda table: table[1] + table[2] > 0))
def test_a_paired_interval_holds_0_where_the_score_test_sees_nothing(table: tuple[int, int, int, int]) -> None:
    reference: Any = reference_mcnemar([table[:2], table[2:]], exact=False, correction=False)
    assert holds(stats.paired_difference(*paired(*table)), 0.0) == (reference.statistic <= intervals.Z95**2)


@pytest.mark.parametrize("n", [100, 150])
def test_paired_difference_covers_small_differences(n: int) -> None:
    # Exact: the trinomial is summed over the tables whose interval holds the difference.
    gained, lost = (grid.ravel() for grid in np.meshgrid(np.arange(46), np.arange(28)))
    ends = np.array([intervals.tango(float(b), float(c), float(n)) for b, c in zip(gained, lost, strict=True)])
    tables = np.stack([gained, lost, n - gained - lost], axis=1)
    for against in (0.01, 0.02, 0.03, 0.05, 0.08):
        for difference in (0.02, 0.03, 0.05, 0.1):
            chances = multinomial.pmf(tables, n, [against + difference, against, 1 - 2 * against - difference])
            assert chances.sum() > 0.999
            assert 0.93 <= chances[(ends[:, 0] <= difference) & (difference <= ends[:, 1])].sum() <= 0.97


def test_differences_of_means_over_draws_cover_the_truth() -> None:
    rng, hits = np.random.default_rng(6), 0
    for _ in range(RUNS):
        theirs = rng.binomial(10, rng.beta(0.4, 0.6, size=120)) / 10  # what random draws do differs by prompt
        hits += holds(stats.paired_difference((rng.random(120) < 0.3).astype(float).tolist(), theirs.tolist()), -0.1)
    assert 0.93 <= hits / RUNS <= 0.97


def test_scores_outside_0_and_1_have_no_paired_interval() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.paired_difference([3.0], [1.0])


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


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any), st.integers(0, 5))
def test_paired_p_is_statsmodels_exact_mcnemar(table: tuple[int, int, int, int], unscored: int) -> None:
    after, before = paired(*table)
    reference: Any = reference_mcnemar([table[:2], table[2:]], exact=True)
    expected = reference.pvalue if table[1] + table[2] else 1.0
    found = stats.paired_p([*after, *[NaN] * unscored], [*before, *[1.0] * unscored])
    assert found == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10), st.sampled_from("abcdef")), min_size=2, max_size=20))
def test_clustered_p_equals_scipys_exact_permutations(rows: list[tuple[int, int, str]]) -> None:
    after, before, names = [a / 10 for a, _, _ in rows], [b / 10 for _, b, _ in rows], [name for _, _, name in rows]
    totals = np.array([sum(a - b for a, b, name in rows if name == wanted) for wanted in sorted(set(names))])
    found = stats.paired_p(after, before, names)
    if len(totals) < 2:
        assert found == 1.0
        return
    reference = permutation_test(
        (totals, np.zeros(len(totals))),
        lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples",
        vectorized=True,
    )
    expected = np.mean(np.abs(reference.null_distribution) >= abs(totals.sum()) - 1e-9)
    assert found == pytest.approx(expected)


def test_random_flips_come_close_to_all_of_them() -> None:
    rng = np.random.default_rng(8)
    values = rng.normal(0.3, 1, size=40).clip(-1, 1)
    p = stats.paired_p(values.tolist(), [0.0] * 40)
    assert p == stats.paired_p(values.tolist(), [0.0] * 40)
    assert p == pytest.approx(stats.paired_p(np.round(values, 2).tolist(), [0.0] * 40), abs=0.005)


def test_a_clustered_test_keeps_its_level() -> None:
    hits, plain, runs = 0, 0, 300
    for drawn in islice(categories(np.random.default_rng(9), [0.15, 0.15, 0.7], 0.6), runs):
        after, before = (drawn == 0).astype(float).tolist(), (drawn == 1).astype(float).tolist()
        hits += (stats.paired_p(after, before, CLUSTERS) or 0) <= 0.05
        plain += (stats.paired_p(after, before) or 0) <= 0.05
    assert hits / runs <= 0.07
    assert plain / runs > 0.12


@settings(max_examples=8)  # statsmodels collects garbage at every call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_statsmodels(p: list[float]) -> None:
    assert stats.holm(p) == pytest.approx(list(np.asarray(multipletests(p, method="holm")[1])))


def test_holm_is_applied_within_each_family() -> None:
    def row(p: float | None, family: str) -> Row:
        return Row("d", "m", "x", "", 10, 0.1, 0.0, 0.2, 1.0, p, family)

    rows = [row(0.01, "one"), row(0.2, "other"), row(0.04, "one"), row(0.5, ""), row(None, "one")]
    assert [made.p_holm for made in stats.with_holm(rows)] == [0.02, 0.2, 0.04, None, None]
    assert [(made.p, made.family) for made in stats.with_holm(rows)] == [(made.p, made.family) for made in rows]


@pytest.mark.parametrize(("comparisons", "needed"), [(1, 6), (6, 8), (12, 9), (40, 11)])
def test_the_smallest_difference_is_the_first_that_passes(comparisons: int, needed: int) -> None:
    assert stats.smallest_difference(150, comparisons) == (needed, needed / 150)
    assert stats.smallest_difference(needed - 1, comparisons) is None
    for discordant in (needed - 1, needed):
        p = stats.paired_p([1.0] * discordant + [0.0] * 20, [0.0] * (discordant + 20))
        assert p is not None
        assert (stats.holm([p, *[1.0] * (comparisons - 1)])[0] <= 0.05) == (discordant == needed)


def test_a_family_is_not_empty() -> None:
    with pytest.raises(ValueError, match="at least one comparison"):
        stats.smallest_difference(10, 0)


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
    assert numbers(alone)[0] == -numbers(alone)[2] < -0.1
    assert stats.paired_difference([1.0] * 40, [1.0] * 40, [*names, *names])[1:] == pytest.approx(alone[1:])


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(any), st.integers(0, 5))
def test_kappa_equals_statsmodels(table: tuple[int, int, int, int], unscored: int) -> None:
    first, second = paired(*table)
    found = stats.kappa([*first, *[NaN] * unscored], [*second, *[1.0] * unscored])
    assert found.coverage == pytest.approx(sum(table) / (sum(table) + unscored))
    if sum(table) in (table[0], table[3]):
        assert (found.n, found.estimate) == (0, None)
        return
    assert found.n == sum(table)
    assert found.estimate == pytest.approx(cohens_kappa(np.array(table).reshape(2, 2), return_results=False), abs=1e-12)
    assert sorted([-1.0, *numbers(found), 1.0]) == [-1.0, *numbers(found), 1.0]


def test_kappa_has_doubt_where_judges_never_disagree_or_one_is_constant() -> None:
    agreed = [1.0] * 30 + [0.0] * 70
    low, estimate, high = numbers(stats.kappa(agreed, agreed))
    assert (estimate, high) == (pytest.approx(1), pytest.approx(1))
    assert 0.85 < low < 0.97
    low, estimate, high = numbers(stats.kappa([1.0] * 20, [1.0] * 19 + [0.0]))
    assert estimate == 0
    assert width(stats.kappa([1.0] * 20, [1.0] * 19 + [0.0])) > 0.3
    fewer = stats.kappa(agreed, agreed, [str(i // 5) for i in range(100)])
    assert numbers(fewer)[0] < 0.85


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_clustered_kappa_covers_the_truth(correlation: float) -> None:
    hits, plain, runs = 0, 0, 400
    for drawn in islice(categories(np.random.default_rng(10), [0.35, 0.15, 0.15, 0.35], correlation), runs):
        first, second = (drawn < 2).astype(float).tolist(), (drawn % 2 == 0).astype(float).tolist()
        hits += holds(stats.kappa(first, second, CLUSTERS), 0.4)
        plain += holds(stats.kappa(first, second), 0.4)
    assert 0.93 <= hits / runs <= 0.97
    assert plain / runs < 0.88


def test_kappa_is_of_yes_and_no() -> None:
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        stats.kappa([0.5, 1.0], [0.0, 1.0])
