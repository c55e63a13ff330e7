"""The fewest features whose silence flips a prompt, and those that wake up then: measured, then stated.

Prompts are taken a few at a time, each few an artifact of its own: a run that is killed searches a few again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from refusalscope.core.scores import Activity, Scores
from refusalscope.core.types import Feature, FeatureSet, Finding, NaN, Prompts, Response
from refusalscope.evals import rules
from refusalscope.mechanism import attribution, features, silencing
from refusalscope.mechanism import minimal as mechanism
from refusalscope.mechanism.minimal import Least, Pruned, Question
from refusalscope.mechanism.reading import assemble, layer_entries
from refusalscope.pipeline import woken
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, provenance
from refusalscope.pipeline.select import Chosen
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.pipeline.traces import make_traces, opening_refused
from refusalscope.pipeline.woken import AT_ONCE, FOLDER
from refusalscope.studies import minimal
from refusalscope.studies.minimal import Case

MOST_ENUMERATED = 20
"""Features of a prompt's own set beyond which nothing is enumerated."""


@dataclass(frozen=True)
class Ground:
    """What is read off the SAEs once, before anything is silenced."""

    prompts: Prompts
    scores: Scores
    """Of all candidates on the prompts; those that removing the direction does not flip are left out."""
    activity: Activity
    key: str
    """Of all that lies in the folder."""


class Listed(NamedTuple):
    """Which prompts were refused, and how many of those are searched."""

    refused: Prompts
    among: int
    """Prompts asked."""
    found: int
    """Of which so many are refused."""


def run_minimal(job: Job, fitted: Fitted, chosen: Chosen, *, sizes: Sizes = WHOLE) -> Finding:
    """Prune every prompt's own set and write `findings/minimal.json`. Raises ValueError, one line, where it cannot."""
    listed = _listed(job, fitted, sizes.minimal_prompts)
    ground = _ground(job, fitted, listed.refused)
    cases = [case for part in _parts(job, fitted, ground, sizes.enumerated) for case in part]
    heard = woken.listen(job, ground.prompts, cases, ground.activity, ground.key, draws=sizes.woken_draws)
    finding = minimal.summarise(
        cases,
        heard,
        dataset=listed.refused.name,
        k=job.options.k,
        draws=sizes.woken_draws,
        caveats=(
            *sizes.caveats("minimal", job.options),
            *(*fitted.notes, *fitted.direction.caveats, *_caveats(listed, cases)),
        ),
        provenance=provenance(job, fitted, chosen),
    )
    return keep_finding(job.store, finding)


def _listed(job: Job, fitted: Fitted, most: int) -> Listed:
    rows = fitted.data.harmful_validation
    ids = job.store.get(
        f"{FOLDER}/refused.json",
        job.key("features", "refused", fitted.direction, rows),
        dict,
        lambda: {"ids": list(opening_refused(job, fitted, rows, size=job.size("features")).ids)},
    )["ids"]
    if not ids:
        raise ValueError(f"none of {len(rows)} {rows.name} prompts is refused: there is nothing to flip")
    return Listed(rows.keep(ids)[:most], len(rows), len(ids))


def _ground(job: Job, fitted: Fitted, rows: Prompts) -> Ground:
    """Candidates by the run's direction, their attribution on each prompt, how active every feature is; slices."""
    key = job.key("features", "minimal", fitted.direction, rows)
    path = {name: f"{FOLDER}/{name}.safetensors" for name in ("scores", "activity")}
    slices = [f"{FOLDER}/candidates/layer_{layer}.safetensors" for layer in job.target.saes.names]
    if not all(job.store.has(one, key) for one in (*path.values(), *slices, f"{FOLDER}/promoted.json")):
        _read(job, fitted, rows, key)
    scores, activity = job.store.read(path["scores"], Scores), job.store.read(path["activity"], Activity)
    return Ground(rows.keep(scores.prompt_ids), scores, activity, key)


