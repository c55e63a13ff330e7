"""How few features flip a prompt, and which others wake up once those are silent? As one Finding.

Holds the names of the conditions under which activations are read. Everything is at c = 0; knows nothing of files.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refusalscope.core import stats
from refusalscope.core.scores import Scores
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Feature, Finding, NaN, Row
from refusalscope.mechanism import silencing
from refusalscope.mechanism.minimal import EXHAUSTED, LARGEST, Least, Pruned

QUESTION = "How few features have to be silent for a prompt to be answered, and which others wake up then?"
CLEAN, MINIMAL, OWN = "clean", "minimal set", "own set"
LEAST = "least set"
FAMILY = "features woken, against random silencing"
WOKEN = ("woken_any", "woken", "woken_rise")
"""Per prompt: whether any feature wakes, how many do, and by how much in all they rise, in residual units."""


@dataclass(frozen=True)
class Case:
    """One prompt and what its search came to."""

    prompt_id: str
    cluster: str
    own: tuple[Feature, ...]
    """Its top K* by attribution, in order of rank."""
    pruned: Pruned | None
    """None where not even silencing all of them flips it."""
    least: Least | None
    """None where nothing was enumerated."""
    refused_by_phrase: float
    """Whether the answer with the minimal set silenced still refuses in words; NaN without such a set."""


def silenced_sets(case: Case) -> dict[str, tuple[Feature, ...]]:
    """The sets of a prompt that are silenced to see what wakes: none for one that does not flip."""
    return {} if case.pruned is None else {MINIMAL: case.pruned.features, OWN: case.own}


def condition(what: str, prompt_id: str) -> str:
    """The name of a row of activations."""
    return f"{what}@{prompt_id}"


def summarise(
    cases: Sequence[Case],
    activations: Scores,
    *,
    dataset: str,
    k: int,
    draws: int,
    caveats: Iterable[str],
    provenance: Mapping[str, Any],
) -> Finding:
    """Sizes, memberships and true minima; what wakes up, beside random silencing matched prompt by prompt.

    `activations` hold a row for each `condition` of a prompt: clean, its sets silenced, `draws` random ones for each.
    """
    flipped = [case for case in cases if case.pruned is not None]
    made = _Rows.over(dataset, flipped)
    flips = stats.rate([float(case.pruned is not None) for case in cases], [case.cluster for case in cases])
    rows = [Row(dataset, OWN, "flipped", f"scale c=0 k={k}", *flips)]
    if flipped:
        rows += [*_size_rows(made, flipped), *_least_rows(dataset, flipped), *_inner_rows(dataset, flipped)]
        rows += [*_member_rows(made, flipped), *_woken_rows(made, flipped, activations, draws)]
    notes = [*caveats, *_notes(cases, flipped)]
    return Finding("minimal", QUESTION, tuple(stats.with_holm(rows)), tuple(notes), provenance)


class _Rows(NamedTuple):
    """Rows over some prompts; NaN is not known of one."""

    dataset: str
    clusters: Sequence[str]

    @classmethod
    def over(cls, dataset: str, cases: Sequence[Case]) -> "_Rows":
        return cls(dataset, [case.cluster for case in cases])

    def rate(self, method: str, metric: str, values: Sequence[float], setting: str = "") -> Row:
        return self.row(method, metric, setting, stats.rate(values, self.clusters))

    def mean(self, method: str, metric: str, values: Sequence[float], setting: str = "") -> Row:
        return self.row(method, metric, setting, stats.mean(values, self.clusters))

    def row(self, method: str, metric: str, setting: str, found: Estimate) -> Row:
        return Row(self.dataset, method, metric, setting, *found)


def _size_rows(made: _Rows, flipped: Sequence[Case]) -> list[Row]:
    """How large the pruned sets are, what they took, and whether the answer still refuses in words."""
    sizes = [_size(case) for case in flipped]
    tried = [float(case.pruned.tried) for case in flipped if case.pruned is not None]
    rows = [
        made.mean(MINIMAL, "size", [float(size) for size in sizes]),
        made.mean(MINIMAL, "tried", tried),
        made.rate(MINIMAL, "refused_by_phrase", [case.refused_by_phrase for case in flipped]),
    ]
    return rows + [
        made.rate(MINIMAL, "size_share", [float(own == size) for own in sizes], f"size={size}")
        for size in range(min(1, *sizes), max(sizes) + 1)
    ]


def _least_rows(dataset: str, flipped: Sequence[Case]) -> list[Row]:
    """The true minima beside the pruned sets, on the prompts where they were looked for."""
    found = [(case, case.least) for case in flipped if case.least is not None]
    if not found:
        return []
    made = _Rows.over(dataset, [case for case, _ in found])
    sizes = [LARGEST + 1 if least.features is None else len(least.features) for _, least in found]
    pruned = [_size(case) for case, _ in found]
    shares = {f"size={size}": size for size in range(1, LARGEST + 1)} | {f"size>{LARGEST}": LARGEST + 1}
    excess = [NaN if size > LARGEST else float(own - size) for own, size in zip(pruned, sizes, strict=True)]
    return [
        *(made.rate(LEAST, "size_share", [float(o == size) for o in sizes], name) for name, size in shares.items()),
        made.mean(LEAST, "tried", [float(least.tried) for _, least in found]),
        made.rate(MINIMAL, "least", [_is_least(own, size) for own, size in zip(pruned, sizes, strict=True)]),
        made.mean(MINIMAL, "excess", excess),
    ]


def _size(case: Case) -> int:
    return 0 if case.pruned is None else len(case.pruned.features)


def _is_least(own: int, least: int) -> float:
    """Whether a pruned set is as small as any; `least` is LARGEST + 1 where no set up to LARGEST flips.

    One of LARGEST + 1 is the smallest then; of a larger one nobody knows: NaN.
    """
    return NaN if own > least > LARGEST else float(own == least)


def _inner_rows(dataset: str, flipped: Sequence[Case]) -> list[Row]:
    """How often a proper subset of a pruned set flips after all, by the size of the smallest that does."""
    found = [(case, case.pruned.inner) for case in flipped if case.pruned is not None and case.pruned.inner is not None]
    if not found:
        return []
    made, inner = _Rows.over(dataset, [case for case, _ in found]), [sizes for _, sizes in found]
    rows = [made.rate(MINIMAL, "non_monotone", [float(bool(sizes)) for sizes in inner])]
    for size in sorted({min(sizes) for sizes in inner if sizes}):
        smallest = [float(bool(sizes) and min(sizes) == size) for sizes in inner]
        rows.append(made.rate(MINIMAL, "non_monotone", smallest, f"size={size}"))
    return rows


def _member_rows(made: _Rows, flipped: Sequence[Case]) -> list[Row]:
    """In how many prompts' minimal sets, and in how many of their own sets, each feature is."""
    minimal = [set(case.pruned.features) for case in flipped if case.pruned is not None]
    count = Counter(feature for own in minimal for feature in own)
    rows = []
    for feature in sorted(count, key=lambda one: (-count[one], one)):
        rows.append(made.rate(str(feature), "in_minimal", [float(feature in own) for own in minimal]))
        rows.append(made.rate(str(feature), "in_own", [float(feature in case.own) for case in flipped]))
    return rows


