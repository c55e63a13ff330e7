"""From a direction to feature sets: one pass over the SAEs, every set of method 4 chosen from what it read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from refusalscope.core.memory import give_back
from refusalscope.core.scores import Attribution, Scores, Trace
from refusalscope.core.store import Store
from refusalscope.core.types import Feature, FeatureSet, Prompts, SaeSlice, layers_of
from refusalscope.inputs.chat import scored
from refusalscope.mechanism import attribution, features
from refusalscope.mechanism.attribution import NodeCheck
from refusalscope.mechanism.features import Choice, LayerSurvey
from refusalscope.mechanism.reading import Entries, LayerTotals, assemble, layer_entries, layer_totals
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.traces import TRACES, kept_traces, refused_prompts


@dataclass(frozen=True)
class Chosen:
    """The feature sets, by the name of their artifact, and the SAE slices that edit them."""

    sets: Mapping[str, FeatureSet]
    slices: Mapping[int, SaeSlice]
    typical: Mapping[str, float]
    """Set -> its features' mean largest activation on refused harmful prompts, in the SAE's own units."""
    notes: tuple[str, ...]


class Reading(NamedTuple):
    """What one pass over the SAEs read; the lists hold one item a layer."""

    surveys: list[LayerSurvey]
    candidates: Attribution
    slopes: Attribution | None
    """The candidates' attribution by the clean gradient, if wanted."""
    scores: Scores | None
    """All features, if `attribution` is wanted."""
    highest: tuple[Scores, Scores] | None
    """On harmful and on harmless prompts, if `activation-difference` is wanted."""
    totals: list[LayerTotals]
    notes: dict[str, list[int]]
    """What must be known of how SAEs are read -> the layers it holds for."""


def choose_features(job: Job, fitted: Fitted) -> Chosen:
    """Attribute refusal to features, choose every set, and write sets, table and slices."""
    key = job.key(
        *("features", fitted.direction, fitted.data, job.options.set_sizes, job.options.random_draws, job.options.seed),
        job.options.wanted_methods,
    )
    if not _features_stand(job, key):
        _make_features(job, fitted, key)
    for scheme in ("sound", "paper", "gradient"):
        job.drop_parts(f"{TRACES}/{scheme}")
    return read_chosen(job.store)


def read_chosen(store: Store) -> Chosen:
    """The sets and slices that a run folder holds. Raises ValueError, one line, when they were not chosen yet."""
    index = store.read("features/index.json", dict)
    sets = {name: store.read(f"features/{name}.json", FeatureSet) for name in index["sets"]}
    slices = {int(layer): store.read(f"slices/layer_{layer}.safetensors", SaeSlice) for layer in index["layers"]}
    return Chosen(sets, slices, index["typical"], tuple(index["notes"]))


def _features_stand(job: Job, key: str) -> bool:
    if not job.store.has("features/index.json", key):
        return False
    index = job.store.read("features/index.json", dict)
    paths = [f"features/{name}.json" for name in (*index["sets"], "table")]
    paths += [f"slices/layer_{layer}.safetensors" for layer in index["layers"]]
    paths += ["attributions/candidates.safetensors", "attributions/layers.json"]
    return all(job.store.has(path, key) for path in paths)


def _make_features(job: Job, fitted: Fitted, key: str) -> None:
    published = job.options.protocol == "paper"
    train = fitted.data.harmful_train
    refused = train if published else refused_prompts(job, fitted, train, size=job.size("features"))
    nodes = [] if published else attribution.enough_nodes(job.model, refused, fitted.direction, layers=job.saes.layers)
    scheme = attribution.paper() if published else attribution.sound(nodes[-1].nodes)
    traces = kept_traces(job, fitted, refused, scheme, key)
    attribution.check_flipped(traces)
    if published:
        # The published code keeps prompts that removal does not flip: their metric is 0, and so are their scores.
        traces = [replace(part, flipped=torch.ones_like(part.flipped)) for part in traces]
    reading = read_layers(job, fitted, refused, traces, key)
    named = _named_sets(job, reading)
    sets = {name: made.features for name, made in named.items()} | _controls(job, reading, named)
    table = [row for name, made in named.items() for row in _table_rows(job, name, made)]
    slices = job.saes.slices(layers_of(sets.values()))
    _describe(job, table, slices)
    for layer, part in slices.items():
        job.store.put(f"slices/layer_{layer}.safetensors", key, part)
    for name, chosen in sets.items():
        job.store.put(f"features/{name}.json", key, chosen)
    job.store.put("features/table.json", key, {"rows": table})
    job.store.put("attributions/candidates.safetensors", key, reading.candidates)
    job.store.put("attributions/layers.json", key, _totals(reading, refused, nodes))
    index = {
        "sets": list(sets),
        "layers": list(slices),
        "typical": _typical(sets, slices, traces),
        "notes": [
            *_sae_notes(job.saes.layers, len(job.model.layers), reading.notes),
            *_notes(nodes, sets, job.options.set_sizes),
        ],
    }
    # The index comes last: while it is missing, a killed stage is made again.
    job.store.put("features/index.json", key, index)


