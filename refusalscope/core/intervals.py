"""95 % intervals from counts and totals alone; `stats` knows what is counted, unscored, or one cluster with another."""

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Z95 = 1.959963984540054
DRAWN_AT_ONCE = 2_000_000
"""Entries of a bootstrap in memory together."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447)
"""The .975 quantiles of Student's t for two clusters, three, and so on."""
FEW = len(STUDENT) + 2


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927). `n` may be an effective sample size."""
    if n <= 0:
        raise ValueError(f"a proportion needs n > 0, got {n}")
    share = successes / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # Rounding must not put a share of 0 or 1 outside its own interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def tango(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Score interval of the difference of two paired proportions (Tango 1998): discordant pairs of each kind, of `n`.

    All three may be effective numbers.
    """
    if n <= 0:
        raise ValueError(f"a paired difference needs n > 0, got {n}")
    ends = []
    for outside in (-1.0, 1.0):
        inside = (gained - lost) / n
        for _ in range(40):
            middle = (inside + outside) / 2
            if abs(_tango_score(middle, gained, lost, n)) <= Z95:
                inside = middle
            else:
                outside = middle
        ends.append(inside)
    return ends[0], ends[1]


def _tango_score(difference: float, gained: float, lost: float, n: float) -> float:
    """How far the observed difference is from a true one, in standard errors of the likeliest table that has it."""
    linear = (2 * n - gained + lost) * difference - gained - lost
    root = math.sqrt(max(0.0, linear**2 + 8 * n * lost * difference * (1 - difference)))
    variance = n * ((root - linear) / (2 * n) + difference * (1 - difference))
    return (gained - lost - n * difference) / math.sqrt(variance) if variance > 0 else math.inf


def studentised(
    totals: Float[ndarray, "clusters"], masses: Float[ndarray, "clusters"], *, seed: int, resamples: int
) -> tuple[float, float]:
    """Bootstrap-t interval of sum(totals) / sum(masses), whole clusters drawn again.

    Where one resample in a thousand shows no doubt at all, because few clusters differ from the rest, its t values say
    nothing, and the interval is BCa's. Too few clusters to draw from have Student's interval; one has no doubt to show.
    """
    point = float(totals.sum() / masses.sum())
    if len(totals) == 1 or np.ptp(totals / masses) == 0:
        return point, point
    (error,) = _standard_errors(totals[None], masses[None])
    if len(totals) < FEW:
        half = STUDENT[len(totals) - 2] * float(error)
        return point - half, point + half
    replicates, errors = _resampled(totals, masses, np.random.default_rng(seed), resamples)
    if np.mean(errors < 1e-9 * error) > 0.001:
        return bca(totals, masses, replicates)
    high, low = np.quantile((replicates - point) / np.maximum(errors, 1e-9 * error), (0.025, 0.975))
    return point - float(low * error), point - float(high * error)


def bca(
    totals: Float[ndarray, "clusters"], masses: Float[ndarray, "clusters"], replicates: Float[ndarray, "resamples"]
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of sum(totals) / sum(masses)."""
    point = float(totals.sum() / masses.sum())
    left_out = (totals.sum() - totals) / (masses.sum() - masses)
    spread = left_out.mean() - left_out
    skew = float((spread**3).sum() / (6 * max((spread**2).sum() ** 1.5, 1e-300)))
    below, one = np.mean(replicates < point) + 0.5 * np.mean(replicates == point), 1 / len(replicates)
    bias = NormalDist().inv_cdf(float(min(max(below, one), 1 - one)))
    ends = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-Z95, Z95)]
    low, high = np.quantile(replicates, [NormalDist().cdf(end) for end in ends])
    return float(low), float(high)


def _resampled(
    totals: Float[ndarray, "clusters"], masses: Float[ndarray, "clusters"], rng: np.random.Generator, resamples: int
) -> tuple[Float[ndarray, "resamples"], Float[ndarray, "resamples"]]:
    """The ratio in every resample, and its standard error there."""
    count = len(totals)
    at_once = max(1, DRAWN_AT_ONCE // count)
    replicates, errors = [], []
    for start in range(0, resamples, at_once):
        draws = rng.integers(count, size=(min(at_once, resamples - start), count))
        sums, weights = totals[draws], masses[draws]
        replicates.append(sums.sum(1) / weights.sum(1))
        errors.append(_standard_errors(sums, weights))
    return np.concatenate(replicates), np.concatenate(errors)


def _standard_errors(
    totals: Float[ndarray, "samples clusters"], masses: Float[ndarray, "samples clusters"]
) -> Float[ndarray, "samples"]:
    """Linearised, of each sample's ratio."""
    count, mass = totals.shape[1], masses.sum(1)
    residuals = totals - (totals.sum(1) / mass)[:, None] * masses
    return np.sqrt(count / (count - 1) * (residuals**2).sum(1)) / mass


def kappa_of(cells: Float[ndarray, "*samples 4"]) -> Float[ndarray, "*samples"]:
    """Cohen's kappa of two-by-two tables: both yes, first alone, second alone, both no. NaN where both are constant."""
    both, first, second, neither = np.moveaxis(cells / cells.sum(-1, keepdims=True), -1, 0)
    one, other = both + first, both + second
    chance = one * other + (1 - one) * (1 - other)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (both + neither - chance) / (1 - chance), np.nan)


def jeffreys_kappa(cells: Float[ndarray, "4"], *, seed: int, draws: int = 10_000) -> tuple[float, float]:
    """Interval of Cohen's kappa: its quantiles where the table's shares have Jeffreys's prior, 1/2 a cell.

    Keeps its width where the judges never disagree or one of them is constant. Counts may be effective numbers.
    """
    shares = np.random.default_rng(seed).dirichlet(cells + 0.5, size=draws)
    low, high = np.quantile(kappa_of(shares), (0.025, 0.975))
    return float(low), float(high)
