"""Every candidate's activation on each prompt: clean, with the prompt's sets silenced, with random ones instead."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.scores import Activity, Scores
from refusalscope.core.types import Feature, FeatureSet, Prompts, SaeSlice, layers_of
from refusalscope.mechanism import features, silencing
from refusalscope.mechanism.features import LayerSurvey
from refusalscope.mechanism.minimal import Question
from refusalscope.pipeline.job import Job
from refusalscope.studies.minimal import CLEAN, Case, condition, silenced_sets

FOLDER = "minimal"
AT_ONCE = 8
"""Prompts that advance in step, are one artifact, and that a kill loses at most."""
Drawn = Mapping[str, Sequence[FeatureSet]]
"""Prompt id -> random counterparts of its own set, feature by feature, one a draw."""


def listen(job: Job, rows: Prompts, cases: Sequence[Case], activity: Activity, ground: str, *, draws: int) -> Scores:
    """A row for each prompt and condition, a column for each candidate that is watched."""
    key = job.key("minimal", "woken", ground, list(cases), job.options.seed, draws)
    paths = []
    made: list[tuple[Drawn, Mapping[int, SaeSlice]]] = []

    def drawn() -> tuple[Drawn, Mapping[int, SaeSlice]]:
        # Only where something is left to be made, and once then.
        if not made:
            made.append(_drawn(job, cases, activity, draws))
        return made[0]

    for start in range(0, len(rows), AT_ONCE):
        job.progress("minimal: which features wake up", start, len(rows))
        paths.append(f"{FOLDER}/woken/{start // AT_ONCE:04d}.safetensors")
        part, own = rows[start : start + AT_ONCE], cases[start : start + AT_ONCE]
        job.store.ensure(paths[-1], key, lambda part=part, own=own: _heard(job, part, own, *drawn()))
    read = [job.store.read(path, Scores) for path in paths]
    ids = tuple(name for one in read for name in one.prompt_ids)
    return Scores(read[0].method, ids, read[0].features, torch.cat([one.values for one in read]))


def candidate_slices(job: Job) -> dict[int, SaeSlice]:
    """Of every layer's candidates."""
    paths = job.store.paths(f"{FOLDER}/candidates", ".safetensors")
    return {part.layer: part for part in (job.store.read(path, SaeSlice) for path in paths)}


def _drawn(job: Job, cases: Sequence[Case], activity: Activity, count: int) -> tuple[Drawn, Mapping[int, SaeSlice]]:
    """For each flipped prompt's own set random features outside all candidates, matched by layer and activity.

    A control for part of the set takes the counterparts of that part.
    """
    flipped = [case for case in cases if case.pruned is not None]
    excluded = {Feature(part.layer, i) for part in candidate_slices(job).values() for i in part.features.tolist()}
    surveys = _near(activity, {feature for case in flipped for feature in case.own}, excluded, 10 + job.options.k)
    drawn = {}
    for number, case in enumerate(flipped):
        own = FeatureSet("own", case.own, (0.0,) * len(case.own))
        seeds = range(job.options.seed + count * number, job.options.seed + count * (number + 1))
        drawn[case.prompt_id] = [features.random_like(own, surveys, excluded, seed=seed) for seed in seeds]
    return drawn, job.saes.slices(layers_of(one for draws in drawn.values() for one in draws))


def _near(activity: Activity, targets: set[Feature], excluded: set[Feature], count: int) -> list[LayerSurvey]:
    """Surveys that know only the targets and the `count` features nearest to each that a draw may take.

    The same draws as from all features: one looks at ten, less those that the same set has taken.
    """
    made = []
    for layer, means in zip(activity.layers, activity.mean.split(list(activity.sizes)), strict=True):
        wanted = [feature.index for feature in targets if feature.layer == layer]
        free = means > 0
        free[[feature.index for feature in excluded if feature.layer == layer]] = False
        places, kept = free.nonzero()[:, 0], torch.zeros(len(means), dtype=torch.bool)
        for index in wanted:
            distance = (means[places].log() - means[index].clamp(min=1e-12).log()).abs()
            kept[places[distance.argsort(stable=True)[:count]]] = True
        kept[wanted] = True
        made.append(LayerSurvey(layer, FeatureSet("none", (), ()), torch.where(kept, means, 0.0)))
    return made


def _heard(job: Job, rows: Prompts, cases: Sequence[Case], drawn: Drawn, controls: Mapping[int, SaeSlice]) -> Scores:
    """The activations of all candidates on a few prompts under every condition."""
    watched = candidate_slices(job)
    tokens, size = job.model.tokens(rows), job.size("minimal")
    hear = partial(silencing.activations, job.model, tokens, watched=watched, size=size)
    chosen: dict[str, Question] = {condition(CLEAN, c.prompt_id): (c.prompt_id, frozenset()) for c in cases}
    random: dict[str, Question] = {}
    for case in cases:
        for name, some in silenced_sets(case).items():
            chosen[condition(name, case.prompt_id)] = (case.prompt_id, frozenset(some))
            for draw, counterparts in enumerate(drawn.get(case.prompt_id, ())):
                twin = dict(zip(case.own, counterparts.features, strict=True))
                label = condition(f"{name} draw={draw}", case.prompt_id)
                random[label] = (case.prompt_id, frozenset(twin[feature] for feature in some))
    values: list[Float[Tensor, "question feature"]] = [hear(asked=list(chosen.values()), slices=watched)]
    if random:
        values.append(hear(asked=list(random.values()), slices=controls))
    columns = tuple(Feature(layer, i) for layer, part in sorted(watched.items()) for i in part.features.tolist())
    return Scores("activation", (*chosen, *random), columns, torch.cat(values))
