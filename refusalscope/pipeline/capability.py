"""What a finished run's edits cost: the harness's tasks, documents, and what the run itself has measured already.

Direction, sets and strengths are those of the run folder; nothing is chosen or answered anew. Each task under each edit
is one artifact, so a run that was killed goes on at the next.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Direction, Finding, Prompts, Responses
from refusalscope.evals import capability as costs
from refusalscope.evals import harness, rules
from refusalscope.inputs import documents
from refusalscope.pipeline import options as run_options
from refusalscope.pipeline.environment import versions
from refusalscope.pipeline.job import Job, Progress
from refusalscope.pipeline.measure import (
    STRENGTHS,
    answers_key,
    arms,
    cost_key,
    inductions,
    judged_key,
    keep_finding,
    slices_of,
    write_report,
)
from refusalscope.pipeline.select import Chosen, read_chosen
from refusalscope.pipeline.sweep import CHOSEN
from refusalscope.studies import capability as study
from refusalscope.studies.benchmark import BASE, Arm

STAGE = "capability"
DOCUMENTS, DOCUMENT_COSTS = "documents", "costs/documents"
T = TypeVar("T")
Settings = dict[str, Any]
"""What two edits must have in common to be compared."""
Measured = tuple[Arm, Mapping[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    """Methods or single edits of the run; None: all but random ones. Inductions only as single edits."""
    limit: int | None = None
    """Documents of each task, from its first; None: all."""
    num_fewshot: int | None = None
    include_path: Path | None = None
    documents: str | None = None
    batch_size: int | None = None
    """Of every task and of the documents, from now on; None: as it stands."""


class Standing(NamedTuple):
    """What a run folder holds of its edits."""

    chosen: Chosen
    arms: list[Arm]
    """The unedited model first."""


def reopened(folder: Path, progress: Progress = lambda *_: None) -> Job:
    """The job of a run folder, with the options that made it. Raises ValueError, one line, where there is none."""
    if not (folder / run_options.RUN_FILE).is_file():
        raise ValueError(f"{folder} is no run folder: make one with `refusalscope run MODEL`")
    file = folder / run_options.RUN_FILE
    if run_options.read_toml(file).get("sizes") is not None:
        raise ValueError(
            f"{folder} is a sweep, which answers no test prompts: repeat its command with --choose, then "
            f"`refusalscope run --config {folder / CHOSEN}`, and name the folder of that run"
        )
    return Job(run_options.make({}, file), folder, progress)


def run_capability(job: Job, wanted: Wanted) -> str:
    """Measure what is wanted, write the finding, and the report anew if there is one; returns the path of either."""
    standing = read_standing(job)
    chosen = wanted_arms(standing.arms, wanted.methods)
    texts = None if wanted.documents is None else documents.source(wanted.documents)
    tasks = _loaded(wanted)
    if wanted.batch_size is not None:
        for name in (*(task.name for task in tasks), *([] if texts is None else [DOCUMENTS])):
            job.resize(_stage(name), wanted.batch_size)

    def measured(job: Job) -> None:
        _measure_tasks(job, standing, chosen, wanted, tasks)
        if texts is not None:
            _measure_documents(job, standing, chosen, texts)

    job.run(measured)
    summarise(job, standing, chosen)
    return write_report(job.store) if (job.store.root / "report.html").is_file() else "findings/capability.json"


def read_standing(job: Job) -> Standing:
    """The run's edits at its own strengths. Raises ValueError, one line, when it has not come so far."""
    for path in ("direction.safetensors", "features/index.json", STRENGTHS):
        if not (job.store.root / path).is_file():
            raise ValueError(
                f"{job.store.root} has no {path} yet: let `refusalscope benchmark` or `refusalscope run` go on there "
                "with the same options first"
            )
    chosen = read_chosen(job.store)
    factors = job.store.read(STRENGTHS, dict)
    grid = arms(job.store.read("direction.safetensors", Direction), chosen.sets, factors)
    return Standing(chosen, [BASE, *grid, *inductions(job, chosen)])


