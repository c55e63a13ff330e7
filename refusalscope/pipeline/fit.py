"""From prompts to the refusal direction, and which prompts it was fitted on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Direction, Prompts
from refusalscope.evals import rules
from refusalscope.inputs import prompts
from refusalscope.mechanism import direction
from refusalscope.mechanism.direction import FitData
from refusalscope.pipeline.job import Job


@dataclass(frozen=True)
class Fitted:
    """A direction, the prompts it was fitted on, and what to say about that."""

    direction: Direction
    data: FitData
    validation: Mapping[str, Prompts]
    """The validation sets by name, in a sweep with more prompts than the direction was chosen on."""
    notes: tuple[str, ...]


def fit(job: Job) -> Fitted:
    """Find the direction on the prompts given, or, when too few of them are refused, on the model's own."""
    sources = sources_of(job, job.sets)
    overrides = (job.refusal_tokens, job.best_layer, job.options.keep_unrefused, job.options.protocol)
    key = job.key("direction", {name: dict(s.fitting) for name, s in sources.items()}, overrides)
    if not (job.store.has("direction.safetensors", key) and job.store.has("fitting.json", key)):
        found, source, notes = _find(job, sources)
        job.begin()
        job.store.put("direction.safetensors", key, found)
        job.store.put("fitting.json", key, {"source": source, "notes": notes})
    how = job.store.read("fitting.json", dict)
    source = sources[how["source"]]
    used = {**source.fitting, **source.validation}
    for name, rows in {**used, **job.sets.evaluation}.items():
        job.store.keep(f"prompts/{name}.jsonl", fingerprint(rows), rows)
    return Fitted(
        job.store.read("direction.safetensors", Direction),
        FitData(*(source.fitting[name] for name in prompts.FITTING)),
        {name: rows for name, rows in used.items() if name.endswith("validation")},
        (*job.sets.notes, *how["notes"]),
    )


def sources_of(job: Job, given: prompts.PromptSets) -> dict[str, prompts.PromptSets]:
    """What a direction may be fitted on, in the order in which it is tried: `given`, the model's own prompts.

    Raises ValueError where neither is there.
    """
    sources = {"given": given} if given.fitting else {}
    if job.prompts is not None and job.target.prompts is not None:
        sources["own"] = prompts.from_testbed(count=1, full=False)
    if not sources:
        raise ValueError(
            f"{job.prompts} holds no train split (at least 48 harmful and 48 harmless prompts are needed) and "
            f"{job.target.name} has no prompts of its own: give more prompts"
        )
    return sources


def _find(job: Job, sources: Mapping[str, prompts.PromptSets]) -> tuple[Direction, str, list[str]]:
    notes = _published(job)
    if "given" not in sources:
        notes.append(f"{job.prompts} has no train split: direction and features come from the model's own prompts.")
    for name, source in sources.items():
        try:
            found = direction.find(
                job.model,
                FitData(*(source.fitting[part] for part in prompts.FITTING)),
                batch_size=job.size("direction"),
                is_refusal=lambda text: bool(rules.refused_by_phrase(text).score),
                refusal_tokens=token_ids(job, job.model.tokenizer),
                best_layer=job.best_layer,
                keep_unrefused=job.options.keep_unrefused,
                published=job.options.protocol == "paper",
                progress=job.progress,
            )
        except direction.NoDirection as error:
            if name == list(sources)[-1]:
                raise
            notes.append(
                f"Direction and features were fitted on the model's own prompts, not on {job.prompts}: {error}."
            )
            continue
        return found, name, notes
    raise AssertionError("a source either fits or raises")


def _published(job: Job) -> list[str]:
    """Which of the preset's published settings this run goes by."""
    used = []
    if job.target.refusal_tokens and not job.options.refusal_token:
        used.append(f"the refusal tokens {', '.join(job.target.refusal_tokens)}")
    if job.target.best_layer is not None and job.options.best_layer is None:
        used.append(f"layer {job.target.best_layer} for the direction")
    return [f"Published settings of {job.target.name} are used: {' and '.join(used)}."] if used else []


def token_ids(job: Job, tokenizer: Any) -> list[int]:
    """The refusal tokens that were given or published. Raises ValueError for a text that is not one token."""
    ids = []
    for text in job.refusal_tokens:
        found = tokenizer(text, add_special_tokens=False).input_ids
        if len(found) != 1:
            raise ValueError(f"--refusal-token {text!r} is {len(found)} tokens of {job.target.name}, not one")
        ids.append(int(found[0]))
    return ids
