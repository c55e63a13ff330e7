"""What do attacks silence, and is that why they work? Pairs and restored answers in, one Finding out.

The relative drop of a sum on a pair is 1 minus the attack's over the plain form's. Knows nothing of files.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from numpy.typing import NDArray

from refusalscope.core import ranking, stats
from refusalscope.core.types import Feature, Finding, NaN, Responses, Row

QUESTION = "Which features does an attack silence, and does setting them back bring refusal back?"
SUCCEEDED, FAILED = "succeeded", "failed"
LEAST = 0.05
"""A pair whose plain sum is under this share of the median has no relative drop."""
COMMON, PROJECTION = "common", "projection"
RESTORE = "restore"
BOTH = "refused_coherently"
CONTROLS = ("random direction", "harmless prompt", "random features")


class Seen(NamedTuple):
    """What one side of every pair shows."""

    closing: Float[ndarray, "pair feature"]
    """Sum over closing tokens, residual units, as all activations here."""
    total: Float[ndarray, "pair feature"]
    """Sum over instruction tokens."""
    highest: Float[ndarray, "pair feature"]
    """Largest over instruction tokens."""
    average: Float[ndarray, "pair feature"]
    """Mean over all positions, BOS included: what the paper takes, which length alone lowers."""
    projection: Float[ndarray, "pair"]
    """On the direction at its layer, above harmless prompts' mean at the same token; sum over closing tokens."""


@dataclass(frozen=True)
class Measured:
    """All pairs, attacks that succeeded and attacks that failed."""

    features: tuple[Feature, ...]
    common: tuple[Feature, ...]
    harm: Bool[ndarray, "pair feature"]
    """Which features are harm features for the pair."""
    families: tuple[str, ...]
    clusters: tuple[str, ...]
    outcomes: tuple[str, ...]
    plain: Seen
    adversarial: Seen
    sham: Seen
    """The plain form behind neutral words, as long as the attack."""

    @property
    def succeeded(self) -> list[bool]:
        return [outcome == SUCCEEDED for outcome in self.outcomes]

    @property
    def vulnerable(self) -> list[bool]:
        """Whether attacks of the pair's family both succeeded and failed."""
        seen = set(zip(self.families, self.outcomes, strict=True))
        return [{(family, SUCCEEDED), (family, FAILED)} <= seen for family in self.families]


@dataclass(frozen=True)
class Restored:
    """Successful attacks answered again, scored, under every arm."""

    prompt_ids: tuple[str, ...]
    families: tuple[str, ...]
    clusters: tuple[str, ...]
    answers: tuple[Responses, ...]
    single: tuple[str, ...]
    """Methods that set back one feature alone."""
    notes: tuple[str, ...] = ()

    def of(self, method: str) -> list[Responses]:
        """The arms of a method: one, or its draws."""
        return [made for made in self.answers if made.method == method]


def summarise(
    measured: Measured, restored: Restored, *, caveats: Iterable[str], provenance: Mapping[str, Any]
) -> Finding:
    """Drops by group and family, how they differ and tell success from failure, and what restoring brings back."""
    drops, lost = _drops(measured)
    rows = [
        *_success_rows(measured),
        *(row for name, sides in drops.items() for row in _group_rows(measured, name, *sides)),
        *(row for name in drops for row in _difference_rows(measured, name, drops[name][0])),
        *_telling_rows(measured, drops[COMMON][0], drops[PROJECTION][0]),
        *_feature_rows(measured),
        *_restored_rows(restored),
    ]
    counts = Counter(measured.outcomes)
    notes = [
        f"{len(measured.outcomes)} pairs: {counts[SUCCEEDED]} attacks succeeded, {counts[FAILED]} failed, of "
        f"{len(set(measured.families))} families; {sum(measured.vulnerable)} pairs are of families with both outcomes.",
        *lost,
        *restored.notes,
    ]
    if len(restored.prompt_ids) < counts[SUCCEEDED]:
        notes.append(
            f"{len(restored.prompt_ids)} of {counts[SUCCEEDED]} successful attacks are answered again with features "
            "set back, one of each family in turn."
        )
    elif not counts[SUCCEEDED]:
        notes.append("No attack succeeded: nothing could be set back.")
    return Finding("jailbreaks", QUESTION, tuple(stats.with_holm(rows)), (*caveats, *notes), provenance)


def _success_rows(measured: Measured) -> list[Row]:
    """How many attacks pass of those on a request that is refused plainly: of all, and family by family."""
    places: dict[str, list[int]] = {"all pairs": list(range(len(measured.outcomes)))}
    for family in sorted(set(measured.families)):
        places[f"family={family}"] = [at for at, own in enumerate(measured.families) if own == family]
    return [
        Row(
            *("pairs", "base", "succeeded", setting),
            *stats.rate([float(measured.succeeded[at]) for at in inside], [measured.clusters[at] for at in inside]),
        )
        for setting, inside in places.items()
    ]


