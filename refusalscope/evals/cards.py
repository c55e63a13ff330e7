"""The instruction a judge was trained on: read from its model card, or from a file, never stored here.

A card is text that others wrote: its fenced Python is parsed, never run. Knows no model.
"""

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

_FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\n`]*)\n(.*?)^ {0,3}\1[`~]*[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "python3", "py"}


@dataclass(frozen=True)
class Template:
    """A text with named places, as `str.format` reads it: `{name}`, and doubled braces for single ones."""

    text: str
    parts: tuple[tuple[str, str | None], ...]
    """Literal text, and the field that follows it."""

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with each field replaced once; braces in what is put in mean nothing."""
        return "".join(literal + ("" if field is None else values[field]) for literal, field in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def from_card(card: Path, fields: Sequence[str], *, name: str) -> Template:
    """The one string in the card's fenced Python whose fields are `fields`. Raises ValueError, one line, otherwise."""
    if not card.is_file():
        raise ValueError(f"{name} has no model card to read its template from{_instead(fields)}")
    blocks = list(_python(card.read_text("utf-8", errors="replace")))
    if not blocks:
        raise ValueError(f"the model card of {name} has no fenced block of Python{_instead(fields)}")
    parsed = [made for block in blocks for made in map(parsed_or_none, _strings(block)) if made is not None]
    found = {made.text: made for made in parsed if names(made) == set(fields)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(f"the model card of {name} has {len(found)} different texts{_with(fields)}{_instead(fields)}")
    stray = sorted({field for made in parsed if set(fields) < names(made) for field in names(made) - set(fields)})
    more = f" alone: there is also {_braced(stray)}" if stray else ""
    raise ValueError(f"the model card of {name} has no text{_with(fields)}{more}{_instead(fields)}")


def from_file(path: Path, fields: Sequence[str]) -> Template:
    """The template that a text file holds, less the newline that ends its last line. Raises ValueError, one line."""
    try:
        text = path.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --judge-template {path}: {error}") from error
    return from_text(text, fields, name=f"--judge-template {path}")


def from_text(text: str, fields: Sequence[str], *, name: str) -> Template:
    """A template whose fields must be `fields`. Raises ValueError, one line, otherwise."""
    made = parsed_or_none(text)
    if made is None:
        raise ValueError(f"{name}: a brace stands alone; the fields are {_braced(fields)}, other braces are doubled")
    if names(made) != set(fields):
        raise ValueError(f"{name}: its fields are {_braced(sorted(names(made))) or 'none'}, not {_braced(fields)}")
    return made


def parsed_or_none(text: str) -> Template | None:
    """The text as a template; None where a brace stands alone or a field asks for a format of its own."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError:
        return None
    if any(spec or conversion for _, _, spec, conversion in parts):
        return None
    return Template(text, tuple((literal, field) for literal, field, _, _ in parts))


def names(template: Template) -> set[str]:
    """The fields it has."""
    return {field for _, field in template.parts if field is not None}


def _python(card: str) -> Iterator[ast.Module]:
    """The fenced blocks that say they are Python (or do not say what they are) and parse as such."""
    for match in _FENCED.finditer(card.replace("\r\n", "\n")):
        if match[2].strip(" \t[]{}.").casefold() in _PYTHON:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # A card's odd escapes are nothing that the reader can mend.
                    yield ast.parse(match[3])
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue


def _strings(block: ast.Module) -> Iterator[str]:
    """Plain string constants: the pieces of f-strings are no text of their own."""
    pieces = {id(part) for node in ast.walk(block) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(block):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            yield node.value


def _with(fields: Sequence[str]) -> str:
    return f" with the fields {_braced(fields)}"


def _instead(fields: Sequence[str]) -> str:
    return f": give a text file{_with(fields)} by --judge-template"


def _braced(fields: Sequence[str]) -> str:
    return " and ".join(f"{{{field}}}" for field in fields)
