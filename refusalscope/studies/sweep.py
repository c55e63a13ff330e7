"""How strong should an edit be? Refusal, coherent answers and cost over set size and factor, as one Finding.

Holds the one rule by which a strength is chosen (`choose`). Everything is measured on validation prompts; knows nothing
of files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from refusalscope.core import comparisons, stats
from refusalscope.core.comparisons import Scored
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Finding, Prompts, Responses, Row
from refusalscope.evals.capability import Cost

QUESTION = "How many features should be edited, and how strongly, for coherent answers at the least cost?"
RATES = ("refused", "answered", "coherent", "complied")
COSTS = ("cross_entropy_change", "kl")
JOINT = "refused_coherently"
"""Refused and coherent at once: what inducing refusal is after."""


class Cell(NamedTuple):
    """One strength, and what it did."""

    k: int
    """Features edited."""
    amount: float
    """The factor c that they are scaled by, or the value v that they are set to."""
    answers: Responses
    cost: Cost


class Candidate(NamedTuple):
    """A strength as the rule sees it."""

    setting: str
    wanted: Sequence[float]
    """One score a prompt: 1 where the edit did what it is for, NaN where that is not known."""
    kl: float
    """Its cost, nats per token."""
    mildness: tuple[float, ...]
    """Smaller is milder."""


class Choice(NamedTuple):
    """The strength to use, and what it was chosen among."""

    setting: str
    best: str
    """The one that did what it is for most often."""
    near: tuple[str, ...]
    """All that are not discernibly worse than that, itself included."""


def choose(candidates: Sequence[Candidate], before: Sequence[float], clusters: Sequence[str]) -> Choice | None:
    """Of the strengths that work and are not discernibly worse than the best, the cheapest.

    A strength works if it does what the edit is for on discernibly more prompts than no edit (`before`) does; the best
    does so on the most. Differences are paired and discernible where their 95 % interval does not hold 0. The cheapest
    has the least KL on the unedited model's own harmless answers; ties, here and for the best, go to the mildest edit.
    None where no strength works.
    """
    working = [one for one in candidates if _difference(one.wanted, before, clusters).low > 0]
    if not working:
        return None
    best = min(working, key=lambda one: (-_share(one.wanted), one.kl, one.mildness))
    near = [one for one in working if one is best or _difference(one.wanted, best.wanted, clusters).high >= 0]
    chosen = min(near, key=lambda one: (one.kl, one.mildness))
    return Choice(chosen.setting, best.setting, tuple(one.setting for one in near))


class _Ends(NamedTuple):
    low: float
    high: float


def _difference(scores: Sequence[float], others: Sequence[float], clusters: Sequence[str]) -> _Ends:
    """The interval of a paired difference; without a scored pair it is below every number."""
    found = stats.paired_difference(scores, others, clusters)
    return _Ends(-math.inf if found.low is None else found.low, -math.inf if found.high is None else found.high)


def _share(scores: Sequence[float]) -> float:
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known)


def choose_scaling(cells: Sequence[Cell], base: Responses, prompts: Prompts) -> Choice | None:
    """The rule for scaling: wanted are coherent answers; milder are fewer features and a factor nearer 1."""
    candidates = [_candidate(cell, cell.answers.score("answered"), abs(1 - cell.amount)) for cell in cells]
    return choose(candidates, base.score("answered"), prompts.clusters)


def choose_induction(cells: Sequence[Cell], base: Responses, prompts: Prompts) -> Choice | None:
    """The rule for setting features: wanted are coherent refusals; milder are smaller values."""
    candidates = [_candidate(cell, coherent_refusals(cell.answers), abs(cell.amount)) for cell in cells]
    return choose(candidates, coherent_refusals(base), prompts.clusters)


def _candidate(cell: Cell, wanted: Sequence[float], strength: float) -> Candidate:
    weights = cell.cost.weights("kl")
    tokens = sum(weights)
    nats = sum(kl * count for kl, count in zip(cell.cost.kl, weights, strict=True))
    return Candidate(cell.answers.setting, wanted, nats / tokens if tokens else math.inf, (cell.k, strength))


def coherent_refusals(answers: Responses) -> list[float]:
    """Per answer whether it refuses and is coherent at once."""
    return [a * b for a, b in zip(answers.score("refused"), answers.score("coherent"), strict=True)]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The settings whose (effect, cost) no other one beats in one and reaches in the other, by ascending cost."""
    front: list[str] = []
    reached = -math.inf
    for name, (effect, _) in sorted(points.items(), key=lambda item: (item[1][1], -item[1][0])):
        if effect > reached:
            front.append(name)
            reached = effect
    return front


