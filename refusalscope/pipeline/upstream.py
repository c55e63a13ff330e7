"""What becomes of the common features when a category's own, upstream of them, are scaled; beside matched controls.

Measures alone: one artifact a category. What it comes to is `studies/graph.py`'s to say.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from refusalscope.core.types import Feature, FeatureSet, Prompts, SaeSlice, layers_of
from refusalscope.inputs.categories import slug
from refusalscope.mechanism import edges, features
from refusalscope.mechanism.interventions import ScaleFeatures, editor
from refusalscope.pipeline.category_sets import CategorySets, strength
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.traces import refused_prompts
from refusalscope.studies.graph import SPECIFIC, Arm, Drops

FOLDER = "graph"


class Plan(NamedTuple):
    """What is scaled on one category's prompts, and what is watched."""

    downstream: FeatureSet
    """F_R above the lowest layer of F_H."""
    arms: tuple[tuple[str, int | None, FeatureSet], ...]
    """F_H below the highest layer of F_R, then the draws of every control: kind, draw, features."""


def factors(job: Job) -> tuple[float, ...]:
    """Silencing, and the strength at which the studies work."""
    return tuple(dict.fromkeys((0.0, strength(job))))


def refused(job: Job, fitted: Fitted, sets: CategorySets) -> dict[str, Prompts]:
    """Category -> its held-out prompts whose first token refuses."""
    given = sets.prompts.test

    def measure() -> dict[str, Any]:
        size = job.size("graph")
        return {name: list(refused_prompts(job, fitted, rows, size=size).ids) for name, rows in given.items()}

    key = job.key("graph", "refused", given, fitted.direction.refusal_tokens, job.options.keep_unrefused)
    ids = job.store.get(f"{FOLDER}/refused.json", key, dict, measure)
    return {name: rows.keep(ids[name]) for name, rows in given.items()}


def measure_drops(
    job: Job, fitted: Fitted, sets: CategorySets, prompts: Mapping[str, Prompts], draws: int
) -> tuple[list[Drops], list[str]]:
    """Every category's drops on these prompts, read where they stand; and which categories or controls have none.

    Of each kind of control there are as many `draws`.
    """
    plans, notes, made = {}, [], []
    for category, rows in prompts.items():
        if not len(rows):
            notes.append(f"{category}: no held-out prompt is refused.")
            continue
        plan, more = _plan(job, sets, category, draws)
        notes += more
        plans |= {} if plan is None else {category: plan}

    @cache
    def slices() -> dict[int, SaeSlice]:
        return job.saes.slices(layers_of(chosen for plan in plans.values() for _, _, chosen in plan.arms))

    for done, (category, plan) in enumerate(plans.items()):
        job.progress("graph: what drives the common features", done, len(plans))
        rows = prompts[category]
        key = job.key("graph", "drops", rows, plan, factors(job), fitted.direction.refusal_tokens)
        found = job.store.get(
            f"{FOLDER}/drops/{slug(category)}.json",
            key,
            dict,
            lambda rows=rows, plan=plan: asdict(_measure(job, fitted, sets, rows, plan, slices)),
        )
        made.append(Drops.read(found))
    return made, notes


def _plan(job: Job, sets: CategorySets, category: str, draws: int) -> tuple[Plan | None, list[str]]:
    """None, and why, where no feature of the one kind lies below one of the other."""
    specific, common = sets.specific[category], sets.common
    highest = max((feature.layer for feature in common.features), default=-1)
    lowest = min((feature.layer for feature in specific.features), default=highest)
    upstream = specific.only((f for f in specific.features if f.layer < highest), SPECIFIC)
    downstream = common.only((f for f in common.features if f.layer > lowest), "common")
    if not upstream.features or not downstream.features:
        return None, [f"{category}: none of its own features lies below a common one, so nothing is upstream there."]
    arms, notes = [(SPECIFIC, None, upstream)], []
    for kind, draw in _controls(job, sets, upstream).items():
        try:
            drawn = [draw(job.options.seed + number) for number in range(draws)]
        except ValueError as error:
            notes.append(f"{category}: no {kind} control, {error}.")
            continue
        arms += [(kind, number, chosen) for number, chosen in enumerate(drawn)]
        if short := len(upstream) - len(drawn[0]):
            notes.append(f"{category}: {kind} controls hold {short} of {len(upstream)} features fewer: none are left.")
    return Plan(downstream, tuple(arms)), notes


