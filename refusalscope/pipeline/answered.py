"""What was answered in a run folder: each data set under each edit, as judges and people are shown it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Finding, Prompts, Responses
from refusalscope.evals.judges import Exchange
from refusalscope.inputs.releases import did_you_mean
from refusalscope.report.settings import DATASET_OF_STRENGTHS


@dataclass(frozen=True)
class Answered:
    """One data set's answers under one edit."""

    name: str
    """`<dataset>/<arm>.jsonl`, below `responses/` and below each judge's verdicts."""
    prompts: Prompts
    responses: Responses

    @property
    def arm(self) -> tuple[str, str, str]:
        return self.responses.dataset, self.responses.method, self.responses.setting

    @property
    def exchanges(self) -> list[Exchange]:
        prompts = {prompt.id: prompt for prompt in self.prompts}
        return [Exchange(prompts[row.prompt_id], row) for row in self.responses.rows]

    def key(self, judge: str, about: Mapping[str, Any]) -> str:
        """What verdicts on these answers depend on."""
        texts = [(prompt.id, prompt.text, response.text) for prompt, response in self.exchanges]
        return fingerprint("verdicts", judge, about, texts)


def answers(store: Store) -> list[Answered]:
    """All answers of a run but those to the strengths that were tried, in the order of the benchmark's finding.

    Raises ValueError when there are none, and for a sweep.
    """
    if "findings/sweep.json" in store.paths("findings", ".json"):
        raise ValueError(
            f"{store.root} is a sweep, on validation prompts alone: judge a run, such as of its chosen.toml"
        )
    asked = {rows.name: rows for rows in (store.read(path, Prompts) for path in store.paths("prompts", ".jsonl"))}
    found = []
    for path in store.paths("responses", ".jsonl"):
        responses = store.read(path, Responses)
        if responses.dataset != DATASET_OF_STRENGTHS:
            found.append(Answered(path.removeprefix("responses/"), asked[responses.dataset], responses))
    if not found:
        raise ValueError(f"{store.root} holds no answers: is it a run folder that `run` or `benchmark` has finished?")
    return _in_order(store, found)


def of_benchmark(store: Store) -> list[str]:
    """The data sets that the benchmark answered, without those that strengths were tried on."""
    asked = {row.dataset for row in store.read("findings/benchmark.json", Finding).rows} - {DATASET_OF_STRENGTHS}
    return sorted(asked & {path.split("/")[1] for path in store.paths("responses", ".jsonl")})


def only(answered: Sequence[Answered], datasets: Iterable[str] | None) -> list[Answered]:
    """The answers to these data sets, or all. Raises ValueError for one that was not answered, naming near ones."""
    if datasets is None:
        return list(answered)
    known = list(dict.fromkeys(one.responses.dataset for one in answered))
    wanted = set(datasets)
    if unknown := sorted(wanted - set(known)):
        raise ValueError(
            f"--dataset {unknown[0]!r} was not answered in this run: {did_you_mean(unknown[0], known)}"
            f"there are {', '.join(known)}"
        )
    return [one for one in answered if one.responses.dataset in wanted]


def _in_order(store: Store, found: Sequence[Answered]) -> list[Answered]:
    path = "findings/benchmark.json"
    rows = store.read(path, Finding).rows if path in store.paths("findings", ".json") else ()
    places = {arm: n for n, arm in enumerate(dict.fromkeys((row.dataset, row.method, row.setting) for row in rows))}
    return sorted(found, key=lambda one: places.get(one.arm, len(places)))
