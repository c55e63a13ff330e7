"""Texts that cross-entropy is measured on: a file of one's own, or a data set of the hub at a named revision."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from refusalscope.core.types import Prompt, Prompts
from refusalscope.inputs import hub
from refusalscope.inputs.tables import read_table, read_text
from refusalscope.testbed import grammar

COUNT = 1000
"""How many documents are read at most, from the first that is not blank."""
SPELLING = (
    "write a .txt, .jsonl, .json or .csv file, or owner/name@revision:column of a data set on the Hugging Face hub"
)


class HubColumn(NamedTuple):
    """One column of the train split of a data set, at a revision."""

    repository: str
    revision: str
    column: str


def source(text: str) -> Path | HubColumn:
    """What `--documents` names. Raises ValueError, one line, for what is neither a file nor a hub data set."""
    if Path(text).is_file():
        return Path(text)
    named, _, column = text.rpartition(":")
    repository, _, revision = named.partition("@")
    if (
        repository.count("/") != 1
        or not (revision and column)
        or Path(text).suffix in (".txt", ".jsonl", ".json", ".csv")
    ):
        raise ValueError(f"--documents {text!r}: there is no such file; {SPELLING}")
    return HubColumn(repository, revision, column)


def identity(where: Path | HubColumn) -> str:
    """What a cache key needs to know of a source: a file's content and ending, a data set's revision, `COUNT`."""
    if isinstance(where, Path):
        return f"{hashlib.sha256(where.read_bytes()).hexdigest()}{where.suffix.lower()} {COUNT}"
    return f"{'@'.join(where)} {COUNT}"


def read(where: Path | HubColumn) -> Prompts:
    """The first documents that are not blank: of a .txt file its lines, of a table its column `text`.

    Raises ValueError, one line, when there are none, a text is missing, or the data set cannot be had.
    """
    texts = _from_file(where) if isinstance(where, Path) else _from_hub(where)
    origin = where.name if isinstance(where, Path) else f"{where.repository}@{where.revision}"
    kept = list(islice((text for text in texts if text.strip()), COUNT))
    if not kept:
        raise ValueError(f"--documents {where}: no text is in it")
    rows = (Prompt(f"document-{at}", text, "harmless", source=origin) for at, text in enumerate(kept))
    return Prompts("documents", tuple(rows))


def from_testbed(count: int) -> Prompts:
    """The testbed's own plain text: held-out harmless requests, each with one of the grammar's answers, and no chat."""
    drawn = grammar.examples("harmless", split="test", count=count)
    texts = {example.id: f"{example.text} {grammar.placeholder_answer(example)}" for example in drawn}
    rows = (Prompt(f"document-{name}", text, "harmless", source="testbed") for name, text in texts.items())
    return Prompts("documents", tuple(rows))


def _from_file(file: Path) -> Iterator[str]:
    if file.suffix.lower() == ".txt":
        yield from read_text(file).split("\n")
    else:
        yield from (_text(row.values, "text", f"{file}, {row.place}") for row in read_table(file))


def _from_hub(where: HubColumn) -> Iterator[str]:
    return (_text(row, where.column, where.repository) for row in _hub_rows(where))


def _hub_rows(where: HubColumn) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        # Streamed: of a large data set only what is read is downloaded.
        yield from load_dataset(where.repository, revision=where.revision, split="train", streaming=True)
    except Exception as error:  # the network's, the hub's and the file formats' own errors
        asked = hub.Asked(where.repository, where.revision, "dataset", f"as {where.repository}@COMMIT:{where.column}")
        reason = hub.explained(error, asked) or hub.first_line(error)
        raise ValueError(f"--documents {where.repository}@{where.revision} cannot be read: {reason}") from error


def _text(row: dict[str, Any], column: str, place: str) -> str:
    if not isinstance(row.get(column), str):
        raise ValueError(f"{place}: no text in column {column!r}, there are {', '.join(map(str, row))}")
    return row[column]
