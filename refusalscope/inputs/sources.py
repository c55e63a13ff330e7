"""A file of rows that others wrote: found on this disk or on the hub, read row by row, whatever is left out counted."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from refusalscope.inputs.hub import snapshot
from refusalscope.inputs.tables import ENDINGS, Fault, TableRow, scan_table

PINNED = {
    "declare-lab/CategoricalHarmfulQA": "321e068b391b7d1aeeb882ac468356a9513c9167",
    "allenai/wildjailbreak": "5ddc12a7894f842b0619b8e1c7ee496b198af009",
}
"""The commits that are read where no revision is named."""
SHOWN = 3
"""Places that a note names for each reason."""


class Source(NamedTuple):
    """A file, and what prompts say of where they come from."""

    path: Path
    name: str
    """The file's name; of a repository `owner/name@commit`."""
    local: bool


def locate(named: str, *, option: str, tags: Sequence[str]) -> Source:
    """The file that `--option` names: a path, else `owner/name` or `owner/name@revision` of a data set on the hub.

    Where a repository has several tables, the one with a word of `tags` in its path is meant.
    Raises ValueError, one line, when there is no such file or not one alone.
    """
    if path := local(named, option=option):
        return Source(path, path.name, True)
    repository, _, revision = named.partition("@")
    wanted = revision or PINNED.get(repository)
    try:
        tables = (f"*{ending}" for ending in ENDINGS)
        choice = f"as {repository}@COMMIT"
        folder = snapshot(repository, *tables, revision=wanted, kind="dataset", choice=choice)
    except ValueError as error:
        if repository in PINNED:
            raise
        raise ValueError(f"{option}: no file {named} is here, and {error}") from error
    return Source(_table(folder, repository, tags), f"{repository}@{folder.name}", False)


def local(named: str, *, option: str) -> Path | None:
    """The file that `--option` names; None where it names a data set on the hub.

    Raises ValueError, one line, when there is no such file and the name is no repository's.
    """
    path = Path(named)
    if path.is_file():
        return path
    if path.exists() or path.suffix.lower() in ENDINGS or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", named):
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(
            f"{option} {named}: {what}; write a {', '.join(ENDINGS)} file, or owner/name or owner/name@revision of a "
            "data set on the Hugging Face hub"
        )
    return None


def _table(folder: Path, repository: str, tags: Sequence[str]) -> Path:
    tables = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in ENDINGS)
    paths = [file.relative_to(folder).as_posix() for file in tables]
    tagged = [at for at, path in enumerate(paths) if set(tags) & set(re.findall(r"[a-z]+", path.lower()))]
    chosen = tagged if len(tables) > 1 else list(range(len(tables)))
    if len(chosen) != 1:
        raise ValueError(
            f"{repository}: expected one {', '.join(ENDINGS)} file with {' or '.join(tags)} in its name; "
            f"there are {', '.join(paths) or 'no such files'}: download the one you mean and name it"
        )
    return tables[chosen[0]]


@dataclass
class Reading:
    """One pass over a file: rows under our column names, and a count of every row that is not used."""

    path: Path
    columns: Mapping[str, Sequence[str]]
    """Our name of a column -> the names that a file may give it, in lower case, the preferred one first."""
    needed: Sequence[str]
    """Of our names those that a file must have."""
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Why -> how many rows were left out for it."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """Why -> where the first of them stand."""

    def rows(self) -> Iterator[TableRow]:
        """The rows that can be read; a cell that is blank or no text is "".

        Raises ValueError, one line, when the file holds no rows or lacks a column.
        """
        seen: dict[str, str] = {}
        for row in scan_table(self.path):
            self.read += 1
            if isinstance(row, Fault):
                self.drop(row.why, row.place)
                continue
            given = {str(name).strip().casefold(): name for name in row.values}
            seen |= given
            yield TableRow(row.place, self._renamed(row.values, given))
        self._check(seen)

    def _renamed(self, values: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
        """The cells of the columns that this row has, by our names."""
        made = {}
        for ours, names in self.columns.items():
            own = next((given[name] for name in names if name in given), None)
            if own is not None:
                made[ours] = values[own] if isinstance(values[own], str) and values[own].strip() else ""
        return made

    def _check(self, seen: Mapping[str, str]) -> None:
        if not self.read:
            raise ValueError(f"{self.path} holds no rows")
        if not seen:
            why, places = next(iter(self.places.items()))
            raise ValueError(f"{self.path}: no row can be read; the first, {places[0]}: {why}")
        for name in self.needed:
            if not seen.keys() & set(self.columns[name]):
                wanted = ", ".join(" or ".join(self.columns[needed]) for needed in self.needed)
                raise ValueError(
                    f"{self.path}: no column {' or '.join(self.columns[name])}; there are {', '.join(seen.values())}; "
                    f"the file must have {wanted}"
                )

    def drop(self, why: str, place: str) -> None:
        """Count a row that is left out."""
        self.dropped[why] += 1
        places = self.places.setdefault(why, [])
        if len(places) < SHOWN:
            places.append(place)

    def notes(self, name: str) -> tuple[str, ...]:
        """One sentence a reason: how many of the rows of `name`, why, and where the first of them stand."""
        return tuple(
            f"{name}: {count} of {self.read} rows left out: {why} "
            f"({', '.join(self.places[why])}{', ...' if count > SHOWN else ''})."
            for why, count in self.dropped.items()
        )
