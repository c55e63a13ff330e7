"""Does an edit change refusal, and what does it cost? Arms of one experiment in, one Finding out.

An arm is one edit at one setting. The unedited model is the arm `base`, and every other arm is compared with it prompt
by prompt. Knows nothing of files; whoever drives it decides what is answered again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from refusalscope.core import comparisons, stats
from refusalscope.core.comparisons import Scored, pooled_setting
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Direction, FeatureSet, Finding, Prompts, Responses, Row, SaeSlice
from refusalscope.evals.capability import Cost
from refusalscope.evals.rules import OUTCOMES
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Edits
from refusalscope.mechanism.interventions import (
    AddDirection,
    Intervention,
    RemoveDirection,
    ScaleFeatures,
    SetFeatures,
    editor,
)

QUESTION = "Does editing these SAE features change whether the model refuses, and what does the edit cost?"
RATES = (*OUTCOMES, "coherent", "complied", "refused_first_token", "reasoning_refused")
COMPARED = ("refused", "answered", "complied")


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


def set_arm(features: FeatureSet, value: float) -> Arm:
    """Every feature of a set held at `value`: induction of refusal on harmless prompts."""
    return Arm(features.method, f"set v={value:g} k={len(features)}", SetFeatures(features, value))


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
    (made,) = answer_each(model, prompts, [arm], slices=slices, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return made


def answer_each(
    model: ChatModel,
    prompts: Prompts,
    arms: Sequence[Arm],
    *,
    slices: Mapping[int, SaeSlice],
    batch_size: int,
    max_new_tokens: int,
) -> list[Responses]:
    """The same under several arms at once: 20 prompts under each of ten take half the time of one arm after another."""
    made = [editor(arm.intervention, layers=len(model.layers), slices=slices) for arm in arms]
    tokens = model.answer_tokens(prompts).repeated(len(arms))
    edits = made[0].edits
    if len(arms) > 1:
        tokens = replace(tokens, prompt_ids=tuple(map(str, range(len(tokens.prompt_ids)))))
        edits = _by_row([one.edits for one in made], prompts.ids)
    rows = model.generate(tokens, edits=edits, max_new_tokens=max_new_tokens, batch_size=batch_size, recordable=True)
    count = len(prompts)
    said = [replace(row, prompt_id=prompts.ids[number % count]) for number, row in enumerate(rows)]
    return [
        Responses(prompts.name, arm.method, arm.setting, tuple(said[at * count : (at + 1) * count]), one.changed)
        for at, (arm, one) in enumerate(zip(arms, made, strict=True))
    ]


def _by_row(edits: Sequence[Edits], names: Sequence[str]) -> Edits:
    """Each row edited as its own arm does it; rows are numbered, arm after arm, and `names` are an arm's prompts."""

    @lru_cache(maxsize=1)
    def owners(rows: tuple[str, ...], device: torch.device) -> tuple[list[tuple[int, tuple[str, ...], Tensor]], Tensor]:
        """Arm, its prompts and where they are, for each arm; and where each row is once these lie side by side."""
        found: dict[int, list[int]] = {}
        for at, row in enumerate(rows):
            found.setdefault(int(row) // len(names), []).append(at)
        parts = [
            (arm, tuple(names[int(rows[at]) % len(names)] for at in own), torch.tensor(own, device=device))
            for arm, own in found.items()
        ]
        return parts, torch.cat([own for _, _, own in parts]).argsort()

    def edit_at(layer: int) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            parts, back = owners(batch.prompt_ids, residual.device)
            edited = []
            for arm, prompts, own in parts:
                part = residual[own]
                if layer in edits[arm]:
                    part = edits[arm][layer](part, Batch(prompts, batch.roles[own], batch.answering))
                edited.append(part)
            return torch.cat(edited)[back]

        return edit

    return {layer: edit_at(layer) for layer in sorted({layer for own in edits for layer in own})}


def joined(parts: Sequence[Responses]) -> Responses:
    """The answers to a data set from those to its batches, in order."""
    rows = tuple(row for part in parts for row in part.rows)
    return replace(parts[0], rows=rows, changed=sum(part.changed for part in parts))


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
    """Rates, paired changes of refusal against `base`, methods compared, and costs.

    Paired rows carry a p-value, and one after Holm's correction over the family they name; a row for every family says
    how small a difference it can show.
    """
    base = {r.dataset: r for r in responses if r.method == BASE.method}
    rows: list[Row] = []
    for answered in responses:
        clusters = prompts[answered.dataset].clusters
        rows += _rates(answered, clusters)
        if answered.method != BASE.method and answered.dataset in base:
            rows.append(_change(answered, base[answered.dataset].score("refused"), clusters))
    rows += _pooled_draws(responses, base, prompts)
    rows += _comparisons(responses, prompts)
    clusters = {dataset: len(set(asked.clusters)) for dataset, asked in prompts.items()}
    rows = [*stats.with_holm(rows), *comparisons.smallest(rows, clusters)]
    for (method, setting), measured in _with_pooled(costs).items():
        rows += _cost_rows(method, setting, measured, prompts[cost_prompts])
    idle = [f"{r.method} {r.setting} on {r.dataset}" for r in responses if r.method != "base" and r.changed == 0]
    return Finding("benchmark", QUESTION, tuple(rows), (*caveats, *comparisons.untouched(idle)), provenance)


def _change(answered: Responses, before: Sequence[float], clusters: Sequence[str]) -> Row:
    return comparisons.change(Scored.of(answered, "refused", clusters), before, "refused_change", what="refused")


def _rates(answered: Responses, clusters: Sequence[str]) -> list[Row]:
    judged = {name for row in answered.rows for name in row.scores}
    return [
        _row(answered.dataset, answered.method, metric, answered.setting, stats.rate(answered.score(metric), clusters))
        for metric in RATES
        if metric in judged
    ]


def _pooled_draws(
    responses: Sequence[Responses], base: Mapping[str, Responses], prompts: Mapping[str, Prompts]
) -> list[Row]:
    """The random draws of one setting taken together; a prompt's answers under all draws are one cluster."""
    groups: dict[tuple[str, str, str], list[Responses]] = {}
    for answered in responses:
        if pooled := pooled_setting(answered.setting):
            groups.setdefault((answered.dataset, answered.method, pooled), []).append(answered)
    rows = []
    for (dataset, method, setting), group in groups.items():
        clusters = list(prompts[dataset].clusters) * len(group)
        together = Responses(dataset, method, setting, tuple(row for answered in group for row in answered.rows))
        rows += _rates(together, clusters)
        if dataset in base:
            rows.append(_change(together, base[dataset].score("refused") * len(group), clusters))
    return rows


def _comparisons(responses: Sequence[Responses], prompts: Mapping[str, Prompts]) -> list[Row]:
    """The reference set against every other edit of equal size, by each outcome."""
    rows = []
    for metric in COMPARED:
        scored = [Scored.of(answered, metric, prompts[answered.dataset].clusters) for answered in responses]
        rows += comparisons.differences(scored, f"{metric}_difference", what=metric)
    return rows


def _with_pooled(costs: Sequence[tuple[Arm, Cost]]) -> dict[tuple[str, str], list[Cost]]:
    """Costs by method and setting, the random draws once more under their pooled setting."""
    found: dict[tuple[str, str], list[Cost]] = {(arm.method, arm.setting): [cost] for arm, cost in costs}
    for arm, cost in costs:
        if pooled := pooled_setting(arm.setting):
            found.setdefault((arm.method, pooled), []).append(cost)
    return found


def _cost_rows(method: str, setting: str, costs: Sequence[Cost], prompts: Prompts) -> list[Row]:
    cluster = dict(zip(prompts.ids, prompts.clusters, strict=True))
    names = [cluster[prompt] for cost in costs for prompt in cost.prompt_ids]
    rows = []
    for metric in ("cross_entropy_change", "kl"):
        weights = [tokens for cost in costs for tokens in cost.weights(metric)]
        values = [value for cost in costs for value in getattr(cost, metric)]
        rows.append(_row(prompts.name, method, metric, setting, stats.mean(values, names, weights=weights)))
    return rows


def _row(dataset: str, method: str, metric: str, setting: str, estimate: Estimate) -> Row:
    return Row(dataset, method, metric, setting, *estimate)
