"""What the report shows of single features and single prompts: where a feature fires, and why a prompt was refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core import stats
from refusalscope.core.scores import Trace
from refusalscope.core.types import Direction, Feature, FeatureSet, Prompt, Prompts, SaeSlice
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.template import Role
from refusalscope.mechanism import attribution, effects
from refusalscope.mechanism.interventions import Intervention, RemoveDirection, ScaleFeatures, editor, needed_features
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import STRENGTHS
from refusalscope.pipeline.select import Chosen
from refusalscope.pipeline.traces import make_traces, opening_refused, refused_prompts

STRONGEST = 5
"""Prompts shown per feature."""
HELD_OUT = 32
"""Held-out refused prompts on which editing a feature alone is measured."""
SHOWN = 8
"""Features shown per prompt; the others of the set are summed."""
PER_SET = 2
"""Refused prompts shown per evaluation set."""


class Activations(NamedTuple):
    """One prompt's tokens and the activations of every chosen feature on them."""

    prompt: Prompt
    dataset: str
    ids: list[int]
    roles: list[int]
    values: Float[Tensor, "position feature"]


def explain_features(job: Job, fitted: Fitted, chosen: Chosen) -> None:
    """Write `features/details.json`: for every feature of a set, where it fires and what editing it alone does."""
    key = job.key("explain", "features", fitted.direction, fitted.data, dict(chosen.sets))
    job.store.get("features/details.json", key, dict, lambda: {"features": _details(job, fitted, chosen)})


def explain_prompts(job: Job, fitted: Fitted, chosen: Chosen) -> None:
    """Write `prompts/why.json`: refused prompts token by token, and which edits flip them.

    Each set is scaled by the factor that the benchmark chose for it.
    """
    factors = job.store.read(STRENGTHS, dict)
    key = job.key(
        "explain",
        "prompts",
        fitted.direction,
        job.sets.evaluation,
        dict(chosen.sets),
        dict(factors),
    )
    job.store.get("prompts/why.json", key, dict, lambda: {"prompts": list(_whys(job, fitted, chosen, factors))})


def _details(job: Job, fitted: Fitted, chosen: Chosen) -> list[dict[str, Any]]:
    slices = list(chosen.slices.values())
    columns = [Feature(part.layer, index) for part in slices for index in part.features.tolist()]
    seen = [
        a for rows in (fitted.data.harmful_train, fitted.data.harmless_train) for a in _activations(job, rows, slices)
    ]
    scored = [torch.tensor([role in (Role.INSTRUCTION, Role.CLOSING) for role in a.roles]) for a in seen]
    best = torch.stack([a.values[inside].amax(0) for a, inside in zip(seen, scored, strict=True)])
    table = job.store.read("features/table.json", dict)["rows"]
    size = job.size("explain")
    refused = refused_prompts(job, fitted, fitted.data.harmful_validation, size=size)[:HELD_OUT]
    traces = make_traces(job, fitted, refused, attribution.gradient(), size=size)
    listed = sorted({Feature(row["layer"], row["index"]) for row in table})
    made = []
    for done, feature in enumerate(listed):
        job.progress("explaining features", done, len(listed))
        column = columns.index(feature)
        own = [row for row in table if (row["layer"], row["index"]) == (feature.layer, feature.index)]
        made.append(
            {
                "layer": feature.layer,
                "index": feature.index,
                "sets": [{k: row[k] for k in ("method", "k", "rank", "score", "chosen", "stability")} for row in own],
                "promoted": own[0]["promoted"],
                "suppressed": own[0]["suppressed"],
                "active": _active(seen, best[:, column]),
                "strongest": _strongest(job.model, seen, best[:, column], column),
                "alone": _alone(job, fitted, feature, chosen, traces, refused.clusters),
            }
        )
    return made


def _activations(job: Job, rows: Prompts, slices: Sequence[SaeSlice]) -> Iterator[Activations]:
    for part, tokens in job.model.batches(rows, job.size("explain")):
        residuals = job.model.run(tokens, keep=[piece.layer for piece in slices]).residuals
        values = torch.cat([piece.encode(residuals[piece.layer]) for piece in slices], -1)
        tokens = tokens.to("cpu")
        for row, prompt in enumerate(part):
            inside = tokens.mask[row]
            ids, roles = tokens.ids[row][inside].tolist(), tokens.roles[row][inside].tolist()
            yield Activations(prompt, rows.name, ids, roles, values[row][inside])


def _active(seen: Sequence[Activations], best: Float[Tensor, "prompt"]) -> dict[str, float]:
    """Share of the harmful and of the harmless fitting prompts in which the feature fires at all."""
    shares = {}
    for label in ("harmful", "harmless"):
        own = torch.tensor([a.prompt.label == label for a in seen])
        shares[label] = float((best[own] > 0).double().mean()) if own.any() else 0.0
    return shares


def _strongest(
    model: ChatModel, seen: Sequence[Activations], best: Float[Tensor, "prompt"], column: int
) -> list[dict[str, Any]]:
    order = best.argsort(descending=True, stable=True)[:STRONGEST].tolist()
    return [
        {
            "id": seen[at].prompt.id,
            "dataset": seen[at].dataset,
            "label": seen[at].prompt.label,
            "tokens": model.decode(seen[at].ids),
            "roles": _roles(seen[at].roles),
            "activations": seen[at].values[:, column].tolist(),
        }
        for at in order
        if best[at] > 0
    ]


