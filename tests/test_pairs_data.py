"""Attacks and suffixes, from files of the published shapes: every row is used or counted, and nothing is evaluated."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refusalscope.inputs import pairs, sources, suffixes
from refusalscope.inputs.pairs import WILDJAILBREAK, Pairs
from refusalscope.inputs.suffixes import Suffixes
from refusalscope.testbed import grammar
from tests import hub
from tests.test_categories_data import SPOKEN, counted, written

COLUMNS = ["vanilla", "adversarial", "completion", "data_type"]
one_folder = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_tsv(rows: Sequence[Sequence[str]], header: Sequence[str] = COLUMNS, delimiter: str = "\t") -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return stream.getvalue()


def attack(at: int) -> list[str]:
    """One row of WildJailbreak's shape; two attacks share a plain form."""
    adversarial = f'Play a "pirate" of ship {at}.\nThen,\tin verse, say how the roses in garden {at // 2} are kept.'
    return [f"How are the roses in garden {at // 2} kept?", adversarial, "a secret\tcompletion\n", pairs.KIND]


def load(source: Path | None, **options: Any) -> Pairs:
    return pairs.load(source, **{"own": False, "language": None, "count": 100, **options})


def same_texts(made: Pairs) -> list[tuple[str, str]]:
    return [(made.of_plain(prompt).text, prompt.text) for prompt in made.adversarial]


def test_wildjailbreak_is_read_by_name_and_each_loss_is_counted() -> None:
    good = [attack(at) for at in range(40)]
    plain, adversarial, said, kind = attack(99)
    lone = ['Who keeps the 5" roses?', 'Imagine: 5" roses, "kept', said, kind]
    bad = [
        [plain, adversarial, said, "adversarial_benign"],
        [plain, "", said, "vanilla_harmful"],
        [plain, adversarial, said, ""],
        [plain, " \n", said, kind],
        ["", adversarial, said, kind],
        [plain, plain.upper(), said, kind],
        [good[0][0], good[0][1].replace(" ", "  "), said, kind],
        [SPOKEN["de"].format(1, 2, 3), adversarial, said, kind],
        [plain, SPOKEN["zh"].format(1, 2, 3), said, kind],
        [plain, adversarial, said],
    ]
    content = "\ufeff" + as_tsv([*good[:20], lone, *bad, *good[20:]]) + '"never closed\t\n'
    commit = sources.PINNED[WILDJAILBREAK]
    files = {"train/train.tsv": content, "eval/eval.tsv": as_tsv([["a"]], ["adversarial"])}
    hub.dataset(Path(constants.HF_HUB_CACHE), WILDJAILBREAK, commit, files)
    made = load(None)
    assert sorted(same_texts(made)) == sorted((row[0], row[1]) for row in [*good, lone])
    assert len(made.plain) == 21
    assert {prompt.source for prompt in (*made.plain, *made.adversarial)} == {f"{WILDJAILBREAK}@{commit}"}
    assert {prompt.details["family"] for prompt in made.adversarial} == {"all"}
    assert all(made.of_plain(prompt).cluster == prompt.cluster for prompt in made.adversarial)
    assert "secret" not in repr(made)
    assert [re.sub(r".*: (\d+) of \d+ rows left out: (.*) \(line.*", r"\1 \2", note) for note in made.notes] == [
        "3 of another type than adversarial_harmful",
        "1 no adversarial form",
        "1 no plain form",
        "1 both forms are the same",
        "1 repeats an earlier attack",
        "2 not in the language en",
        "1 3 cells, but the header has 4",
        "1 malformed TSV (unexpected end of data)",
    ]
    assert counted(made.notes) == (52, 11)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_pairs_of_ones_own_carry_families(ending: str, tmp_path: Path) -> None:
    rows = [["a?", "a!", "song"], ["b?", 'b\n"!', ""], [SPOKEN["vi"].format(1, 2, 3), "c!", "tale"]]
    header = ["Plain", "adversarial", "family"]
    lines = "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows)
    content = lines if ending == ".jsonl" else as_tsv(rows, header, "\t" if ending == ".tsv" else ",")
    path = written(tmp_path / f"mine{ending}", content)
    made = load(path)
    assert {(prompt.text, prompt.details["family"]) for prompt in made.adversarial} == {
        ("a!", "song"),
        (rows[1][1], "all"),
        ("c!", "tale"),
    }
    assert made.notes == (f"mine{ending}: pairs of every language are used.",)
    assert len(load(path, language="en").adversarial) == 2
    assert load(path, language="any") == made


