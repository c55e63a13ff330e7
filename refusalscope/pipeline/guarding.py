"""From a fitted probe to a guard in the run folder: the slices it reads, its threshold, and what its features are."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refusalscope.core import calibration
from refusalscope.core.types import SaeSlice
from refusalscope.guard.content import Content, ReadFeature, packed, tensors_of
from refusalscope.inputs import presets
from refusalscope.mechanism.activations import Plan
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.studies.probes import RATES, Item, Scored

FOLDER = "guard"
PROMOTED = 3
"""Tokens by which a feature without a label is called."""


class Detector(NamedTuple):
    """A probe as numbers: one weight for every feature, or for every unit of the residual stream."""

    features: Sequence[Sequence[int]]
    """(layer, index) each; empty: the residual stream is read."""
    weights: Sequence[float]
    means: Sequence[float]
    bias: float


def keep_guard(
    job: Job, fitted: Fitted, detector: Detector, scored: Scored, plan: Plan, validation: Sequence[Item]
) -> None:
    """Write `guard/`, unless it stands. Raises ValueError with fewer benign validation prompts than a rate needs."""
    key = job.key("guard", scored._asdict(), detector._asdict(), plan.pooling, fitted.direction)
    paths = [f"{FOLDER}/guard.json", f"{FOLDER}/guard.safetensors"]
    if all(job.store.has(path, key) for path in paths):
        return
    slices = _slices(job, detector)
    tensors = tensors_of(slices) if slices else _dense(detector)
    written = packed(_content(job, detector, scored, plan, validation, slices), tensors)
    for path in reversed(paths):
        job.store.put(path, key, written[path.partition("/")[2]])


def _slices(job: Job, detector: Detector) -> dict[int, SaeSlice]:
    wanted: dict[int, list[int]] = {}
    for layer, index in detector.features:
        wanted.setdefault(layer, []).append(index)
    return job.saes.slices(wanted) if wanted else {}


def _dense(detector: Detector) -> dict[str, Tensor]:
    return {name: torch.tensor(getattr(detector, name), dtype=torch.double) for name in ("weights", "means")}


def _content(
    job: Job,
    detector: Detector,
    scored: Scored,
    plan: Plan,
    validation: Sequence[Item],
    slices: Mapping[int, SaeSlice],
) -> Content:
    negatives = [score for score, item in zip(scored.validation, validation, strict=True) if not item.harmful]
    rate = next((rate for rate in sorted(RATES) if len(negatives) >= RATES[rate]), max(RATES))
    style, options, target = job.model.template.style, job.options, job.target
    named = target.revision is not None or options.model in presets.presets()
    return Content(
        model=target.name,
        source=options.model if named else None,
        revision=target.revision,
        weights=target.weights,
        identity=target.identity,
        system=style.system,
        thinking=style.thinking,
        template=style.template,
        method=scored.method,
        labels=scored.scheme,
        pooling=plan.pooling,
        layer=None if detector.features else int(scored.detail.partition("=")[2]),
        features=_features(job, detector, slices),
        normalisations={layer: part.normalisation for layer, part in slices.items()},
        active={layer: part.active for layer, part in slices.items() if part.active is not None},
        bias=detector.bias,
        temperature=scored.temperature,
        threshold=calibration.threshold(negatives, rate) / scored.temperature,
        false_positive_rate=rate,
        negatives=len(negatives),
    )


def _features(job: Job, detector: Detector, slices: Mapping[int, SaeSlice]) -> tuple[ReadFeature, ...]:
    """In the order in which the slices hold them, each with the tokens that it promotes."""
    known = {
        (layer, index): (weight, mean)
        for (layer, index), weight, mean in zip(detector.features, detector.weights, detector.means, strict=True)
    }
    made = []
    for layer, part in slices.items():
        promoted = job.model.promoted(part.decoder, PROMOTED)
        for index, tokens in zip(part.features.tolist(), promoted, strict=True):
            weight, mean = known[layer, index]
            label = f"promotes {', '.join(repr(token) for token in tokens)}"
            made.append(ReadFeature(layer=layer, index=index, weight=weight, mean=mean, label=label))
    return tuple(made)
