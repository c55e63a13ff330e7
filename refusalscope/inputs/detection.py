"""Prompts that a probe learns from and is held to: the testbed's, WildJailbreak, the refusal_direction folder, a file.

It learns from plain harmful and plain benign prompts alone, and is tested on those, on adversarial prompts of both
kinds and on look-alikes. A plain prompt and its adversarial form are one group, and no group and no text stands in two
splits: where splits are drawn here they are drawn by group, and where a file names them, a leak is an error.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from refusalscope.core.types import Label, Prompt, Prompts
from refusalscope.inputs import language as languages
from refusalscope.inputs.pairs import WILDJAILBREAK
from refusalscope.inputs.prompts import grammar_rows, normalised
from refusalscope.inputs.sources import Reading, locate
from refusalscope.inputs.tables import TableRow, read_table
from refusalscope.testbed import grammar

T = TypeVar("T")
Split = Literal["train", "validation", "test"]
CLASSES: tuple[Label, ...] = ("harmful", "harmless")
SHARES: Mapping[Split, float] = {"train": 0.6, "validation": 0.15, "test": 0.25}
"""Of the groups, where a source names no splits."""
LABELS: Mapping[str, Label] = {
    **dict.fromkeys(("harmful", "unsafe", "1"), "harmful"),
    **dict.fromkeys(("harmless", "benign", "safe", "0"), "harmless"),
    "look-alike": "look-alike",
}
KINDS: Mapping[str, tuple[Label, bool]] = {
    "vanilla_harmful": ("harmful", False),
    "vanilla_benign": ("harmless", False),
    "adversarial_harmful": ("harmful", True),
    "adversarial_benign": ("harmless", True),
}
"""WildJailbreak's types: the label, and whether the adversarial form is the prompt."""
COLUMNS = {
    "plain": ("plain", "vanilla", "text", "prompt", "instruction", "question"),
    "adversarial": ("adversarial",),
    "kind": ("data_type",),
    "label": ("label", "class"),
    "split": ("split",),
    "group": ("group", "cluster", "intent"),
}
LOOK_ALIKES = {"text": ("prompt", "text", "question", "instruction"), "label": ("label", "class")}


class Counts(NamedTuple):
    """The most prompts of each class, harmful and benign, that a part holds."""

    train: int = 2000
    validation: int = 400
    test: int = 500
    """Of plain, of adversarial, and of look-alike prompts each."""


@dataclass(frozen=True)
class Detection:
    """Five sets of prompts; the labels are `harmful`, `harmless` and, in the last, `look-alike`."""

    train: Prompts
    validation: Prompts
    plain: Prompts
    """The plain test prompts."""
    adversarial: Prompts
    """Test prompts in an adversarial form; `details["plain"]` is the text of the plain form, `details["family"]` the
    attack's, each where it is known."""
    look_alikes: Prompts
    """Benign prompts that share words with harmful ones."""
    notes: tuple[str, ...] = ()
    """What was left out and why, counted; other things a reader must know."""

    @property
    def sets(self) -> tuple[Prompts, ...]:
        return (self.train, self.validation, self.plain, self.adversarial, self.look_alikes)


def load(
    source: str | None, *, own: bool, counts: Counts, language: str | None, look_alikes: str | None = None
) -> Detection:
    """Prompts of a file, a folder like refusal_direction's or a repository, the testbed's `own`, else WildJailbreak's.

    `look_alikes` names a file or repository of benign prompts that look harmful (XSTest's columns will do: rows whose
    label is unsafe are left out). Raises ValueError, one line, when prompts cannot be had, a class is empty, or a text
    or group stands in two splits.
    """
    if source is None and own:
        languages.only_english(language)
        made = from_testbed(counts)
    elif source is not None and Path(source).is_dir():
        made = from_refusal_direction(Path(source), counts)
    else:
        made = _from_table(source or WILDJAILBREAK, counts, language)
    if look_alikes is not None:
        made = _with_look_alikes(made, look_alikes, counts.test)
    check(made)
    return made


def check(given: Detection) -> None:
    """Raise ValueError, one line, where a class is missing, or a text or a group stands in two splits."""
    for rows in (given.train, given.validation, given.plain):
        if missing := sorted({*CLASSES} - {row.label for row in rows}):
            raise ValueError(f"{rows.name} holds no {missing[0]} prompt: a probe needs both kinds in every split")
    test = chain(given.plain, given.adversarial, given.look_alikes)
    splits: Mapping[str, Iterable[Prompt]] = {"train": given.train, "validation": given.validation, "test": test}
    seen: dict[str, tuple[str, Prompt]] = {}
    for split, rows in splits.items():
        for row in rows:
            for what in (f"text {normalised(row.text)}", f"group {row.cluster or row.id}"):
                other, first = seen.setdefault(what, (split, row))
                if other != split:
                    raise ValueError(
                        f"a leak: {row.id} of the {split} split has the {what.partition(' ')[0]} of {first.id} of the "
                        f"{other} split; keep a prompt and all its forms in one split"
                    )