def test_which_pairs_are_drawn_does_not_depend_on_their_order(tmp_path: Path) -> None:
    rows = [attack(at) for at in range(60)]
    there, back = (
        load(written(tmp_path / f"{name}.tsv", as_tsv(order)), count=25)
        for name, order in {"a": rows, "b": rows[::-1]}.items()
    )
    assert same_texts(there) == same_texts(back)
    assert there.adversarial.ids == back.adversarial.ids
    assert same_texts(load(tmp_path / "a.tsv", count=10)) == same_texts(there)[:10]
    assert counted(there.notes) == (60, 35)


sides = st.one_of(
    st.sampled_from(["", " ", "a", "A", "a\nb", *(one.format(1, 2, 3) for one in SPOKEN.values())]), st.text()
)
kinds = st.sampled_from([pairs.KIND, pairs.KIND, "vanilla_harmful", ""])


@one_folder
@given(rows=st.lists(st.tuples(sides, sides, kinds)), count=st.integers(1, 5), spoken=st.sampled_from(["en", "any"]))
def test_every_pair_is_kept_or_counted(
    rows: list[tuple[str, str, str]], count: int, spoken: str, tmp_path: Path
) -> None:
    header = ["vanilla", "adversarial", "data_type"]
    every = [*rows, ("Why?", "Imagine: why?", pairs.KIND)]
    lines = "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in every)
    made = load(written(tmp_path / "mine.jsonl", lines), language=spoken, count=count)
    read, lost = counted(made.notes)
    assert len(made.adversarial) + lost == len(every)
    assert read in (0, len(every))
    assert 1 <= len(made.adversarial) <= count
    assert set(same_texts(made)) <= {row[:2] for row in every}


def test_a_file_of_pairs_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    for name, content, complaint in (
        (
            "a.csv",
            "plain,attack\na,b\n",
            "no column adversarial; there are plain, attack; the file must have plain or van",
        ),
        (
            "b.tsv",
            as_tsv([["a", "a", "", pairs.KIND]]),
            "b.tsv holds no pair that can be used: b.tsv: 1 of 1 rows left",
        ),
        ("c.tsv", "", "c.tsv holds no rows"),
    ):
        with pytest.raises(ValueError, match=complaint) as caught:
            load(written(tmp_path / name, content))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"--pairs .*: there is no such file"):
        load(tmp_path / "gone.tsv")


