"""What each word of an adversarial suffix silences.

Every suffix of every goal that is refused alone is asked; those that turn their goal are read word by word, goal by
goal, so a kill loses one goal at most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Feature, FeatureSet, Finding, Prompt, Prompts, Responses
from refusalscope.evals import rules
from refusalscope.inputs import neutral
from refusalscope.inputs import suffixes as suffix_rows
from refusalscope.mechanism import attribution, features, suppression
from refusalscope.mechanism.reading import assemble, layer_entries
from refusalscope.mechanism.suppression import Attack, Reading
from refusalscope.pipeline.category_sets import CategorySets
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, make_answers, make_judged, provenance
from refusalscope.pipeline.select import Chosen
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.pipeline.traces import make_traces, opening_refused
from refusalscope.studies import benchmark, suffixes
from refusalscope.studies.suffixes import Measured

FOLDER = "suffixes"
VIEWS = f"{FOLDER}/views.json"
"""The goals that the report shows word by word."""


class _Asked(NamedTuple):
    goals: Prompts
    attacks: Prompts
    notes: list[str]


def run_suffixes(job: Job, fitted: Fitted, sets: CategorySets, *, sizes: Sizes = WHOLE) -> Finding:
    """Measure every goal and write `findings/suffixes.json`.

    Raises ValueError, one line, where no feature serves every category: there is nothing to follow then.
    """
    if not len(sets.common):
        raise ValueError("no feature is in every category's set: try a larger --k, or fewer categories")
    asked = _asked(job, sizes.goals)
    answered = _judged(job, fitted, asked.goals)
    refused = [a * b for a, b in zip(answered.score("refused"), answered.score("coherent"), strict=True)]
    alone = {prompt.id for prompt, score in zip(asked.goals, refused, strict=True) if score == 1}
    attacks = asked.attacks.keep(prompt.id for prompt in asked.attacks if prompt.details["goal"] in alone)
    outcomes = [_outcome(row.scores) for row in _judged(job, fitted, attacks).rows]
    turned = attacks.keep(p.id for p, outcome in zip(attacks, outcomes, strict=True) if outcome == "turned")
    goals = asked.goals.keep({prompt.details["goal"] for prompt in turned})
    shams = _shams(goals, turned)
    job.store.keep(f"prompts/{shams.name}.jsonl", fingerprint(shams), shams)
    found = Measured(
        *(asked.goals, refused, attacks, outcomes),
        turned=_measured(job, fitted, sets, goals, turned),
        shams=shams,
        sham_outcomes=[_outcome(row.scores) for row in _judged(job, fitted, shams).rows],
        common=sets.common.features,
        own=_own_sets(job, fitted, goals),
        upstream={goal.id: min(_harm(sets, goal.category).by_layer(), default=0) for goal in goals},
        harmless=_harmless(job, fitted, sets),
    )
    _keep_views(job, found)
    notes = (
        *sizes.caveats("suffixes", job.options),
        *(*fitted.notes, *fitted.direction.caveats, *sets.notes, *asked.notes),
    )
    made_from = {**provenance(job, fitted, None), "features": {"common": fingerprint(sets.common)}}
    return keep_finding(job.store, suffixes.summarise(found, caveats=notes, provenance=made_from))


def _asked(job: Job, count: int) -> _Asked:
    """Goals, and every goal with each of its suffixes; kept in the run folder."""
    given = suffix_rows.load(
        job.options.suffixes,
        own=job.target.prompts is not None and job.options.prompts is None,
        count=job.options.limit or count,
    )
    named = Prompts("suffix-goals", given.goals.rows)
    goals, long = job.within_context(named)
    pairs = [(goal, at, suffix) for goal in goals for at, suffix in enumerate(given.suffixes[goal.id], start=1)]
    rows = tuple(_attack(*pair) for pair in pairs if suppression.words(pair[2]))
    attacks, longer = job.within_context(Prompts("suffixes", rows))
    for prompts in (goals, attacks):
        job.store.keep(f"prompts/{prompts.name}.jsonl", fingerprint(prompts), prompts)
    blank = [f"{len(pairs) - len(rows)} suffixes hold no word: left out."] if len(rows) < len(pairs) else []
    return _Asked(goals, attacks, [*given.notes, *long, *blank, *longer])


def _attack(goal: Prompt, number: int, suffix: str) -> Prompt:
    return Prompt(
        f"{goal.id}+{number}",
        f"{goal.text} {suffix}",
        "harmful",
        goal.category,
        goal.source,
        goal.cluster or goal.id,
        {"goal": goal.id, "suffix": suffix},
    )


def _shams(goals: Prompts, turned: Prompts) -> Prompts:
    """Each goal with as many neutral words as a suffix that turns it has, once for each number."""
    lengths = {goal: set[int]() for goal in goals.ids}
    for prompt in turned:
        lengths[prompt.details["goal"]].add(len(suppression.words(prompt.details["suffix"])))
    rows = [
        replace(
            goal,
            id=f"{goal.id}~{count}",
            text=" ".join([goal.text, *neutral.suffix(count)]),
            cluster=goal.cluster or goal.id,
            details={"goal": goal.id, "words": count},
        )
        for goal in goals
        for count in sorted(lengths[goal.id])
    ]
    return Prompts("suffix-shams", tuple(rows))


def _judged(job: Job, fitted: Fitted, rows: Prompts) -> Responses:
    """What the unedited model answers, by the rules."""
    ends = rules.ordinarily_ends(make_answers(job, fitted.data.harmless_validation, benchmark.BASE, {}))
    return make_judged(job, fitted, Chosen({}, {}, {}, ()), rows, benchmark.BASE, cut_off_counts=ends)


def _outcome(scores: Mapping[str, float]) -> str:
    if scores["answered"] == 1:
        return "turned"
    return "refused" if scores["refused"] == 1 and scores["coherent"] == 1 else "unclear"


def _measured(job: Job, fitted: Fitted, sets: CategorySets, goals: Prompts, turned: Prompts) -> list[Attack]:
    """Every turned attack word by word; each goal's readings are an artifact of their own."""
    made = []
    for done, goal in enumerate(goals):
        job.progress("suffixes: word by word", done, len(goals))
        attacks = turned.keep(prompt.id for prompt in turned if prompt.details["goal"] == goal.id)
        made += _measure_goal(job, fitted, sets, goal, attacks)
    return made


