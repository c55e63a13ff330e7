"""Does an edit make answers harmful, refused or incoherent, as each judge sees it? Verdicts in, one Finding out.

Every judge has rows of its own, `harmful:minos` and so on: no judge is taken for another. Knows nothing of files.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from refusalscope.core import stats
from refusalscope.core.comparisons import Scored, changes, differences, smallest, with_pooled
from refusalscope.core.types import Finding, NaN, Prompts, Question, Row, Verdicts

QUESTION = "Which answers are harmful, refused or coherent, by which judge, and what does each edit change in that?"


def summarise(
    told: Sequence[Verdicts],
    asked: Sequence[Verdicts],
    prompts: Mapping[str, Prompts],
    *,
    provenance: Mapping[str, Any],
) -> Finding:
    """Rates by judge; for judges that were asked also changes from the unedited model and differences of methods.

    Not so for those that told by themselves: the benchmark's finding has the rules' changes and differences, and a
    person labels too few answers for any.
    """
    rows: list[Row] = []
    unscored = []
    by_themselves = {made.judge for made in told}
    for (judge, question), made in _by_judge([*told, *asked]).items():
        scored = [_scored(one, prompts, "score") for one in made]
        metric = f"{question}:{judge}"
        rows += [one.row(metric, stats.rate(one.scores, one.clusters)) for one in with_pooled(scored)]
        if judge in by_themselves:
            continue
        rows += changes(scored, f"{question}_change:{judge}", what=metric)
        rows += differences(scored, f"{question}_difference:{judge}", what=metric)
        rows += _graded(made, prompts, f"{question}_score:{judge}")
        unscored += _unscored(judge, made, prompts)
    clusters = {dataset: len(set(asked.clusters)) for dataset, asked in prompts.items()}
    rows = [*stats.with_holm(rows), *smallest(rows, clusters)]
    return Finding("safety", QUESTION, tuple(rows), (*_stand_ins(provenance), *unscored), provenance)


def _by_judge(verdicts: Sequence[Verdicts]) -> dict[tuple[str, Question], list[Verdicts]]:
    found: dict[tuple[str, Question], list[Verdicts]] = {}
    for made in verdicts:
        found.setdefault((made.judge, made.question), []).append(made)
    return found


def _scored(made: Verdicts, prompts: Mapping[str, Prompts], what: str) -> Scored:
    """Every prompt's score; one that has no verdict yet is unscored."""
    asked = prompts[made.dataset]
    values = {row.prompt_id: getattr(row, what) for row in made.rows}
    scores = [values.get(name, NaN) for name in asked.ids]
    return Scored(made.dataset, made.method, made.setting, scores, asked.clusters)


def _graded(made: Sequence[Verdicts], prompts: Mapping[str, Prompts], metric: str) -> list[Row]:
    """Mean probability of a yes, or mean graded score, where the judge gives one."""
    graded = [_scored(one, prompts, "probability") for one in made]
    if all(math.isnan(value) for one in graded for value in one.scores):
        return []
    return [one.row(metric, stats.mean(one.scores, one.clusters)) for one in with_pooled(graded)]


def _stand_ins(provenance: Mapping[str, Any]) -> list[str]:
    """A sentence for every judge under whose name another model than its own answered."""
    found = []
    for judge in provenance.get("judges", {}).values():
        if own := judge["about"].get("in_place_of"):
            asked = judge["about"]["model"]
            found.append(
                f"The judge {judge['name']} was {asked}: what is known of {own} holds only if that is the same."
            )
    return found


def _unscored(judge: str, made: Sequence[Verdicts], prompts: Mapping[str, Prompts]) -> list[str]:
    """What the judge left without a score, and the commonest reasons, in a sentence; none where it scored all."""
    answers = sum(len(prompts[one.dataset]) for one in made)
    reasons = Counter(row.reason for one in made for row in one.rows if math.isnan(row.score))
    if never := answers - sum(len(one.rows) for one in made):
        reasons["not asked yet"] = never
    if not reasons:
        return []
    told = ", ".join(f"{reason or 'no reason given'} ({count})" for reason, count in reasons.most_common(3))
    return [f"The judge {judge} left {reasons.total()} of {answers} answers unscored: {told}."]
