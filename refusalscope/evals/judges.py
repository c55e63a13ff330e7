"""Who says whether an answer refuses, harms or is coherent: one function type, and a table of those that are known.

A judge answers exactly one question about exchanges (a prompt and its answer) and never raises for one of them: what it
cannot score comes back unscored, with the reason. Knows nothing of files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from refusalscope.core.types import Prompt, Question, Response, Verdict


class Exchange(NamedTuple):
    """What a judge sees."""

    prompt: Prompt
    response: Response


Score = Callable[[Sequence[Exchange]], list[Verdict]]
"""One verdict per exchange, in order."""


@dataclass(frozen=True)
class Judge:
    """One question, and who answers it."""

    name: str
    """Fit for a file name."""
    question: Question
    about: Mapping[str, Any]
    """All that its verdicts depend on (model, revision, template, engine): part of their key, shown in the report."""
    batch_size: int
    """Exchanges per call of `score`: the unit that a killed run repeats."""
    score: Score
    """Loads what it needs when it is first called."""
