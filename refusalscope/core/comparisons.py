"""Scores of the same prompts under several edits: rates, changes against the unedited model, methods in pairs.

Whoever scored them. Random draws of one setting are also taken together, a prompt's answers under all of them as one
cluster. Knows how a benchmark's settings are spelled, nothing of files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from refusalscope.core import stats
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Responses, Row

UNEDITED = "base"
"""The method that every other is compared with."""


class Scored(NamedTuple):
    """One data set under one method and setting: a score for each prompt, NaN where there is none."""

    dataset: str
    method: str
    setting: str
    scores: Sequence[float]
    clusters: Sequence[str]

    @classmethod
    def of(cls, answered: Responses, judge: str, clusters: Sequence[str]) -> "Scored":
        """What one judge gave to each answer."""
        return cls(answered.dataset, answered.method, answered.setting, answered.score(judge), clusters)

    def row(self, metric: str, estimate: Estimate) -> Row:
        return Row(self.dataset, self.method, metric, self.setting, *estimate)


def with_pooled(scored: Sequence[Scored]) -> list[Scored]:
    """All of them, and after them the random draws of each setting taken together."""
    groups: dict[tuple[str, str, str], list[Scored]] = {}
    for one in scored:
        if pooled := pooled_setting(one.setting):
            groups.setdefault((one.dataset, one.method, pooled), []).append(one)
    together = [
        Scored(*key, [s for one in group for s in one.scores], [c for one in group for c in one.clusters])
        for key, group in groups.items()
    ]
    return [*scored, *together]


def changes(scored: Sequence[Scored], metric: str, *, what: str) -> list[Row]:
    """`change` of every edit, and of random draws taken together, where the data set was scored without edits."""
    base = {one.dataset: one.scores for one in scored if one.method == UNEDITED}
    edited = [one for one in with_pooled(scored) if one.method != UNEDITED and one.dataset in base]
    return [change(one, base[one.dataset], metric, what=what) for one in edited]


def change(one: Scored, base: Sequence[float], metric: str, *, what: str) -> Row:
    """Share under an edit minus the share without, prompt by prompt; of pooled draws each against the same `base`.

    A single random draw claims nothing by itself and is in no family. `what` says in a family's name what is compared.
    """
    kind = "value set" if one.setting.startswith("set ") else "edit"
    family = "" if pooled_setting(one.setting) else f"{what}: every {kind} against base on {one.dataset}"
    return _paired(one, [*base] * (len(one.scores) // max(1, len(base))), metric, family)


def differences(scored: Sequence[Scored], metric: str, *, what: str) -> list[Row]:
    """The reference set against every other edit of equal size, prompt by prompt; random draws by their mean.

    The reference is the first method that scales features; removing the direction is compared at every size. Where it
    was tried at several factors, on a validation set, nothing is compared.
    """
    sizes = sorted({size for one in scored if (size := scaled_size(one.setting))}, key=int)
    arms: dict[tuple[str, str], dict[str, list[Scored]]] = {}
    for one in scored:
        size = scaled_size(one.setting)
        for k in [size] if size else sizes if one.setting == "remove" else []:
            arms.setdefault((one.dataset, k), {}).setdefault(one.method, []).append(one)
    rows = []
    for (dataset, k), methods in arms.items():
        first = next((name for name in methods if name != "direction"), None)
        if first is None or (len(methods[first]) > 1 and first != "random"):
            continue
        family = f"{what}: {first} against every other method on {dataset}, K* = {k}"
        clusters = methods[first][0].clusters
        for other in (name for name in methods if name != first):
            pair = Scored(dataset, f"{first} vs {other}", f"k={k}", _mean_scores(methods[first]), clusters)
            rows.append(_paired(pair, _mean_scores(methods[other]), metric, family))
    return [row for row in rows if row.n]


def smallest(rows: Sequence[Row], clusters: Mapping[str, int]) -> list[Row]:
    """The smallest difference that each family can show after Holm, at the fewest prompts that any of its rows has.

    It takes that many discordant prompts, all one way and of different clusters, of which `clusters` says how many each
    data set has; n is 0 where there are too few. Families of one size and n on one data set share a row.
    """
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.p is not None and row.family:
            families.setdefault((row.dataset, row.family), []).append(row)
    made: dict[str, Row] = {}
    for (dataset, _), members in families.items():
        metric = "smallest_change" if "_change" in members[0].metric else "smallest_difference"
        kind = "set " if members[0].setting.startswith("set ") else ""
        n, setting = min(row.n for row in members), f"{kind}comparisons={len(members)}"
        found, estimate = stats.smallest_difference(n, len(members)), stats.NOTHING
        if found and found[0] <= clusters[dataset]:
            setting = f"{setting} discordant={found[0]}"
            estimate = Estimate(n, found[1], found[1], found[1], min(row.coverage for row in members))
        row = Row(dataset, "any", metric, setting, *estimate)
        made.setdefault(f"{row.key()}/{row.n}", row)
    return list(made.values())


def untouched(names: Sequence[str]) -> list[str]:
    """The caveat on edits that did nothing at all; none where there are none."""
    return [f"These edits changed no position at all: {', '.join(names)}."] if names else []


def pooled_setting(setting: str) -> str:
    """The setting that pools a random draw's, or the empty string."""
    head, drawn, _ = setting.partition(" draw=")
    return f"{head} mean" if drawn else ""


def scaled_size(setting: str) -> str:
    """The set size of a scaling, or the empty string."""
    found = re.fullmatch(r"scale c=\S+ k=(\d+)(?: draw=\d+)?", setting)
    return found[1] if found else ""


def _paired(one: Scored, before: Sequence[float], metric: str, family: str) -> Row:
    found = stats.paired_difference(one.scores, before, one.clusters)
    return replace(one.row(metric, found), p=stats.paired_p(one.scores, before, one.clusters), family=family)


def _mean_scores(draws: Sequence[Scored]) -> list[float]:
    """Each prompt's score, a mean over draws; NaN where any draw is unscored."""
    return [sum(scores) / len(draws) for scores in zip(*(draw.scores for draw in draws), strict=True)]