def _read(job: Job, fitted: Fitted, rows: Prompts, key: str) -> None:
    traces = make_traces(job, fitted, rows, attribution.sound(), size=job.size("features"))
    attribution.check_flipped(traces)
    residuals, entries, means, promoted = features.traced_residuals(traces), [], [], {}
    for sae in job.saes.each():
        survey = features.survey(sae, residuals, fitted.direction, keep=features.PER_LAYER)
        listed = sorted(feature.index for feature in survey.candidates.features)
        entries += layer_entries(sae, traces, listed)
        means.append(survey.activation)
        part = sae.slice(listed)
        texts = job.model.promoted(part.decoder, 8)
        promoted |= {str(Feature(sae.layer, index)): text for index, text in zip(listed, texts, strict=True)}
        job.store.put(f"{FOLDER}/candidates/layer_{sae.layer}.safetensors", key, part)
    activity = Activity(job.saes.layers, tuple(map(len, means)), torch.cat(means), len(residuals.prompt))
    job.store.put(f"{FOLDER}/promoted.json", key, promoted)
    job.store.put(f"{FOLDER}/activity.safetensors", key, activity)
    job.store.put(f"{FOLDER}/scores.safetensors", key, features.prompt_scores(assemble(traces, entries)))


def _parts(job: Job, fitted: Fitted, ground: Ground, most: int) -> list[list[Case]]:
    """Every few prompts' cases, made where they do not stand; the first `most` prompts' true minima too."""
    own = features.per_prompt(ground.scores, job.options.k)
    rows, made = ground.prompts, []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        job.progress("minimal: pruning", start, len(rows))
        enumerated = max(0, min(len(part), most - start)) if job.options.k <= MOST_ENUMERATED else 0
        key = job.key("minimal", ground.key, part, job.options.k, enumerated)
        search = partial(_searched, job, fitted, part, own, enumerated)
        found = job.store.get(f"{FOLDER}/found/{start // AT_ONCE:04d}.json", key, dict, search)
        made.append([_case(row, prompt.cluster or prompt.id) for row, prompt in zip(found["cases"], part, strict=True)])
    return made


def _searched(
    job: Job, fitted: Fitted, rows: Prompts, own: dict[str, FeatureSet], enumerated: int
) -> dict[str, list[dict[str, Any]]]:
    """Prune the prompts in step, then enumerate for the first `enumerated` of them."""
    size, tokens, slices = job.size("minimal"), job.model.tokens(rows), woken.candidate_slices(job)
    ask = partial(
        silencing.flips,
        *(job.model, tokens),
        slices=slices,
        refusal_tokens=fitted.direction.refusal_tokens,
        coherent=_coherent,
        size=size,
    )
    pruned = mechanism.in_step({name: mechanism.prune(own[name].features) for name in rows.ids}, ask)
    flipping = [name for name in rows.ids[:enumerated] if pruned[name] is not None]
    least = mechanism.in_step({name: mechanism.enumerate_least(own[name].features) for name in flipping}, ask)
    asked: list[Question] = [(name, frozenset(found.features)) for name, found in pruned.items() if found is not None]
    said = silencing.answers(job.model, tokens, asked, slices, size=size)
    phrases = {name: rules.refused_by_phrase(answer.text).score for (name, _), answer in zip(asked, said, strict=True)}
    cases = (
        Case(name, "", own[name].features, pruned[name], least.get(name), phrases.get(name, NaN)) for name in rows.ids
    )
    return {"cases": [asdict(case) for case in cases]}


def _coherent(answer: Response) -> bool:
    """These answers are cut off by us: that they do not end says nothing."""
    return not rules.incoherence(answer, cut_off_counts=False)


def _case(row: dict[str, Any], cluster: str) -> Case:
    """A case as it was before it was written."""

    def listed(found: Sequence[dict[str, int]]) -> tuple[Feature, ...]:
        return tuple(Feature(**one) for one in found)

    pruned, least = row["pruned"], row["least"]
    if pruned is not None:
        inner = None if pruned["inner"] is None else tuple(pruned["inner"])
        pruned = Pruned(listed(pruned["features"]), pruned["passes"], pruned["tried"], inner)
    if least is not None:
        least = Least(None if least["features"] is None else listed(least["features"]), least["tried"])
    phrase = NaN if row["refused_by_phrase"] is None else row["refused_by_phrase"]
    return Case(row["prompt_id"], cluster, listed(row["own"]), pruned, least, phrase)


def _caveats(listed: Listed, cases: Sequence[Case]) -> list[str]:
    """What was left out on the way, and how far the search went."""
    rows, searched = listed.refused, len(cases)
    notes = [
        f"Minimal sets: {listed.found} of {listed.among} {rows.name} prompts are refused to begin with"
        f"{f', the first {len(rows)} of them are looked at' if len(rows) < listed.found else ''}."
    ]
    if searched < len(rows):
        notes.append(
            f"{len(rows) - searched} of {len(rows)} {rows.name} prompts are still refused when the direction is "
            "removed: they have no attribution, hence no set of their own, and are left out."
        )
    return notes
