"""Answers that stand in a run folder, scored by any judges at any time: nothing is generated again.

A judge's verdicts are files of its own, so judging together with the run or later leaves the same bytes; one of the
same name under other settings is another judge. What a judge could not score, and another time might, is a gap: every
later call asks about it again, and never about a scored one.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import NaN, Question, Verdict, Verdicts
from refusalscope.evals import judges
from refusalscope.evals.checkpoints import first_line
from refusalscope.evals.judges import Exchange, Judge, Score, Settings
from refusalscope.evals.rules import RULES
from refusalscope.pipeline import labels as person
from refusalscope.pipeline.answered import Answered, answers, only
from refusalscope.pipeline.measure import keep_finding, rewrite_report
from refusalscope.studies import agreement, safety

Progress = Callable[[str, int, int], None]
NO_JUDGE = "none"
SAFETY = "findings/safety.json"
DIGITS = 6
"""Of a fingerprint, where two judges of one name are told apart."""


class Unscored(NamedTuple):
    """What one judge left without a score."""

    judge: str
    unscored: int
    answers: int
    reason: str
    """The most frequent one."""


def asked(names: Iterable[str]) -> list[str]:
    """The names of judges that have a model or code of their own, each once."""
    return [name for name in dict.fromkeys(names) if name not in RULES and name != NO_JUDGE]


def check(names: Sequence[str], settings: Settings) -> Settings:
    """Raise ValueError, one line, for a judge that is not known or cannot be had; loads no weights.

    Returns the settings with the name that a server gave its model: it may be gone by the time that it is asked.
    """
    abouts = [judge.about for judge in judges.opened(asked(names), settings)]
    served = [about["model"] for about in abouts if about.get("engine") == "server"]
    return replace(settings, model=served[0]) if served else settings


def judge_run(
    store: Store,
    names: Sequence[str],
    settings: Settings,
    *,
    labels: Path | None = None,
    datasets: Sequence[str] | None = None,
    progress: Progress = lambda *_: None,
) -> list[Unscored]:
    """Score the answers of a run folder, then make its findings on safety and agreement, and its page if it has one.

    Rules have scored every answer already. Raises ValueError, before any judge is asked, for one that cannot be had, a
    data set that was not answered and a faulty file of labels.
    """
    answered = answers(store)
    wanted = only(answered, datasets)
    told = [] if labels is None else person.read(labels, answered)
    settings = check(names, settings)
    if labels is not None:
        keep_labels(store, told, person.about(labels))
    left = score(store, wanted, judges.opened(asked(names), settings), progress)
    write_findings(store, answered)
    return left


def score(store: Store, answered: Sequence[Answered], opened: Iterable[Judge], progress: Progress) -> list[Unscored]:
    """Every judge in turn over all answers; each batch is written as soon as it is scored.

    A judge that fails as a whole leaves its answers unscored, and the other judges to go on.
    """
    left = []
    for judge in opened:
        judge = replace(judge, name=_name(store, judge), score=_unfailing(judge.score))
        rows: list[Verdict] = []
        for done, one in enumerate(answered):
            progress(f"{judge.name} on {one.name.removesuffix('.jsonl')}", done, len(answered))
            rows += _scored(store, one, judge).rows
        reasons = Counter(row.reason for row in rows if math.isnan(row.score))
        if reasons:
            left.append(Unscored(judge.name, reasons.total(), len(rows), reasons.most_common(1)[0][0]))
    return left


def keep_labels(store: Store, told: Sequence[tuple[Answered, Verdicts]], about: Mapping[str, Any]) -> None:
    """Write a person's verdicts; those of an earlier file no longer count for the questions that this one answers."""
    for one, verdicts in told:
        _describe(store, verdicts.judge, verdicts.question, about)
        store.keep(_path(verdicts.judge, one), one.key(verdicts.judge, about), verdicts)


def write_findings(store: Store, answered: Sequence[Answered]) -> None:
    """`findings/safety.json` and `findings/agreement.json` from all verdicts that stand, and the page anew."""
    verdicts, described = standing(store, answered)
    prompts = {one.prompts.name: one.prompts for one in answered}
    by_rule = [made for one in answered for made in _by_rules(one)]
    by_person = [made for made in verdicts if made.judge.startswith(person.PERSON)]
    by_machine = [made for made in verdicts if not made.judge.startswith(person.PERSON)]
    provenance = {
        "answers": fingerprint([one.key("", {}) for one in answered]),
        "verdicts": fingerprint(verdicts),
        "judges": described,
    }
    keep_finding(store, safety.summarise([*by_rule, *by_person], by_machine, prompts, provenance=provenance))
    keep_finding(store, agreement.summarise([*by_rule, *by_machine, *by_person], prompts, provenance=provenance))
    rewrite_report(store)