def wanted_arms(known: Sequence[Arm], methods: Sequence[str] | None) -> list[Arm]:
    """The arms of these methods, or of these labels, in the run's order; the unedited model is always among them.

    Those that set features to a value are taken by label alone.

    Raises ValueError, one line that says what there is, for a name that the run does not know.
    """
    names = dict.fromkeys(arm.method for arm in known)
    if methods is None:
        return [arm for arm in known if arm.method != "random" and not _induces(arm)]
    labels = {arm.label for arm in known}
    if unknown := [name for name in methods if name not in names and name not in labels]:
        raise ValueError(
            f"--methods {unknown[0]!r}: this run has {', '.join(names)}; of several edits of one method name one as in "
            f"{max(labels)!r}"
        )
    return [
        arm for arm in known if arm is BASE or arm.label in methods or (arm.method in methods and not _induces(arm))
    ]


def _induces(arm: Arm) -> bool:
    """Whether it sets features to a value: made to induce refusal, at a range of values, so measured by name alone."""
    return arm.setting.startswith("set ")


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
        job,
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


def _loaded(wanted: Wanted) -> list[harness.Task]:
    if not wanted.tasks:
        return []
    return harness.load(wanted.tasks, include_path=wanted.include_path, num_fewshot=wanted.num_fewshot)


def _stage(name: str) -> str:
    """Of a task, or of the documents: memory that runs out in one leaves the batches of the others as they are."""
    return f"{STAGE} {name}"


def _key(job: Job, arm: Arm, name: str, settings: Settings) -> str:
    """Under `STAGE`, whose batch size is always the run's own: that of the measurement is one of the settings."""
    return job.key(STAGE, name, arm, settings)


def _measure_tasks(
    job: Job, standing: Standing, chosen: Sequence[Arm], wanted: Wanted, tasks: Sequence[harness.Task]
) -> None:
    for task in tasks:
        settings = {
            "limit": wanted.limit,
            "num_fewshot": wanted.num_fewshot,
            "task_files": harness.digest(wanted.include_path),
            "lm_eval": harness.package_version(),
            "batch_size": job.size(_stage(task.name)),
        }
        for arm in chosen:
            job.store.ensure(
                f"{STAGE}/{task.name.replace('/', '-')}/{arm.label}.json",
                _key(job, arm, task.name, settings),
                partial(_measure_task, job, standing, task, arm, settings),
            )


def _measure_task(job: Job, standing: Standing, task: harness.Task, arm: Arm, settings: Settings) -> dict[str, Any]:
    made = harness.measure(
        job.model,
        task,
        arm.intervention,
        slices=slices_of(standing.chosen, arm),
        batch_size=job.size(_stage(task.name)),
        limit=settings["limit"],
        progress=lambda step, done, total: job.progress(f"{task.name} under {arm.label}: {step}", done, total),
    )
    return {**made, "settings": settings}


def _measure_documents(job: Job, standing: Standing, chosen: Sequence[Arm], source: Path | documents.HubColumn) -> None:
    # Kept in the folder: a data set of the hub is fetched once, whatever is measured on it later.
    key = fingerprint(DOCUMENTS, documents.identity(source))
    rows = job.store.get(f"{DOCUMENTS}.jsonl", key, Prompts, lambda: documents.read(source))
    settings = {
        "source": rows[0].source,
        "count": len(rows),
        "key": key,
        "tokens": costs.DOCUMENT_TOKENS,
        "batch_size": job.size(_stage(DOCUMENTS)),
    }
    for done, arm in enumerate(chosen):
        job.progress(f"cross-entropy of documents: {arm.label}", done, len(chosen))
        job.in_batches(
            _stage(DOCUMENTS),
            f"{DOCUMENT_COSTS}/{arm.label}.json",
            key=_key(job, arm, DOCUMENTS, settings),
            rows=rows,
            kind=dict,
            make=partial(_measure_batch, job, standing, arm, settings),
            join=_joined,
        )


def _measure_batch(job: Job, standing: Standing, arm: Arm, settings: Settings, batch: Prompts) -> dict[str, Any]:
    slices, size = slices_of(standing.chosen, arm), job.size(_stage(DOCUMENTS))
    cost = costs.document_cost(job.model, batch, arm.intervention, slices=slices, batch_size=size)
    return {"settings": settings, "cost": cost._asdict()}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cost = costs.joined([costs.DocumentCost(**part["cost"]) for part in parts])
    return {**parts[0], "cost": cost._asdict()}


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
            key = _key(job, arm, claimed.get("task", DOCUMENTS), claimed["settings"])
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
    return [f"These edits changed no position at all: {', '.join(names)}."] if names else []
