"""Successful attacks answered again with features set back at their closing tokens, and every control beside them.

Each arm is an artifact of its own, made batch by batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from typing import Literal

import numpy as np

from refusalscope.core.types import Direction, Feature, FeatureSet, Prompt, Prompts, Responses, SaeSlice, layers_of
from refusalscope.mechanism import restoring
from refusalscope.mechanism.restoring import RandomDirections, Restoration, RestoreDirection, RestoreFeatures
from refusalscope.pipeline.attacks import Grouped
from refusalscope.pipeline.category_sets import CategorySets
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.sizes import Sizes
from refusalscope.studies import benchmark, jailbreaks
from refusalscope.studies.jailbreaks import SUCCEEDED, Restored

FOLDER = "jailbreaks/restored"
SLICES = "jailbreaks/slices"


@dataclass(frozen=True)
class Arm:
    """One way of setting back, and whose values are set."""

    method: str
    setting: str
    kind: Literal["features", "direction", "random"]
    features: FeatureSet
    sources: Prompts
    """The prompts that values come from, under the ids of the attacks."""
    seed: int = 0


def restore(
    job: Job,
    fitted: Fitted,
    sets: CategorySets,
    grouped: Grouped,
    harmless: Prompts,
    judged: Callable[[Prompts, Responses], Responses],
    sizes: Sizes,
) -> Restored:
    """Answer and score successful attacks, evenly over families, under every arm."""
    successful = grouped.adversarial.keep(name for name, what in grouped.outcome.items() if what == SUCCEEDED)
    rows, draws = _evenly(successful, sizes.restored), sizes.restored_draws
    notes = []
    drawn: list[FeatureSet] = []
    try:
        drawn = sets.random_like(sets.common, seed=job.options.seed, draws=draws)
    except ValueError as error:
        notes.append(f"No matched random features are set back: {error}.")
    made = _arms(job, sets, grouped, rows, harmless, drawn, draws, notes) if len(rows) else []
    pool = _pool(job, drawn, sets.slices)
    answers = []
    for done, arm in enumerate(made):
        job.progress(f"jailbreaks: {arm.method} {arm.setting}", done, len(made))
        answers.append(judged(rows, _answers(job, fitted.direction, arm, rows, pool)))
    families = tuple(str(row.details.get("family") or "unnamed") for row in rows)
    return Restored(
        rows.ids, families, rows.clusters, tuple(answers), tuple(map(str, sets.common.features)), tuple(notes)
    )


def _evenly(rows: Prompts, most: int) -> Prompts:
    """At most so many prompts, one of each family in turn."""
    families: dict[str, list[Prompt]] = {}
    for row in rows:
        families.setdefault(str(row.details.get("family")), []).append(row)
    turns = chain.from_iterable(zip_longest(*families.values()))
    chosen = [row.id for row in turns if row is not None][:most]
    return rows.keep(chosen)


def _arms(
    job: Job,
    sets: CategorySets,
    grouped: Grouped,
    rows: Prompts,
    harmless: Prompts,
    drawn: Sequence[FeatureSet],
    draws: int,
    notes: list[str],
) -> list[Arm]:
    """The whole set, single features, the direction, and the controls; what cannot be made is noted."""
    common, seed, plain = sets.common, job.options.seed, _named(rows, [grouped.plain[name] for name in rows.ids])
    made = [Arm("common", jailbreaks.RESTORE, "features", common, plain)]
    for feature in common.features:
        single = common.only([feature], str(feature))
        made.append(Arm(str(feature), jailbreaks.RESTORE, "features", single, plain))
    made.append(Arm("projection", jailbreaks.RESTORE, "direction", common, plain))
    others = _others(rows, grouped, seed)
    if others is None:
        notes.append("All attacks set back share an intent: no other harmful prompt's values are set.")
    else:
        made.append(Arm("other harmful prompt", jailbreaks.RESTORE, "features", common, others))
    for draw in range(draws):
        setting = f"{jailbreaks.RESTORE} draw={draw:02d}"
        made.append(Arm("random direction", setting, "random", common, plain, seed + draw))
        if len(harmless):
            picked = np.random.default_rng((seed, draw)).integers(len(harmless), size=len(rows))
            sources = _named(rows, [harmless[int(at)] for at in picked])
            made.append(Arm("harmless prompt", setting, "features", common, sources))
        if draw < len(drawn):
            made.append(Arm("random features", setting, "features", drawn[draw], plain))
    if not len(harmless):
        notes.append("No harmless validation prompt is answered: no harmless prompt's values are set.")
    return made


def _named(rows: Prompts, sources: Sequence[Prompt]) -> Prompts:
    """Other prompts under the ids of the attacks that are to show their values."""
    return Prompts("sources", tuple(replace(one, id=name) for one, name in zip(sources, rows.ids, strict=True)))


def _others(rows: Prompts, grouped: Grouped, seed: int) -> Prompts | None:
    """For each attack the plain form of one with another intent."""
    rng, picked = np.random.default_rng(seed), []
    clusters = rows.clusters
    for cluster in clusters:
        elsewhere = [at for at, other in enumerate(clusters) if other != cluster]
        if not elsewhere:
            return None
        picked.append(grouped.plain[rows.ids[int(rng.choice(elsewhere))]])
    return _named(rows, picked)


Pool = Callable[[FeatureSet], dict[int, SaeSlice]]


def _pool(job: Job, drawn: Sequence[FeatureSet], slices: Mapping[int, SaeSlice]) -> Pool:
    """A function that gives the slices of exactly a set's features; those of random ones are kept on disk."""
    layers = layers_of(drawn)
    key = job.key("jailbreak slices", {str(layer): indices for layer, indices in layers.items()})
    paths = {layer: f"{SLICES}/layer_{layer}.safetensors" for layer in layers}
    if not all(job.store.has(path, key) for path in paths.values()):
        for layer, part in job.saes.slices(layers).items():
            job.store.put(paths[layer], key, part)
    more = {layer: job.store.read(path, SaeSlice) for layer, path in paths.items()}

    def take(chosen: FeatureSet) -> dict[int, SaeSlice]:
        random = set(chosen.features) <= {Feature(layer, i) for layer, own in layers.items() for i in own}
        held = more if random else slices
        return {layer: held[layer].take(sorted(wanted)) for layer, wanted in chosen.by_layer().items()}

    return take


