"""Which features drive which: the drop of common features, and a graph of weighted edges."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import networkx
import torch
from safetensors.torch import load, save
from torch import Tensor

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Feature, FeatureSet, Finding, Prompts, SaeSlice, layers_of, ordered_features
from refusalscope.mechanism import edges
from refusalscope.mechanism.interventions import record
from refusalscope.pipeline.category_sets import CategorySets, strength
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, provenance
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.pipeline.upstream import FOLDER, factors, measure_drops, refused
from refusalscope.report.network import GRAPH
from refusalscope.report.tokens import visible
from refusalscope.studies import graph
from refusalscope.studies.graph import Edges

GRAPHML = f"{FOLDER}/graph.graphml"
PROMOTED = 5
"""Tokens named with a node."""


def run_graph(job: Job, fitted: Fitted, sets: CategorySets, *, sizes: Sizes = WHOLE) -> Finding:
    """Measure what drives what and write `findings/graph.json`, the graph and its figure."""
    asked = refused(job, fitted, sets)
    drops, notes = measure_drops(job, fitted, sets, asked, sizes.drive_draws)
    nodes = choose_nodes(sets, job.options.nodes)
    slices = {layer: sets.slices[layer].take(sorted(some)) for layer, some in layers_of([nodes]).items()}
    rows = _mixed(asked, sizes.edge_prompts)
    found = _measure(job, rows, slices) if len(slices) > 1 and len(rows) else None
    if found is None:
        notes.append("No graph: no two chosen features lie in different layers, or no prompt is refused.")
    else:
        _export(job, sets, slices, found)
    finding = graph.summarise(
        drops,
        found,
        caveats=(
            *sizes.caveats("graph", job.options),
            *(*fitted.notes, *sets.notes, *_unrefused(sets, asked), *notes),
        ),
        provenance=provenance(job, fitted, None) | {"nodes": fingerprint(nodes)},
    )
    return keep_finding(job.store, finding)


def _unrefused(sets: CategorySets, asked: Mapping[str, Prompts]) -> list[str]:
    """How many held-out prompts are left out because the model does not refuse them."""
    total = sum(map(len, sets.prompts.test.values()))
    left = total - sum(map(len, asked.values()))
    return [f"{left} of {total} held-out category prompts do not open with a refusal: left out."] if left else []


def choose_nodes(sets: CategorySets, count: int) -> FeatureSet:
    """Half of them common features, half of single categories, spread over the layers so that there are edges.

    Of each kind every layer's best come first, then every layer's second, by mean score over the categories; where one
    kind has too few the other fills up.
    """
    categories = len(sets.whole)
    total: dict[Feature, float] = {}
    for chosen in sets.specific.values():
        for feature, score in zip(chosen.features, chosen.scores, strict=True):
            total[feature] = total.get(feature, 0.0) + score / categories
    common = _layers_in_turn(list(zip(sets.common.features, sets.common.scores, strict=True)))
    specific = _layers_in_turn(list(total.items()))
    mixed = [pair for pair in chain.from_iterable(zip_longest(common, specific)) if pair is not None][:count]
    return FeatureSet("nodes", *ordered_features(mixed, count))


def _layers_in_turn(pairs: Sequence[tuple[Feature, float]]) -> list[tuple[Feature, float]]:
    """Best first within every layer, and the layers in turn."""
    best, _ = ordered_features(pairs, len(pairs))
    scores, seen = dict(pairs), dict.fromkeys((feature.layer for feature in best), 0)
    places = {}
    for feature in best:
        places[feature] = seen[feature.layer]
        seen[feature.layer] += 1
    return [(feature, scores[feature]) for feature in sorted(best, key=lambda f: (places[f], -scores[f], f))]


def _mixed(asked: Mapping[str, Prompts], count: int) -> Prompts:
    """The first prompts of every category in turn."""
    mixed = [row for turn in zip_longest(*asked.values()) for row in turn if row is not None]
    return Prompts("graph", tuple(mixed[:count]))


def _measure(job: Job, rows: Prompts, slices: Mapping[int, SaeSlice]) -> Edges:
    """Weights and effects of all edges, batch by batch."""
    content = job.in_batches(
        "graph",
        f"{FOLDER}/edges.safetensors",
        key=job.key("graph", "edges", rows, [(layer, part.features) for layer, part in slices.items()], factors(job)),
        rows=rows,
        kind=bytes,
        make=lambda batch: save(_measure_batch(job, batch, slices)),
        join=lambda parts: save(_joined([load(part) for part in parts])),
    )
    found = load(content)
    alone, held = ({c: found[f"{kind} c={c:g}"] for c in factors(job)} for kind in ("alone", "held"))
    kept = {name: found[name] for name in ("activity", "silenced", "total", "direct")}
    return Edges(edges.nodes_of(slices), rows.clusters, **kept, alone=alone, held=held)


def _measure_batch(job: Job, batch: Prompts, slices: Mapping[int, SaeSlice]) -> dict[str, Tensor]:
    job.progress("graph: edges", 0, 1)
    model, tokens = job.model, job.model.tokens(batch).to(job.model.device)
    held = record(model, batch, slices, batch_size=len(batch))
    weights = edges.weights(model, tokens, slices)
    made = {
        "activity": edges.read(model, tokens, slices, {}).activity,
        "silenced": edges.silenced_together(model, tokens, slices),
        "total": weights.total,
        "direct": weights.direct,
    }
    for c in factors(job):
        made[f"alone c={c:g}"] = edges.measured(model, tokens, slices, c)
        made[f"held c={c:g}"] = edges.measured(model, tokens, slices, c, held=held)
    return {name: made[name].contiguous() for name in sorted(made)}


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _export(job: Job, sets: CategorySets, slices: Mapping[int, SaeSlice], found: Edges) -> None:
    """Write the graph as JSON and as GraphML: the same nodes and edges, values means over prompts."""
    vectors = torch.cat([part.decoder for _, part in sorted(slices.items())])
    promoted = job.store.get(
        f"{FOLDER}/promoted.json",
        job.key("graph", "promoted", found.nodes),
        dict,
        lambda: {"tokens": job.model.promoted(vectors, PROMOTED)},
    )["tokens"]
    data = {
        "nodes": [_node(sets, found, at, tokens) for at, tokens in enumerate(promoted)],
        "edges": [_edge(found, pair, strength(job)) for pair in found.pairs(1)],
        "prompts": len(found.clusters),
        "working_factor": strength(job),
    }
    job.store.keep(GRAPH, fingerprint(data), data)
    made = networkx.DiGraph()
    for node in data["nodes"]:
        text = {name: ", ".join(part) if isinstance(part, list) else part for name, part in node.items()}
        made.add_node(node["id"], **{name: part for name, part in text.items() if name != "id"})
    for edge in data["edges"]:
        rest = {name: value for name, value in edge.items() if name not in ("source", "target")}
        made.add_edge(edge["source"], edge["target"], **rest)
    text = "\n".join(networkx.generate_graphml(made)) + "\n"
    job.store.keep(GRAPHML, fingerprint(text), text)


def _node(sets: CategorySets, found: Edges, at: int, tokens: Sequence[str]) -> dict[str, Any]:
    node = found.nodes[at]
    serving = [name for name, chosen in sets.whole.items() if node in chosen.features]
    activation = next(survey.activation for survey in sets.surveys if survey.layer == node.layer)
    return {
        "id": str(node),
        "layer": node.layer,
        "index": node.index,
        "kind": "common" if node in sets.common.features else "specific",
        "categories": serving,
        "mean_activation": _short(float(activation[node.index])),
        "activity": _short(float(found.activity[:, at].double().mean())),
        "promoted": [visible(token) for token in tokens],
    }


def _edge(found: Edges, pair: tuple[int, int], working: float) -> dict[str, Any]:
    u, d = pair
    mean = partial(_mean, pair=pair)
    activity = float(found.activity[:, d].double().mean())
    return {
        "source": str(found.nodes[u]),
        "target": str(found.nodes[d]),
        "total": mean(found.total),
        "direct": mean(found.direct),
        "direct_share": _short(mean(found.direct) / activity),
        "measured": mean(found.alone[0.0]),
        "measured_direct": mean(found.held[0.0]),
        "measured_working": mean(found.alone[working]),
        "measured_direct_working": mean(found.held[working]),
    }


def _mean(values: Tensor, pair: tuple[int, int]) -> float:
    return _short(float(values.double().mean(0)[pair]))


def _short(value: float) -> float:
    """Six digits: what is beyond them no one means."""
    return float(f"{value:.6g}")
