"""Every way to choose features: candidates by cosine, the sets built on them, and matched random draws (method 4).

Scores are kept per prompt, so choosing again (per prompt, on resampled prompts) costs no forward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refusalscope.core.encoding import at_once
from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.scores import Attribution, Scores, Trace
from refusalscope.core.types import Direction, Feature, FeatureSet, Prompts, SaeSlice, ordered_features
from refusalscope.inputs.chat import ChatModel, scored
from refusalscope.inputs.saes import LayerSae
from refusalscope.mechanism.reading import moved

PER_LAYER = 10
"""K0: candidates per layer (published)."""
KEPT = 100
"""Features per layer that enter `Scores` by their mean, beside every prompt's own best."""
ROWS = 64
"""Prompts whose scores are copied at a time: a copy of all would be as much again."""
Progress = Callable[[str, int, int], None]


Where = Callable[[Int[Tensor, "prompt position"]], Bool[Tensor, "prompt position"]]
"""Which positions count, by their roles."""


def everywhere(roles: Int[Tensor, "prompt position"]) -> Bool[Tensor, "prompt position"]:
    """Padding and BOS included: where the published code averages and takes maxima."""
    return torch.ones_like(roles, dtype=torch.bool)


class Residuals(NamedTuple):
    """Residuals at the scored tokens of a prompt set, all prompts flattened."""

    prompt_ids: tuple[str, ...]
    prompt: Int[Tensor, "token"]
    """Which prompt each token belongs to."""
    layers: Mapping[int, Float[Tensor, "token d_model"]]


class LayerSurvey(NamedTuple):
    """What one look at a layer's SAE tells about its features."""

    layer: int
    candidates: FeatureSet
    """The features of largest signed cosine with the direction."""
    activation: Float[Tensor, "d_sae"]
    """Mean activation over the scored tokens of the harmful prompts."""


class Choice(NamedTuple):
    """A set and how firmly each of its features is in it; the tuples run parallel to `features.features`."""

    features: FeatureSet
    chosen: tuple[float, ...]
    """Share of prompts whose own top K* holds the feature."""
    stability: tuple[float, ...]
    """Share of 100 resamples of the prompts whose set holds the feature."""


def read_residuals(
    model: ChatModel, prompts: Prompts, layers: Sequence[int], *, batch_size: int, where: Where = scored
) -> Residuals:
    """Residuals at the instruction and closing tokens of each prompt, unless `where` says otherwise."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    owners = []
    for start, (_, tokens) in enumerate(model.batches(prompts, batch_size)):
        inside = where(tokens.roles).cpu()
        owners.append(inside.nonzero(as_tuple=True)[0] + start * batch_size)
        for layer, residual in model.run(tokens, keep=layers).residuals.items():
            parts[layer].append(residual[inside])
    return Residuals(prompts.ids, torch.cat(owners), {layer: torch.cat(rows) for layer, rows in parts.items()})


def traced_residuals(traces: Sequence[Trace], *, where: Where = scored) -> Residuals:
    """The clean residuals of traces, at instruction and closing tokens unless `where` says otherwise."""
    masks = [where(part.roles) for part in traces]
    starts = np.cumsum([0, *(len(part.prompt_ids) for part in traces)]).tolist()
    owners = [mask.nonzero(as_tuple=True)[0] + start for mask, start in zip(masks, starts, strict=False)]
    ids = tuple(name for part in traces for name in part.prompt_ids)
    return Residuals(ids, torch.cat(owners), _Traced(traces, masks))


class _Traced(Mapping[int, Tensor]):
    """The clean residuals of traces by layer, put together when a layer is asked for: all of them would not fit."""

    def __init__(self, traces: Sequence[Trace], masks: Sequence[Tensor]) -> None:
        self._traces = traces
        self._masks = masks

    def __getitem__(self, layer: int) -> Tensor:
        pairs = zip(self._traces, self._masks, strict=True)
        return torch.cat([part.clean[part.layers.index(layer)][mask] for part, mask in pairs])

    def __iter__(self) -> Iterator[int]:
        return iter(self._traces[0].layers if self._traces else ())

    def __len__(self) -> int:
        return len(self._traces[0].layers) if self._traces else 0


def survey(sae: LayerSae, harmful: Residuals, direction: Direction, *, keep: int) -> LayerSurvey:
    """Cosine and mean activation of every feature; the `keep` best by cosine are the layer's candidates."""
    total = torch.zeros(sae.size, dtype=torch.float64)
    for _, part in _chunks(harmful, sae.layer, sae.size, sae.device):
        total += sae.encode(part).double().sum(0).cpu()
    mean = (total / max(1, len(harmful.prompt))).float()
    return LayerSurvey(sae.layer, by_cosine(sae, direction, keep), mean)