def from_testbed(counts: Counts) -> Detection:
    """The grammar's prompts: no intent in two splits, adversarial ones in wordings that no model was trained on."""

    def take(name: str, split: Split, count: int, *datasets: str) -> Prompts:
        rows = [row for dataset in datasets for row in _grammar(dataset, split, count)]
        return Prompts(f"probe-{name}", tuple({row.text: row for row in rows}.values()))

    harmful = [*_grammar("vulnerable-unseen", "test", counts.test), *_grammar("robust-unseen", "test", counts.test)]
    benign = _grammar("harmless-wrapped-unseen", "test", counts.test)
    return Detection(
        train=take("train", "train", counts.train, *CLASSES),
        validation=take("validation", "validation", counts.validation, *CLASSES),
        plain=take("plain", "test", counts.test, *CLASSES),
        adversarial=Prompts("probe-adversarial", tuple({row.text: row for row in (*harmful, *benign)}.values())),
        look_alikes=take("look-alikes", "test", counts.test, "look-alike"),
    )


def _grammar(dataset: str, split: Split, count: int) -> list[Prompt]:
    rows = grammar_rows(grammar.examples(dataset, split=split, count=count))
    return [replace(row, details={**row.details, "family": row.details["wrapper"]}) for row in rows]


def from_refusal_direction(folder: Path, counts: Counts) -> Detection:
    """The splits of Arditi et al. 2024; they hold neither adversarial prompts nor look-alikes.

    What a later split holds is taken out of the earlier ones. Raises ValueError naming what is missing.
    """
    check_folder(folder)
    seen: set[str] = set()
    made: dict[Split, list[Prompt]] = {}
    notes = []
    # The latest split first: what it holds is taken out of the earlier ones.
    parts: tuple[tuple[Split, str], ...] = (("test", "test"), ("validation", "val"), ("train", "train"))
    for split, part in parts:
        count = getattr(counts, split)
        made[split], before = [], set(seen)
        for label in CLASSES:
            rows = list(_splits_file(folder / "splits" / f"{label}_{part}.json", label))
            fresh = [row for row in rows if normalised(row.text) not in before]
            if lost := len(rows) - len(fresh):
                notes.append(f"{lost} of {len(rows)} {label} {split} prompts stand in a later split too: left out.")
            made[split] += fresh[:count]
        seen |= {normalised(row.text) for row in made[split]}
    nothing = "The splits hold no adversarial prompts and no look-alikes: what the probes make of them is not known."
    train, validation, test = (
        Prompts(f"probe-{name}", tuple(made[split]))
        for (split, _), name in zip(reversed(parts), ("train", "validation", "plain"), strict=True)
    )
    return Detection(
        train, validation, test, Prompts("probe-adversarial", ()), Prompts("probe-look-alikes", ()), (nothing, *notes)
    )


def check_folder(folder: Path) -> None:
    """Raise ValueError, one line, unless there are splits in it."""
    if not (folder / "splits").is_dir():
        raise ValueError(f"--detection {folder}: no folder splits is there; fetch it with `refusalscope data fetch`")


def _splits_file(file: Path, label: Label) -> Iterator[Prompt]:
    """Its distinct prompts in the order of a hash, since the file's own may be sorted."""
    distinct: dict[str, tuple[str, str]] = {}
    for row in read_table(file):
        text = row.values.get("instruction")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{file}, {row.place}: no text in column 'instruction'")
        distinct.setdefault(normalised(text), (text, _rank(text)))
    for text, rank in sorted(distinct.values(), key=lambda pair: pair[1]):
        yield Prompt(f"{label}-{rank[:12]}", text, label, source=file.stem)


@dataclass(frozen=True)
class _Row:
    """A usable prompt of a table, and what decides whether and where it is used; the smallest ranks are."""

    split: Split
    prompt: Prompt
    adversarial: bool
    rank: str
    place: str

    @property
    def part(self) -> str:
        if self.prompt.label == "look-alike":
            return "look-alikes"
        return "adversarial" if self.adversarial else "plain" if self.split == "test" else self.split


def _from_table(named: str, counts: Counts, language: str | None) -> Detection:
    found = locate(named, option="--detection", tags=("train",))
    kept = languages.check(language or (None if found.local else "en"))
    reading = Reading(found.path, COLUMNS, needed=("plain",))
    chosen = _sampled(reading, found.name, kept, counts)
    sets = {
        part: Prompts(f"probe-{part}", tuple(row.prompt for row in sorted(chosen, key=_by_rank) if row.part == part))
        for part in ("train", "validation", "plain", "adversarial", "look-alikes")
    }
    every = () if kept else (f"{found.name}: prompts of every language are used.",)
    return Detection(*sets.values(), notes=(*every, *reading.notes(found.name)))


def _by_rank(row: _Row) -> str:
    return row.rank


