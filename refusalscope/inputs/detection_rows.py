"""Rows of a table as prompts for probes: which split, which form, which class, and which of them are drawn.

A row of WildJailbreak says its type; one of a user's file its label, and if he likes its split and its group. Whatever
is not used is counted. Knows nothing of what the parts are for.
"""

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from refusalscope.core.types import Label, Prompt
from refusalscope.inputs import language as languages
from refusalscope.inputs.prompts import normalised
from refusalscope.inputs.sources import Reading
from refusalscope.inputs.tables import TableRow

T = TypeVar("T")
Split = Literal["train", "validation", "test"]
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


class Counts(NamedTuple):
    """The most prompts of each class, harmful and benign, that a part holds."""

    train: int = 2000
    validation: int = 400
    test: int = 500
    """Of plain, of adversarial, and of look-alike prompts each."""


@dataclass(frozen=True)
class Drawn:
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


def sampled(reading: Reading, source: str, language: str | None, counts: Counts) -> list[Drawn]:
    """Of every part and class the rows of least rank, in its order; of the others only ranks are in memory."""
    limits = {"train": counts.train, "validation": counts.validation}
    kept: dict[tuple[str, Label], list[tuple[int, str, Drawn]]] = {}  # heaps, the greatest rank first
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
    return sorted((row for heap in kept.values() for _, _, row in heap), key=lambda row: row.rank)


def _usable(reading: Reading, source: str) -> Iterator[Drawn]:
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


def _parsed(row: TableRow, source: str, reading: Reading) -> "Drawn | str":
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
    rank = digest(text)
    group = values.get("group") or normalised(plain or text)
    split = _word(values, "split", _SPLITS, row, reading) if "split" in values else drawn_split(group)
    if label == "look-alike" and "split" not in values:
        split = "test"
    details = {"plain": plain} if disguised and plain else {}
    name = f"{'adversarial' if disguised else 'plain'}-{label}-{split}-{rank[:12]}"
    return Drawn(
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
    at, bound = int(digest(group)[:12], 16) / 16**12, 0.0
    for split, share in SHARES.items():
        bound += share
        if at < bound:
            return split
    return "test"


def digest(text: str) -> str:
    """What decides which prompts are drawn, and the split of a group."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()