def read_layers(job: Job, fitted: Fitted, refused: Prompts, traces: Sequence[Trace], key: str) -> Reading:
    """Open each layer's SAE once and read everything off it that any wanted set needs."""
    give_back()
    wanted, most = job.options.wanted_methods, max(job.options.set_sizes)
    published = job.options.protocol == "paper"
    where, over = (features.everywhere, max(p.ids.shape[1] for p in traces)) if published else (scored, None)
    harmful = features.traced_residuals(traces)
    maxima = features.traced_residuals(traces, where=where) if published else harmful
    wants_slopes = "cosine+gradient" in wanted
    slope_traces = kept_traces(job, fitted, refused, attribution.gradient(), key) if wants_slopes else []
    plain = fitted.data.harmless_train
    harmless = (
        features.read_residuals(job.model, plain, job.saes.layers, batch_size=job.size("features"), where=where)
        if "activation-difference" in wanted
        else None
    )
    surveys: list[LayerSurvey] = []
    entries: list[Entries] = []
    slopes: list[Entries] = []
    scores: Scores | None = None
    highest: list[tuple[Scores, Scores]] = []
    totals: list[LayerTotals] = []
    notes: dict[str, list[int]] = {}
    for done, sae in enumerate(job.saes.each()):
        job.progress("features: reading SAEs", done, len(job.saes.layers))
        surveys.append(features.survey(sae, harmful, fitted.direction, keep=max(features.PER_LAYER, most)))
        listed = features.candidates(surveys[-1:])[sae.layer]
        entries += layer_entries(sae, traces, listed)
        totals.append(layer_totals(sae, traces))
        if sae.note:
            notes.setdefault(sae.note, []).append(sae.layer)
        if slope_traces:
            slopes += layer_entries(sae, slope_traces, listed)
        if "attribution" in wanted:
            scores = features.best(scores, features.layer_scores(sae, traces, k=most, where=where, over=over), most)
        if harmless is not None:
            highest.append(features.layer_highest(sae, maxima, harmless))
    return Reading(
        surveys,
        assemble(traces, entries),
        assemble(slope_traces, slopes) if slope_traces else None,
        scores,
        (features.join([a for a, _ in highest]), features.join([b for _, b in highest])) if highest else None,
        totals,
        notes,
    )


def _named_sets(job: Job, reading: Reading) -> dict[str, Choice]:
    """Every wanted set but the random ones, at every size, by the name of its artifact."""
    seed, published = job.options.seed, job.options.protocol == "paper"
    # The published mask: everything after BOS, or after a fixed header.
    last = (reading.candidates.length - job.target.published_skip).clamp(min=1) if published else None
    sources = {"cosine+attribution": features.prompt_scores(reading.candidates, last=last)}
    if reading.slopes is not None:
        sources["cosine+gradient"] = features.prompt_scores(reading.slopes, method="cosine+gradient", last=last)
    if reading.scores is not None:
        sources["attribution"] = reading.scores
    made: dict[str, Choice] = {}
    for k in job.options.set_sizes:
        chosen = {name: features.choose(scores, k, seed=seed, signed=published) for name, scores in sources.items()}
        if reading.highest is not None:
            chosen["activation-difference"] = features.choose_difference(*reading.highest, k, seed=seed)
        if "cosine" in job.options.wanted_methods:
            chosen["cosine"] = Choice(features.cosine(reading.surveys, k), (), ())
        made |= {job.options.set_name(name, k): choice for name, choice in chosen.items()}
    return {name: made[name] for name in made if name.partition("-k")[0] in job.options.wanted_methods}