def _answers(job: Job, direction: Direction, arm: Arm, rows: Prompts, pool: Pool) -> Responses:
    """What the model answers under an arm, before it is scored."""
    return job.in_batches(
        "restore",
        f"{FOLDER}/{arm.method.replace('/', '-')} {arm.setting}.jsonl",
        key=job.key("restore", rows, arm, direction.vector, job.max_new_tokens),
        rows=rows,
        kind=Responses,
        make=partial(_batch, job, direction, arm, pool(arm.features)),
        join=benchmark.joined,
    )


def _batch(job: Job, direction: Direction, arm: Arm, slices: Mapping[int, SaeSlice], batch: Prompts) -> Responses:
    model = job.model
    # Read as answers are given, so that both prompts end in the same tokens.
    sources = model.answer_tokens(arm.sources.keep(batch.ids))
    values = restoring.read_closing(model, sources, slices, direction.unit)
    tokens = model.answer_tokens(batch)
    wanted: Restoration = RestoreFeatures(arm.features, values)
    if arm.kind == "direction":
        wanted = RestoreDirection(direction.unit, tuple(slices), values)
    elif arm.kind == "random":
        wanted = RandomDirections(restoring.read_distances(model, tokens, wanted, slices), arm.seed)
    made = restoring.editor(wanted, slices=slices)
    answers = model.generate(tokens, edits=made.edits, max_new_tokens=job.max_new_tokens, recordable=True)
    return Responses(batch.name, arm.method, arm.setting, answers, made.changed)