def _measure_goal(job: Job, fitted: Fitted, sets: CategorySets, goal: Prompt, attacks: Prompts) -> list[Attack]:
    cut = {prompt.id: suppression.words(prompt.details["suffix"]) for prompt in attacks}
    parts = {name: suppression.texts(goal.text, said, neutral.suffix(len(said))) for name, said in cut.items()}
    # Beginnings and shams are shared between suffixes: each text is read once.
    place = {text: at for at, text in enumerate(dict.fromkeys(t for part in parts.values() for ts in part for t in ts))}
    rows = Prompts(goal.id, tuple(Prompt(str(at), text, "harmful") for text, at in place.items()))
    key = job.key("suffixes", rows, sets.common, (harm := _harm(sets, goal.category)), fitted.direction)
    read = partial(_read, job, fitted, sets, rows, harm)
    reading = _reading(job.store.get(f"{FOLDER}/goals/{fingerprint(goal.id)}.json", key, dict, read))

    def taken(texts: Sequence[str]) -> Reading:
        return reading.take([place[text] for text in texts])

    return [
        Attack(prompt.id, goal.id, prompt.cluster, cut[prompt.id], *map(taken, parts[prompt.id])) for prompt in attacks
    ]


def _read(job: Job, fitted: Fitted, sets: CategorySets, rows: Prompts, harm: FeatureSet) -> dict[str, Any]:
    reading = suppression.read(
        *(job.model, rows, sets.common, harm, sets.slices, fitted.direction), batch_size=job.size("suffixes")
    )
    return {name: part.tolist() for name, part in reading._asdict().items()}


def _reading(saved: Mapping[str, Any]) -> Reading:
    return Reading(**{name: torch.tensor(part) for name, part in saved.items()})


def _harm(sets: CategorySets, category: str | None) -> FeatureSet:
    """The harm features of the goal's category; of all categories where it is not one of them."""
    if category is not None and category in sets.specific:
        return sets.specific[category]
    every = sorted({feature for chosen in sets.specific.values() for feature in chosen.features})
    return FeatureSet("specific", tuple(every), (0.0,) * len(every))


def _harmless(job: Job, fitted: Fitted, sets: CategorySets) -> float:
    """The mean projection of answered harmless prompts, summed over the closing tokens as the attacks' is."""
    plain = fitted.data.harmless_train

    def read() -> dict[str, Any]:
        refused = opening_refused(job, fitted, plain, size=job.size("suffixes"))
        return _read(job, fitted, sets, plain.keep(set(plain.ids) - set(refused.ids)), _harm(sets, None))

    key = job.key("suffixes", plain, sets.common, _harm(sets, None), fitted.direction)
    return float(_reading(job.store.get(f"{FOLDER}/harmless.json", key, dict, read)).projection.double().mean())


def _own_sets(job: Job, fitted: Fitted, goals: Prompts) -> dict[str, frozenset[Feature]]:
    """Each goal's own top K* by cosine+attribution; none for a goal that removing the direction does not flip."""

    def make(batch: Prompts) -> dict[str, Any]:
        if not len(batch):
            return {}
        traces = make_traces(job, fitted, batch, attribution.sound(), size=len(batch))
        entries = []
        for sae in job.saes.each():
            listed = features.by_cosine(sae, fitted.direction, features.PER_LAYER)
            entries += layer_entries(sae, traces, sorted(feature.index for feature in listed.features))
        own = features.per_prompt(features.prompt_scores(assemble(traces, entries)), job.options.k)
        return {name: [[f.layer, f.index] for f in made.features] for name, made in own.items()}

    made = job.in_batches(
        "features",
        f"{FOLDER}/own.json",
        key=job.key("features", "own sets", goals, fitted.direction, job.options.k),
        rows=goals,
        kind=dict,
        make=make,
        join=lambda parts: {name: own for part in parts for name, own in part.items()},
    )
    return {name: frozenset(Feature(*pair) for pair in own) for name, own in made.items()}


def _keep_views(job: Job, found: Measured) -> None:
    """What the report shows of single goals: text, words, and what each word does."""
    first = {curve.attack.goal: curve for curve in reversed(suffixes.curves(found, suffixes.REFUSAL))}
    goals = [goal for goal in dict.fromkeys(attack.goal for attack in found.turned) if goal in first]
    text = {prompt.id: prompt.text for prompt in found.goals}
    shown = [
        {
            "id": first[goal].attack.id,
            "goal": text[goal],
            "words": list(first[goal].attack.words),
            "steps": first[goal].steps.tolist(),
            "left_out": first[goal].left_out.tolist(),
        }
        for goal in goals[: suffixes.SHOWN]
    ]
    job.store.keep(VIEWS, fingerprint(shown), {"goals": shown})
