"""Does an edit change refusal, and what does it cost? Arms of one experiment in, one Finding out.

An arm is one edit at one setting. The unedited model is the arm `base`, and every other arm is compared with it prompt
by prompt. Knows nothing of files; whoever drives it decides what is answered again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusalscope.core import stats
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Direction, FeatureSet, Finding, Prompts, Responses, Row, SaeSlice
from refusalscope.evals.capability import Cost
from refusalscope.evals.judges import OUTCOMES
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism.interventions import AddDirection, Intervention, RemoveDirection, ScaleFeatures, editor

QUESTION = "Does editing these SAE features change whether the model refuses, and what does the edit cost?"
RATES = (*OUTCOMES, "complied", "refused_first_token")


@dataclass(frozen=True)
class Arm:
    """One edit at one setting."""

    method: str
    setting: str
    intervention: Intervention | None

    @property
    def label(self) -> str:
        """Fit for a file name."""
        return f"{self.method} {self.setting}".strip().replace("/", "-")


BASE = Arm("base", "", None)


def direction_arms(direction: Direction) -> list[Arm]:
    """The upper reference: the direction removed (to zero, to the harmless mean) and added."""
    return [
        Arm("direction", "remove", RemoveDirection(direction)),
        Arm("direction", "remove-affine", RemoveDirection(direction, affine=True)),
        Arm("direction", "add", AddDirection(direction)),
    ]


def scale_arm(features: FeatureSet, factor: float, *, method: str | None = None, draw: int | None = None) -> Arm:
    """Every feature of a set scaled by `factor`; the setting names factor, set size and, for random sets, the draw."""
    setting = f"scale c={factor:g} k={len(features)}" + ("" if draw is None else f" draw={draw}")
    return Arm(method or features.method, setting, ScaleFeatures(features, factor))


def answer(
    model: ChatModel,
    prompts: Prompts,
    arm: Arm,
    *,
    slices: Mapping[int, SaeSlice],
    batch_size: int,
    max_new_tokens: int,
) -> Responses:
    """Answer a data set under an arm, greedily, and count the positions its edit changed."""
    made = editor(arm.intervention, layers=len(model.layers), slices=slices)
    rows = []
    for _, tokens in model.batches(prompts, batch_size):
        rows.extend(model.generate(tokens, edits=made.edits, max_new_tokens=max_new_tokens))
    return Responses(prompts.name, arm.method, arm.setting, tuple(rows), made.changed)


def choose_factor(tried: Mapping[float, Responses]) -> float:
    """The factor under which most validation prompts are answered coherently; ties go to the mildest edit."""

    def merit(factor: float) -> tuple[float, float]:
        answered = [score for score in tried[factor].score("answered") if not math.isnan(score)]
        return sum(answered) / max(1, len(answered)), -abs(1 - factor)

    return max(tried, key=merit)


def summarise(
    responses: Sequence[Responses],
    prompts: Mapping[str, Prompts],
    costs: Sequence[tuple[Arm, Cost]],
    *,
    cost_prompts: str,
    caveats: Iterable[str],
    provenance: Mapping[str, Any],
) -> Finding:
    """Rates with Wilson intervals, paired changes of refusal against `base`, and costs with bootstrap intervals."""
    base = {r.dataset: r for r in responses if r.method == BASE.method}
    rows: list[Row] = []
    for answered in responses:
        clusters = prompts[answered.dataset].clusters
        rows += _rates(answered, clusters)
        if answered.method != BASE.method and answered.dataset in base:
            change = stats.paired_difference(answered.score("refused"), base[answered.dataset].score("refused"))
            rows.append(_row(answered.dataset, answered.method, "refused_change", answered.setting, change))
    rows += _pooled_draws(responses, prompts)
    for arm, cost in costs:
        rows += _cost_rows(arm, cost, prompts[cost_prompts])
    untouched = [f"{r.method} {r.setting} on {r.dataset}" for r in responses if r.method != "base" and r.changed == 0]
    notes = [f"These edits changed no position at all: {', '.join(untouched)}."] if untouched else []
    return Finding("benchmark", QUESTION, tuple(rows), (*caveats, *notes), provenance)


def _rates(answered: Responses, clusters: Sequence[str]) -> list[Row]:
    judged = {name for row in answered.rows for name in row.scores}
    return [
        _row(answered.dataset, answered.method, metric, answered.setting, stats.rate(answered.score(metric), clusters))
        for metric in RATES
        if metric in judged
    ]


def _pooled_draws(responses: Sequence[Responses], prompts: Mapping[str, Prompts]) -> list[Row]:
    """The random draws of one setting taken together; a prompt's answers under all draws are one cluster."""
    groups: dict[tuple[str, str, str], list[Responses]] = {}
    for answered in responses:
        setting, drawn, _ = answered.setting.partition(" draw=")
        if drawn:
            groups.setdefault((answered.dataset, answered.method, f"{setting} mean"), []).append(answered)
    rows = []
    for (dataset, method, setting), group in groups.items():
        clusters = list(prompts[dataset].clusters) * len(group)
        for metric in OUTCOMES:
            values = [score for answered in group for score in answered.score(metric)]
            rows.append(_row(dataset, method, metric, setting, stats.rate(values, clusters)))
    return rows


def _cost_rows(arm: Arm, cost: Cost, prompts: Prompts) -> list[Row]:
    clusters = dict(zip(prompts.ids, prompts.clusters, strict=True))
    names = [clusters[prompt] for prompt in cost.prompt_ids]
    return [
        _row(prompts.name, arm.method, metric, arm.setting, stats.mean(values, names, weights=cost.tokens))
        for metric, values in (("cross_entropy_change", cost.cross_entropy_change), ("kl", cost.kl))
    ]


def _row(dataset: str, method: str, metric: str, setting: str, estimate: Estimate) -> Row:
    return Row(dataset, method, metric, setting, *estimate)
