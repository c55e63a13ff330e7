"""What a run folder holds of its edits' costs, as far as it can be compared: one finding.

Whatever was made by other versions, edits or settings than the rest is left out, and named.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from refusalscope.core.comparisons import untouched
from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Direction, Finding, Prompts, Responses
from refusalscope.evals import capability as costs
from refusalscope.evals import rules
from refusalscope.pipeline.environment import versions
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import answers_key, cost_key, judged_key, keep_finding
from refusalscope.pipeline.select import Chosen
from refusalscope.studies import capability as study
from refusalscope.studies.benchmark import BASE, Arm

STAGE = "capability"
DOCUMENTS, DOCUMENT_COSTS = "documents", "costs/documents"
T = TypeVar("T")
Settings = dict[str, Any]
"""What two edits must have in common to be compared."""
Measured = tuple[Arm, Mapping[str, Any]]


class Standing(NamedTuple):
    """What a run folder holds of its edits."""

    chosen: Chosen
    arms: list[Arm]
    """The unedited model first."""


def summarise(job: Job, standing: Standing, chosen: Sequence[Arm]) -> Finding:
    """The finding on all that stands in the folder of these edits, and of those that were measured before.

    What other versions, edits or settings made is left out, and named in a caveat.
    """
    shelf = _Shelf(job.store, [])
    tasks = _comparable(job, standing, [path.rpartition("/")[0] for path in job.store.paths(STAGE, ".json")], shelf)
    texts = _comparable(job, standing, [DOCUMENT_COSTS], shelf)
    shown = {arm.label for arm in chosen} | {arm.label for arm, _ in (*tasks, *texts)}
    edits = [arm for arm in standing.arms if arm.label in shown]
    measures = [one for arm, made in tasks for one in study.of_task(arm.method, arm.setting, made)]
    measures += [study.of_documents(arm.method, arm.setting, costs.DocumentCost(**made["cost"])) for arm, made in texts]
    measures += _own_measures(job, edits, shelf)
    settings = {made["task"]: made["settings"] for _, made in tasks}
    if texts:
        settings[DOCUMENTS] = texts[0][1]["settings"]
    return keep_finding(
        job.store,
        study.summarise(
            measures,
            caveats=[*_caveats(tasks), *_untouched(tasks, texts), *shelf.notes],
            provenance={
                "model": job.target.name,
                "model_and_saes": job.target.identity,
                "chat": job.derived["chat"],
                "direction": fingerprint(job.store.read("direction.safetensors", Direction)),
                "features": {name: fingerprint(made) for name, made in standing.chosen.sets.items()},
                "settings": settings,
                "versions": versions(),
            },
        ),
    )


def settled_key(job: Job, arm: Arm, name: str, settings: Settings) -> str:
    """Under `STAGE`, whose batch size is always the run's own: that of the measurement is one of the settings."""
    return job.key(STAGE, name, arm, settings)


@dataclass(frozen=True)
class _Shelf:
    """Reads what stands, and remembers what does not."""

    store: Store
    left: list[str]

    def read(self, path: str, key: str, kind: type[T]) -> T | None:
        if self.store.has(path, key):
            return self.store.read(path, kind)
        if (self.store.root / path).is_file():
            self.left.append(path)
        return None

    @property
    def notes(self) -> list[str]:
        if not self.left:
            return []
        names = ", ".join(path.rpartition(".")[0] for path in self.left)
        return [f"Left out, since other versions, edits or settings made them than are compared here: {names}."]


def _comparable(
    job: Job, standing: Standing, folders: Iterable[str], shelf: _Shelf
) -> list[tuple[Arm, dict[str, Any]]]:
    """What stands in these folders, by arm, where it was made under the settings of the unedited model's last time."""
    found = []
    for folder in dict.fromkeys(folders):
        paths = {arm.label: f"{folder}/{arm.label}.json" for arm in standing.arms}
        there = [arm for arm in standing.arms if (job.store.root / paths[arm.label]).is_file()]
        settings = None
        for arm in there:
            claimed = job.store.read(paths[arm.label], dict)
            # Before any other arm: the unedited model is the first.
            settings = claimed["settings"] if arm is BASE else settings
            key = settled_key(job, arm, claimed.get("task", DOCUMENTS), claimed["settings"])
            made = shelf.read(paths[arm.label], key if claimed["settings"] == settings else "", dict)
            if made is not None:
                found.append((arm, made))
    return found


def _own_measures(job: Job, edits: Sequence[Arm], shelf: _Shelf) -> list[study.Measure]:
    """What the run itself measured: costs on its own harmless answers, refusals of what should not be refused."""
    asked = {name: rows for name, rows in _prompts(job).items() if rows[0].label != "harmful"}
    costly = [rows for name, rows in asked.items() if job.store.paths(f"costs/{name}", ".json")]
    made = []
    for rows in costly:
        unedited = shelf.read(f"answers/{rows.name}/{BASE.label}.jsonl", answers_key(job, rows, BASE), Responses)
        if unedited is not None:
            made += _own_answers(job, edits, rows, unedited, shelf)
            made += [one for told in asked.values() for one in _refusals(job, edits, told, unedited, shelf)]
    return made


def _own_answers(
    job: Job, edits: Sequence[Arm], rows: Prompts, unedited: Responses, shelf: _Shelf
) -> list[study.Measure]:
    usable = []
    for arm in edits:
        cost = shelf.read(f"costs/{rows.name}/{arm.label}.json", cost_key(job, rows, unedited, arm), dict)
        if cost is not None:
            usable.append((arm.method, arm.setting, costs.Cost(**cost)))
    return study.of_costs(usable, rows)


def _refusals(job: Job, edits: Sequence[Arm], rows: Prompts, unedited: Responses, shelf: _Shelf) -> list[study.Measure]:
    tokens = job.store.read("direction.safetensors", Direction).refusal_tokens
    cut_off_counts = rules.ordinarily_ends(unedited)
    made = []
    for arm in edits:
        name = f"{rows.name}/{arm.label}.jsonl"
        answers = shelf.read(f"answers/{name}", answers_key(job, rows, arm), Responses)
        if answers is not None:
            key = judged_key(job, rows, answers, tokens, cut_off_counts=cut_off_counts)
            judged = shelf.read(f"responses/{name}", key, Responses)
            made += [] if judged is None else [study.of_responses(judged, rows)]
    return made


def _prompts(job: Job) -> dict[str, Prompts]:
    read = [job.store.read(path, Prompts) for path in job.store.paths("prompts", ".jsonl")]
    return {rows.name: rows for rows in read if len(rows)}


def _caveats(tasks: Sequence[Measured]) -> list[str]:
    notes = []
    for _, made in tasks:
        if left := ", ".join(made["left_out"]):
            notes.append(
                f"Of the task {made['task']} these metrics have no value per document and are left out: {left}."
            )
        if made["shortened"]:
            notes.append(
                f"Of the task {made['task']} {made['shortened']} requests lost their beginning: they are longer than "
                "the model's context."
            )
    return list(dict.fromkeys(notes))


def _untouched(tasks: Sequence[Measured], texts: Sequence[Measured]) -> list[str]:
    counts = [(arm, made["task"], made["changed"]) for arm, made in tasks]
    counts += [(arm, DOCUMENTS, made["cost"]["changed"]) for arm, made in texts]
    names = [f"{arm.method} {arm.setting} on {name}" for arm, name, changed in counts if not changed and arm != BASE]
    return untouched(names)
