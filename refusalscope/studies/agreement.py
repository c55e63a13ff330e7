"""Do the judges of one question agree with each other, and with a person? Verdicts in, one Finding out.

Compared answer by answer, over all data sets and edits together. Knows nothing of files.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from refusalscope.core import stats
from refusalscope.core.types import Finding, NaN, Prompts, Question, Row, Verdicts

QUESTION = "How far do the judges of one question agree, answer by answer?"
EVERYTHING = "all answers"
CELLS = {"both": (1, 1), "first_only": (1, 0), "second_only": (0, 1), "neither": (0, 0)}
"""What the first and the second judge say."""

Answer = tuple[str, str, str, str]
"""Data set, method, setting and prompt."""


class _Judged(NamedTuple):
    judge: str
    question: Question
    scores: dict[Answer, float]


def summarise(
    verdicts: Sequence[Verdicts], prompts: Mapping[str, Prompts], *, provenance: Mapping[str, Any]
) -> Finding:
    """Cohen's kappa, agreement and the four cells as shares, for every pair of judges of the same question.

    They rest on the answers that both scored; coverage is the share of these among the answers both were asked about.
    """
    clusters = {
        (name, prompt.id): prompt.cluster or f"{name}/{prompt.id}"
        for name, asked in prompts.items()
        for prompt in asked
    }
    rows = []
    for first, second in combinations(_by_judge(verdicts), 2):
        if first.question == second.question:
            shared = [answer for answer in first.scores if answer in second.scores]
            names = [clusters[answer[0], answer[3]] for answer in shared]
            rows += _pair(first, second, shared, names)
    return Finding("agreement", QUESTION, tuple(rows), (), provenance)


def _by_judge(verdicts: Sequence[Verdicts]) -> list[_Judged]:
    found: dict[str, _Judged] = {}
    for made in verdicts:
        scores = found.setdefault(made.judge, _Judged(made.judge, made.question, {})).scores
        scores |= {(made.dataset, made.method, made.setting, row.prompt_id): row.score for row in made.rows}
    return list(found.values())


def _pair(first: _Judged, second: _Judged, shared: Sequence[Answer], clusters: Sequence[str]) -> list[Row]:
    one, other = ([judged.scores[answer] for answer in shared] for judged in (first, second))
    pairs = list(zip(one, other, strict=True))
    cells = {name: stats.rate([_said(pair, [said]) for pair in pairs], clusters) for name, said in CELLS.items()}
    agree = [CELLS["both"], CELLS["neither"]]
    found = {
        "agreement": stats.rate([_said(pair, agree) for pair in pairs], clusters),
        "kappa": stats.kappa(one, other, clusters),
        **cells,
    }
    named = f"{first.judge} vs {second.judge}"
    return [Row(EVERYTHING, named, metric, first.question, *estimate) for metric, estimate in found.items()]


def _said(pair: tuple[float, float], wanted: Sequence[tuple[int, int]]) -> float:
    """Whether the two scores are among the wanted pairs; NaN where either judge gave none."""
    return NaN if any(math.isnan(score) for score in pair) else float(pair in wanted)
