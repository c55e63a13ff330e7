"""From prompts by category to the features that serve each: a direction, an attribution and a set for every category.

Made once for all studies that need them; a run that is killed makes one category again. Knows nothing of edits.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.scores import Activity, Scores
from refusalscope.core.types import Direction, Feature, FeatureSet, Prompts, SaeSlice, layers_of, ordered_features
from refusalscope.inputs import categories
from refusalscope.inputs.categories import Categories, slug
from refusalscope.mechanism import attribution, direction, features
from refusalscope.mechanism.features import LayerSurvey
from refusalscope.mechanism.reading import assemble, layer_entries
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.pipeline.traces import make_traces, opening_refused, refused_prompts

FOLDER = "categories"
FEWEST = 10
"""Refused train prompts that a category needs for a direction of its own, and flipped ones for scores."""
PARALLEL = 0.95
"""Cosine above which two categories' directions are nearly one."""


@dataclass(frozen=True)
class CategorySets:
    """What features serve which category, and what is needed to edit them."""

    prompts: Categories
    """Train and test prompts by category; categories too few of whose prompts are refused are left out."""
    whole: Mapping[str, FeatureSet]
    """Category -> its top K*, F*."""
    shares: Mapping[str, Mapping[Feature, float]]
    """Category -> feature of any F* -> the share of the category's prompts whose own top K* holds it."""
    common: FeatureSet
    """F_R: in every category's F*, by mean score."""
    specific: Mapping[str, FeatureSet]
    """F_H: what remains of each F*."""
    exclusive: Mapping[str, FeatureSet]
    """In this category's F* and in no other's."""
    surveys: Sequence[LayerSurvey]
    """Layer by layer: the candidates of any category, and each feature's mean activation on all categories' prompts."""
    slices: Mapping[int, SaeSlice]
    """Of all features of all sets."""
    notes: tuple[str, ...]
    directions: Mapping[str, Direction] = field(default_factory=dict)
    """Category -> its v*."""
    local: Mapping[str, Mapping[str, FeatureSet]] = field(default_factory=dict)
    """Category -> train prompt id -> that prompt's own top K*."""

    @property
    def size(self) -> int:
        """n: how many features a compared subset holds, min(|F_R|, |F_H|) over the categories."""
        return min(len(self.common), *(len(chosen) for chosen in self.specific.values()))

    def random_like(self, like: FeatureSet, *, seed: int, draws: int) -> list[FeatureSet]:
        """Random features like these in number, layers and activity; no set's and no candidate is among them.

        Raises ValueError where too few of those are left.
        """
        excluded = {feature for chosen in self.whole.values() for feature in chosen.features}
        excluded |= {feature for survey in self.surveys for feature in survey.candidates.features}
        return [features.random_like(like, self.surveys, excluded, seed=seed + draw) for draw in range(draws)]


def strength(job: Job) -> float:
    """The factor c that all studies of single features scale by: given, else published, else 0."""
    given, published = job.options.factors, job.target.published_factor
    return given[0] if given else 0.0 if published is None else published


def choose_category_sets(job: Job, fitted: Fitted, *, sizes: Sizes = WHOLE) -> CategorySets:
    """Fit every category that is not fitted yet, and compare their sets.

    Raises ValueError, one line, where fewer than two categories are refused often enough.
    """
    given = _prompts(job, sizes.category_prompts)
    fits: dict[str, _Fit] = {}
    notes = [*given.notes]
    for done, (category, rows) in enumerate(given.train.items()):
        job.progress("categories: direction and features", done, len(given.train))
        made = _fit(job, fitted, category, rows)
        if isinstance(made, str):
            notes.append(made)
        else:
            fits[category] = made
    if len(fits) < 2:
        raise ValueError(f"categories need two that are refused often enough: {' '.join(notes) or 'none was given'}")
    prompts = Categories({name: given.train[name] for name in fits}, {name: given.test[name] for name in fits})
    return _compared(job, fits, prompts, notes)


def _prompts(job: Job, count: int) -> Categories:
    """The category prompts that this run is to use, without those too long for the model; kept in the run folder."""
    given = categories.load(
        job.options.category_prompts,
        own=job.target.prompts is not None and job.options.prompts is None,
        names=job.options.categories,
        language=job.options.language,
        count=job.options.limit or count,
    )
    _check_names([*given.train.values(), *given.test.values()], {**job.sets.fitting, **job.sets.evaluation})
    notes, short = [*given.notes], []
    for part in (given.train, given.test):
        made = {category: job.within_context(rows) for category, rows in part.items()}
        notes += [note for _, more in made.values() for note in more]
        short.append({category: rows for category, (rows, _) in made.items()})
    for rows in [rows for part in short for rows in part.values()]:
        job.store.keep(f"prompts/{rows.name}.jsonl", fingerprint(rows), rows)
    return Categories(*short, notes=tuple(notes))


