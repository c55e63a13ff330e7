"""Numbers that carry their doubt: intervals for rates, means and paired differences. Pure, NaN-aware.

NaN means unscored: it lowers coverage and never enters an estimate as 0. Prompts of one cluster (shared intent)
count as one draw.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refusalscope.core.types import Row

Z95 = 1.959963984540054


class Estimate(NamedTuple):
    """A number, its 95 % interval, how many values it rests on, and the share of values that were scored."""

    n: int
    estimate: float | None
    low: float | None
    high: float | None
    coverage: float


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion (Wilson 1927). `n` may be an effective sample size."""
    if n <= 0:
        raise ValueError(f"a proportion needs n > 0, got {n}")
    share = successes / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # Rounding must not put a share of 0 or 1 outside its own interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def rate(values: Sequence[float], clusters: Sequence[str] | None = None) -> Estimate:
    """Share of ones among 0/1 values, with Wilson's interval.

    Clusters shrink n to an effective sample size by the design effect of the cluster totals (Dean and Pagano 2015);
    a rate of 0 or 1 shows no variance to estimate it from, and takes the number of clusters.
    """
    kept, names = _scored(values, clusters)
    if not len(kept):
        return Estimate(0, None, None, None, 0.0)
    share = float(kept.mean())
    low, high = wilson(share * (effective := _effective_n(kept, names)), effective)
    return Estimate(len(kept), share, low, high, len(kept) / len(values))


