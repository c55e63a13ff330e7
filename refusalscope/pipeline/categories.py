"""Edits of common, specific and exclusive features on every category's held-out prompts: measures, states the Finding.

The unit of resuming is the category for the metric, and for the rates the answers of a few arms, given in one go.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Feature, FeatureSet, Finding, Prompts, Responses, SaeSlice, layers_of
from refusalscope.evals import rules
from refusalscope.inputs.categories import slug
from refusalscope.inputs.chat import ChatModel, Given, Tokens
from refusalscope.mechanism.effects import contrast, metric_under
from refusalscope.mechanism.interventions import (
    Held,
    HoldFeatures,
    Intervention,
    ScaleFeatures,
    Together,
    editor,
    record,
)
from refusalscope.pipeline import category_matrix
from refusalscope.pipeline.category_sets import FOLDER, CategorySets, strength
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import TOGETHER, Job
from refusalscope.pipeline.measure import judge_answers, keep_finding, make_answers, provenance
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.pipeline.traces import opening_refused
from refusalscope.studies import benchmark, categories
from refusalscope.studies.categories import Arm, Effect, Kind, Measured, Rest

BOTH: tuple[Rest, Rest] = ("held", "free")
CONTROLS: tuple[tuple[Kind, Rest], ...] = (("common", "free"), ("specific", "held"), ("specific", "free"))
"""What random features are like, and what the common ones do meanwhile."""

Slices = Callable[[], Mapping[int, SaeSlice]]
"""What the edits need of the SAEs, read off them when first asked for."""
Recorded = Mapping[tuple[Feature, ...], Mapping[str, Mapping[int, Held]]]
"""Held set -> prompt id -> layer -> its values there."""


def run_categories(job: Job, fitted: Fitted, sets: CategorySets, *, sizes: Sizes = WHOLE) -> Finding:
    """Measure every edit on every category and write `findings/categories.json`."""
    random, notes = _random(job, sets, sizes.edit_draws)
    arms = {name: list(_arms(name, sets, random, strength(job))) for name in sets.whole}
    wanted = layers_of([*sets.whole.values(), *(chosen for made in random.values() for chosen in made)])
    slices = cache(lambda: job.saes.slices(wanted))
    measured = []
    for done, name in enumerate(sets.whole):
        job.progress(f"categories: edits on {slug(name)}", done, len(sets.whole))
        answered = [arm for arm in arms[name] if _is_answered(arm, sizes)]
        measured.append(_measure(job, fitted, name, sets.prompts.test[name], arms[name], answered, slices))
    category_matrix.keep_matrix(job, sets)
    finding = categories.summarise(
        measured,
        served=[category_matrix.served(sets, name) for name in sets.whole],
        size=sets.size,
        caveats=(
            *sizes.caveats("categories", job.options),
            *(*fitted.notes, *fitted.direction.caveats, *sets.notes, *notes),
        ),
        provenance=provenance(job, fitted, None) | {"categories": {n: fingerprint(s) for n, s in sets.whole.items()}},
    )
    return keep_finding(job.store, finding)


def _random(job: Job, sets: CategorySets, draws: int) -> tuple[dict[tuple[Kind, str], list[FeatureSet]], list[str]]:
    """Kind and category -> random sets like its subset, or none with a note why; no set or candidate is in them."""
    # The common features are the same for every category: drawn for once.
    draw = cache(lambda like: sets.random_like(like, seed=job.options.seed, draws=draws if sets.size else 0))
    made: dict[tuple[Kind, str], list[FeatureSet]] = {}
    notes = {}
    for name in sets.whole:
        likes: dict[Kind, FeatureSet] = {"common": sets.common, "specific": sets.specific[name]}
        for kind, chosen in likes.items():
            try:
                made[kind, name] = draw(chosen.top(sets.size))
            except ValueError as error:
                made[kind, name] = []
                notes[f"Random features like the {kind} ones of {name} cannot be drawn: {error}."] = None
    return made, list(notes)


def _arms(
    name: str, sets: CategorySets, random: Mapping[tuple[Kind, str], Sequence[FeatureSet]], c: float
) -> Iterator[Arm]:
    """Every edit of one category's prompts, all at one strength."""
    n, common, own = sets.size, sets.common, sets.specific[name]
    yield Arm("all", "all", sets.whole[name], c)
    scaled: dict[Kind, tuple[FeatureSet, FeatureSet]] = {
        "common": (common.top(n), own),
        "specific": (own.top(n), common),
        "exclusive": (sets.exclusive[name], common),
    }
    for (kind, (chosen, other)), rest in product(scaled.items(), BOTH):
        yield _arm(kind, kind, chosen, c, other, rest)
    for other, rest in product((other for other in sets.whole if other != name), BOTH):
        yield _arm(f"from {slug(other)}", "specific", sets.specific[other].top(n), c, common, rest)
        yield _arm(f"from {slug(other)}", "exclusive", sets.exclusive[other], c, common, rest)
    for kind, rest in CONTROLS:
        for draw, drawn in enumerate(random[kind, name]):
            yield _arm("random", kind, drawn, c, common, rest, draw)