class _Wake(NamedTuple):
    """What woke up under one condition, prompt by prompt."""

    awake: Bool[Tensor, "prompt feature"]
    rise: Float[Tensor, "prompt feature"]
    """Value after minus before, 0 where a feature did not wake."""

    def score(self, metric: str) -> list[float]:
        """One number a prompt for a metric of WOKEN."""
        if metric == "woken_rise":
            return self.rise.double().sum(1).tolist()
        found = self.awake.sum(1)
        return (found.double() if metric == "woken" else (found > 0).double()).tolist()


def _woken_rows(made: _Rows, flipped: Sequence[Case], activations: Scores, draws: int) -> list[Row]:
    at = {name: row for row, name in enumerate(activations.prompt_ids)}
    usual = activations.values[[row for name, row in at.items() if name.startswith(f"{CLEAN}@")]].double().mean(0)

    def values(what: str) -> Float[Tensor, "prompt feature"]:
        return activations.values[[at[condition(what, case.prompt_id)] for case in flipped]]

    rows: list[Row] = []
    for what in (MINIMAL, OWN):
        hidden = torch.tensor(
            [[feature in silenced_sets(case)[what] for feature in activations.features] for case in flipped]
        )
        own, *random = (
            _wake(values(CLEAN), values(name), usual.float(), hidden)
            for name in (what, *(f"{what} draw={draw}" for draw in range(draws)))
        )
        for metric in WOKEN:
            rows += _against_random(made, what, metric, own.score(metric), [one.score(metric) for one in random])
        rows += _feature_rows(made, what, activations.features, own, random)
    return rows