def _controls(job: Job, reading: Reading, named: Mapping[str, Choice]) -> dict[str, FeatureSet]:
    """Random draws matched with cosine+attribution (else the first set), outside all sets and candidates."""
    if "random" not in job.options.wanted_methods or not named:
        return {}
    excluded = {feature for made in named.values() for feature in made.features.features}
    excluded |= {Feature(layer, i) for layer, listed in features.candidates(reading.surveys).items() for i in listed}
    controls = {}
    for k in job.options.set_sizes:
        matched = named.get(job.options.set_name("cosine+attribution", k), next(iter(named.values())))
        for draw in range(job.options.random_draws):
            seed = job.options.seed + draw
            name = job.options.set_name(f"random-{draw}", k)
            controls[name] = features.random_like(matched.features.top(k), reading.surveys, excluded, seed=seed)
    return controls


def _sae_notes(held: Sequence[int], layers: int, notes: Mapping[str, Sequence[int]]) -> list[str]:
    """Which layers have an SAE, unless all have, and which of these are not read as they were trained."""
    found = []
    if len(held) < layers:
        found.append(f"SAEs exist for layers {_listed(held)} of {layers}: features of other layers cannot be chosen.")
    return found + [f"SAEs of layers {_listed(some)}: {note}." for note, some in notes.items()]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _notes(nodes: Sequence[NodeCheck], sets: Mapping[str, FeatureSet], sizes: Sequence[int]) -> list[str]:
    notes = []
    if nodes and nodes[-1].change > attribution.NODE_TOLERANCE:
        notes.append(
            f"The attribution's gradients still move by {nodes[-1].change:.1%} when its {nodes[-1].nodes} nodes are "
            "doubled."
        )
    for name, chosen in sets.items():
        if len(chosen) < (asked := _asked(name, sizes)):
            notes.append(f"{name} holds {len(chosen)} features, not {asked}: no other one has a positive score.")
    return notes


def _typical(
    sets: Mapping[str, FeatureSet], slices: Mapping[int, SaeSlice], traces: Sequence[Trace]
) -> dict[str, float]:
    """The mean over a set's features of their mean largest activation on the prompts of the traces.

    In the SAE's own units: features are set to multiples of it.
    """
    residuals = features.traced_residuals(traces)
    means: dict[Feature, float] = {}
    for layer, part in slices.items():
        named = (Feature(layer, index) for index in part.features.tolist())
        means |= dict(
            zip(named, features.highest(part, residuals, encode=part.encode_own).mean(0).tolist(), strict=True)
        )
    return {name: sum(means[f] for f in chosen.features) / max(1, len(chosen)) for name, chosen in sets.items()}


def _asked(name: str, sizes: Sequence[int]) -> int:
    _, _, size = name.partition("-k")
    return int(size) if size else sizes[0]


def _totals(reading: Reading, refused: Prompts, nodes: Sequence[NodeCheck]) -> dict[str, Any]:
    """Per layer and prompt: what candidates, all features and the error term carry, and how the nodes were chosen."""
    found = reading.candidates
    layers = []
    for part in reading.totals:
        inside = found.layer == part.layer
        listed = [0.0] * len(refused)
        for prompt, value in zip(found.prompt[inside].tolist(), found.value[inside].tolist(), strict=True):
            listed[prompt] += value
        layers.append(
            {
                "layer": part.layer,
                "candidates": listed,
                "features": part.features.tolist(),
                "error": part.error.tolist(),
            }
        )
    checks = [{"nodes": check.nodes, "change": check.change} for check in nodes]
    return {"prompt_ids": list(refused.ids), "clusters": list(refused.clusters), "layers": layers, "nodes": checks}


def _table_rows(job: Job, name: str, made: Choice) -> list[dict[str, Any]]:
    size = _asked(name, job.options.set_sizes)
    label = "" if size == job.options.k else f" (K* = {size})"
    chosen = made.features
    return [
        {
            "method": f"{chosen.method}{label}",
            "k": size,
            "rank": rank + 1,
            "layer": feature.layer,
            "index": feature.index,
            "score": chosen.scores[rank],
            "chosen": made.chosen[rank] if made.chosen else None,
            "stability": made.stability[rank] if made.stability else None,
        }
        for rank, feature in enumerate(chosen.features)
    ]


def _describe(job: Job, table: list[dict[str, Any]], slices: Mapping[int, SaeSlice]) -> None:
    """Add to each row the tokens that its decoder row promotes and suppresses through the unembedding."""
    for row in table:
        vector = slices[row["layer"]].take([row["index"]]).decoder
        row["promoted"] = job.model.promoted(vector, 8)[0]
        row["suppressed"] = job.model.promoted(-vector, 8)[0]