def _arm(
    method: str, kind: Kind, scaled: FeatureSet, c: float, other: FeatureSet, rest: Rest, draw: int | None = None
) -> Arm:
    return Arm(method, kind, scaled, c, other if rest == "held" else None, rest, draw)


def _is_answered(arm: Arm, sizes: Sizes) -> bool:
    """Whether answers are generated under an arm: of the many controls a few alone, they cost the most."""
    if arm.method.startswith("from "):
        wanted = sizes.answered_transfers and (arm.kind, arm.rest) == ("specific", "held")
    else:
        wanted = arm.draw is None or (arm.draw < sizes.answered_draws and (arm.kind, arm.rest) in CONTROLS[:2])
    return wanted and len(arm.scaled) > 0


def _measure(
    job: Job,
    fitted: Fitted,
    name: str,
    rows: Prompts,
    arms: Sequence[Arm],
    wanted: Sequence[Arm],
    slices: Slices,
) -> Measured:
    """What every arm does to a category's prompts, and what is answered under those that are `wanted`."""
    found = job.store.get(
        f"{FOLDER}/{slug(name)}/effects.json",
        job.key("categories", fitted.direction, rows, arms),
        dict,
        lambda: _effects(job, fitted, rows, arms, slices()),
    )
    used = rows.keep(found["ids"])
    unedited = make_answers(job, used, benchmark.BASE, {})
    judged = partial(judge_answers, job, fitted, used, cut_off_counts=rules.ordinarily_ends(unedited))
    at_once = max(1, TOGETHER // max(1, len(used)))
    answers = []
    for start in range(0, len(wanted), at_once):
        part = wanted[start : start + at_once]
        answered = _answers(job, used, part, slices)
        for done, arm in enumerate(part, start):
            job.progress(f"categories: answering {used.name}, {_label(arm)}", done, len(wanted))
            answers.append((arm, judged(answered(arm), _label(arm))))
    # Whoever judges the run's answers takes all there are: none may be of sets that are no longer these.
    labels = [benchmark.BASE.label, *map(_label, wanted)]
    for folder in (f"answers/{used.name}", f"responses/{used.name}"):
        job.store.keep_only(folder, [f"{folder}/{label}.jsonl" for label in labels])
    return Measured(
        category=name,
        dataset=slug(name),
        asked=len(rows),
        refused=found["refused"],
        clusters=used.clusters,
        effects=[Effect(arm, change) for arm, change in zip(arms, found["changes"], strict=True)],
        unedited=judged(unedited, benchmark.BASE.label),
        answers=answers,
    )


def _effects(
    job: Job, fitted: Fitted, rows: Prompts, arms: Sequence[Arm], slices: Mapping[int, SaeSlice]
) -> dict[str, Any]:
    """The usable prompts, and how each arm changes the metric of each."""
    size = job.size("categories")
    refused = opening_refused(job, fitted, rows, size=size) if len(rows) else rows
    used: list[str] = []
    changes: list[list[float]] = [[] for _ in arms]
    starts = {_first(arm) for arm in arms if len(arm.scaled)}
    for batch, tokens in job.model.batches(refused, size):
        seen = contrast(job.model, tokens, fitted.direction)
        clean = job.model.run(tokens, keep=starts, offload=False).residuals
        known = {layer: Given(layer, residual) for layer, residual in clean.items()}
        used += [prompt for prompt, usable in zip(batch.ids, seen.flipped.tolist(), strict=True) if usable]
        held = _recorded(job.model, batch, arms, slices, batch_size=max(1, len(batch)), render=job.model.tokens)
        for change, arm in zip(changes, arms, strict=True):
            if len(arm.scaled):
                edits = editor(_intervention(arm, held), layers=len(job.model.layers), slices=slices).edits
                moved = metric_under(job.model, seen, edits, known[_first(arm)]).metric - seen.clean
                change += moved[seen.flipped].tolist()
    return {"ids": used, "refused": len(refused), "changes": changes}


def _first(arm: Arm) -> int:
    """The lowest layer at which anything changes: what is held below it is what it is anyway."""
    return min(feature.layer for feature in arm.scaled.features)


def _recorded(
    model: ChatModel,
    batch: Prompts,
    arms: Sequence[Arm],
    slices: Mapping[int, SaeSlice],
    *,
    batch_size: int,
    render: Callable[[Prompts], Tokens],
) -> Recorded:
    """The values that any of the arms holds, on the unedited prompts of one part."""
    wanted = {arm.held.features: arm.held.by_layer() for arm in arms if arm.held is not None}
    return {
        chosen: record(
            model,
            batch,
            {layer: slices[layer].take(indices) for layer, indices in layers.items()},
            batch_size=batch_size,
            render=render,
        )
        for chosen, layers in wanted.items()
    }


def _intervention(arm: Arm, recorded: Recorded) -> Intervention:
    scaled = ScaleFeatures(arm.scaled, arm.factor)
    if arm.held is None:
        return scaled
    # Held features act last: at a layer that both edit they stay what they were, whatever scaling does to them there.
    return Together((scaled, HoldFeatures(arm.held, recorded[arm.held.features])))


def _label(arm: Arm) -> str:
    return f"{arm.method} {arm.setting}"


def _answers(job: Job, rows: Prompts, arms: Sequence[Arm], slices: Slices) -> Callable[[Arm], Responses]:
    """A function that gives what the model answers under each of a few arms.

    All are answered at once when the first is missing, those that stand too: what a row says must not depend on when a
    run was killed. The values held are recorded part by part, and are no part of the key.
    """
    made: dict[tuple[str, ...], dict[str, Responses]] = {}

    def make(arm: Arm, batch: Prompts) -> Responses:
        if batch.ids not in made:
            size, longest = job.size("answer"), job.max_new_tokens
            held = _recorded(job.model, batch, arms, slices(), batch_size=size, render=job.model.answer_tokens)
            edits = [benchmark.Arm(one.method, one.setting, _intervention(one, held)) for one in arms]
            said = benchmark.answer_each(
                job.model, batch, edits, slices=slices(), batch_size=size, max_new_tokens=longest
            )
            made[batch.ids] = {_label(one): answers for one, answers in zip(arms, said, strict=True)}
        return made[batch.ids][_label(arm)]

    def answered(arm: Arm) -> Responses:
        return job.in_batches(
            "answer",
            f"answers/{rows.name}/{_label(arm)}.jsonl",
            key=job.key("answer", rows, arm, arms, job.max_new_tokens, TOGETHER),
            rows=rows,
            kind=Responses,
            make=partial(make, arm),
            join=benchmark.joined,
            together=TOGETHER,
        )

    return answered