def _check_names(given: Sequence[Prompts], taken: Collection[str]) -> None:
    """Raise ValueError where two prompt sets would be one file."""
    names = [*taken, *(rows.name for rows in given)]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"two sets of prompts would be called {', '.join(twice)}: name the categories differently")


class _Fit(NamedTuple):
    """One category's direction, its candidates' scores prompt by prompt, and how active every feature is on it."""

    direction: Direction
    candidates: FeatureSet
    scores: Scores
    activity: Activity


PARTS: Mapping[str, type] = {
    "direction.safetensors": Direction,
    "candidates.json": FeatureSet,
    "scores.safetensors": Scores,
    "activity.safetensors": Activity,
}
"""The artifacts of a `_Fit`, in its order."""


def _fit(job: Job, fitted: Fitted, category: str, rows: Prompts) -> "_Fit | str":
    """What a category comes to, or why it is left out."""
    inputs = (fitted.direction, fitted.data.harmless_train, rows, job.options.keep_unrefused)
    folder, key = f"{FOLDER}/{slug(category)}", job.key("features", "category", *inputs)

    def refuses() -> dict[str, Any]:
        return {"ids": list(refused_prompts(job, fitted, rows, size=job.size("features")).ids)}

    refused = job.store.get(f"{folder}/refused.json", key, dict, refuses)["ids"]
    if len(refused) < FEWEST:
        return f"{category}: only {len(refused)} of {len(rows)} prompts are refused, {FEWEST} are needed: left out."
    if not all(job.store.has(f"{folder}/{name}", key) for name in PARTS):
        for name, part in zip(PARTS, _make_fit(job, fitted, rows.keep(refused)), strict=True):
            job.store.put(f"{folder}/{name}", key, part)
    made = _Fit(*(job.store.read(f"{folder}/{name}", kind) for name, kind in PARTS.items()))
    flipped = len(made.scores.prompt_ids)
    if flipped < max(FEWEST, len(refused) / 2):
        return (
            f"{category}: removing its direction flips the first token of only {flipped} of {len(refused)} refused "
            "prompts: left out, its direction does not mediate refusal."
        )
    return made


def _make_fit(job: Job, fitted: Fitted, refused: Prompts) -> _Fit:
    size = job.size("features")
    found = _direction(job, fitted, refused, size=size)
    traces = make_traces(job, replace(fitted, direction=found), refused, attribution.sound(), size=size)
    residuals, surveys, entries = features.traced_residuals(traces), [], []
    for sae in job.saes.each():
        surveys.append(features.survey(sae, residuals, found, keep=features.PER_LAYER))
        entries += layer_entries(sae, traces, sorted(feature.index for feature in surveys[-1].candidates.features))
    means = [survey.activation for survey in surveys]
    listed = [pair for part in surveys for pair in zip(part.candidates.features, part.candidates.scores, strict=True)]
    return _Fit(
        found,
        FeatureSet("candidates", *ordered_features(listed, len(listed)), parent=fingerprint(found)),
        features.prompt_scores(assemble(traces, entries)),
        Activity(job.saes.layers, tuple(map(len, means)), torch.cat(means), len(residuals.prompt)),
    )


def _direction(job: Job, fitted: Fitted, refused: Prompts, *, size: int) -> Direction:
    """Mean of the category's prompts minus mean of answered harmless ones, at the run's own layer."""
    plain = fitted.data.harmless_train
    answered = plain.keep(set(plain.ids) - set(opening_refused(job, fitted, plain, size=size).ids))
    harmful, harmless = (
        direction.mean_last_residuals(job.model, rows, batch_size=size) for rows in (refused, answered)
    )
    layer = fitted.direction.layer
    vector = (harmful - harmless)[layer].float()
    offsets = (harmless @ (vector / vector.norm()).double()).float()
    counts = {"harmful_train_kept": len(refused), "harmless_train_kept": len(answered)}
    return Direction(vector, layer, offsets, fitted.direction.refusal_tokens, (), counts)


