"""Can these SAEs be trusted on this model's chats? What they keep, layer by layer, beside a second set if there is one.

A layer's verdict goes by whole intervals: it is trusted where every figure is shown to be good enough, and not to be
trusted where some figure is shown to be bad. What lies between is doubtful.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refusalscope.core import stats
from refusalscope.core.stats import Estimate
from refusalscope.core.types import FeatureSet, Finding, Row
from refusalscope.evals.health import Cosine, Floors, Kind, Spliced

QUESTION = "How faithfully do these SAEs carry the residual stream of this model's own chats?"
FIRST = "sae"
"""The set whose features all other studies read."""
TEMPLATE, DIRECTION = "template tokens", "refusal direction"
"""Data sets of a row: the template's tokens in the same chats; the prompts that the direction was fitted on."""
BEARING = "health/bearing.json"
"""Where a run folder keeps what the verdicts mean for its feature sets."""
RESAMPLES = 2000
TRUSTED: Mapping[str, float] = {
    "variance_explained": 0.7,
    "cross_entropy_recovered": 0.9,
    "cross_entropy_recovered_mean": 0.9,
    "direction_cosine": 0.9,
}
"""What each figure must reach on chats, and the direction's cosine, with its whole interval."""
BAD: Mapping[str, float] = {
    "variance_explained": 0.5,
    "cross_entropy_recovered": 0.8,
    "cross_entropy_recovered_mean": 0.8,
    "direction_cosine": 0.7,
}
"""Below this with its whole interval, one figure is enough to condemn a layer."""
TESTED = ("variance_explained", "cross_entropy_recovered")
"""Measures whose difference between two sets is tested."""
Word = Literal["trusted", "doubtful", "not to be trusted"]
WORDS: tuple[Word, ...] = ("trusted", "doubtful", "not to be trusted")


@dataclass(frozen=True)
class Measured:
    """Texts of one kind at one layer."""

    dataset: str
    kind: Kind
    clusters: Sequence[str]
    """One per text."""
    floors: Floors
    spliced: Mapping[str, Spliced]
    """By SAE set."""


@dataclass(frozen=True)
class Layer:
    """All that was measured at one layer."""

    layer: int
    texts: Sequence[Measured]
    cosines: Mapping[str, Cosine]
    """By SAE set."""


class Trust(NamedTuple):
    """The verdict on one layer of one set, and what speaks against it."""

    layer: int
    sae_set: str
    word: Word
    reasons: tuple[str, ...]


def summarise(layers: Sequence[Layer], *, caveats: Sequence[str] = (), provenance: Mapping[str, Any]) -> Finding:
    """One row per kind of text, set, layer and measure; with two sets also their paired differences."""
    rows = [row for layer in layers for row in _rows(layer)]
    order = list(dict.fromkeys(row.dataset for row in rows if row.dataset != DIRECTION))
    rows.sort(key=lambda row: ([*order, DIRECTION].index(row.dataset), row.method != FIRST, " vs " in row.method))
    finding = Finding("health", QUESTION, tuple(stats.with_holm(rows)), (), provenance)
    doubts = [_doubt(trusts, name) for name, trusts in _by_set(verdicts(finding)).items()]
    return Finding(finding.study, QUESTION, finding.rows, (*caveats, *filter(None, doubts)), provenance)


def verdicts(finding: Finding) -> list[Trust]:
    """One verdict per layer and set, from the rows on chats and the direction's cosine; layer by layer."""
    chats = next((row.dataset for row in finding.rows if row.dataset not in (TEMPLATE, DIRECTION)), "")
    judged: dict[tuple[str, int], list[Row]] = {}
    for row in finding.rows:
        if row.dataset in (chats, DIRECTION) and row.metric in TRUSTED:
            judged.setdefault((row.method, int(row.setting.removeprefix("layer="))), []).append(row)
    found = sorted(judged.items(), key=lambda item: item[0][1])
    return [_verdict(name, layer, rows) for (name, layer), rows in found]


def bearing(finding: Finding, sets: Mapping[str, FeatureSet]) -> list[str]:
    """For every feature set, how many of its features lie in layers of each verdict."""
    words = {trust.layer: trust.word for trust in verdicts(finding) if trust.sae_set == FIRST}
    made = []
    for name, chosen in sets.items():
        held = Counter(words.get(feature.layer, "not measured") for feature in chosen.features)
        parts = [f"{held[word]} in layers that are {word}" for word in (*WORDS, "not measured") if held[word]]
        if parts:
            made.append(f"{name}: of {len(chosen)} features, {', '.join(parts)}.")
    return made


