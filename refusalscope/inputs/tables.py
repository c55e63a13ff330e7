"""Rows of a prompt file: CSV, JSONL or JSON in, dictionaries out, every fault named with its file and line."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class TableRow(NamedTuple):
    """One record and where it stands."""

    line: int
    """Line of the file where the record ends (CSV) or begins; for a JSON array, its place counted from 1."""
    values: dict[str, Any]


def read_table(path: Path) -> list[TableRow]:
    """All records of a file, by its ending. Raises ValueError, one line naming file and line, on any fault."""
    readers: dict[str, Callable[[str, Path], Iterator[TableRow]]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".json": _json,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: a prompt file ends in {', '.join(readers)}")
    rows = list(readers[path.suffix](_text(path), path))
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from error


def _csv(text: str, path: Path) -> Iterator[TableRow]:
    # A prompt may be long; the module's default stops at 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: the header has {len(reader.fieldnames or ())} columns, "
                    "this row has another number"
                )
            yield TableRow(reader.line_num, record)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: malformed CSV ({error})") from error


def _jsonl(text: str, path: Path) -> Iterator[TableRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: malformed JSON ({error.msg})") from error
            yield TableRow(number, _object(record, path, f"line {number}"))


def _json(text: str, path: Path) -> Iterator[TableRow]:
    try:
        records = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield TableRow(number, _object(record, path, f"record {number}"))


def _object(record: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{path}, {place}: expected an object, found {type(record).__name__}")
    return record
