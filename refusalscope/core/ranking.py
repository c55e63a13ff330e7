"""How well scores tell two groups apart, and how far groups differ within strata, with doubt that knows of clusters.

A cluster may hold values of both groups and of several strata. NaN means unscored, as in `stats`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import NDArray

from refusalscope.core.intervals import FEW, STUDENT, Z95, wilson
from refusalscope.core.stats import NOTHING, Estimate, flip_p

RESAMPLES = 4_000
Sample = tuple[Sequence[float], Sequence[float]]
"""One score on the positives and on the negatives."""


def auroc(
    positive: Sequence[float],
    negative: Sequence[float],
    positive_clusters: Sequence[str],
    negative_clusters: Sequence[str],
) -> Estimate:
    """P(a positive's score is above a negative's), ties half, with an interval by Obuchowski's (1997) variance.

    Half a cluster more on each side, a quarter all above and a quarter all below the others, enters the variance, and
    the interval is Wilson's at the n of independent draws that has it: the logit's is too narrow where groups hardly
    overlap, and there is none where they do not. `n` counts the values of both groups; a group without a scored value
    leaves nothing.
    """
    return mean_auroc([(positive, negative)], positive_clusters, negative_clusters)


def mean_auroc(
    scores: Sequence[Sample],
    positive_clusters: Sequence[str],
    negative_clusters: Sequence[str],
) -> Estimate:
    """The mean AUROC of several scores, each (positive, negative) on the same values, with an interval as `auroc`'s.

    Its doubt is that of the values, not of which scores there are. A value that any score lacks is left out of all.
    """
    sides = [np.asarray([score[side] for score in scores], dtype=float) for side in (0, 1)]
    known = [np.asarray(~np.isnan(side).any(0)) for side in sides]
    positive, negative = sides[0][0], sides[1][0]
    _, above_names = _kept(np.where(known[0], positive, np.nan), positive_clusters)
    _, below_names = _kept(np.where(known[1], negative, np.nan), negative_clusters)
    if not (len(above_names) and len(below_names)):
        return NOTHING
    pairs = [_placements(a[known[0]], b[known[1]]) for a, b in zip(*sides, strict=True)]
    placed = np.mean([a for a, _ in pairs], 0), np.mean([b for _, b in pairs], 0)
    found, fewest = float(placed[0].mean()), min(len(set(above_names)), len(set(below_names)))
    middle = (fewest * found + 0.25) / (fewest + 0.5)
    n = middle * (1 - middle) / _variance(*placed, found, above_names, below_names, more=0.5)
    low, high = wilson(found * n, n)
    scored = len(above_names) + len(below_names)
    return Estimate(scored, found, low, high, scored / (len(positive) + len(negative)))


class Difference(NamedTuple):
    """One AUROC minus another."""

    estimate: Estimate
    p: float | None
    """Two-sided, by the normal distribution; None where nothing was scored."""


def auroc_difference(
    first: Sample, second: Sample, positive_clusters: Sequence[str], negative_clusters: Sequence[str]
) -> Estimate:
    """AUROC of one score minus that of another on the same values, with a normal interval."""
    return compared([first], [second], positive_clusters, negative_clusters).estimate


def compared(
    first: Sequence[Sample],
    second: Sequence[Sample],
    positive_clusters: Sequence[str],
    negative_clusters: Sequence[str],
) -> Difference:
    """The mean AUROC of some scores minus that of others, all on the same values, with a normal interval.

    A value that any score lacks is left out of all.
    """
    sides = [np.asarray([score[side] for score in (*first, *second)], dtype=float) for side in (0, 1)]
    known = [np.asarray(~np.isnan(side).any(0)) for side in sides]
    scored = int(sum(side.sum() for side in known))
    if not all(side.any() for side in known):
        return Difference(NOTHING, None)
    names = [
        [name for name, keep in zip(clusters, side, strict=True) if keep]
        for clusters, side in zip((positive_clusters, negative_clusters), known, strict=True)
    ]
    pairs = [_placements(a[known[0]], b[known[1]]) for a, b in zip(*sides, strict=True)]
    above, below = (
        np.mean([pair[side] for pair in pairs[: len(first)]], 0)
        - np.mean([pair[side] for pair in pairs[len(first) :]], 0)
        for side in (0, 1)
    )
    found = float(above.mean())
    error = math.sqrt(max(0.0, _variance(above, below, found, names[0], names[1])))
    return _normal(found, error, scored, scored / sum(len(side) for side in known))


def gap(
    first: Sample,
    second: Sample,
    first_clusters: tuple[Sequence[str], Sequence[str]],
    second_clusters: tuple[Sequence[str], Sequence[str]],
) -> Difference:
    """AUROC of one score on one sample minus that on another, each (positive, negative), with a normal interval.

    Samples may share clusters, in the same class or across classes. The variance is that of the placements, each
    sample's divided by its size, summed by cluster over all four groups (Obuchowski's with every covariance).
    """
    pulls: dict[str, float] = {}
    found, scored, asked = 0.0, 0, 0
    for sign, sample, clusters in ((1.0, first, first_clusters), (-1.0, second, second_clusters)):
        kept = [_kept(values, names) for values, names in zip(sample, clusters, strict=True)]
        asked += sum(map(len, sample))
        scored += sum(len(values) for values, _ in kept)
        if not all(len(values) for values, _ in kept):
            return Difference(NOTHING, None)
        placed = _placements(kept[0][0], kept[1][0])
        mean = float(placed[0].mean())
        found += sign * mean
        for values, (_, names) in zip(placed, kept, strict=True):
            for value, name in zip(values, names, strict=True):
                pulls[name] = pulls.get(name, 0.0) + sign * (float(value) - mean) / len(values)
    squares = sum(pull**2 for pull in pulls.values()) * len(pulls) / max(1, len(pulls) - 1)
    return _normal(found, math.sqrt(squares), scored, scored / asked)


def _normal(found: float, error: float, scored: int, coverage: float) -> Difference:
    """A difference with its normal interval and p; without any doubt p is 1 where there is no difference, else 0."""
    p = math.erfc(abs(found) / error / math.sqrt(2)) if error > 0 else float(found == 0)
    return Difference(Estimate(scored, found, found - Z95 * error, found + Z95 * error, coverage), p)


def stratified_difference(
    values: Sequence[float], groups: Sequence[bool], strata: Sequence[str], clusters: Sequence[str], *, seed: int = 0
) -> Estimate:
    """Mean over strata of (mean where `groups` is true minus mean where it is not), weights n1 n0 / (n1 + n0).

    The interval is a studentised bootstrap of whole clusters, Student's where they are too few to draw from. `n` counts
    the scored values of strata that hold both groups; the others say nothing. Coverage is the share of all values that
    are scored.
    """
    table = _tabled(values, groups, strata, clusters)
    if table is None:
        return NOTHING
    once = np.ones((1, len(table.ones)))
    (point,), (error,) = _differences(table, once)
    n, coverage = int(table.ones.sum() + table.zeros.sum()), 1 - float(np.isnan(np.asarray(values, dtype=float)).mean())
    if len(table.ones) < 2 or error == 0:
        return Estimate(n, float(point), float(point), float(point), coverage)
    if len(table.ones) < FEW:
        half = STUDENT[len(table.ones) - 2] * float(error)
        return Estimate(n, float(point), float(point) - half, float(point) + half, coverage)
    draws = np.random.default_rng(seed).multinomial(len(table.ones), [1 / len(table.ones)] * len(table.ones), RESAMPLES)
    again, errors = _differences(table, draws.astype(float))
    usable = errors > 1e-9 * error
    high, low = np.quantile((again - point)[usable] / errors[usable], (0.025, 0.975))
    return Estimate(n, float(point), float(point - low * error), float(point - high * error), coverage)


def stratified_p(
    values: Sequence[float], groups: Sequence[bool], strata: Sequence[str], clusters: Sequence[str], *, seed: int = 0
) -> float | None:
    """Two-sided p of no difference within strata: the signs of the clusters' scores are flipped; None without strata.

    A cluster's score is what it adds to the difference when stratum means are taken out of values and groups.
    """
    table = _tabled(values, groups, strata, clusters)
    if table is None:
        return None
    ones, zeros = table.ones.sum(0), table.zeros.sum(0)
    share, centre = ones / (ones + zeros), (table.above.sum(0) + table.below.sum(0)) / (ones + zeros)
    scores = (table.above - table.ones * centre) @ (1 - share) - (table.below - table.zeros * centre) @ share
    return flip_p(scores, seed=seed)


class _Table(NamedTuple):
    """Counts and totals of both groups by cluster and stratum; every stratum holds both groups."""

    ones: Float[ndarray, "clusters strata"]
    zeros: Float[ndarray, "clusters strata"]
    above: Float[ndarray, "clusters strata"]
    """Totals of the values whose group is true."""
    below: Float[ndarray, "clusters strata"]


def _tabled(
    values: Sequence[float], groups: Sequence[bool], strata: Sequence[str], clusters: Sequence[str]
) -> _Table | None:
    if not len(values) == len(groups) == len(strata) == len(clusters):
        raise ValueError(f"{len(values)} values need as many groups, strata and clusters")
    array, inside = np.asarray(values, dtype=float), np.asarray(groups, dtype=bool)
    layers, kinds = np.asarray(strata, dtype=str), ~np.isnan(array)
    both = set(layers[kinds & inside]) & set(layers[kinds & ~inside])
    kept = kinds & np.isin(layers, sorted(both))
    if not kept.any():
        return None
    _, row = np.unique(np.asarray(clusters, dtype=str)[kept], return_inverse=True)
    _, column = np.unique(layers[kept], return_inverse=True)
    made = np.zeros((4, row.max() + 1, column.max() + 1))
    for at, (mask, mass) in enumerate([(inside, 1.0), (~inside, 1.0), (inside, array), (~inside, array)]):
        np.add.at(made[at], (row, column), np.where(mask, mass, 0.0)[kept])
    return _Table(*made)


def _differences(
    table: _Table, draws: Float[ndarray, "resamples clusters"]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The stratified difference in every resample, where a cluster counts as often as drawn, and its standard error.

    The difference is the slope of the values on the group with an intercept for every stratum.
    """
    ones, zeros, above, below = (draws @ part for part in table)
    total = np.maximum(ones + zeros, 1.0)
    share, centre, mass = ones / total, (above + below) / total, ones * zeros / total
    with np.errstate(invalid="ignore", divide="ignore"):
        found = ((1 - share) * above - share * below).sum(1) / mass.sum(1)
        up, down = 1 - share, -share
        slope = found[:, None]
        pull = up @ table.above.T - (up * (centre + slope * up)) @ table.ones.T
        pull += down @ table.below.T - (down * (centre + slope * down)) @ table.zeros.T
        count = draws.sum(1)
        error = np.sqrt(count / (count - 1) * (draws * pull**2).sum(1)) / mass.sum(1)
    return found, np.nan_to_num(error)


