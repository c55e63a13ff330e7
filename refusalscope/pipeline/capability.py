"""What a finished run's edits cost: the harness's tasks, documents, and what the run itself has measured already.

Direction, sets and strengths are those of the run folder; nothing is chosen or answered anew. Each task under each edit
is one artifact, so a run that was killed goes on at the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Direction, Prompts
from refusalscope.evals import capability as costs
from refusalscope.evals import harness
from refusalscope.inputs import documents
from refusalscope.pipeline import options as run_options
from refusalscope.pipeline.compared import (
    DOCUMENT_COSTS,
    DOCUMENTS,
    STAGE,
    Settings,
    Standing,
    settled_key,
    summarise,
)
from refusalscope.pipeline.job import Job, Progress
from refusalscope.pipeline.measure import STRENGTHS, arms, inductions, rewrite_report, slices_of
from refusalscope.pipeline.select import read_chosen
from refusalscope.pipeline.sweep import CHOSEN
from refusalscope.studies.benchmark import BASE, Arm


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
    return rewrite_report(job.store) or "findings/capability.json"


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


def _loaded(wanted: Wanted) -> list[harness.Task]:
    if not wanted.tasks:
        return []
    return harness.load(wanted.tasks, include_path=wanted.include_path, num_fewshot=wanted.num_fewshot)


def _stage(name: str) -> str:
    """Of a task, or of the documents: memory that runs out in one leaves the batches of the others as they are."""
    return f"{STAGE} {name}"


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
                settled_key(job, arm, task.name, settings),
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
            key=settled_key(job, arm, DOCUMENTS, settings),
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
