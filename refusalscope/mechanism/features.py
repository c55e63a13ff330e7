"""Every way to choose features: candidates by cosine, the sets built on them, and matched random draws (method 4).

Scores come from a cached `Attribution`, so choosing again (per prompt, on resampled prompts) costs no forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Attribution, Direction, Feature, FeatureSet, Prompts, ordered_features
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.inputs.template import Role

PER_LAYER = 10
"""K0: candidates per layer (published)."""
Progress = Callable[[str, int, int], None]


class LayerSurvey(NamedTuple):
    """What one look at a layer's SAE tells about its features."""

    layer: int
    candidates: FeatureSet
    """The K0 features of largest signed cosine with the direction."""
    activation: Float[Tensor, "d_sae"]
    """Mean activation over instruction and closing tokens of the prompts given."""


class Choice(NamedTuple):
    """A set and how firmly each of its features is in it; the tuples run parallel to `features.features`."""

    features: FeatureSet
    chosen: tuple[float, ...]
    """Share of prompts whose own top K* holds the feature."""
    stability: tuple[float, ...]
    """Share of 100 resamples of the prompts whose set holds the feature."""


def survey(
    model: ChatModel,
    saes: SaeBank,
    prompts: Prompts,
    direction: Direction,
    *,
    keep: int,
    batch_size: int,
    progress: Progress = lambda *_: None,
) -> list[LayerSurvey]:
    """Cosines and mean activations of every feature; the `keep` best by cosine of each layer are its candidates."""
    residuals = _scored_residuals(model, prompts, saes.layers, batch_size=batch_size)
    surveys = []
    for done, layer in enumerate(saes.layers):
        progress("features: surveying SAEs", done, len(saes.layers))
        sae = saes.layer(layer)
        total = torch.zeros(sae.size, dtype=torch.float64)
        for part in residuals[layer].split(4096):
            total += sae.encode(part).double().sum(0).cpu()
        surveys.append(LayerSurvey(layer, by_cosine(sae, direction, keep), (total / len(residuals[layer])).float()))
    return surveys