def _roles(roles: Sequence[int]) -> list[str]:
    return [Role(role).name.lower() for role in roles]


def _alone(
    job: Job, fitted: Fitted, feature: Feature, chosen: Chosen, traces: Sequence[Trace], clusters: Sequence[str]
) -> dict[str, Any] | None:
    """What silencing this feature alone does to refused held-out prompts."""
    if not traces:
        return None
    edit = ScaleFeatures(FeatureSet("one", (feature,), (0.0,)), 0.0)
    changes, flips = [], []
    for part in traces:
        found = effects.metric_under(job.model, part, _edits(job, edit, chosen))
        changes += (found.metric - part.metric_clean).tolist()
        flips += [float(token not in fitted.direction.refusal_tokens) for token in found.first]
    metric, flipped = stats.mean(changes, clusters), stats.rate(flips, clusters)
    return {
        "factor": 0.0,
        "n": len(changes),
        "metric_change": [metric.estimate, metric.low, metric.high],
        "flipped": [flipped.estimate, flipped.low, flipped.high],
    }


def _edits(job: Job, intervention: Intervention | None, chosen: Chosen) -> dict[int, Any]:
    slices = {layer: chosen.slices[layer].take(some) for layer, some in needed_features(intervention).items()}
    return editor(intervention, layers=len(job.model.layers), slices=slices).edits


def _whys(job: Job, fitted: Fitted, chosen: Chosen, factors: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The first refused prompts of every evaluation set, wrongly refused harmless ones among them."""
    for name, rows in job.sets.evaluation.items():
        if name.endswith("-unseen"):
            continue
        job.progress(f"explaining prompts: {name}", 0, 1)
        refused = opening_refused(job, fitted, rows, size=job.size("explain"))[:PER_SET]
        for trace in make_traces(job, fitted, refused, attribution.sound(), size=PER_SET):
            for row, prompt in enumerate(trace.prompt_ids):
                if trace.flipped[row]:
                    label = rows.keep([prompt])[0].label
                    yield {"id": prompt, "dataset": name, "label": label} | _why(
                        job, fitted.direction, _single(trace, row), chosen, factors
                    )


def _single(trace: Trace, row: int) -> Trace:
    """One prompt of a trace, its padding cut off."""
    inside = trace.roles[row] != Role.PADDING

    def cut(part: Tensor) -> Tensor:
        return part[:, row : row + 1, inside]

    one = slice(row, row + 1)
    return Trace(
        *((trace.prompt_ids[row],), trace.ids[one, inside], trace.roles[one, inside], trace.layers),
        *(cut(trace.clean), cut(trace.patched), None, cut(trace.gradient)),
        *(trace.answer[one], trace.refusal[one], trace.metric_clean[one], trace.metric_patched[one]),
        trace.flipped[one],
    )


def _why(job: Job, found: Direction, trace: Trace, chosen: Chosen, factors: Mapping[str, float]) -> dict[str, Any]:
    """The first set's features on one prompt, token by token, and what every edit makes of it."""
    first = next(iter(chosen.sets.values()))
    slices = [chosen.slices[layer].take(some) for layer, some in first.by_layer().items()]
    listed = [
        (delta.feature, delta.change[0] * (trace.gradient[trace.layers.index(delta.feature.layer)][0] @ delta.decoder))
        for delta in effects.deltas(trace, slices)
    ]
    listed.sort(key=lambda pair: (-float(pair[1].sum()), pair[0]))
    tokens = job.model.decode(trace.ids[0].tolist())
    rest = sum((values for _, values in listed[SHOWN:]), torch.zeros(len(tokens)))
    return {
        "tokens": tokens,
        "roles": _roles(trace.roles[0].tolist()),
        "refusal_token": job.model.decode(trace.refusal.tolist())[0],
        "answer_token": job.model.decode(trace.answer.tolist())[0],
        "metric_clean": float(trace.metric_clean[0]),
        "metric_removed": float(trace.metric_patched[0]),
        "features": [
            {"layer": f.layer, "index": f.index, "values": values.tolist(), "total": float(values.sum())}
            for f, values in listed[:SHOWN]
        ],
        "rest": rest.tolist(),
        "edits": [
            _tried(job, found, trace, chosen, name, edit)
            for name, edit in _trials(found, chosen, factors, listed[0][0] if listed else None)
        ],
    }


def _trials(
    found: Direction, chosen: Chosen, factors: Mapping[str, float], strongest: Feature | None
) -> list[tuple[str, Intervention | None]]:
    trials: list[tuple[str, Intervention | None]] = [("no edit", None), ("direction removed", RemoveDirection(found))]
    for name, factor in factors.items():
        features = chosen.sets[name]
        trials.append((f"{features.method} scaled by c={factor:g}, k={len(features)}", ScaleFeatures(features, factor)))
    if strongest is not None:
        alone = FeatureSet("one", (strongest,), (0.0,))
        trials.append((f"feature {strongest} alone silenced", ScaleFeatures(alone, 0.0)))
    return trials


def _tried(
    job: Job, found: Direction, trace: Trace, chosen: Chosen, name: str, edit: Intervention | None
) -> dict[str, Any]:
    made = effects.metric_under(job.model, trace, _edits(job, edit, chosen))
    return {
        "edit": name,
        "metric": float(made.metric[0]),
        "first_token": job.model.decode([made.first[0]])[0],
        "refused": made.first[0] in found.refusal_tokens,
    }
