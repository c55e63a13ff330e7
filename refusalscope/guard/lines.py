"""Prompts as lines of JSON in, scores as lines of JSON out, a batch in memory at a time."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from refusalscope.core.types import Prompt, Prompts
from refusalscope.guard.content import DESCRIPTION
from refusalscope.guard.detector import BATCH, Guard, Scored

TEXTS = ("text", "prompt", "instruction")
"""What a row may call the prompt, the preferred name first."""
STANDARD_INPUT = Path("-")


class _Line(NamedTuple):
    row: dict[str, Any]
    text: str
    place: str


def score_lines(folder: Path, prompts: Path, *, model: str | None = None, batch_size: int = BATCH) -> Iterator[str]:
    """Each row of a JSONL file with `probability`, `flagged` and `reasons` added, in order, without its line end.

    Raises ValueError, one line, for a guard that cannot be used or a row without a prompt; what was scored before that
    row has been handed on.
    """
    inside = folder / "guard"
    guard = Guard.load(inside if (inside / DESCRIPTION).is_file() else folder, model=model)
    lines = _lines(prompts)
    while batch := list(islice(lines, batch_size)):
        rows = Prompts("guarded", tuple(Prompt(line.place, line.text, "harmless") for line in batch))
        scored = guard.score(rows, batch_size=batch_size)
        yield from (_written(line.row, found) for line, found in zip(batch, scored, strict=True))


def _lines(prompts: Path) -> Iterator[_Line]:
    named = "standard input" if prompts == STANDARD_INPUT else str(prompts)
    try:
        source = nullcontext(sys.stdin) if prompts == STANDARD_INPUT else prompts.open(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{prompts} cannot be read: {error.strerror}") from error
    with source as stream:
        for number, written in enumerate(stream, start=1):
            if written.strip():
                yield _parsed(written, f"{named}, line {number}")


def _parsed(written: str, place: str) -> _Line:
    try:
        row = json.loads(written)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    row = {"text": row} if isinstance(row, str) else row
    text = next((row[name] for name in TEXTS if name in row), None) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: no prompt: write an object with a text called {', '.join(TEXTS)}")
    return _Line(row, text, place)


def _written(row: dict[str, Any], scored: Scored) -> str:
    reasons = [reason._asdict() for reason in scored.reasons]
    found = {"probability": scored.probability, "flagged": scored.flagged, "reasons": reasons}
    return json.dumps({**row, **found}, ensure_ascii=False)