def _compared(job: Job, fits: Mapping[str, _Fit], prompts: Categories, notes: Sequence[str]) -> CategorySets:
    """Which features all categories share, which only one has."""
    chosen = {
        name: features.choose(fit.scores, job.options.k, seed=job.options.seed).features for name, fit in fits.items()
    }
    served = Counter(feature for made in chosen.values() for feature in made.features)
    local = {name: features.per_prompt(fit.scores, job.options.k) for name, fit in fits.items()}
    common = _common(chosen, {feature for feature, count in served.items() if count == len(chosen)})
    exclusive = {
        name: made.only((f for f in made.features if served[f] == 1), "exclusive") for name, made in chosen.items()
    }
    specific = {name: made.only(set(made.features) - set(common.features), "specific") for name, made in chosen.items()}
    return CategorySets(
        prompts=prompts,
        whole=chosen,
        shares={name: _shares(made, set(served)) for name, made in local.items()},
        common=common,
        specific=specific,
        exclusive=exclusive,
        surveys=_surveys(fits),
        slices=kept_slices(job, f"{FOLDER}/slices", chosen.values()),
        notes=(*notes, *_short(chosen, job.options.k), *_parallel(fits)),
        directions={name: fit.direction for name, fit in fits.items()},
        local=local,
    )


def kept_slices(job: Job, folder: str, wanted: Iterable[FeatureSet]) -> dict[int, SaeSlice]:
    """What edits of these sets need of the SAEs, by layer; read off them once and kept in `folder`."""
    layers = layers_of(wanted)
    key = job.key("slices", [(layer, indices) for layer, indices in layers.items()])
    paths = {layer: f"{folder}/layer_{layer}.safetensors" for layer in layers}
    if not all(job.store.has(path, key) for path in paths.values()):
        for layer, part in job.saes.slices(layers).items():
            job.store.put(paths[layer], key, part)
    return {layer: job.store.read(path, SaeSlice) for layer, path in paths.items()}


def _short(chosen: Mapping[str, FeatureSet], k: int) -> list[str]:
    """Which sets hold fewer than K* features."""
    return [
        f"{name}: its set holds {len(made)} features, not {k}: no other candidate has a positive score."
        for name, made in chosen.items()
        if len(made) < k
    ]


def _parallel(fits: Mapping[str, _Fit]) -> list[str]:
    """The categories whose directions are nearly one: what they share is no wonder."""
    units = {name: fit.direction.unit for name, fit in fits.items()}
    close = [f"{a} and {b}" for a, b in combinations(units, 2) if float(units[a] @ units[b]) > PARALLEL]
    if not close:
        return []
    pairs = len(units) * (len(units) - 1) // 2
    shown = ", ".join(close[:3]) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
    return [f"The directions of {len(close)} of {pairs} pairs of categories have a cosine above {PARALLEL}: {shown}."]


def _common(chosen: Mapping[str, FeatureSet], shared: Collection[Feature]) -> FeatureSet:
    """The shared features, by their mean score over the categories."""
    scores = [dict(zip(made.features, made.scores, strict=True)) for made in chosen.values()]
    pairs = [(feature, sum(own[feature] for own in scores) / len(scores)) for feature in shared]
    return FeatureSet("common", *ordered_features(pairs, len(pairs)), parent=fingerprint(dict(chosen)))


def _shares(local: Mapping[str, FeatureSet], wanted: Collection[Feature]) -> dict[Feature, float]:
    """Feature -> the share of prompts whose own top K* holds it."""
    own = Counter(feature for made in local.values() for feature in made.features)
    return {feature: own[feature] / len(local) for feature in sorted(wanted)}


def _surveys(fits: Mapping[str, _Fit]) -> tuple[LayerSurvey, ...]:
    """Every layer's features by their mean activation over all categories, and the candidates of any category."""
    tokens = sum(fit.activity.tokens for fit in fits.values())
    mean = torch.stack([fit.activity.mean.double() * fit.activity.tokens for fit in fits.values()]).sum(0) / tokens
    first = next(iter(fits.values())).activity
    listed = sorted({feature for fit in fits.values() for feature in fit.candidates.features})
    made = []
    for layer, part in zip(first.layers, mean.float().split(list(first.sizes)), strict=True):
        own = tuple(feature for feature in listed if feature.layer == layer)
        made.append(LayerSurvey(layer, FeatureSet("candidates", own, (0.0,) * len(own)), part))
    return tuple(made)