def summarise(
    scaled: Sequence[Cell],
    induced: Sequence[Cell],
    base: Mapping[str, Responses],
    prompts: Mapping[str, Prompts],
    *,
    cost_prompts: str,
    caveats: Iterable[str],
    provenance: Mapping[str, Any],
) -> Finding:
    """Every cell's rates, its paired change of refusal, its costs; `provenance["chosen"]` holds what the rule chose.

    `base` and `prompts` go by data set; induction is judged on `cost_prompts`, scaling on the other.
    """
    rows = [row for answers in base.values() for row in _rates(answers, prompts[answers.dataset].clusters)]
    for cell in (*scaled, *induced):
        clusters = prompts[cell.answers.dataset].clusters
        scored = Scored.of(cell.answers, "refused", clusters)
        before = base[cell.answers.dataset].score("refused")
        rows += _rates(cell.answers, clusters)
        rows.append(comparisons.change(scored, before, "refused_change", what="refused"))
        rows += _cost_rows(cell, prompts[cost_prompts])
    asked = next(name for name in base if name != cost_prompts)
    chosen = {
        "scale": choose_scaling(scaled, base[asked], prompts[asked]),
        "set": choose_induction(induced, base[cost_prompts], prompts[cost_prompts]),
    }
    known = {name: made._asdict() for name, made in chosen.items() if made is not None}
    notes = [*caveats, *_notes(scaled, chosen["scale"], len(prompts[asked]))]
    notes += comparisons.untouched([c.answers.setting for c in (*scaled, *induced) if c.answers.changed == 0])
    clusters = {name: len(set(asked.clusters)) for name, asked in prompts.items()}
    rows = [*stats.with_holm(rows), *comparisons.smallest(rows, clusters)]
    return Finding("sweep", QUESTION, tuple(rows), tuple(notes), {**provenance, "chosen": known})


def _notes(scaled: Sequence[Cell], chosen: Choice | None, n: int) -> list[str]:
    if chosen is None:
        return [
            "No strength tried makes the model answer discernibly more validation prompts coherently: none is chosen."
        ]
    notes = [
        f"The strength was chosen as one of {len(scaled)} on these very {n} validation prompts, so its rates here "
        "flatter it: what it does is for the test prompts of a run to say."
    ]
    if fewest := _fewest_discordant(n):
        notes.append(
            f"The rule tells two strengths apart here from {fewest} discordant prompts of different intents on, all "
            f"one way ({fewest / n:.1%})."
        )
    factors = {cell.answers.setting: cell.amount for cell in scaled}
    for edge, end, word in ((min, "strongest", "stronger"), (max, "mildest", "milder")):
        if len(set(factors.values())) > 1 and factors[chosen.best] == edge(factors.values()):
            notes.append(
                f"The most prompts are answered at the {end} factor tried, c = {factors[chosen.best]:g}: a {word} one "
                "may do better (--factor)."
            )
    return notes


def _fewest_discordant(n: int) -> int | None:
    """How many of `n` prompts must differ, all one way, for the paired interval not to hold 0; None: even all."""
    for found in range(1, n + 1):
        if _difference([1.0] * found + [0.0] * (n - found), [0.0] * n, [str(i) for i in range(n)]).low > 0:
            return found
    return None


def _rates(answers: Responses, clusters: Sequence[str]) -> list[Row]:
    judged = {name for row in answers.rows for name in row.scores}
    made = {name: answers.score(name) for name in RATES if name in judged}
    made[JOINT] = coherent_refusals(answers)
    return [_row(answers, metric, stats.rate(scores, clusters)) for metric, scores in made.items()]


def _cost_rows(cell: Cell, prompts: Prompts) -> list[Row]:
    cluster = dict(zip(prompts.ids, prompts.clusters, strict=True))
    names = [cluster[prompt] for prompt in cell.cost.prompt_ids]
    return [
        Row(
            *(prompts.name, cell.answers.method, metric, cell.answers.setting),
            *stats.mean(getattr(cell.cost, metric), names, weights=cell.cost.weights(metric)),
        )
        for metric in COSTS
    ]


def _row(answers: Responses, metric: str, estimate: Estimate) -> Row:
    return Row(answers.dataset, answers.method, metric, answers.setting, *estimate)
