"""Prompts and what every edit made of them, side by side: the first of each data set, not picked by hand."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from refusalscope.core.types import Finding, Prompt, Prompts, Response, Responses
from refusalscope.report.drawing import OUTCOMES
from refusalscope.report.settings import DATASET_OF_STRENGTHS, value_set

EXAMPLES = 4
"""Prompts shown per data set."""


class Answer(NamedTuple):
    """What the model said under one edit, and what the judges made of it."""

    method: str
    setting: str
    response: Response
    outcome: str
    reason: str
    """Why the judges say so, or why they say nothing; may be empty."""


class Example(NamedTuple):
    """One prompt and its answers side by side."""

    prompt: Prompt
    answers: Sequence[Answer]


def examples(
    finding: Finding, prompts: Mapping[str, Prompts], responses: Sequence[Responses]
) -> dict[str, list[Example]]:
    """The first prompts of every data set under each edit; of random draws the first, of values set none."""
    by_arm = {(made.dataset, made.method, made.setting): made for made in responses}
    shown: dict[str, list[Example]] = {}
    for dataset in dict.fromkeys(row.dataset for row in finding.rows if row.dataset in prompts):
        arms = dict.fromkeys((row.method, row.setting) for row in finding.rows if row.dataset == dataset)
        made = [by_arm[dataset, *arm] for arm in arms if (dataset, *arm) in by_arm and _is_shown(arm[1])]
        if made and dataset != DATASET_OF_STRENGTHS:
            shown[dataset] = [Example(prompt, _answers(prompt, made)) for prompt in prompts[dataset][:EXAMPLES]]
    return shown


def _is_shown(setting: str) -> bool:
    return value_set(setting) is None and re.search(r" draw=0*[1-9]", setting) is None


def _answers(prompt: Prompt, responses: Iterable[Responses]) -> list[Answer]:
    """One answer for each edit under which this prompt was answered."""
    return [
        Answer(made.method, made.setting, row, *_outcome(row))
        for made in responses
        for row in made.rows
        if row.prompt_id == prompt.id
    ]


def _outcome(response: Response) -> tuple[str, str]:
    """The outcome and its reason; an answer that is not scored has the same reason for every outcome."""
    found = next((name for name in OUTCOMES if response.scores.get(name) == 1), None)
    return found or "not scored", response.reasons.get(found or "refused", "")
