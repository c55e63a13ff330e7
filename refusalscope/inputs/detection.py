"""Prompts that a probe learns from and is held to: the testbed's, WildJailbreak, the refusal_direction folder, a file.

It learns from plain harmful and plain benign prompts alone, and is tested on those, on adversarial prompts of both
kinds and on look-alikes. A plain prompt and its adversarial form are one group, and no group and no text stands in two
splits: where splits are drawn here they are drawn by group, and where a file names them, a leak is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from refusalscope.core.types import Label, Prompt, Prompts
from refusalscope.inputs import language as languages
from refusalscope.inputs.detection_rows import COLUMNS, LABELS, Counts, Split, digest, sampled
from refusalscope.inputs.pairs import WILDJAILBREAK
from refusalscope.inputs.prompts import grammar_rows, normalised
from refusalscope.inputs.sources import Reading, locate
from refusalscope.inputs.tables import read_table
from refusalscope.testbed import grammar

CLASSES: tuple[Label, ...] = ("harmful", "harmless")
LOOK_ALIKES = {"text": ("prompt", "text", "question", "instruction"), "label": ("label", "class")}


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
        distinct.setdefault(normalised(text), (text, digest(text)))
    for text, rank in sorted(distinct.values(), key=lambda pair: pair[1]):
        yield Prompt(f"{label}-{rank[:12]}", text, label, source=file.stem)


def _from_table(named: str, counts: Counts, language: str | None) -> Detection:
    found = locate(named, option="--detection", tags=("train",))
    kept = languages.check(language or (None if found.local else "en"))
    reading = Reading(found.path, COLUMNS, needed=("plain",))
    chosen = sampled(reading, found.name, kept, counts)
    sets = {
        part: Prompts(f"probe-{part}", tuple(row.prompt for row in chosen if row.part == part))
        for part in ("train", "validation", "plain", "adversarial", "look-alikes")
    }
    every = () if kept else (f"{found.name}: prompts of every language are used.",)
    return Detection(*sets.values(), notes=(*every, *reading.notes(found.name)))


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
            rows[digest(text)] = Prompt(f"look-alike-{digest(text)[:12]}", text, "look-alike", source=found.name)
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
