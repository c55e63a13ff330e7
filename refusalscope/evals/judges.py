"""Who says whether an answer refuses, harms or is coherent: one function type, and a table of those that are known.

A judge answers exactly one question about exchanges (a prompt and its answer) and never raises for one of them: what it
cannot score comes back unscored, with the reason. Knows nothing of files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from refusalscope.core.types import NaN, Prompt, Question, Response, Verdict


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


@dataclass(frozen=True)
class Settings:
    """How the judges are run."""

    url: str | None = None
    model: str | None = None
    revision: str | None = None
    template: Path | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    question: Question = "harmful"
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None


class Known(NamedTuple):
    name: str
    question: str
    what: str


def known() -> list[Known]:
    return [Known("module:function", "any", "a function of your own")]


def opened(names: Sequence[str], settings: Settings) -> Iterator[Judge]:
    for name in names:
        module, colon, function = name.partition(":")
        if not colon:
            raise ValueError(f"unknown judge {name!r}: see `refusalscope judges`")
        call = getattr(import_module(module), function)
        yield _own(f"{module}.{function}", call, settings)


def _own(name: str, call: Any, settings: Settings) -> Judge:
    def score(exchanges: Sequence[Exchange]) -> list[Verdict]:
        made = []
        for exchange, said in zip(exchanges, call(exchanges), strict=True):
            value = NaN if said is None else float(said)
            made.append(Verdict(exchange.prompt.id, value, reason="", final=said is not None))
        return made

    return Judge(name, settings.question, {"function": name}, settings.batch_size or 8, score)