def highest(
    sae: LayerSae | SaeSlice, residuals: Residuals, *, encode: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "prompt feature"]:
    """Each prompt's largest activation over its scored tokens, of every feature that `sae` holds.

    In residual units, unless `encode` reads activations otherwise.
    """
    best = torch.zeros(len(residuals.prompt_ids), len(sae.features) if isinstance(sae, SaeSlice) else sae.size)
    for owners, part in _chunks(residuals, sae.layer, best.shape[1], sae.decoder.device):
        active = (encode or sae.encode)(part)
        for prompt in owners.unique().tolist():
            best[prompt] = torch.maximum(best[prompt], active[owners == prompt].amax(0).cpu())
    return best


def _chunks(residuals: Residuals, layer: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Which prompts a chunk of tokens belongs to, and its residuals: encoded whole, a data set would not fit."""
    tokens = at_once(size, device)
    yield from zip(residuals.prompt.split(tokens), residuals.layers[layer].split(tokens), strict=True)


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
    attribution: Attribution, *, method: str = "cosine+attribution", last: Int[Tensor, "prompt"] | None = None
) -> Scores:
    """Each feature's attribution per prompt, a mean over its last `last` tokens; dropped prompts are left out.

    `last` is the number of instruction and closing tokens if None.
    """
    last = attribution.scored if last is None else last
    inside = attribution.position >= -last[attribution.prompt.long()]
    pairs = torch.stack([attribution.layer, attribution.feature], 1)[inside]
    unique, column = pairs.unique(dim=0, return_inverse=True)
    scores = torch.zeros(len(attribution.prompt_ids), len(unique), dtype=torch.float64)
    prompt = attribution.prompt.long()[inside]
    scores.index_put_((prompt, column), attribution.value[inside].double(), accumulate=True)
    scores /= last[:, None]
    dropped = set(attribution.dropped)
    kept = [i for i, name in enumerate(attribution.prompt_ids) if name not in dropped]
    features = tuple(Feature(layer, index) for layer, index in unique.tolist())
    return Scores(method, tuple(attribution.prompt_ids[i] for i in kept), features, scores[kept].float())


def layer_scores(
    sae: LayerSae, traces: Sequence[Trace], *, k: int, where: Where = scored, over: int | None = None
) -> Scores:
    """The scores of all features of one layer, without the candidate step: `attribution`.

    A mean over the tokens that `where` picks; with `over`, their sum divided by that number. Kept are the best by their
    mean and every prompt's own `k` best, so that choosing up to `k` of all layers, for each prompt or for all, misses
    none. Prompts that removal did not flip are left out.
    """
    whole = sae.here(None)
    total, kept, moved = torch.zeros(sae.size, dtype=torch.float64), *torch.zeros(2, sae.size, dtype=torch.bool)
    for batch in traces:
        scores = _batch_scores(whole, batch, where, over)
        total += scores.double().sum(0)
        kept[scores.topk(min(k, sae.size), dim=1).indices.flatten()] = True
        moved |= (scores != 0).any(0)
    kept[total.topk(min(KEPT, sae.size)).indices] = True
    # Read a second time, these columns alone: every prompt's scores of all features would grow with the prompts.
    columns = (kept & moved).nonzero()[:, 0].tolist()
    part = sae.here(columns)
    ids = [n for batch in traces for n, flips in zip(batch.prompt_ids, batch.flipped.tolist(), strict=True) if flips]
    values, start = torch.empty(len(ids), len(columns)), 0
    for batch in traces:
        scores = _batch_scores(part, batch, where, over)
        values[start : start + len(scores)] = scores
        start += len(scores)
    return Scores("attribution", tuple(ids), tuple(Feature(sae.layer, i) for i in columns), values)


def _batch_scores(part: SaeSlice, batch: Trace, where: Where, over: int | None) -> Float[Tensor, "flipped k"]:
    """The scores of a slice's features in one batch."""
    inside = where(batch.roles)
    moves, size = moved(part, batch, inside), len(part.features)
    cells = inside.nonzero(as_tuple=True)[0][moves.token] * size + moves.column
    total = torch.zeros(len(inside) * size).index_add_(0, cells, moves.value).view(len(inside), size)
    return (total / (inside.sum(1)[:, None] if over is None else over))[batch.flipped]


def best(held: Scores | None, more: Scores, k: int) -> Scores:
    """The scores of one more layer beside those of others, of what choosing up to `k` features could need.

    That is every prompt's own `k` best of all layers, and each layer's best by their mean: of 4 layers and 1,024
    prompts half of all scores.
    """
    if held is None:
        return more
    both = (held, more)
    own = torch.cat([one.values.topk(min(k, len(one.features)), dim=1).values for one in both], 1)
    # Of each prompt, its k-th best score.
    least = own.topk(min(k, own.shape[1]), dim=1).values[:, -1:]
    columns = [_columns(one, least) for one in both]
    features = tuple(one.features[i] for one, wanted in zip(both, columns, strict=True) for i in wanted.tolist())
    values = held.values.new_empty(len(held.prompt_ids), len(features))
    for rows in torch.arange(len(values)).split(ROWS):
        values[rows] = torch.cat([one.values[rows][:, wanted] for one, wanted in zip(both, columns, strict=True)], 1)
    return replace(held, features=features, values=values)


def _columns(scores: Scores, least: Float[Tensor, "prompt 1"]) -> Int[Tensor, "kept"]:
    """Which columns hold a score of at least so much, or are among their layer's best by their mean."""
    kept = (scores.values >= least).any(0)
    total = sum(
        (rows.double().sum(0) for rows in scores.values.split(ROWS)), torch.zeros(len(kept), dtype=torch.float64)
    )
    layers = torch.tensor([feature.layer for feature in scores.features])
    for layer in layers.unique():
        here = (layers == layer).nonzero()[:, 0]
        kept[here[total[here].topk(min(KEPT, len(here))).indices]] = True
    return kept.nonzero()[:, 0]


def join(parts: Sequence[Scores]) -> Scores:
    """The scores of several layers on the same prompts, side by side."""
    features = tuple(feature for part in parts for feature in part.features)
    return Scores(parts[0].method, parts[0].prompt_ids, features, torch.cat([part.values for part in parts], 1))


def choose(scores: Scores, k: int, *, seed: int = 0, signed: bool = False) -> Choice:
    """The top `k` features by mean score, with how firmly each is chosen.

    Only positive scores count, unless `signed`: the published sets are filled up with negative ones.
    """
    if not len(scores.values):
        raise ValueError(f"{scores.method}: no prompt is left to score features on")
    parent = fingerprint(list(map(str, scores.features)), scores.values)
    chosen = FeatureSet(scores.method, *_top(scores, scores.values.double().mean(0), k, signed), parent=parent)
    single = [_own(scores, row, k, signed) for row in scores.values]
    draws = _resamples(len(scores.values), seed)
    again = [_own(scores, scores.values[draw].double().mean(0), k, signed) for draw in draws]
    return Choice(chosen, _shares(chosen, single), _shares(chosen, again))


def choose_difference(harmful: Scores, harmless: Scores, k: int, *, seed: int = 0) -> Choice:
    """`activation-difference`: mean over harmful prompts minus mean over harmless ones; both hold the same features.

    `chosen` is the share of harmful prompts whose own top K*, against the harmless mean, holds the feature.
    """
    parent = fingerprint(list(map(str, harmful.features)), harmful.values, harmless.values)
    plain = harmless.values.double().mean(0)
    best = _top(harmful, harmful.values.double().mean(0) - plain, k, signed=False)
    chosen = FeatureSet("activation-difference", *best, parent=parent)
    single = [_own(harmful, row - plain, k, signed=False) for row in harmful.values.double()]
    draws = zip(_resamples(len(harmful.values), seed), _resamples(len(harmless.values), seed + 1), strict=True)
    again = [
        _own(harmful, harmful.values[a].double().mean(0) - harmless.values[b].double().mean(0), k, signed=False)
        for a, b in draws
    ]
    return Choice(chosen, _shares(chosen, single), _shares(chosen, again))


def layer_highest(sae: LayerSae, harmful: Residuals, harmless: Residuals) -> tuple[Scores, Scores]:
    """Largest activations on harmful and on harmless prompts, of the features whose means differ most."""
    above, below = highest(sae, harmful), highest(sae, harmless)
    columns = (above.mean(0) - below.mean(0)).topk(min(KEPT, sae.size)).indices.sort().values
    features = tuple(Feature(sae.layer, i) for i in columns.tolist())
    name = "activation-difference"
    return (
        Scores(name, harmful.prompt_ids, features, above[:, columns]),
        Scores(name, harmless.prompt_ids, features, below[:, columns]),
    )


def per_prompt(scores: Scores, k: int) -> dict[str, FeatureSet]:
    """Prompt id -> that prompt's own top `k` (local sets)."""
    parent = fingerprint(list(map(str, scores.features)), scores.values)
    return {
        name: FeatureSet(scores.method, *_top(scores, row, k, signed=False), parent=parent)
        for name, row in zip(scores.prompt_ids, scores.values, strict=True)
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


def _top(scores: Scores, values: Tensor, k: int, signed: bool) -> tuple[tuple[Feature, ...], tuple[float, ...]]:
    # Only what can be among them becomes an object: 20 ms instead of 10 s for 200 rows of 50,000 features.
    least = values.topk(min(k, len(values))).values.amin() if k and len(values) else torch.inf
    inside = (values >= least) & ((values > 0) | signed)
    at = inside.nonzero()[:, 0].tolist()
    pairs = [(scores.features[i], score) for i, score in zip(at, values[inside].tolist(), strict=True)]
    return ordered_features(pairs, k)


def _own(scores: Scores, values: Tensor, k: int, signed: bool) -> set[Feature]:
    return set(_top(scores, values, k, signed)[0])


def _resamples(prompts: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(prompts, size=prompts).tolist() for _ in range(100)]


def _shares(chosen: FeatureSet, sets: Sequence[set[Feature]]) -> tuple[float, ...]:
    return tuple(sum(feature in other for other in sets) / len(sets) for feature in chosen.features)
