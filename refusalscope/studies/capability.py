"""What does an edit cost? Tasks, documents, the model's own answers, refusals of harmless prompts in, one Finding out.

Everything is a `Measure`: one metric under one edit, document by document, so that it can be compared in pairs with the
same metric without. Knows nothing of files, nor of the harness that made the numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from refusalscope.core import stats
from refusalscope.core.comparisons import UNEDITED, pooled_setting
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Finding, NaN, Prompts, Responses, Row
from refusalscope.evals.capability import Cost, DocumentCost

QUESTION = (
    "What do these edits cost: on tasks, on text, on the model's own answers and on prompts it should not refuse?"
)
ENOUGH = 10
"""Parts of a group that make them clusters."""


class Measure(NamedTuple):
    """One metric of one data set under one edit."""

    dataset: str
    method: str
    setting: str
    metric: str
    ids: Sequence[str]
    """What pairs a value with that of the unedited model: the document, and which of its values."""
    values: Sequence[float]
    """NaN: unscored."""
    clusters: Sequence[str]
    weights: Sequence[int] | None = None
    """Tokens that a value is the mean of; None: all count alike."""


def of_task(method: str, setting: str, scored: Mapping[str, Any]) -> list[Measure]:
    """One measure a metric of a task, as `evals.harness.measure` gives it.

    Several values of one document are one cluster. So are the documents of one part of a group of `ENOUGH` parts or
    more (MMLU's subjects); fewer say nothing of how parts differ, and there every document is its own.
    """
    documents = scored["documents"]
    grouped = len({document["part"] for document in documents}) >= ENOUGH
    made = []
    for metric in dict.fromkeys(name for document in documents for name in document["values"]):
        flat = [
            (f"{document['id']}#{at}", NaN if value is None else float(value), document["part" if grouped else "id"])
            for document in documents
            for at, value in enumerate(document["values"].get(metric, ()))
        ]
        ids, values, clusters = (list(column) for column in zip(*flat, strict=True))
        made.append(Measure(scored["task"], method, setting, metric, ids, values, clusters))
    return made


def of_documents(method: str, setting: str, cost: DocumentCost) -> Measure:
    """Cross-entropy of web documents."""
    ids = cost.document_ids
    return Measure("documents", method, setting, "cross_entropy", ids, cost.cross_entropy, ids, cost.tokens)


def of_costs(costs: Sequence[tuple[str, str, Cost]], prompts: Prompts) -> list[Measure]:
    """Cross-entropy and KL on the unedited model's own answers to `prompts`, by method and setting.

    The unedited model's cross-entropy comes from the first of them.
    """
    cluster = dict(zip(prompts.ids, prompts.clusters, strict=True))
    made = []
    for method, setting, cost in costs:
        names = [cluster[prompt] for prompt in cost.prompt_ids]
        columns = {"cross_entropy": cost.cross_entropy_edited, "kl": cost.kl}
        if not made:
            before = Measure(
                prompts.name, UNEDITED, "", "cross_entropy", cost.prompt_ids, cost.cross_entropy, names, cost.tokens
            )
            made.append(before)
        made += [
            Measure(prompts.name, method, setting, metric, cost.prompt_ids, values, names, cost.weights(metric))
            for metric, values in columns.items()
        ]
    return made


def of_responses(answered: Responses, prompts: Prompts) -> Measure:
    """Refusals, by the phrase judge, of prompts that should not be refused."""
    values = answered.score("refused")
    return Measure(
        answered.dataset, answered.method, answered.setting, "refused", prompts.ids, values, prompts.clusters
    )


def summarise(measures: Iterable[Measure], *, caveats: Iterable[str], provenance: Mapping[str, Any]) -> Finding:
    """Each metric with its interval, and its paired change against the unedited model where that was measured too.

    Changes of one metric of one data set are one family for Holm's correction. Means over tokens carry no p-value.
    """
    taken = with_pooled(list(measures))
    base = {(one.dataset, one.metric): one for one in taken if one.method == UNEDITED}
    rows = []
    for one in taken:
        rows.append(_row(one, one.metric, _level(one)))
        before = base.get((one.dataset, one.metric))
        if before is not None and one.method != UNEDITED:
            rows.append(_change(one, before))
    return Finding("capability", QUESTION, tuple(stats.with_holm(rows)), tuple(caveats), provenance)


def change_of(metric: str) -> str:
    """The name of a metric's change: `exact_match:strict-match` becomes `exact_match_change:strict-match`."""
    name, found, judge = metric.partition(":")
    return f"{name}_change{found}{judge}"


def with_pooled(measures: Sequence[Measure]) -> list[Measure]:
    """All of them, and after them the random draws of each setting together; what they share is one cluster."""
    groups: dict[tuple[str, str, str, str], list[Measure]] = {}
    for one in measures:
        if pooled := pooled_setting(one.setting):
            groups.setdefault((one.dataset, one.method, pooled, one.metric), []).append(one)
    return [*measures, *(_pooled(key, draws) for key, draws in groups.items())]


def _pooled(key: tuple[str, str, str, str], draws: Sequence[Measure]) -> Measure:
    ids, values, clusters = ([item for one in draws for item in getattr(one, name)] for name in Measure._fields[4:7])
    weights = None if draws[0].weights is None else [weight for one in draws for weight in one.weights or ()]
    return Measure(*key, ids, values, clusters, weights)


def _level(one: Measure) -> Estimate:
    if one.weights is None and _binary(one.values):
        return stats.rate(one.values, one.clusters)
    return stats.mean(one.values, one.clusters, weights=one.weights)


def _change(one: Measure, base: Measure) -> Row:
    known = dict(zip(base.ids, base.values, strict=True))
    before = [known.get(name, NaN) for name in one.ids]
    metric = change_of(one.metric)
    if one.weights is None and _binary([*one.values, *before]):
        change = stats.paired_difference(one.values, before, one.clusters)
    else:
        differences = [a - b for a, b in zip(one.values, before, strict=True)]
        change = stats.mean(differences, one.clusters, weights=one.weights)
    tested = one.weights is None and not pooled_setting(one.setting)
    return replace(
        _row(one, metric, change),
        p=stats.paired_p(one.values, before, one.clusters) if tested else None,
        family=f"{metric} of {one.dataset}, every edit against the unedited model" if tested else "",
    )


def _binary(values: Iterable[float]) -> bool:
    return all(value in (0, 1) for value in values if not math.isnan(value))


def _row(one: Measure, metric: str, estimate: Estimate) -> Row:
    return Row(one.dataset, one.method, metric, one.setting, *estimate)