def standing(store: Store, answered: Sequence[Answered]) -> tuple[list[Verdicts], dict[str, Any]]:
    """All verdicts on these very answers by the judges as they are described in the folder; and the descriptions."""
    verdicts, described = [], {}
    for path in store.paths("judges", ".json"):
        judge = store.read(path, dict)
        described[judge["name"]] = judge
        for one in answered:
            made = _path(judge["name"], one)
            if store.has(made, one.key(judge["name"], judge["about"])):
                verdicts.append(store.read(made, Verdicts))
    return verdicts, described


def _scored(store: Store, one: Answered, judge: Judge) -> Verdicts:
    """All answers of one data set under one edit, in batches that lie where they lay before a kill."""
    path, key = _path(judge.name, one), one.key(judge.name, judge.about)
    known = {row.prompt_id: row for row in (store.read(path, Verdicts).rows if store.has(path, key) else ())}
    exchanges = one.exchanges
    for start in range(0, len(exchanges), judge.batch_size):
        batch = exchanges[start : start + judge.batch_size]
        pending = [exchange for exchange in batch if _is_gap(known.get(exchange.prompt.id))]
        if pending:
            known |= {row.prompt_id: row for row in judge.score(pending)}
            _describe(store, judge.name, judge.question, judge.about)
            store.put(path, key, _verdicts(judge, one, known))
    return _verdicts(judge, one, known)


def _name(store: Store, judge: Judge) -> str:
    """The judge's name, or another one where a judge of that name that is about something else has said anything.

    So the verdicts of one rubric by two models, or of one judge on two machines, stand side by side.
    """
    other = f"{judge.name}-{fingerprint(judge.about)[:DIGITS]}"
    stand = store.paths("judges", ".json")
    if f"judges/{other}.json" in stand:
        return other
    if (path := f"judges/{judge.name}.json") not in stand:
        return judge.name
    same = fingerprint(store.read(path, dict)["about"]) == fingerprint(judge.about)
    made = (row for path in store.paths(f"judged/{judge.name}", ".jsonl") for row in store.read(path, Verdicts).rows)
    # One that never came to an answer, as its weights did not fit, gives its name to the next.
    return judge.name if same or all(map(_is_gap, made)) else other


def _unfailing(score: Score) -> Score:
    """The judge that fails but once, as when its weights cannot be loaded, and leaves all from there on unscored."""
    fault = ""

    def scored(exchanges: Sequence[Exchange]) -> list[Verdict]:
        nonlocal fault
        if not fault:
            try:
                return score(exchanges)
            except Exception as error:
                # Libraries fail in their own ways, and what was generated for hours is worth its findings.
                name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                fault = f"{name}{first_line(error)}"
        return [Verdict(exchange.prompt.id, NaN, reason=fault, final=False) for exchange in exchanges]

    return scored


def _verdicts(judge: Judge, one: Answered, known: Mapping[str, Verdict]) -> Verdicts:
    in_order = (known[row.prompt_id] for row in one.responses.rows if row.prompt_id in known)
    return Verdicts(judge.name, judge.question, *one.arm, tuple(in_order))


def _is_gap(verdict: Verdict | None) -> bool:
    return verdict is None or (math.isnan(verdict.score) and not verdict.final)


def _by_rules(one: Answered) -> list[Verdicts]:
    """What the rules said when the answers were given, as verdicts; a rule that scored none of them is left out."""
    made = []
    for name, (question, column) in RULES.items():
        rows = [
            Verdict(row.prompt_id, row.scores[column], reason=row.reasons.get(column, ""))
            for row in one.responses.rows
            if column in row.scores
        ]
        if rows:
            made.append(Verdicts(name, question, *one.arm, tuple(rows)))
    return made


def _path(judge: str, one: Answered) -> str:
    return f"judged/{judge}/{one.name}"


def _describe(store: Store, name: str, question: Question, about: Mapping[str, Any]) -> None:
    described = {"name": name, "question": question, "about": dict(about)}
    store.keep(f"judges/{name}.json", fingerprint(described), described)
