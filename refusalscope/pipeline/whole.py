"""Every study that a run does beside the benchmark, in order; one that cannot be done is left out with its reason.

The reasons stand in the run folder, so that the report names them whoever writes it; the next command tries again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from refusalscope.core.store import Store
from refusalscope.pipeline import categories, category_sets, graph, jailbreaks, minimal, probes, suffixes
from refusalscope.pipeline.category_sets import CategorySets
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.select import Chosen
from refusalscope.pipeline.sizes import Sizes, sizes_of_run

LEFT_OUT = "left_out.json"


@dataclass(frozen=True)
class Ground:
    """What studies are made from."""

    job: Job
    fitted: Fitted
    chosen: Chosen
    sizes: Sizes

    @cached_property
    def _sets(self) -> "CategorySets | str":
        try:
            return category_sets.choose_category_sets(self.job, self.fitted, sizes=self.sizes)
        except ValueError as error:
            return str(error)

    @property
    def sets(self) -> CategorySets:
        """The features by category; made once, and once in vain where they cannot be: a ValueError says why."""
        if isinstance(self._sets, str):
            raise ValueError(self._sets)
        return self._sets


class Study(NamedTuple):
    """One finding of a run."""

    asked_by: str
    """What `--study` calls it."""
    called: str
    """In a sentence: “the study of ...”."""
    do: Callable[[Ground], object]
    """Raises ValueError, one line, where it cannot be done."""


STUDIES: Mapping[str, Study] = {
    "categories": Study(
        *("categories", "kinds of harm"),
        lambda on: categories.run_categories(on.job, on.fitted, on.sets, sizes=on.sizes),
    ),
    "graph": Study(
        *("categories", "which features drive which"),
        lambda on: graph.run_graph(on.job, on.fitted, on.sets, sizes=on.sizes),
    ),
    "minimal": Study(
        *("minimal", "minimal sets"),
        lambda on: minimal.run_minimal(on.job, on.fitted, on.chosen, sizes=on.sizes),
    ),
    "jailbreaks": Study(
        *("jailbreaks", "attacks"),
        lambda on: jailbreaks.run_jailbreaks(on.job, on.fitted, on.sets, sizes=on.sizes),
    ),
    "suffixes": Study(
        *("suffixes", "suffixes"),
        lambda on: suffixes.run_suffixes(on.job, on.fitted, on.sets, sizes=on.sizes),
    ),
    "probes": Study(
        *("probes", "probes"),
        lambda on: probes.run_probes(on.job, on.fitted, on.chosen, on.sets, sizes=on.sizes),
    ),
}
"""Finding -> its study, in the order in which they are done."""


def run_studies(job: Job, fitted: Fitted, chosen: Chosen) -> None:
    """Every study that is wanted, and keep why those are missing that could not be done."""
    ground = Ground(job, fitted, chosen, sizes_of_run(job.options))
    reasons: dict[str, str | None] = {}
    for name, study in STUDIES.items():
        if study.asked_by in job.options.wanted_studies:
            reasons[name] = _reason(study, ground)
    keep_reasons(job.store, reasons)


def _reason(study: Study, ground: Ground) -> str | None:
    """Why the study is left out; None once it is done."""
    try:
        study.do(ground)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def keep_reasons(store: Store, tried: Mapping[str, str | None]) -> None:
    """Keep why studies were left out; those that were not tried keep the reason they had, None takes it away."""
    before = store.read(LEFT_OUT, dict) if store.has(LEFT_OUT, "") else {}
    now = {name: reason for name, reason in {**before, **tried}.items() if reason is not None}
    if now != before:
        store.put(LEFT_OUT, "", now)


def left_out(store: Store) -> list[str]:
    """A sentence for every study that was left out when it was last tried, in the order of the studies."""
    found = store.read(LEFT_OUT, dict) if store.has(LEFT_OUT, "") else {}
    standing = store.paths("findings", ".json")
    return [
        f"The study of {study.called} was left out: {found[name].rstrip('.')}."
        + (" What stands below is of an earlier command." if f"findings/{name}.json" in standing else "")
        for name, study in STUDIES.items()
        if name in found
    ]
