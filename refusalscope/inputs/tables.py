"""Rows of a file of prompts, labels or documents: CSV, JSONL or JSON in, dictionaries out.

Every fault is named with its file and line.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class TableRow(NamedTuple):
    """One record and where it stands."""

    place: str
    """`line 3` of the file, where the record begins; `record 3` of a JSON array, counted from 1."""
    values: dict[str, Any]


def read_table(path: Path) -> list[TableRow]:
    """All records of a file, by its ending. Raises ValueError, one line naming file and place, on any fault."""
    readers: dict[str, Callable[[str, Path], Iterator[TableRow]]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".json": _json,
    }
    ending = path.suffix.lower()
    if ending not in readers:
        raise ValueError(f"{path}: a table of rows ends in {', '.join(readers)}")
    rows = list(readers[ending](read_text(path), path))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises ValueError, one line, when it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = len(content) - len(error.object) + error.start  # the offset counts from after any byte order mark
        line = content[:at].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {content[at]:#04x}); save it as UTF-8") from error


def _csv(text: str, path: Path) -> Iterator[TableRow]:
    # A prompt may be long; the module's default stops at 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    begins = 1
    try:
        for record in reader:
            place = f"line {begins}"
            begins = reader.line_num + 1
            if record and not header:
                header = _distinct(record, path, place)
            elif record:
                if len(record) != len(header):
                    raise ValueError(f"{path}, {place}: {len(record)} cells, but the header has {len(header)}")
                yield TableRow(place, dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {begins}: malformed CSV ({error})") from error


def _distinct(header: list[str], path: Path, place: str) -> list[str]:
    named = [name for name in header if name]
    if len(set(named)) != len(named):
        raise ValueError(f"{path}, {place}: a column name occurs twice in {header}")
    return header


def _jsonl(text: str, path: Path) -> Iterator[TableRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: malformed JSON ({_complaint(error)})") from error
            yield _row(record, path, f"line {number}")


def _json(text: str, path: Path) -> Iterator[TableRow]:
    try:
        records = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{place}: malformed JSON ({_complaint(error)})") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield _row(record, path, f"record {number}")


def _complaint(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _row(record: Any, path: Path, place: str) -> TableRow:
    if not isinstance(record, dict):
        raise ValueError(f"{path}, {place}: expected an object, found {type(record).__name__}")
    try:
        # JSON can spell half a character ("\ud800"), which no file can be written with.
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, {place}: not a character: {error.object[error.start]!a}") from error
    return TableRow(place, record)
