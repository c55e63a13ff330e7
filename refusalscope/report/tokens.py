"""Tokens as a reader sees them: nothing invisible, nothing that turns the text around, coloured in steps by a value."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

LEVELS = 8
"""Steps of the colour scale; level 0 is uncoloured."""
FAINT = 0.02
"""Share of the largest value under which a value has no colour."""


class Span(NamedTuple):
    """A piece of text in one colour."""

    text: str
    level: int
    """0 to `LEVELS`, negative for a negative value."""
    value: float
    role: str


def visible(text: str) -> str:
    """The text with whitespace, control and direction characters made visible; what is left is safe to lay out."""
    made = "".join(_shown(letter) for letter in text)
    return made.replace(" ", "␣") if not made.strip(" ") and made else made or "∅"


def _shown(letter: str) -> str:
    if letter == "\n":
        return "↵"
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    # Format characters (Cf) join no glyph here: among them are the overrides that reverse what follows.
    if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co"):
        return f"[U+{ord(letter):04X}]"
    return letter


def _broken(text: str) -> str:
    """In running text a line break is shown and takes place."""
    return text.replace("↵", "↵\n")


def level(value: float | None, top: float) -> int:
    """The step of a value on a scale that ends at `top`; what is not finite has no colour."""
    if value is None or not math.isfinite(value) or abs(value) <= FAINT * top:
        return 0
    step = min(LEVELS, max(1, math.ceil(LEVELS * abs(value) / top)))
    return step if value > 0 else -step


def largest(values: Iterable[float | None]) -> float:
    """The largest finite magnitude; 0 for none."""
    return max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)


def spans(tokens: Sequence[str], values: Sequence[float | None], roles: Sequence[str], top: float) -> list[Span]:
    """Tokens coloured by value; neighbours of one role without colour are one span, so that a page stays light.

    Raises ValueError when the three lists are not of one length.
    """
    rows = zip(tokens, values, roles, strict=True)
    pieces = [
        Span(visible(text).replace("↵", "↵\n"), level(value, top), value or 0.0, role) for text, value, role in rows
    ]
    made: list[Span] = []
    for (silent, role), group in groupby(pieces, key=lambda piece: (piece.level == 0, piece.role)):
        together = list(group)
        made += [Span("".join(piece.text for piece in together), 0, 0.0, role)] if silent else together
    return made