def _wake(
    before: Float[Tensor, "prompt feature"],
    after: Float[Tensor, "prompt feature"],
    usual: Float[Tensor, "feature"],
    hidden: Bool[Tensor, "prompt feature"],
) -> _Wake:
    """What wakes of the features that are not `hidden`: those silenced, for a random control those it stands for."""
    awake = silencing.woken(before, after, usual) & ~hidden
    return _Wake(awake, torch.where(awake, after - before, 0.0))


def _against_random(
    made: _Rows, what: str, metric: str, own: Sequence[float], random: Sequence[Sequence[float]]
) -> list[Row]:
    """One measure of what wakes: with the set silenced, with each random draw, with all of them, and the difference."""
    estimate = made.rate if metric == "woken_any" else made.mean
    pooled = torch.tensor(random).double().mean(0).tolist()
    change = [a - b for a, b in zip(own, pooled, strict=True)]
    difference = made.mean(f"{what} vs random", f"{metric}_difference", change)
    return [
        estimate(what, metric, own, "silenced"),
        *(estimate(f"random for {what}", metric, one, f"silenced draw={draw}") for draw, one in enumerate(random)),
        made.mean(f"random for {what}", metric, pooled, "silenced mean"),
        Row(
            *(made.dataset, difference.method, difference.metric, "silenced"),
            *(difference.n, difference.estimate, difference.low, difference.high, difference.coverage),
            *(stats.paired_p(own, pooled, made.clusters), FAMILY),
        ),
    ]


def _feature_rows(
    made: _Rows, what: str, features: Sequence[Feature], own: _Wake, random: Sequence[_Wake]
) -> list[Row]:
    """In how many prompts each feature wakes, and how often with random sets silenced; the most frequent first."""
    counts, drawn = own.awake.sum(0).tolist(), torch.stack([one.awake for one in random]).double().mean(0)
    rows = []
    for column in sorted((c for c, count in enumerate(counts) if count), key=lambda c: (-counts[c], features[c])):
        name = str(features[column])
        rows.append(made.rate(name, "wakes", own.awake[:, column].double().tolist(), what))
        rows.append(made.mean(name, "wakes_random", drawn[:, column].tolist(), what))
    return rows


def _notes(cases: Sequence[Case], flipped: Sequence[Case]) -> list[str]:
    """What the sets rest on and what was not looked at."""
    still, unknown = len(cases) - len(flipped), sum(case.least is None for case in flipped)
    large = sum(case.pruned is not None and case.pruned.inner is None for case in flipped)
    notes = [
        "Minimal sets are pruned with features at c = 0, whatever strength other studies use: at a stronger one single "
        "features flip everything. A flip is a first token that does not refuse and 20 coherent tokens."
    ]
    if still:
        notes.append(f"{still} of {len(cases)} prompts do not flip with their whole own set silent: they have no set.")
    if unknown:
        notes.append(
            f"The true minimum was looked for on {len(flipped) - unknown} of {len(flipped)} prompts that flip, which "
            "bounds the time it takes."
        )
    if large:
        notes.append(
            f"{large} minimal sets hold more than {EXHAUSTED} features: of these only single removals were tried."
        )
    return notes