def _kept(
    values: Sequence[float] | NDArray[np.float64], clusters: Sequence[str]
) -> tuple[NDArray[np.float64], list[str]]:
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    array = np.asarray(values, dtype=float)
    scored = ~np.isnan(array)
    return array[scored], [name for name, keep in zip(clusters, scored, strict=True) if keep]


def _placements(
    positive: NDArray[np.float64], negative: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each positive the share of negatives below it, for each negative the share of positives above; ties half."""

    def below(values: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        ordered = np.sort(others)
        return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (
            2 * len(others)
        )

    return below(positive, negative), 1 - below(negative, positive)


def _variance(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    mean: float,
    first_names: Sequence[str],
    second_names: Sequence[str],
    *,
    more: float = 0.0,
) -> float:
    """Obuchowski's variance of the mean placement, with `more` clusters at either end; without clusters DeLong's."""
    names, index = np.unique(np.asarray([*first_names, *second_names]), return_inverse=True)
    total, sums = 0.0, []
    for part, values, own in zip(
        np.split(index, [len(first)]), (first, second), (first_names, second_names), strict=True
    ):
        clusters = len(set(own))
        size, k = len(values) / clusters, clusters + more
        mass = size * k
        middle = (len(values) * mean + size * more / 2) / mass
        sums.append(np.bincount(part, weights=values - middle, minlength=len(names)) / mass)
        squares = float((sums[-1] ** 2).sum()) + more / 2 * ((1 - middle) ** 2 + middle**2) / k**2
        total += k / max(k - 1, 0.5) * squares
    return total + 2 * len(names) / max(1, len(names) - 1) * float(sums[0] @ sums[1])