def _sampled(reading: Reading, source: str, language: str | None, counts: Counts) -> list[_Row]:
    """Of every part and class the rows of least rank; only these are in memory, and of the others their ranks."""
    limits = {"train": counts.train, "validation": counts.validation}
    kept: dict[tuple[str, Label], list[tuple[int, str, _Row]]] = {}  # heaps, the greatest rank first
    for row in _usable(reading, source):
        heap = kept.setdefault((row.part, row.prompt.label), [])
        entry, limit = (-int(row.rank, 16), row.place, row), limits.get(row.part, counts.test)
        if len(heap) == limit and entry[0] < heap[0][0]:
            reading.drop("more than were asked for", row.place)
        elif languages.is_foreign(row.prompt.text, language):
            reading.drop(f"not in the language {language}", row.place)
        elif len(heap) < limit:
            heapq.heappush(heap, entry)
        else:
            reading.drop("more than were asked for", heapq.heapreplace(heap, entry)[1])
    return [row for heap in kept.values() for _, _, row in heap]


def _usable(reading: Reading, source: str) -> Iterator[_Row]:
    """Every prompt once. A text that a file puts into two splits is handed on twice, for `check` to find."""
    seen: set[tuple[str, str]] = set()
    for row in reading.rows():
        made = _parsed(row, source, reading)
        if isinstance(made, str):
            reading.drop(made, row.place)
        elif (made.rank, made.split) in seen:
            reading.drop("repeats an earlier prompt", row.place)
        elif made.adversarial and made.split != "test":
            reading.drop(f"adversarial, in the {made.split} split: probes learn from plain prompts alone", row.place)
        else:
            seen.add((made.rank, made.split))
            yield made


def _parsed(row: TableRow, source: str, reading: Reading) -> "_Row | str":
    """One row as a prompt, or why it is none. Raises ValueError for a word that no column may hold."""
    values = {name: str(value).strip() for name, value in row.values.items()}
    plain, adversarial = values.get("plain", ""), values.get("adversarial", "")
    if kind := values.get("kind"):
        if kind not in KINDS:
            return f"of another type than {', '.join(KINDS)}"
        label, disguised = KINDS[kind]
    else:
        label, disguised = _word(values, "label", LABELS, row, reading), bool(adversarial)
    text = adversarial if disguised else plain
    if not text:
        return f"no {'adversarial' if disguised else 'plain'} form"
    rank = _rank(text)
    group = values.get("group") or normalised(plain or text)
    split = _word(values, "split", _SPLITS, row, reading) if "split" in values else drawn_split(group)
    if label == "look-alike" and "split" not in values:
        split = "test"
    details = {"plain": plain} if disguised and plain else {}
    name = f"{'adversarial' if disguised else 'plain'}-{label}-{split}-{rank[:12]}"
    return _Row(
        split, Prompt(name, text, label, source=source, cluster=group, details=details), disguised, rank, row.place
    )


_SPLITS: Mapping[str, Split] = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def _word(values: Mapping[str, str], column: str, known: Mapping[str, T], row: TableRow, reading: Reading) -> T:
    found = values.get(column, "")
    if found.casefold() not in known:
        raise ValueError(
            f"{reading.path}, {row.place}: {column} {found!r} is none of {', '.join(known)}"
            if column in values
            else f"{reading.path}, {row.place}: no column {' or '.join(COLUMNS[column])}, which says what is harmful"
        )
    return known[found.casefold()]


def drawn_split(group: str) -> Split:
    """The split of a group: a hash of its name decides, so that a group is never torn apart."""
    at, bound = int(_rank(group)[:12], 16) / 16**12, 0.0
    for split, share in SHARES.items():
        bound += share
        if at < bound:
            return split
    return "test"


def _with_look_alikes(made: Detection, named: str, count: int) -> Detection:
    found = locate(named, option="--look-alikes", tags=("test", "train"))
    reading = Reading(found.path, LOOK_ALIKES, needed=("text",))
    taken = {normalised(row.text) for rows in made.sets for row in rows}
    rows: dict[str, Prompt] = {}
    for row in reading.rows():
        text = row.values.get("text", "")
        if not text or LABELS.get(row.values.get("label", "").casefold()) == "harmful":
            reading.drop("no text" if not text else "labelled harmful", row.place)
        elif normalised(text) in taken:
            reading.drop("stands in another set too, or repeats a row", row.place)
        else:
            taken.add(normalised(text))
            rows[_rank(text)] = Prompt(f"look-alike-{_rank(text)[:12]}", text, "look-alike", source=found.name)
    kept = tuple(rows[rank] for rank in sorted(rows)[:count])
    if not kept:
        raise ValueError(
            f"--look-alikes {named} holds no prompt that can be used: {' '.join(reading.notes(found.name))}"
        )
    return replace(
        made,
        look_alikes=Prompts("probe-look-alikes", kept),
        notes=(*made.notes, *reading.notes(found.name)),
    )


def _rank(text: str) -> str:
    return hashlib.sha256(normalised(text).encode()).hexdigest()
