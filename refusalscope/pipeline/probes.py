"""Probes on every representation, under every label scheme, and the guard chosen among them.

Everything is fitted on plain train prompts and chosen on plain validation prompts; adversarial prompts and look-alikes
are scored once, at the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from refusalscope.core import calibration
from refusalscope.core.types import Feature, Finding
from refusalscope.evals import probes
from refusalscope.evals.probes import Fold, Probe
from refusalscope.inputs.detection import Counts, Detection
from refusalscope.pipeline import capture
from refusalscope.pipeline.capture import Source
from refusalscope.pipeline.category_sets import CategorySets
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.guarding import Detector, keep_guard
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, provenance
from refusalscope.pipeline.probe_data import (
    BASELINES,
    DRAWS,
    FOLDER,
    PARTS,
    Readings,
    items_of,
    probe_prompts,
    read_prompts,
)
from refusalscope.pipeline.select import Chosen
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.studies import probes as study
from refusalscope.studies.probes import DENSE, RANDOM, Curve, Item, Role, Scheme, Scored, truth

TRAIN, VALIDATION, *TESTS = PARTS
LEARNING = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Training prompts of the learning curves, before all of them."""
Fitting = Callable[[Any, Sequence[int], Sequence[Fold]], Probe]
"""(inputs, labels, folds) -> a probe."""


class Candidate(NamedTuple):
    """One representation and how a probe on it is fitted; where there are several sources validation chooses."""

    method: str
    role: Role
    sources: Mapping[str, Source]
    """What distinguishes them, such as `layer=6` -> the inputs."""
    fit: Fitting
    features: tuple[Feature, ...] = ()
    """What the columns are; empty: no features."""
    draw: int | None = None


class Labelled(NamedTuple):
    """The train prompts that a scheme has a label for."""

    places: Sequence[int]
    labels: Sequence[int]
    folds: Sequence[Fold]


def run_probes(job: Job, fitted: Fitted, chosen: Chosen, sets: CategorySets, *, sizes: Sizes = WHOLE) -> Finding:
    """Fit every probe under every label scheme, write `findings/probes.json` and the guard.

    Raises ValueError, one line, where prompts cannot be had or the categories share no feature.
    """
    if not len(sets.common):
        raise ValueError("no feature is in every category's set: there is nothing for a probe to read (try --k)")
    given = probe_prompts(job, _counts(job, sizes))
    items = items_of(job, fitted, given)
    readings = read_prompts(job, fitted, chosen, sets, given)
    told = {name: [list(item) for item in own] for name, own in items.items()}
    read = {name: [str(feature) for feature in own] for name, own in readings.sets.items()}
    key = job.key("probes", *given.sets, told, read, readings.plan.pooling, job.options.k, job.options.seed)
    fits, notes = {}, []
    for scheme in ("intent", "refusal"):
        made = job.store.get(f"{FOLDER}/{scheme}.json", key, dict, partial(_fit_all, job, readings, items, scheme))
        fits[scheme] = [_scored(one, scheme) for one in made["probes"]]
        notes += made["notes"]
    validation, test = items[VALIDATION], [item for name in TESTS for item in items[name]]
    best = study.chosen_guard(fits["intent"], validation)
    detectors = job.store.read(f"{FOLDER}/intent.json", dict)["probes"]
    found = next(one for one in detectors if one["method"] == best.method and one["draw"] is None)
    keep_guard(job, fitted, Detector(**found["detector"]), best, readings.plan, validation)
    curves = job.store.get(f"{FOLDER}/curves.json", key, dict, partial(_curves, job, readings, items, fits["intent"]))
    finding = study.summarise(
        [*fits["intent"], *fits["refusal"]],
        [Curve(**one) for one in curves["curves"]],
        validation=validation,
        test=test,
        guard=best.method,
        paper=job.options.paper_labels,
        caveats=(
            *(*fitted.notes, *sets.notes, *given.notes, *notes),
            *(_sizes(given), *sizes.caveats("probes", job.options)),
        ),
        provenance={**provenance(job, fitted, chosen), "pooling": job.options.pooling},
    )
    return keep_finding(job.store, finding)