def mean(
    values: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    weights: Sequence[int | float] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Weighted mean with a BCa bootstrap interval (Efron 1987) that resamples whole clusters.

    `weights` are token counts when the values are per-token means, so that long answers count for more.
    """
    kept, names = _scored(values, clusters)
    if not len(kept):
        return Estimate(0, None, None, None, 0.0)
    mass = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    mass = mass[~np.isnan(np.asarray(values, dtype=float))]
    totals, masses = _by_cluster(kept * mass, names), _by_cluster(mass, names)
    point = float(totals.sum() / masses.sum())
    low, high = _bca(totals, masses, point, np.random.default_rng(seed), resamples)
    return Estimate(len(kept), point, low, high, len(kept) / len(values))


def paired_difference(
    after: Sequence[float], before: Sequence[float], clusters: Sequence[str] | None = None
) -> Estimate:
    """Difference of two paired rates, `after - before`, with Newcombe's score interval (Newcombe 1998, method 10).

    Values are 0, 1 or NaN; a pair with a NaN on either side is left out and lowers coverage. Where pairs share a
    cluster the interval is that of `mean_difference`.
    """
    if len(after) != len(before):
        raise ValueError(f"pairs need equal lengths, got {len(after)} and {len(before)}")
    if clusters is not None and len(set(clusters)) < len(clusters):
        return mean_difference([a - b for a, b in zip(after, before, strict=True)], clusters)
    both = [(a, b) for a, b in zip(after, before, strict=True) if not (math.isnan(a) or math.isnan(b))]
    n = len(both)
    if n == 0:
        return Estimate(0, None, None, None, 0.0)
    yes_yes = sum(1 for a, b in both if a and b)
    yes_no = sum(1 for a, b in both if a and not b)
    no_yes = sum(1 for a, b in both if b and not a)
    first, second = (yes_yes + yes_no) / n, (yes_yes + no_yes) / n
    low, high = _newcombe(first, second, n, _phi(yes_yes, yes_no, no_yes, n - yes_yes - yes_no - no_yes))
    return Estimate(n, first - second, low, high, n / len(after))


def mean_difference(differences: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Mean of paired differences of scores between 0 and 1, resampling whole clusters as `mean` does.

    Where no pair differs a bootstrap sees no doubt at all; then the interval is Newcombe's for as many pairs that agree
    as there are clusters.
    """
    found = mean(differences, clusters)
    if not found.n or any(differences[i] for i in range(len(differences)) if not math.isnan(differences[i])):
        return found
    agreeing = len({name for name, value in zip(clusters, differences, strict=True) if not math.isnan(value)})
    low, high = _newcombe(0.0, 0.0, agreeing, 0.0)
    return found._replace(low=low, high=high)


def rank_correlation(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Estimate:
    """Spearman's rank correlation with a percentile bootstrap interval over the pairs; n counts the pairs.

    Raises ValueError for fewer than three pairs or where one side does not vary at all.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(x) != len(y) or len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError(f"a rank correlation needs at least three pairs that vary, got {len(x)} and {len(y)} values")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(x), size=(1000, len(x)))
    again = [_spearman(x[draw], y[draw]) for draw in draws if np.ptp(x[draw]) > 0 and np.ptp(y[draw]) > 0]
    low, high = np.quantile(again, (0.025, 0.975))
    return Estimate(len(x), _spearman(x, y), float(low), float(high), 1.0)


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks with ties at their mean."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2


def mcnemar(after: Sequence[float], before: Sequence[float]) -> float:
    """Two-sided exact McNemar p-value: are the discordant pairs a fair coin? NaN pairs are left out."""
    gained = sum(1 for a, b in zip(after, before, strict=True) if a == 1 and b == 0)
    lost = sum(1 for a, b in zip(after, before, strict=True) if a == 0 and b == 1)
    n, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n if n else 1.0
    return min(1.0, 2 * tail)


def paired_p(after: Sequence[float], before: Sequence[float], clusters: Sequence[str] | None = None) -> float | None:
    """Two-sided exact McNemar p-value; None where pairs share a cluster or are no pairs of 0 and 1."""
    values = {value for value in (*after, *before) if not math.isnan(value)}
    if (clusters is not None and len(set(clusters)) < len(clusters)) or not values <= {0.0, 1.0}:
        return None
    return mcnemar(after, before)


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's correction, in their order."""
    order = sorted(range(len(p)), key=lambda at: p[at])
    made, largest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        made[at] = largest
    return made


def with_holm(rows: Sequence[Row]) -> list[Row]:
    """The same rows, each p-value also corrected over its family."""
    families: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        if row.family and row.p is not None:
            families.setdefault(row.family, []).append(at)
    made = list(rows)
    for places in families.values():
        for at, corrected in zip(places, holm([rows[at].p or 0.0 for at in places]), strict=True):
            made[at] = replace(rows[at], p_holm=corrected)
    return made


def kappa(first: Sequence[float], second: Sequence[float], clusters: Sequence[str] | None = None) -> Estimate:
    """Cohen's kappa of two judges, with a percentile bootstrap interval over clusters; n = 0 where it has no value."""
    pairs = np.asarray([first, second], dtype=float)
    kept = ~np.isnan(pairs).any(0)
    x, y = pairs[:, kept]
    names = np.arange(len(first)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    n, coverage = int(kept.sum()), float(kept.mean()) if pairs.size else 0.0
    if not n or math.isnan(point := _kappa(x, y)):
        return Estimate(0, None, None, None, 0.0)
    members = [np.flatnonzero(names[kept] == name) for name in np.unique(names[kept])]
    rng = np.random.default_rng(0)
    again = []
    for draw in rng.integers(len(members), size=(1000, len(members))):
        chosen = np.concatenate([members[at] for at in draw])
        again.append(_kappa(x[chosen], y[chosen]))
    low, high = np.nanquantile(again, (0.025, 0.975))
    return Estimate(n, point, float(low), float(high), coverage)


def _kappa(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    chance = x.mean() * y.mean() + (1 - x.mean()) * (1 - y.mean())
    return float("nan") if chance == 1 else float(((x == y).mean() - chance) / (1 - chance))


def _scored(values: Sequence[float], clusters: Sequence[str] | None) -> tuple[NDArray[np.float64], list[str]]:
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    names = [str(i) for i in range(len(values))] if clusters is None else list(clusters)
    array = np.asarray(values, dtype=float)
    scored = ~np.isnan(array)
    return array[scored], [name for name, keep in zip(names, scored, strict=True) if keep]


def _by_cluster(values: NDArray[np.float64], names: Sequence[str]) -> NDArray[np.float64]:
    _, index = np.unique(np.asarray(names), return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64)


def _effective_n(values: NDArray[np.float64], names: Sequence[str]) -> float:
    n, share = len(values), float(values.mean())
    clusters = len(set(names))
    if clusters == n:
        return float(n)
    if share in (0.0, 1.0) or clusters == 1:
        return float(clusters)
    residual = _by_cluster(values - share, names)
    variance = clusters / (clusters - 1) * float((residual**2).sum()) / n**2
    design_effect = max(1.0, variance / (share * (1 - share) / n))
    return n / design_effect


def _bca(
    totals: NDArray[np.float64], masses: NDArray[np.float64], point: float, rng: np.random.Generator, resamples: int
) -> tuple[float, float]:
    count = len(totals)
    if count == 1 or np.ptp(totals / masses) == 0:
        return point, point
    draws = rng.integers(count, size=(resamples, count))
    replicates = totals[draws].sum(1) / masses[draws].sum(1)
    left_out = (totals.sum() - totals) / (masses.sum() - masses)
    spread = left_out.mean() - left_out
    skew = float((spread**3).sum() / (6 * max((spread**2).sum() ** 1.5, 1e-300)))
    below = (np.sum(replicates < point) + 0.5 * np.sum(replicates == point)) / resamples
    bias = _normal_quantile(min(max(below, 1 / resamples), 1 - 1 / resamples))
    ends = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-Z95, Z95)]
    shares = [0.5 * (1 + math.erf(end / math.sqrt(2))) for end in ends]
    low, high = np.quantile(replicates, shares)
    return float(low), float(high)


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


def _phi(yes_yes: int, yes_no: int, no_yes: int, no_no: int) -> float:
    """Correlation of the pairs, with Newcombe's continuity correction when it is positive."""
    n = yes_yes + yes_no + no_yes + no_no
    margins = (yes_yes + yes_no) * (no_yes + no_no) * (yes_yes + no_yes) * (yes_no + no_no)
    if margins == 0:
        return 0.0
    cross = yes_yes * no_no - yes_no * no_yes
    corrected = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    return corrected / math.sqrt(margins)


def _newcombe(first: float, second: float, n: int, phi: float) -> tuple[float, float]:
    (low1, high1), (low2, high2) = wilson(first * n, float(n)), wilson(second * n, float(n))
    down1, up1, down2, up2 = first - low1, high1 - first, second - low2, high2 - second
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return first - second - below, first - second + above