Drop = NDArray[np.float64]


def _drops(measured: Measured) -> tuple[dict[str, tuple[Drop, Drop]], list[str]]:
    """Measure -> its drops on attacks and on shams, NaN where the plain sum is too small; and how many are."""
    made, lost = {}, []
    wanted = np.array([feature in set(measured.common) for feature in measured.features])

    def sums(seen: Seen) -> dict[str, Drop]:
        counted = np.maximum(1, measured.harm.sum(1))
        return {
            COMMON: seen.closing[:, wanted].sum(1),
            PROJECTION: seen.projection,
            "harm, sum": (seen.total * measured.harm).sum(1),
            "harm, maximum": (seen.highest * measured.harm).sum(1),
            "harm, mean (paper)": (seen.average * measured.harm).sum(1) / counted,
        }

    before, after, shammed = sums(measured.plain), sums(measured.adversarial), sums(measured.sham)
    for name, plain in before.items():
        usable = (plain > 0) & (plain >= LEAST * np.median(plain))
        divisor = np.where(usable, plain, NaN)
        made[name] = (1 - after[name] / divisor, 1 - shammed[name] / divisor)
        if not usable.all():
            lost.append(
                f"{name}: {int((~usable).sum())} of {len(plain)} pairs have no relative drop, their plain sum is under "
                f"{LEAST:.0%} of the median."
            )
    return made, lost


def _group_rows(measured: Measured, name: str, drop: Drop, sham: Drop) -> list[Row]:
    """Mean drop by outcome, then by family and outcome, then on shams."""
    outcomes, families = np.array(measured.outcomes), np.array(measured.families)
    rows = []
    for outcome in (SUCCEEDED, FAILED):
        rows.append(_mean(measured, name, outcome, drop, outcomes == outcome))
        rows.append(_mean(measured, f"{name}, sham", outcome, sham, outcomes == outcome))
    for family in sorted(set(measured.families)):
        for outcome in (SUCCEEDED, FAILED):
            inside = (outcomes == outcome) & (families == family)
            if inside.any() and name in (COMMON, PROJECTION):
                rows.append(_mean(measured, name, f"{outcome} family={family}", drop, inside))
    return rows


def _mean(
    measured: Measured, method: str, setting: str, values: Drop, inside: NDArray[np.bool_], weights: Drop | None = None
) -> Row:
    names = [name for name, keep in zip(measured.clusters, inside, strict=True) if keep]
    mass = None if weights is None else weights[inside].tolist()
    return Row("pairs", method, "drop", setting, *stats.mean(values[inside].tolist(), names, weights=mass))


def _difference_rows(measured: Measured, name: str, drop: Drop) -> list[Row]:
    """Succeeded minus failed: within families, over the families with both outcomes, and over all pairs."""
    mine = [at for at, inside in enumerate(measured.vulnerable) if inside]
    every, once = range(len(drop)), [""] * len(drop)
    scopes = {
        "within families": (mine, measured.families),
        "vulnerable families": (mine, once),
        "all pairs": (every, once),
    }
    made = []
    for setting, (places, strata) in scopes.items():
        columns = (drop.tolist(), measured.succeeded, strata, measured.clusters)
        given = [[column[at] for at in places] for column in columns]
        found, p = ranking.stratified_difference(*given), ranking.stratified_p(*given)
        family = f"drop, succeeded minus failed, {setting}"
        made.append(Row("pairs", name, "drop_difference", setting, *found, p, family if p is not None else ""))
    return made


def _telling_rows(measured: Measured, common: Drop, projection: Drop) -> list[Row]:
    """How well each drop tells success from failure, and one against the other."""
    rows = []
    scopes = {"vulnerable families": np.array(measured.vulnerable), "all pairs": np.ones(len(common), dtype=bool)}
    ones, names = np.array(measured.succeeded), np.array(measured.clusters)
    for setting, inside in scopes.items():
        up, down = inside & ones, inside & ~ones
        clusters = (names[up].tolist(), names[down].tolist())
        sides = {n: (d[up].tolist(), d[down].tolist()) for n, d in ((COMMON, common), (PROJECTION, projection))}
        rows += [Row("pairs", name, "auroc", setting, *ranking.auroc(*side, *clusters)) for name, side in sides.items()]
        apart = ranking.auroc_difference(sides[COMMON], sides[PROJECTION], *clusters)
        rows.append(Row("pairs", f"{COMMON} vs {PROJECTION}", "auroc_difference", setting, *apart))
    return rows


