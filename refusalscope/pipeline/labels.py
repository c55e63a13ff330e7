"""A person's labels of a run's answers, as verdicts like any judge's: refused, harmful, coherent."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from refusalscope.core.types import Question, Verdict, Verdicts
from refusalscope.inputs.tables import TableRow, read_table
from refusalscope.pipeline.answered import Answered

QUESTIONS: tuple[Question, ...] = get_args(Question)
SAID = {"yes": 1.0, "1": 1.0, "true": 1.0, "no": 0.0, "0": 0.0, "false": 0.0}
PERSON = "person-"
"""How the name of a person's verdicts begins."""


def read(path: Path, answered: Sequence[Answered]) -> list[tuple[Answered, Verdicts]]:
    """One `Verdicts` per question and answered data set that the file labels; an empty cell is no label.

    Raises ValueError, one line naming the place in the file, for what is no label or fits no answer.
    """
    labelled: dict[tuple[str, Question], dict[str, Verdict]] = {}
    held = {one.name: one for one in answered}
    for row in read_table(path):
        where = f"{path}, {row.place}"
        one = _answer(row, answered, where)
        prompt = _prompt(row, one, where)
        for question, score in _labels(row, where):
            verdicts = labelled.setdefault((one.name, question), {})
            if prompt in verdicts:
                raise ValueError(f"{where}: this answer has a label for {question!r} already: keep one of them")
            verdicts[prompt] = Verdict(prompt, score, reason="labelled by a person")
    if not labelled:
        raise ValueError(f"{path} holds no label: fill a column {', '.join(QUESTIONS)} with yes or no")
    return [(held[name], _verdicts(held[name], question, rows)) for (name, question), rows in labelled.items()]


def about(path: Path) -> dict[str, Any]:
    """What a person's verdicts depend on: the bytes of the file."""
    return {"labels": hashlib.sha256(path.read_bytes()).hexdigest()}


def _verdicts(one: Answered, question: Question, rows: Mapping[str, Verdict]) -> Verdicts:
    in_order = tuple(rows[prompt] for prompt in one.prompts.ids if prompt in rows)
    return Verdicts(f"{PERSON}{question}", question, *one.arm, in_order)


def _answer(row: TableRow, answered: Sequence[Answered], where: str) -> Answered:
    """The answers that a row names; the setting may be left out where a method has one alone on that data set."""
    left = list(answered)
    for place, column in enumerate(("dataset", "method", "setting")):
        named = _cell(row, column)
        if column == "setting" and not named and len(left) == 1:
            break
        known = list(dict.fromkeys(one.arm[place] for one in left))
        left = [one for one in left if one.arm[place] == named]
        if not left:
            raise ValueError(f"{where}: no answers with {column} {named!r}; there are {', '.join(map(repr, known))}")
    return left[0]


def _prompt(row: TableRow, one: Answered, where: str) -> str:
    prompt = _cell(row, "prompt_id")
    if prompt not in one.prompts.ids:
        example = next(iter(one.prompts.ids), "")
        raise ValueError(f"{where}: data set {one.arm[0]!r} has no prompt_id {prompt!r}; ids look like {example!r}")
    return prompt


def _labels(row: TableRow, where: str) -> Iterator[tuple[Question, float]]:
    for question in QUESTIONS:
        cell = _cell(row, question).lower()
        if cell and cell not in SAID:
            raise ValueError(f"{where}: {question} is {cell!r}; write yes or no, or leave it empty")
        if cell:
            yield question, SAID[cell]


def _cell(row: TableRow, column: str) -> str:
    """A cell as text; JSON's null, and a column that is not there, are empty."""
    value = row.values.get(column)
    return "" if value is None else str(value).strip()