def by_cosine(sae: LayerSae, direction: Direction, k: int) -> FeatureSet:
    """The `k` features of one layer whose decoder rows have the largest signed cosine with the direction."""
    rows = sae.decoder.float()
    cosine = (rows @ direction.unit.to(rows)) / rows.norm(dim=-1).clamp(min=1e-12)
    best = cosine.topk(min(k, sae.size))
    pairs = [(Feature(sae.layer, i), s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return FeatureSet("cosine", *ordered_features(pairs, k), parent=fingerprint(direction))


def cosine(surveys: Sequence[LayerSurvey], k: int) -> FeatureSet:
    """The top `k` by signed cosine over all layers. Each survey must have kept at least `k` candidates."""
    pairs = [p for s in surveys for p in zip(s.candidates.features, s.candidates.scores, strict=True)]
    return FeatureSet("cosine", *ordered_features(pairs, k), parent=surveys[0].candidates.parent)


def candidates(surveys: Sequence[LayerSurvey]) -> dict[int, list[int]]:
    """Layer -> its K0 candidates for attribution."""
    return {s.layer: [f.index for f in s.candidates.features[:PER_LAYER]] for s in surveys}


def prompt_scores(
    attribution: Attribution,
) -> tuple[list[Feature], Float[Tensor, "prompt feature"]]:
    """Each feature's attribution per prompt, a mean over instruction and closing tokens; dropped prompts left out."""
    inside = attribution.position >= -attribution.scored[attribution.prompt.long()]
    pairs = torch.stack([attribution.layer, attribution.feature], 1)[inside]
    unique, column = pairs.unique(dim=0, return_inverse=True)
    scores = torch.zeros(len(attribution.prompt_ids), len(unique), dtype=torch.float64)
    prompt = attribution.prompt.long()[inside]
    scores.index_put_((prompt, column), attribution.value[inside].double(), accumulate=True)
    scores /= attribution.scored[:, None]
    kept = [i for i, name in enumerate(attribution.prompt_ids) if name not in set(attribution.dropped)]
    return [Feature(layer, index) for layer, index in unique.tolist()], scores[kept].float()


def choose(
    method: str, features: Sequence[Feature], scores: Float[Tensor, "prompt feature"], k: int, *, seed: int = 0
) -> Choice:
    """The top `k` features by mean score, positive scores only, with how firmly each is chosen."""
    if not len(scores):
        raise ValueError(f"{method}: no prompt is left to score features on")
    parent = fingerprint(list(map(str, features)), scores)
    best = _top(features, scores.double().mean(0), k)
    chosen_set = FeatureSet(method, *best, parent=parent)
    single = [set(_top(features, row, k)[0]) for row in scores]
    again = [set(_top(features, scores[draw].double().mean(0), k)[0]) for draw in _resamples(len(scores), seed)]
    return Choice(chosen_set, _shares(chosen_set, single), _shares(chosen_set, again))


def per_prompt(
    method: str, features: Sequence[Feature], scores: Float[Tensor, "prompt feature"], ids: Sequence[str], k: int
) -> dict[str, FeatureSet]:
    """Prompt id -> that prompt's own top `k` (local sets); `ids` name the rows of `scores`."""
    parent = fingerprint(list(map(str, features)), scores)
    return {
        name: FeatureSet(method, *_top(features, row, k), parent=parent) for name, row in zip(ids, scores, strict=True)
    }


def random_like(target: FeatureSet, surveys: Sequence[LayerSurvey], excluded: set[Feature], *, seed: int) -> FeatureSet:
    """A control set: for each feature of `target` one of the same layer and similar mean activation.

    Drawn without replacement from the ten active features nearest in log mean activation, none of them `excluded`.
    Raises ValueError when a layer has too few active features left.
    """
    rng = np.random.default_rng(seed)
    activation = {s.layer: s.activation for s in surveys}
    taken = set(excluded) | set(target.features)
    drawn = []
    for feature in target.features:
        means = activation[feature.layer]
        free = [i for i in means.nonzero()[:, 0].tolist() if Feature(feature.layer, i) not in taken]
        if not free:
            raise ValueError(f"layer {feature.layer} has no active feature left for a random draw")
        goal = means[feature.index].clamp(min=1e-12).log()
        distance = (means[free].log() - goal).abs()
        nearest = [free[i] for i in distance.argsort(stable=True)[:10].tolist()]
        pick = Feature(feature.layer, int(rng.choice(nearest)))
        taken.add(pick)
        drawn.append(pick)
    scores = tuple(float(activation[f.layer][f.index]) for f in drawn)
    return FeatureSet("random", tuple(drawn), scores, parent=fingerprint(target, seed))


def _top(features: Sequence[Feature], scores: Tensor, k: int) -> tuple[tuple[Feature, ...], tuple[float, ...]]:
    pairs = [(f, s) for f, s in zip(features, scores.tolist(), strict=True) if s > 0]
    return ordered_features(pairs, k)


def _resamples(prompts: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(prompts, size=prompts).tolist() for _ in range(100)]


def _shares(chosen: FeatureSet, sets: Sequence[set[Feature]]) -> tuple[float, ...]:
    return tuple(sum(feature in other for other in sets) / len(sets) for feature in chosen.features)


def _scored_residuals(
    model: ChatModel, prompts: Prompts, layers: Sequence[int], *, batch_size: int
) -> Mapping[int, Float[Tensor, "token d_model"]]:
    """Residuals at instruction and closing tokens, all prompts flattened."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for _, tokens in model.batches(prompts, batch_size):
        scored = ((tokens.roles == Role.INSTRUCTION) | (tokens.roles == Role.CLOSING)).cpu()
        for layer, residual in model.run(tokens, keep=layers).residuals.items():
            parts[layer].append(residual[scored])
    return {layer: torch.cat(rows) for layer, rows in parts.items()}