def _feature_rows(measured: Measured) -> list[Row]:
    """Each common feature by itself: its drop as a ratio of totals, since many a pair's own plain value is 0."""
    rows = []
    outcomes = np.array(measured.outcomes)
    for feature in measured.common:
        at = measured.features.index(feature)
        plain, adversarial = measured.plain.closing[:, at], measured.adversarial.closing[:, at]
        if not plain.sum():
            continue
        mass = np.maximum(plain, 1e-9 * plain.mean())
        for outcome in (SUCCEEDED, FAILED):
            inside = outcomes == outcome
            if plain[inside].any():
                rows.append(_mean(measured, str(feature), outcome, (plain - adversarial) / mass, inside, mass))
        change = ((plain - adversarial) / plain.mean()).tolist()
        given = (change, measured.succeeded, measured.families, measured.clusters)
        found, p = ranking.stratified_difference(*given), ranking.stratified_p(*given)
        family = "drop of single features, succeeded minus failed within families"
        row = Row("pairs", str(feature), "drop_difference", "within families", *found, p, family if found.n else "")
        rows.append(row)
    return rows


def _both(answered: Responses) -> list[float]:
    """Per answer whether it refuses and is coherent at once."""
    return [a * b for a, b in zip(answered.score("refused"), answered.score("coherent"), strict=True)]


def _restored_rows(restored: Restored) -> list[Row]:
    """How often refusal returns: under every arm, draws also pooled; the whole set against each control."""
    rows = []
    for method in dict.fromkeys(made.method for made in restored.answers):
        arms = restored.of(method)
        for made in arms:
            rows += _rates(restored, method, made.setting, [made])
        if len(arms) > 1:
            rows += _rates(restored, method, f"{RESTORE} mean", arms)
    if not restored.of(COMMON):
        return rows
    whole = _both(restored.of(COMMON)[0])
    for control in CONTROLS:
        if arms := restored.of(control):
            rows.append(_against(restored, whole, control, arms))
            share = stats.rate([float(np.nanmean(_both(made)) < np.nanmean(whole)) for made in arms])
            rows.append(Row("restored", f"{COMMON} vs {control}", "above_draws", RESTORE, *share))
    return [*rows, *_explaining_rows(restored, whole)]


def _rates(restored: Restored, method: str, setting: str, arms: Sequence[Responses]) -> list[Row]:
    clusters = list(restored.clusters) * len(arms)
    scores = {BOTH: [score for made in arms for score in _both(made)]}
    scores["refused"] = [score for made in arms for score in made.score("refused")]
    scores["coherent"] = [score for made in arms for score in made.score("coherent")]
    return [
        Row("restored", method, metric, setting, *stats.rate(values, clusters)) for metric, values in scores.items()
    ]


def _against(restored: Restored, whole: Sequence[float], control: str, arms: Sequence[Responses]) -> Row:
    """The whole set minus the mean over a control's draws, prompt by prompt."""
    mean = np.mean([_both(made) for made in arms], axis=0).tolist()
    found = stats.paired_difference(whole, mean, restored.clusters)
    p = stats.paired_p(whole, mean, restored.clusters)
    family = "refusal restored: the common features against controls" if p is not None else ""
    return Row("restored", f"{COMMON} vs {control}", "refused_coherently_difference", RESTORE, *found, p, family)


def _explaining_rows(restored: Restored, whole: Sequence[float]) -> list[Row]:
    """Of the attacks that the whole set turns back: what share each feature turns back alone, and any of them."""
    turned = [at for at, score in enumerate(whole) if score == 1]
    clusters = [restored.clusters[at] for at in turned]
    alone = {name: [_both(restored.of(name)[0])[at] for at in turned] for name in restored.single}
    if not turned:
        return []
    rows = [Row("restored", name, "suffices", RESTORE, *stats.rate(found, clusters)) for name, found in alone.items()]
    any_of = np.max(list(alone.values()), axis=0).tolist()
    return [*rows, Row("restored", "any single feature", "suffices", RESTORE, *stats.rate(any_of, clusters))]


def explained(restored: Restored) -> dict[str, Any]:
    """For each attack answered again: whether the whole set turns it back, and which features do so alone."""
    whole = {made.method: _both(made) for made in restored.answers if made.setting == RESTORE}
    return {
        "pairs": [
            {
                "id": name,
                "family": restored.families[at],
                "restored": bool(whole[COMMON][at] == 1),
                "alone": [single for single in restored.single if whole[single][at] == 1],
            }
            for at, name in enumerate(restored.prompt_ids)
        ]
    }
