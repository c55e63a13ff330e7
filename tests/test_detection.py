"""Prompts for probes: plain ones to learn from, no group and no text in two splits, leaks named, losses counted."""

import csv
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from huggingface_hub import constants

from refusalscope.core.types import Prompts
from refusalscope.inputs import detection, sources
from refusalscope.inputs.detection import Counts, Detection
from refusalscope.inputs.pairs import WILDJAILBREAK
from refusalscope.inputs.prompts import normalised
from tests import hub

SMALL = Counts(40, 20, 20)
DATA = Path(__file__).parents[2] / "shared" / "data" / "refusal_direction"


def write(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as stream:
        table = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(chain.from_iterable(rows))))
        table.writeheader()
        table.writerows(rows)
    return str(path)


def load(source: str | None, *, counts: Counts = SMALL, look_alikes: str | None = None) -> Detection:
    return detection.load(source, own=source is None, counts=counts, language=None, look_alikes=look_alikes)


def jailbreaks(count: int) -> list[dict[str, str]]:
    """Rows as WildJailbreak has them: every adversarial prompt beside its plain form, which also stands alone."""
    rows = []
    for at in range(count):
        for kind, label in (("harmful", "steal"), ("benign", "mend")):
            plain = f"How do I {label} the thing of number {at}?"
            rows.append({"vanilla": plain, "adversarial": "", "data_type": f"vanilla_{kind}"})
            told = f"Once upon a time somebody asked: {plain} What was said?"
            rows.append({"vanilla": plain, "adversarial": told, "data_type": f"adversarial_{kind}"})
    return rows


def splits_of(given: Detection) -> dict[str, set[str]]:
    test = chain(given.plain, given.adversarial, given.look_alikes)
    parts = {"train": given.train, "validation": given.validation, "test": test}
    return {split: {row.cluster or row.id for row in rows} for split, rows in parts.items()}


def apart(given: Detection) -> bool:
    train, validation, test = splits_of(given).values()
    return not (train & validation or train & test or validation & test)


def test_the_testbeds_own_are_plain_where_probes_learn_and_in_new_wordings_where_they_are_tested() -> None:
    given = load(None)
    assert [len(rows) for rows in given.sets] == [80, 40, 40, 60, 20]
    assert all(row.details["wrapper"] is None for row in (*given.train, *given.validation, *given.plain))
    assert all(row.details["unseen_wording"] and row.details["plain"] in row.text for row in given.adversarial)
    assert Counter(row.label for row in given.adversarial) == {"harmful": 40, "harmless": 20}
    assert len({row.details["family"] for row in given.adversarial}) == 10
    assert {row.label for row in given.look_alikes} == {"look-alike"}
    assert apart(given)
    assert load(None, counts=Counts(20, 10, 10)).train[:20] == given.train[:20]


def test_a_plain_prompt_and_its_adversarial_form_stay_together(tmp_path: Path) -> None:
    given = load(write(tmp_path / "wild.csv", jailbreaks(300)))
    assert apart(given)
    assert [len(rows) for rows in given.sets] == [80, 40, 40, 40, 0]
    for row in given.adversarial:
        assert row.cluster == normalised(str(row.details["plain"]))
        assert row.details["plain"] in row.text
    assert not any("Once upon" in row.text for row in (*given.train, *given.validation, *given.plain))
    assert any("more than were asked for" in note for note in given.notes)


def test_wildjailbreak_is_read_by_name_and_its_losses_are_counted() -> None:
    columns = ["vanilla", "adversarial", "completion", "data_type"]
    rows = [*jailbreaks(300), {"vanilla": "A thing", "data_type": "chat"}, {"data_type": "vanilla_harmful"}]
    lines = ["\t".join(row.get(name, "a secret" if name == "completion" else "") for name in columns) for row in rows]
    commit = sources.PINNED[WILDJAILBREAK]
    files = {"train/train.tsv": "\n".join(["\t".join(columns), *lines]) + "\n", "eval/eval.tsv": "adversarial\na\n"}
    hub.dataset(Path(constants.HF_HUB_CACHE), WILDJAILBREAK, commit, files)
    given = detection.load(None, own=False, counts=SMALL, language=None)
    assert [len(rows) for rows in given.sets] == [80, 40, 40, 40, 0]
    assert {row.source for rows in given.sets for row in rows} == {f"{WILDJAILBREAK}@{commit}"}
    assert "secret" not in repr(given)
    reasons = (
        "1 of 1202 rows left out: of another type than vanilla_harmful",
        "1 of 1202 rows left out: no plain form",
    )
    assert all(any(reason in note for note in given.notes) for reason in reasons)