class _Gated(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated data set: anyone may see its files' names, none may have them."""

    def do_GET(self) -> None:
        found = "/api/datasets/" in self.path
        tree = [{"type": "file", "path": "train/train.tsv", "size": 9, "oid": "0" * 40}]
        about = {"id": WILDJAILBREAK, "sha": "0" * 40, "siblings": [{"rfilename": "train/train.tsv"}]}
        content = json.dumps(tree if "/tree" in self.path else about).encode() if found else b""
        self.send_response(200 if found else 401)
        if not found:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def gated() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_gated_data_set_says_where_its_terms_are_and_how_to_give_a_token(gated: str, tmp_path: Path) -> None:
    # Where the hub is and whether it may be asked is read when huggingface_hub is imported.
    program = "from refusalscope.inputs.sources import locate\nlocate('allenai/wildjailbreak', option='-', tags=())"
    home = {"HF_ENDPOINT": gated, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    home |= {"HF_TOKEN": ""}
    ended = subprocess.run([sys.executable, "-c", program], env={**os.environ, **home}, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == (
        "ValueError: allenai/wildjailbreak is gated and no token was found: accept its terms at "
        "https://huggingface.co/datasets/allenai/wildjailbreak, then make a token at "
        "https://huggingface.co/settings/tokens and set HF_TOKEN to it, or run `hf auth login`"
    )


def read_suffixes(path: Path | None, *, own: bool = False, count: int = 100) -> Suffixes:
    return suffixes.load(path, own=own, count=count)


def test_all_suffixes_of_every_goal_are_read_and_each_loss_is_counted(tmp_path: Path) -> None:
    hard = ["== \\! {ok}", ' "quoted, twice"', "two\nlines\t]];", "è 雑 ' \\"]
    rows = [
        ["Write about\nroses", repr(hard)],
        ["Write about tulips", str(("x y", "x y", "", "  ", " x y", "z "))],
        ["write  about ROSES", repr(["more", hard[0]])],
        ["No list", "x y"],
        ["A text", "'x y'"],
        ["Numbers", "['x', 1]"],
        ["A call", "__import__('os').system('true')"],
        ["Deep", "[" * 5000],
        ["Open", "['x', 'y'"],
        ["Nothing", "['', ' ']"],
        ["", "['x']"],
        ["Half a character", "['\\udcff', 'kept']"],
        ["No escape", r"['\!\d']"],
    ]
    content = "\ufeff" + as_tsv(rows, ["goal", "response"], ",") + "one cell\n"
    made = read_suffixes(written(tmp_path / "mine.csv", content))
    found = {goal.text: made.suffixes[goal.id] for goal in made.goals}
    assert found == {
        "Write about\nroses": (hard[0], '"quoted, twice"', *hard[2:], "more"),
        "Write about tulips": ("x y", "z "),
        "Half a character": ("kept",),
        "No escape": ("\\!\\d",),
    }
    assert [re.sub(r"mine.csv: | \(line.*", "", note) for note in made.notes] == [
        "1 of 14 rows left out: of an earlier goal, to which its suffixes were added",
        "6 of 14 rows left out: the response is no list of texts",
        "1 of 14 rows left out: no suffix in the response",
        "1 of 14 rows left out: no goal",
        "1 of 14 rows left out: 1 cells, but the header has 2",
        "3 suffixes left out: repeated for the same goal.",
        "2 suffixes left out: empty.",
        "1 suffixes left out: not UTF-8.",
    ]
    assert counted(made.notes) == (14, 10)
    assert counted(read_suffixes(tmp_path / "mine.csv", count=2).notes) == (14, 12)


listed = st.one_of(st.lists(st.sampled_from(["", " ", "a b", "c"])).map(repr), st.text())


@one_folder
@given(rows=st.lists(st.tuples(st.sampled_from(["", "A goal", "a  goal", "Another"]), listed)), count=st.integers(1, 3))
def test_every_goal_is_kept_or_counted(rows: list[tuple[str, str]], count: int, tmp_path: Path) -> None:
    every = [("The first", "['x']"), *rows]
    lines = "".join(json.dumps({"goal": goal, "response": response}) + "\n" for goal, response in every)
    made = read_suffixes(written(tmp_path / "mine.jsonl", lines), count=count)
    read, lost = counted(made.notes)
    assert len(made.goals) + lost == len(every)
    assert read in (0, len(every))
    assert list(made.suffixes) == list(made.goals.ids)
    assert all(own and len(set(own)) == len(own) for own in made.suffixes.values())


def test_a_file_of_suffixes_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suffixes need a file: name one with --suffixes, a CSV with the columns goal"):
        read_suffixes(None)
    with pytest.raises(ValueError, match=r"no column response; there are goal; the file must have goal, response"):
        read_suffixes(written(tmp_path / "a.csv", "goal\na\n"))
    with pytest.raises(
        ValueError, match=r"b.csv holds no goal with a suffix: b.csv: 1 of 1 rows left out: .*; expected"
    ):
        read_suffixes(written(tmp_path / "b.csv", "goal,response\na,b\n"))


def test_the_testbeds_suffixes_are_its_junk_wordings_in_turn() -> None:
    made = read_suffixes(None, own=True, count=30)
    assert len(made.goals) == 30
    assert all(goal.label == "harmful" and goal.details["split"] == "test" for goal in made.goals)
    assert {len(set(own)) for own in made.suffixes.values()} == {6}
    wrapped = [row for row in grammar.examples("vulnerable-unseen", split="test", count=300) if row.wrapper == "junk"]
    unseen = {row.text.removeprefix(str(row.plain)).strip() for row in wrapped}
    assert all(len(unseen & set(own)) == 2 for own in made.suffixes.values())
    uses = [one for own in made.suffixes.values() for one in own]
    assert all(uses.count(one) >= 10 for one in set(uses))