def _counts(job: Job, sizes: Sizes) -> Counts:
    """The published proportions; of the testbed, whose prompts are free, more to set thresholds by."""
    train = job.options.limit or sizes.probe_prompts
    own = job.target.prompts is not None and job.options.prompts is None and job.options.detection is None
    if own:
        return Counts(train, max(1, train // 2), max(1, train // 2))
    return Counts(*(max(1, train * part // Counts().train) for part in Counts()))


def _sizes(given: Detection) -> str:
    return f"Prompts for probes: {', '.join(f'{len(rows)} {PARTS[rows.name]}' for rows in given.sets)}."


def _fit_all(job: Job, readings: Readings, items: Mapping[str, list[Item]], scheme: Scheme) -> dict[str, Any]:
    """Every probe under one scheme; none, and a note, where its train prompts are of one class."""
    labelled = _labelled(items[TRAIN], scheme, seed=job.options.seed)
    checked = [truth(scheme, item) for item in items[VALIDATION]]
    if {0, 1} - set(labelled.labels) or {0.0, 1.0} - set(checked):
        return {"probes": [], "notes": [f"By {scheme} labels all train or validation prompts are of one class."]}
    candidates = list(_candidates(job, readings, labelled))
    made = []
    for done, candidate in enumerate(candidates):
        job.progress(f"probes: fitting by {scheme}", done, len(candidates))
        made.append(_fit(candidate, labelled, checked))
    return {"probes": made, "notes": []}


def _labelled(train: Sequence[Item], scheme: Scheme, *, seed: int, order: Sequence[int] | None = None) -> Labelled:
    """The prompts at `order` (None: all) that have a label."""
    asked = range(len(train)) if order is None else order
    places = [at for at in asked if truth(scheme, train[at]) in (0, 1)]
    labels = [int(truth(scheme, train[at])) for at in places]
    folds = probes.grouped_folds(labels, [train[at].cluster for at in places], seed=seed)
    return Labelled(places, labels, folds)


def _candidates(job: Job, readings: Readings, labelled: Labelled) -> Iterator[Candidate]:
    """Every representation, features first."""
    sets = {name: readings.sets[name] for name in readings.named}
    sources = {name: readings.features(name) for name in sets}
    layer, found = readings.plan.layer, _mean_difference(readings, labelled, job.options.k)
    sets["mean-difference features"] = tuple(Feature(layer, index) for index in found)
    sources["mean-difference features"] = readings.some(found)
    for name, features in sets.items():
        yield Candidate(name, "features", {"": sources[name]}, probes.logistic, features)
        yield Candidate(f"{name}, mass-mean", "features", {"": sources[name]}, _mass_mean, features)
    every = tuple(Feature(layer, index) for index in range(readings.size))
    name = f"all features of layer {layer}"
    yield Candidate(name, "features", {"": readings.whole()}, partial(probes.sparse, seed=job.options.seed), every)
    yield Candidate(DENSE, "dense", readings.dense(), partial(probes.logistic, strengths=probes.DENSE_STRENGTHS))
    yield Candidate("mean-difference direction", "dense", readings.dense(), _mass_mean)
    for name, method in BASELINES.items():
        yield Candidate(method, "baseline", {"": readings.baseline(name)}, probes.logistic)
    for draw in range(DRAWS):
        name = f"{RANDOM} {draw}"
        yield Candidate(RANDOM, "random", {"": readings.features(name)}, probes.logistic, readings.sets[name], draw)


def _mass_mean(inputs: Any, labels: Sequence[int], _: Sequence[Fold]) -> Probe:
    return probes.mass_mean(inputs, labels)


def _mean_difference(readings: Readings, labelled: Labelled, k: int) -> list[int]:
    """The features of the whole layer whose mean activations on the two classes are furthest apart."""
    inputs = csr_matrix(capture.matrix(readings.whole(), TRAIN))[list(labelled.places)]
    y = np.asarray(labelled.labels, dtype=bool)
    apart = np.abs(np.asarray(inputs[y].mean(0) - inputs[~y].mean(0)).ravel())
    return np.argsort(-apart, kind="stable")[:k].tolist()


def _fit(candidate: Candidate, labelled: Labelled, checked: Sequence[float]) -> dict[str, Any]:
    """Fit on every source, keep the one of least log loss on validation, score the test prompts with it."""
    fitted = {}
    for detail, source in candidate.sources.items():
        inputs = capture.matrix(source, TRAIN)[list(labelled.places)]
        probe = candidate.fit(inputs, labelled.labels, labelled.folds)
        means = np.asarray(inputs.mean(0)).ravel()
        fitted[detail] = (probe, means, capture.scores(source, VALIDATION, probe))
    detail = min(fitted, key=lambda name: _loss(fitted[name][2], checked))
    probe, means, validation = fitted[detail]
    known = [at for at, label in enumerate(checked) if label in (0, 1)]
    test = [score for name in TESTS for score in capture.scores(candidate.sources[detail], name, probe)]
    used = np.flatnonzero(probe.weights) if candidate.features else np.arange(len(probe.weights))
    return {
        "method": candidate.method,
        "role": candidate.role,
        "size": len(used),
        "validation": validation,
        "test": test,
        "temperature": calibration.temperature([validation[at] for at in known], [checked[at] for at in known]),
        "detail": detail,
        "draw": candidate.draw,
        "detector": {
            "features": [[candidate.features[at].layer, candidate.features[at].index] for at in used]
            if candidate.features
            else [],
            "weights": probe.weights[used].tolist(),
            "means": means[used].tolist(),
            "bias": probe.bias,
        },
    }


def _loss(logits: Sequence[float], labels: Sequence[float]) -> float:
    x, y = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    known = ~np.isnan(y)
    return float((np.logaddexp(0, x[known]) - y[known] * x[known]).mean())


def _scored(made: Mapping[str, Any], scheme: Scheme) -> Scored:
    return Scored(scheme=scheme, **{name: part for name, part in made.items() if name != "detector"})


def _curves(job: Job, readings: Readings, items: Mapping[str, list[Item]], fitted: Sequence[Scored]) -> dict[str, Any]:
    """Probes on ever more of the train prompts, drawn once: a smaller number is the beginning of a larger one."""
    seed, train = job.options.seed, items[TRAIN]
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    layer = next(one.detail for one in fitted if one.method == DENSE)
    sources = {name: readings.features(name) for name in readings.named} | {DENSE: readings.dense()[layer]}
    inputs = {method: capture.matrix(source, TRAIN) for method, source in sources.items()}
    made = []
    for count in [*(n for n in LEARNING if n < len(order)), len(order)]:
        part = _labelled(train, "intent", seed=seed, order=order[:count])
        if len(set(part.labels)) < 2:
            continue
        for method, source in sources.items():
            job.progress("probes: learning curves", len(made), len(sources) * (len(LEARNING) + 1))
            strengths = probes.DENSE_STRENGTHS if method == DENSE else probes.STRENGTHS
            probe = probes.logistic(inputs[method][part.places], part.labels, part.folds, strengths=strengths)
            test = [score for name in TESTS for score in capture.scores(source, name, probe)]
            made.append({"method": method, "prompts": count, "test": test})
    return {"curves": made}
