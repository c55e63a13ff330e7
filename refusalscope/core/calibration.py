"""How far probabilities are what they say: expected calibration error, Brier score, temperature, thresholds.

Plain arrays in, numbers with their doubt out; prompts of one cluster are one draw. Knows nothing of probes.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import NDArray

from refusalscope.core import stats
from refusalscope.core.intervals import wilson
from refusalscope.core.stats import NOTHING, Estimate

BINS = 10
RESAMPLES = 2_000
HOTTEST = 100.0
"""The largest temperature tried, and one over the smallest."""
STEPS = 200


class Bin(NamedTuple):
    """Prompts of like probability, and how many of them are positive."""

    n: int
    probability: float
    """Their mean."""
    positive: Estimate
    """Share of positives, Wilson's interval."""


def sigmoid(logits: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)), without overflow at either end."""
    x = np.asarray(logits, dtype=float)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def brier(probabilities: Sequence[float], labels: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Mean squared distance of probability and label (Brier 1950); a NaN on either side is unscored.

    The interval is Wilson's at the n of independent yes-or-no draws whose rate has the mean's cluster variance: a
    bootstrap has nothing to draw where a few prompts make up the whole score.
    """
    squares = (np.asarray(probabilities, dtype=float) - np.asarray(labels, dtype=float)) ** 2
    known = ~np.isnan(squares)
    if not known.any():
        return NOTHING
    names, cluster = np.unique(np.asarray(clusters)[known], return_inverse=True)
    kept, n, k = squares[known], int(known.sum()), len(names)
    found = float(kept.mean())
    variance = k / max(1, k - 1) * float((np.bincount(cluster, weights=kept - found) ** 2).sum()) / n**2
    effective = found * (1 - found) / variance if variance > 1e-18 else float(k)
    low, high = wilson(found * effective, effective)
    return Estimate(n, found, low, high, float(known.mean()))


def expected_error(
    probabilities: Sequence[float], labels: Sequence[float], clusters: Sequence[str], *, seed: int = 0
) -> Estimate:
    """Expected calibration error over bins of equal mass: the mean distance of a bin's probability and its positives.

    The interval is a basic bootstrap of whole clusters with the bins as they are: resampling adds to the error what
    sampling already did, which the basic interval takes off again. It begins at 0 where the error is no larger than
    sampling alone makes it (the same resamples about their own means). A NaN on either side is unscored.
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    known = ~np.isnan(p + y)
    if not known.any():
        return NOTHING
    names, cluster = np.unique(np.asarray(clusters)[known], return_inverse=True)
    bins, gap = equal_mass(p[known]), p[known] - y[known]
    table = np.zeros((len(names), bins.max() + 1))
    np.add.at(table, (cluster, bins), gap)
    size = np.bincount(cluster).astype(float)
    found = float(np.abs(table.sum(0)).sum() / size.sum())
    draws = _draws(len(names), seed)
    drawn, total = draws @ table, (draws @ size)[:, None]
    low, high = np.quantile(np.abs(drawn).sum(1) / total[:, 0], (0.025, 0.975))
    noise = np.abs(drawn - table.sum(0) * total / size.sum()).sum(1) / total[:, 0]
    ends = [max(0.0, 2 * found - high), max(0.0, 2 * found - low)]
    if found <= np.quantile(noise, 0.975):
        ends[0] = 0.0
    return Estimate(int(known.sum()), found, min(ends[0], found), max(ends[1], found), float(known.mean()))


@lru_cache(maxsize=2)
def _draws(clusters: int, seed: int) -> Float[ndarray, "resample cluster"]:
    """How often each resample holds each cluster."""
    # Every probe is measured on the same two sets of prompts in turn: where each drew anew, the 104 errors of the
    # testbed took 2.8 s, and drawn once for each set they take 0.2 s.
    drawn = np.random.default_rng(seed).multinomial(clusters, [1 / clusters] * clusters, RESAMPLES).astype(float)
    drawn.flags.writeable = False
    return drawn


def equal_mass(probabilities: Float[ndarray, "prompt"], bins: int = BINS) -> NDArray[np.int64]:
    """The bin of every probability, as many to a bin as can be; equal ones share a bin, so there may be fewer."""
    inner = np.quantile(probabilities, np.arange(1, bins) / bins, method="lower")
    _, index = np.unique(np.searchsorted(inner, probabilities, side="left"), return_inverse=True)
    return index


def reliability(
    probabilities: Sequence[float], labels: Sequence[float], clusters: Sequence[str], bins: int = BINS
) -> list[Bin]:
    """What a reliability figure shows: the bins of `expected_error`, lowest first."""
    p, y = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    known = ~np.isnan(p + y)
    if not known.any():
        return []
    index, names = equal_mass(p[known], bins), np.asarray(clusters)[known]
    made = []
    for number in range(index.max() + 1):
        inside = index == number
        share = stats.rate(y[known][inside].tolist(), names[inside].tolist())
        made.append(Bin(int(inside.sum()), float(p[known][inside].mean()), share))
    return made


def temperature(logits: Sequence[float], labels: Sequence[float]) -> float:
    """T that makes sigmoid(logit / T) likeliest (Guo et al. 2017), between 1 / HOTTEST and HOTTEST.

    Against Platt's targets (1999), (n1 + 1) / (n1 + 2) and 1 / (n0 + 2): where the classes are told apart without
    fault, 0 and 1 would ask for T = 0. Raises ValueError where one class is missing.
    """
    x, y = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    ones, zeros = float((y == 1).sum()), float((y == 0).sum())
    if not (ones and zeros):
        raise ValueError("a temperature needs prompts of both classes")
    targets = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))

    def loss(log_t: float) -> float:
        scaled = x / math.exp(log_t)
        return float((np.logaddexp(0, scaled) - targets * scaled).mean())

    # The loss is convex in 1 / T, hence unimodal in log T: golden sections find its least.
    low, high, ratio = -math.log(HOTTEST), math.log(HOTTEST), (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


def threshold(negatives: Sequence[float], rate: float) -> float:
    """The least score above which at most `rate` of the negatives lie; what is above it is flagged.

    Raises ValueError where there are too few negatives for the rate to be more than none of them.
    """
    ordered = np.sort(np.asarray(negatives, dtype=float))[::-1]
    allowed = math.floor(rate * len(ordered) + 1e-9)
    if not allowed:
        raise ValueError(f"a false positive rate of {rate:.1%} needs {math.ceil(1 / rate)} negatives or more")
    return float(ordered[allowed])