def _controls(job: Job, sets: CategorySets, target: FeatureSet) -> dict[str, Callable[[int], FeatureSet]]:
    """Kind -> one draw by its seed. No control holds a feature of any category's set; two hold no candidate either."""
    chosen = {feature for whole in sets.whole.values() for feature in whole.features}
    listed = {feature for survey in sets.surveys for feature in survey.candidates.features}
    active = {
        survey.layer: [Feature(survey.layer, i) for i in survey.activation.nonzero()[:, 0].tolist()]
        for survey in sets.surveys
    }
    free = {layer: [f for f in some if f not in chosen | listed] for layer, some in active.items()}
    rest = {layer: [f for f in some if f in listed - chosen] for layer, some in active.items()}
    return {
        "uniform": lambda seed: _drawn("uniform", target, free, seed),
        "activity-matched": lambda seed: features.random_like(target, sets.surveys, chosen | listed, seed=seed),
        "other-candidates": lambda seed: _drawn("other-candidates", target, rest, seed),
    }


def _drawn(kind: str, target: FeatureSet, pools: Mapping[int, Sequence[Feature]], seed: int) -> FeatureSet:
    """As many features of each layer as `target` has there, or all there are. ValueError where there are none."""
    rng = np.random.default_rng(seed)
    drawn: list[Feature] = []
    for layer, wanted in target.by_layer().items():
        pool = pools.get(layer, ())
        picked = rng.choice(len(pool), size=min(len(wanted), len(pool)), replace=False) if pool else ()
        drawn += [pool[int(at)] for at in picked]
    if not drawn:
        raise ValueError("its layers have no such feature")
    return FeatureSet(kind, tuple(drawn), (0.0,) * len(drawn))


def _measure(
    job: Job,
    fitted: Fitted,
    sets: CategorySets,
    rows: Prompts,
    plan: Plan,
    slices: Callable[[], Mapping[int, SaeSlice]],
) -> Drops:
    """Every arm at every factor on one category's prompts."""
    watched = {layer: sets.slices[layer].take(some) for layer, some in plan.downstream.by_layer().items()}
    edits = {
        Arm(kind, draw, factor, len(chosen)): editor(
            ScaleFeatures(chosen, factor), layers=len(job.model.layers), slices=slices()
        ).edits
        for kind, draw, chosen in plan.arms
        for factor in factors(job)
    }
    before, after = _Sums([], []), {arm: _Sums([], []) for arm in edits}
    for _, tokens in job.model.batches(rows, job.size("graph")):
        before.add(edges.read(job.model, tokens, watched, {}), fitted.direction.refusal_tokens)
        for arm, edit in edits.items():
            after[arm].add(edges.read(job.model, tokens, watched, edit), fitted.direction.refusal_tokens)
    arms = [arm._asdict() | {"activity": sums.activity, "refusal": sums.refusal} for arm, sums in after.items()]
    watched_names = [str(feature) for feature in plan.downstream.features]
    scaled = [str(feature) for feature in plan.arms[0][2].features]
    return Drops(
        rows.name, list(rows.ids), list(rows.clusters), scaled, watched_names, before.activity, before.refusal, arms
    )


class _Sums(NamedTuple):
    """What is kept of every prompt under one edit."""

    activity: list[float]
    refusal: list[float]

    def add(self, found: edges.Reading, refusal_tokens: Collection[int]) -> None:
        self.activity.extend(_rounded(found.activity.double().sum(1)))
        self.refusal.extend(_rounded(found.logits.double().softmax(-1)[:, list(refusal_tokens)].sum(1)))


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]