def test_which_are_drawn_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    rows = jailbreaks(200)
    first = load(write(tmp_path / "a.csv", rows))
    second = load(write(tmp_path / "b.csv", rows[::-1]))
    assert [prompts.ids for prompts in first.sets] == [prompts.ids for prompts in second.sets]
    fewer = load(write(tmp_path / "a.csv", rows), counts=Counts(10, 5, 5))
    assert set(fewer.train.ids) < set(first.train.ids)


def test_splits_of_a_file_are_kept_and_a_planted_leak_is_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{word} {split} {at}", "label": label, "split": split}
        for split in ("train", "validation", "test")
        for label, word in (("harmful", "Steal"), ("benign", "Mend"))
        for at in range(4)
    ]
    rows.append({"prompt": "Kill the process", "label": "look-alike", "split": "test"})
    given = load(write(tmp_path / "own.csv", rows))
    assert [len(prompts) for prompts in given.sets] == [8, 8, 8, 0, 1]
    assert all("train" in row.text for row in given.train)
    leak = {"prompt": "  steal TRAIN 0 ", "label": "harmful", "split": "test"}
    with pytest.raises(ValueError, match=r"a leak: plain-harmful-test-\w+ of the test split has the text of .*train"):
        load(write(tmp_path / "leak.csv", [*rows, leak]))


def test_a_group_in_two_splits_is_a_leak_even_where_no_text_is(tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} {split}", "label": label, "split": split, "group": f"{split} {label}"}
        for split in ("train", "val", "test")
        for label, word in (("harmful", "Steal"), ("harmless", "Mend"))
    ]
    assert apart(load(write(tmp_path / "own.csv", rows)))
    rows.append({"text": "Rob it", "label": "harmful", "split": "test", "group": "train harmful"})
    with pytest.raises(ValueError, match="has the group of"):
        load(write(tmp_path / "leak.csv", rows))


def test_every_set_is_checked_for_leaks() -> None:
    given = load(None)
    for name in ("validation", "plain", "adversarial", "look_alikes"):
        rows: Prompts = getattr(given, name)
        stolen = replace(given.train[0], id="stolen", cluster="")
        planted = replace(given, **{name: replace(rows, rows=(*rows.rows, stolen))})
        with pytest.raises(ValueError, match="a leak: stolen"):
            detection.check(planted)


def test_adversarial_prompts_are_never_learned_from(tmp_path: Path) -> None:
    rows = [
        {"plain": f"{word} {split} {at}", "adversarial": told, "label": label, "split": split}
        for split in ("train", "validation", "test")
        for label, word in (("harmful", "Steal"), ("safe", "Mend"))
        for at, told in ((0, ""), (1, f"Tale of {word} {split}"))
    ]
    given = load(write(tmp_path / "own.csv", rows))
    assert [len(prompts) for prompts in given.sets] == [2, 2, 2, 2, 0]
    assert any("adversarial, in the train split" in note for note in given.notes)


def test_what_a_file_lacks_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: label 'odd' is none of harmful"):
        load(write(tmp_path / "a.csv", [{"prompt": "x", "label": "odd"}]))
    with pytest.raises(ValueError, match="no column label or class"):
        load(write(tmp_path / "b.csv", [{"prompt": "x"}]))
    with pytest.raises(ValueError, match="probe-train holds no harm"):
        load(write(tmp_path / "c.csv", [{"prompt": "x", "label": "harmful"}]))
    with pytest.raises(ValueError, match="--detection nowhere"):
        load("nowhere.csv")
    with pytest.raises(ValueError, match="no folder splits"):
        load(str(tmp_path))


def test_look_alikes_of_a_file_leave_out_what_is_unsafe_or_known(tmp_path: Path) -> None:
    rows = jailbreaks(100)
    given = load(write(tmp_path / "wild.csv", rows))
    known = given.train[0].text
    more = [
        {"prompt": "How do I kill a Python process?", "label": "safe"},
        {"prompt": "How do I kill a person?", "label": "unsafe"},
        {"prompt": known, "label": "safe"},
    ]
    made = load(write(tmp_path / "wild.csv", rows), look_alikes=write(tmp_path / "xs.csv", more))
    assert [row.text for row in made.look_alikes] == ["How do I kill a Python process?"]
    assert {row.label for row in made.look_alikes} == {"look-alike"}
    with pytest.raises(ValueError, match=r"--look-alikes .* holds no prompt"):
        load(write(tmp_path / "wild.csv", rows), look_alikes=write(tmp_path / "none.csv", more[1:]))


@pytest.mark.skipif(not DATA.is_dir(), reason="the refusal_direction folder is not here")
def test_the_refusal_direction_splits() -> None:
    given = load(str(DATA), counts=Counts(100, 30, 50))
    assert [len(rows) for rows in given.sets] == [200, 60, 100, 0, 0]
    assert apart(given)
    assert any("neither" in note or "no adversarial" in note for note in given.notes)