def _rows(layer: Layer) -> Iterator[Row]:
    setting = f"layer={layer.layer}"
    for texts in layer.texts:
        for name in texts.spliced:
            for metric, estimate in _measures(texts, name).items():
                yield Row(texts.dataset, name, metric, setting, *estimate)
        for name in texts.spliced:
            if name != FIRST:
                yield from _differences(texts, name, setting)
    for name, cosine in layer.cosines.items():
        yield Row(DIRECTION, name, "direction_cosine", setting, *_interval(cosine, cosine.cosine, cosine.draws))
        if name != FIRST:
            first = layer.cosines[FIRST]
            draws = np.subtract(cosine.draws, first.draws).tolist()
            estimate = _interval(cosine, cosine.cosine - first.cosine, draws)
            yield Row(DIRECTION, f"{name} vs {FIRST}", "direction_cosine_difference", setting, *estimate)


def _measures(texts: Measured, name: str) -> dict[str, Estimate]:
    """Totals over all texts as ratios of sums."""
    floors, own = texts.floors, texts.spliced[name]
    parts = {
        "variance_explained": (np.subtract(floors.variance, own.error), floors.variance),
        "cross_entropy_recovered": (np.subtract(floors.zero, own.cross_entropy), _gap(floors.zero, floors)),
        "cross_entropy_recovered_mean": (np.subtract(floors.mean, own.cross_entropy), _gap(floors.mean, floors)),
        "l0": (own.active, floors.tokens),
    }
    return {metric: _ratio(part, whole, texts) for metric, (part, whole) in parts.items()}


def _differences(texts: Measured, name: str, setting: str) -> Iterator[Row]:
    """The second set minus the first on the same texts: same wholes, paired parts."""
    floors, own, first = texts.floors, texts.spliced[name], texts.spliced[FIRST]
    less_error = np.subtract(first.error, own.error)
    less_loss = np.subtract(first.cross_entropy, own.cross_entropy)
    parts = {
        "variance_explained": (less_error, floors.variance),
        "cross_entropy_recovered": (less_loss, _gap(floors.zero, floors)),
        "cross_entropy_recovered_mean": (less_loss, _gap(floors.mean, floors)),
        "l0": (np.subtract(own.active, first.active), floors.tokens),
    }
    for metric, (part, whole) in parts.items():
        estimate, p, family = _ratio(part, whole, texts), None, ""
        if metric in TESTED and estimate.n:
            p = stats.paired_p(part.tolist(), [0.0] * len(part), texts.clusters)
            family = f"{metric} on {texts.dataset}: {name} against {FIRST}, layer by layer"
        yield Row(texts.dataset, f"{name} vs {FIRST}", f"{metric}_difference", setting, *estimate, p, family)


def _gap(floor: Sequence[float], floors: Floors) -> NDArray[np.float64]:
    return np.subtract(floor, floors.clean)


def _ratio(part: ArrayLike, whole: ArrayLike, texts: Measured) -> Estimate:
    parts, wholes = (np.asarray(one, dtype=float).tolist() for one in (part, whole))
    return stats.ratio(parts, wholes, texts.clusters, resamples=RESAMPLES)


def _interval(cosine: Cosine, estimate: float, draws: Sequence[float]) -> Estimate:
    """Percentiles of the draws, widened to the estimate where noise alone has moved all of them."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(cosine.prompts, estimate, min(float(low), estimate), max(float(high), estimate), 1.0)


def _verdict(name: str, layer: int, rows: Iterable[Row]) -> Trust:
    short, bad = [], []
    for row in rows:
        what = row.metric.replace("_", " ")
        if row.low is None or row.high is None:
            short.append(f"{what} could not be measured")
        elif row.high < BAD[row.metric]:
            bad.append(f"{what} is below {BAD[row.metric]:g}")
        elif row.low < TRUSTED[row.metric]:
            short.append(f"{what} is not shown to reach {TRUSTED[row.metric]:g}")
    word: Word = "not to be trusted" if bad else "doubtful" if short else "trusted"
    return Trust(layer, name, word, (*bad, *short))


def _by_set(trusts: Iterable[Trust]) -> dict[str, list[Trust]]:
    made: dict[str, list[Trust]] = {}
    for trust in trusts:
        made.setdefault(trust.sae_set, []).append(trust)
    return made


def _doubt(trusts: Sequence[Trust], name: str) -> str:
    """Which layers of a set are less than trusted, in a sentence; empty where none is."""
    found = {word: [str(trust.layer) for trust in trusts if trust.word == word] for word in WORDS[1:]}
    parts = [f"{word} at layers {', '.join(layers)}" for word, layers in found.items() if layers]
    called = "The SAEs" if name == FIRST else f"The SAEs of the set {name}"
    return f"{called} are {' and '.join(parts)} (see SAE health)." if parts else ""
