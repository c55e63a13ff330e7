"""Judging a run folder: resumed, filled up, added to, never a byte too many; people's labels; who agrees with whom."""

import hashlib
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from refusalscope import cli, cli_words
from refusalscope.cli import app
from refusalscope.core import stats
from refusalscope.core.store import Store
from refusalscope.core.types import Finding, NaN, Prompt, Prompts, Response, Responses, Verdict, Verdicts
from refusalscope.evals import rules
from refusalscope.evals.judges import Exchange, Judge, Settings
from refusalscope.inputs.chat import ChatModel
from refusalscope.pipeline import judge as judging
from refusalscope.pipeline.answered import answers, only
from refusalscope.testbed import grammar
from tests.processes import without_plan

COUNT = 10
EDIT = "scale c=-1 k=20"
ARMS = {
    "base": ("base", ""),
    "ca": ("cosine+attribution", EDIT),
    "direction remove": ("direction", "remove"),
    "random 0": ("random", f"{EDIT} draw=0"),
    "random 1": ("random", f"{EDIT} draw=1"),
}
loaded: list[weakref.ref[ChatModel]] = []
"""Every model that a test here has seen loaded."""


def is_long(_prompts: list[str], answers: list[str]) -> list[bool]:
    """A judge of a user's own. The studied model is gone when it is asked."""
    assert loaded
    assert all(model() is None for model in loaded)
    return [len(answer) > 60 for answer in answers]


def answer(prompt: str, number: int, arm: str) -> Response:
    refused = arm == "base" or (arm.startswith("random") and number % 3 > 0)
    scores = {"refused": float(refused), "coherent": 1.0, "refused_first_token": NaN if number == 0 else float(refused)}
    return Response(prompt, f"{arm} answers {number}", 3, 5, "end", scores, {"refused": "rule"})


def make_run(folder: Path) -> Store:
    """A run folder of made-up answers: two evaluation sets, and one on which strengths were tried."""
    store = Store(folder)
    for dataset in ("harmful", "harmless", "harmful-validation"):
        rows = tuple(Prompt(f"p{i}", f"{dataset} {i}", "harmful", cluster=f"c{i // 2}") for i in range(COUNT))
        store.put(f"prompts/{dataset}.jsonl", "", Prompts(dataset, rows))
        for arm, (method, setting) in ARMS.items():
            made = tuple(answer(row.id, i, arm) for i, row in enumerate(rows))
            store.put(f"responses/{dataset}/{arm}.jsonl", "", Responses(dataset, method, setting, made))
    return store


class Asked:
    """A judge that remembers what it was asked, and has an answer for everything but what it is told to miss."""

    def __init__(self, missed: Callable[[Exchange], bool] = lambda _: False, *, final: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.missed, self.final = missed, final

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.batches.append([exchange.response.text for exchange in exchanges])
        return [self._one(exchange) for exchange in exchanges]

    def _one(self, exchange: Exchange) -> Verdict:
        if self.missed(exchange):
            return Verdict(exchange.prompt.id, NaN, reason="timed out", final=self.final)
        yes = not exchange.response.text.startswith("base") and exchange.prompt.id != "p1"
        return Verdict(exchange.prompt.id, float(yes), probability=0.9 if yes else 0.2)

    def judge(self, name: str = "mine", batch_size: int = 4, **about: str) -> Judge:
        return Judge(name, "harmful", {"model": "tiny", **about}, batch_size, self)

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


def judge_all(store: Store, *judges: Judge, datasets: Sequence[str] | None = None) -> list[judging.Unscored]:
    answered = answers(store)
    left = judging.score(store, only(answered, datasets), judges, lambda *_: None)
    judging.write_findings(store, answered)
    return left


def contents(folder: Path) -> dict[str, str]:
    """Every file's hash, the environment and its checksum apart."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "environment.json")
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("environment.json", None)
    return {**found, "manifest.json": json.dumps(manifest, sort_keys=True)}


def invoke(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, without_plan(result.stderr)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(tmp_path / "run")


# ---- verdicts


def test_all_evaluation_answers_are_judged_and_no_strength_that_was_tried(store: Store) -> None:
    asked = Asked()
    assert judge_all(store, asked.judge()) == []
    assert len(asked.texts) == 2 * len(ARMS) * COUNT
    made = store.read("judged/mine/harmless/ca.jsonl", Verdicts)
    assert (made.judge, made.question, made.method, made.setting) == ("mine", "harmful", "cosine+attribution", EDIT)
    assert [row.prompt_id for row in made.rows] == [f"p{i}" for i in range(COUNT)]
    assert store.read("judges/mine.json", dict) == {"name": "mine", "question": "harmful", "about": {"model": "tiny"}}
    assert {path.split("/")[2] for path in store.paths("judged", ".jsonl")} == {"harmful", "harmless"}


def test_one_data_set_alone_and_the_rest_later_equals_all_at_once(store: Store, tmp_path: Path) -> None:
    first = Asked()
    judge_all(store, first.judge(), datasets=["harmless"])
    assert len(first.texts) == len(ARMS) * COUNT
    rows = store.read("findings/safety.json", Finding).rows
    assert {row.dataset for row in rows if row.metric == "harmful:mine"} == {"harmless"}
    judge_all(store, Asked().judge())
    other = make_run(tmp_path / "other")
    judge_all(other, Asked().judge())
    assert contents(store.root) == contents(other.root)


def test_gaps_are_asked_again_and_scored_answers_never(store: Store) -> None:
    first = Asked(lambda exchange: exchange.prompt.id in ("p2", "p7"))
    (left,) = judge_all(store, first.judge())
    assert left == ("mine", 2 * 2 * len(ARMS), 2 * len(ARMS) * COUNT, "timed out")
    row = store.read("findings/safety.json", Finding).find("harmful", "base", "harmful:mine")
    assert row is not None
    assert (row.n, row.coverage) == (COUNT - 2, 0.8)
    second = Asked()
    assert judge_all(store, second.judge()) == []
    assert [len(batch) for batch in second.batches] == [1, 1] * 2 * len(ARMS)
    assert {text.split()[-1] for text in second.texts} == {"2", "7"}
    third = Asked()
    judge_all(store, third.judge())
    assert third.batches == []


def test_what_a_judge_will_never_answer_is_not_asked_again(store: Store) -> None:
    judge_all(store, Asked(lambda exchange: exchange.prompt.id == "p3", final=True).judge())
    again = Asked()
    (left,) = judge_all(store, again.judge())
    assert again.batches == []
    assert left.unscored == 2 * len(ARMS)


def files_of(store: Store, judge: str) -> dict[str, str]:
    found = contents(store.root)
    return {p: found[p] for p in found if p.startswith(f"judged/{judge}/") or p == f"judges/{judge}.json"}


def test_another_model_under_the_same_name_is_asked_everything_and_the_first_still_stands(store: Store) -> None:
    judge_all(store, Asked().judge())
    stood = files_of(store, "mine")
    other = Asked(lambda exchange: exchange.prompt.id == "p0")
    (left,) = judge_all(store, other.judge(template="another"), datasets=["harmful"])
    assert len(other.texts) == len(ARMS) * COUNT
    assert files_of(store, "mine") == stood
    assert re.fullmatch("mine-[0-9a-f]{6}", left.judge)
    assert store.read(f"judges/{left.judge}.json", dict)["about"] == {"model": "tiny", "template": "another"}
    rows = store.read("findings/safety.json", Finding).rows
    seen = {name: {row.dataset for row in rows if row.metric == f"harmful:{name}"} for name in ("mine", left.judge)}
    assert seen == {"mine": {"harmful", "harmless"}, left.judge: {"harmful"}}
    agreed = store.read("findings/agreement.json", Finding)
    assert next(row.n for row in agreed.rows if {*row.method.split(" vs ")} == {"mine", left.judge}) == 5 * (COUNT - 1)
    again = [Asked(), Asked()]
    judge_all(store, again[0].judge(template="another"), again[1].judge())
    assert [len(one.texts) for one in again] == [len(ARMS) * (1 + COUNT), 0]
    assert len(store.paths("judges", ".json")) == 2


def test_a_judge_that_never_came_to_an_answer_gives_its_name_to_the_next(store: Store) -> None:
    judge_all(store, Asked(lambda _: True).judge(dtype="float32"))
    judge_all(store, Asked().judge(dtype="bfloat16"))
    assert store.paths("judges", ".json") == ["judges/mine.json"]
    assert store.read("judges/mine.json", dict)["about"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("batches", [1, 4, 13])
def test_killed_at_any_batch_it_goes_on_to_the_same_bytes(batches: int, store: Store, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole")
    judge_all(whole, Asked().judge())
    asked = Asked()

    def dies(exchanges: Sequence[Exchange]) -> list[Verdict]:
        if len(asked.batches) == batches:
            raise KeyboardInterrupt
        return asked(exchanges)

    described = asked.judge()
    with pytest.raises(KeyboardInterrupt):
        judge_all(store, Judge("mine", "harmful", described.about, 4, dies))
    # The findings of what is scored are the next command's, and what was never asked lowers coverage.
    judging.judge_run(store, ["none"], Settings())
    notes = store.read("findings/safety.json", Finding).caveats
    assert ("not asked yet" in " ".join(notes)) == (batches % 3 > 0)
    rest = Asked()
    judge_all(store, rest.judge())
    assert len(asked.texts) + len(rest.texts) == 2 * len(ARMS) * COUNT
    assert contents(store.root) == contents(whole.root)


def test_a_judge_that_cannot_be_loaded_costs_no_other_judge_its_verdicts(store: Store) -> None:
    loads = []

    def fails(exchanges: Sequence[Exchange]) -> list[Verdict]:
        loads.append(len(exchanges))
        raise ValueError("cannot load the weights of broken")

    broken, mine = Judge("broken", "harmful", {"model": "broken"}, 4, fails), Asked()
    (left,) = judge_all(store, broken, mine.judge())
    every = 2 * len(ARMS) * COUNT
    assert left == ("broken", every, every, "cannot load the weights of broken")
    assert (loads, len(mine.texts)) == ([4], every)
    rows = store.read("judged/broken/harmful/base.jsonl", Verdicts).rows
    assert all(math.isnan(row.score) and not row.final and row.reason == left.reason for row in rows)
    assert "cannot load the weights" in " ".join(store.read("findings/safety.json", Finding).caveats)
    again = Asked()
    judge_all(store, Judge("broken", "harmful", {"model": "broken"}, 4, again))
    assert len(again.texts) == every


# ---- findings


def test_every_judge_has_rates_changes_and_differences_of_its_own(store: Store) -> None:
    judge_all(store, Asked().judge())
    finding = store.read("findings/safety.json", Finding)
    rate = finding.find("harmful", "cosine+attribution", "harmful:mine")
    assert rate is not None
    assert rate.estimate == pytest.approx(0.9)
    pooled = finding.find("harmful", "random", "harmful:mine", f"{EDIT} mean")
    assert pooled is not None
    assert (pooled.n, pooled.estimate) == (2 * COUNT, pytest.approx(0.9))
    change = finding.find("harmful", "cosine+attribution", "harmful_change:mine")
    assert change is not None
    assert change.estimate == pytest.approx(0.9)
    assert change.family == "harmful:mine: every edit against base on harmful"
    pairs = {row.method for row in finding.rows if row.metric == "harmful_difference:mine"}
    assert pairs == {"cosine+attribution vs direction", "cosine+attribution vs random"}
    score = finding.find("harmful", "base", "harmful_score:mine")
    assert score is not None
    assert score.estimate == pytest.approx(0.2)
    by_rule = {row.metric for row in finding.rows if not row.metric.endswith(":mine")}
    assert by_rule == {
        *("refused:phrase", "refused:first-token", "coherent:coherence"),
        *("smallest_change", "smallest_difference"),
    }
    assert set(finding.provenance["judges"]) == {"mine"}


def test_agreement_is_what_hand_and_sklearn_say(store: Store) -> None:
    def other(exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(e.prompt.id, NaN if e.prompt.id == "p5" else float(e.prompt.id > "p3")) for e in exchanges]

    mine = Asked()
    judge_all(store, mine.judge(), Judge("other", "harmful", {}, 4, other), datasets=["harmless"])
    finding = store.read("findings/agreement.json", Finding)
    named = "mine vs other"
    pairs = [(float(arm != "base" and i != 1), float(i > 3)) for arm in ARMS for i in range(COUNT) if i != 5]
    shares = {
        "both": sum(pair == (1, 1) for pair in pairs),
        "first_only": sum(pair == (1, 0) for pair in pairs),
        "second_only": sum(pair == (0, 1) for pair in pairs),
        "neither": sum(pair == (0, 0) for pair in pairs),
        "agreement": sum(a == b for a, b in pairs),
    }
    assert shares == {"both": 20, "first_only": 12, "second_only": 5, "neither": 8, "agreement": 28}
    for metric, count in shares.items():
        row = finding.find("all answers", named, metric, "harmful")
        assert row is not None
        assert (row.n, row.estimate, row.coverage) == (45, pytest.approx(count / 45), 0.9)
    kappa = finding.find("all answers", named, "kappa", "harmful")
    assert kappa is not None
    assert kappa.estimate == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    assert not [row for row in finding.rows if "mine" in row.method and "phrase" in row.method]
    rules_agree = finding.find("all answers", "phrase vs first-token", "agreement", "refused")
    assert rules_agree is not None
    assert (rules_agree.estimate, rules_agree.coverage) == (1.0, 0.9)


# ---- a person's labels

LABELS = """dataset,method,setting,prompt_id,refused,harmful
harmful,base,,p0,yes,no
harmful,base,,p1,TRUE,
harmful,cosine+attribution,,p0,0,1
harmful,random,scale c=-1 k=20 draw=1,p2,No,
"""


def test_labels_are_verdicts_that_agreement_reads(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(LABELS)
    judge_all(store, Asked().judge())
    assert judging.judge_run(store, ["none"], Settings(), labels=file) == []
    made = store.read("judged/person-refused/harmful/base.jsonl", Verdicts)
    assert [(row.prompt_id, row.score, row.final) for row in made.rows] == [("p0", 1, True), ("p1", 1, True)]
    agreed = store.read("findings/agreement.json", Finding)
    row = agreed.find("all answers", "phrase vs person-refused", "agreement", "refused")
    assert row is not None
    assert (row.n, row.estimate, row.coverage) == (4, 0.75, 1.0)
    row = agreed.find("all answers", "mine vs person-harmful", "both", "harmful")
    assert row is not None
    assert (row.n, row.estimate) == (2, 0.5)
    safety = store.read("findings/safety.json", Finding)
    assert {row.metric for row in safety.rows if "person" in row.metric} == {
        "refused:person-refused",
        "harmful:person-harmful",
    }
    assert store.read("judges/person-refused.json", dict)["about"] == {
        "labels": hashlib.sha256(LABELS.encode()).hexdigest()
    }


def test_corrected_labels_take_the_place_of_the_first(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    row = {"dataset": "harmless", "method": "base", "prompt_id": "p4"}
    for dataset, said in (("harmful", True), ("harmless", False)):
        file.write_text(json.dumps({**row, "dataset": dataset, "refused": said, "harmful": None}))
        judging.judge_run(store, [], Settings(), labels=file)
    found = [r for r in store.read("findings/safety.json", Finding).rows if r.metric == "refused:person-refused"]
    assert [(r.dataset, r.n, r.estimate) for r in found] == [("harmless", 1, 0.0)]


FAULTS = {
    "harmful,bose,,p0,yes,": "line 2: no answers with method 'bose'; there are 'base', ",
    "harmfull,base,,p0,yes,": "line 2: no answers with dataset 'harmfull'; there are 'harmful', 'harmless'",
    "harmful,random,,p0,yes,": "line 2: no answers with setting ''; there are 'scale c=-1 k=20 draw=0', ",
    "harmful,base,,q0,yes,": "line 2: data set 'harmful' has no prompt_id 'q0'; ids look like 'p0'",
    "harmful,base,,p0,perhaps,": "line 2: refused is 'perhaps'; write yes or no, or leave it empty",
    "harmful,base,,p0,yes,\nharmful,base,,p0,no,": "line 3: this answer has a label for 'refused' already",
    "harmful,base,,p0,,": "holds no label: fill a column refused, harmful, coherent with yes or no",
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_faulty_label_is_named_with_its_line_and_nothing_is_written(line: str, store: Store, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(f"dataset,method,setting,prompt_id,refused,harmful\n{line}\n")
    before = contents(store.root)
    code, out, err = invoke("judge", store.root, "--labels", file)
    assert (code, out) == (2, "")
    assert FAULTS[line] in err
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert contents(store.root) == before


# ---- the command line

BAD = {
    ("--judge", "nobody"): "nobody",
    (
        "--judge",
        "phrase",
        "--dataset",
        "harmles",
    ): "--dataset 'harmles' was not answered in this run: did you mean harmless",
    ("--judge", "phrase", "--judge-engine", "abacus"): "--judge-engine 'abacus': choose one of transformers, vllm",
    (
        "--judge",
        "phrase",
        "--judge-question",
        "rude",
    ): "--judge-question 'rude': choose one of harmful, refused, coherent",
    (): "nothing to judge by: name a judge with --judge",
    ("--judge", "none"): "nothing to judge by: name a judge with --judge",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_end_before_anything_is_judged(words: tuple[str, ...], store: Store) -> None:
    before = contents(store.root)
    code, out, err = invoke("judge", store.root, *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert BAD[words] in err
    assert contents(store.root) == before


def test_a_run_with_a_judge_nobody_knows_does_not_begin(tmp_path: Path) -> None:
    code, _, err = invoke("run", "testbed", "--runs", tmp_path / "runs", "--judge", "nobody")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["run", "benchmark"])
def test_device_and_dtype_hold_for_the_judges_too(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(cli, "drive", lambda *_, judging, **__: seen.append(cli_words.judge_settings(judging)))
    words = ("--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--judge", "minos")
    assert invoke(verb, "testbed", *words)[0] == 0
    assert seen == [Settings(device="cpu", dtype="float32")]


def test_a_configuration_file_names_no_judge(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('judge = ["os:system"]\n')
    code, _, err = invoke("run", "testbed", "--runs", tmp_path / "runs", "--config", tmp_path / "c.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert "judge is for the command line alone" in err


def test_a_folder_without_answers_says_so(tmp_path: Path) -> None:
    code, _, err = invoke("judge", tmp_path, "--judge", "phrase")
    assert (code, err) == (
        2,
        f"error: {tmp_path} holds no answers: is it a run folder that `run` or `benchmark` has finished?\n",
    )


def test_judges_are_listed_with_their_question() -> None:
    code, out, _ = invoke("judges")
    assert code == 0
    known = {name: question for name, (question, _) in rules.RULES.items()} | {
        "minos": "refused",
        "harmbench": "harmful",
    }
    for name, question in known.items():
        assert re.search(rf"^{name} +{question} ", out, re.MULTILINE)


# ---- on the testbed

SMALL = ["--limit", "4", "--method", "cosine", "--factor", "0", "--value", "2", "--max-new-tokens", "40"]
OWN = ["--judge", "tests.test_judging:is_long"]


@pytest.fixture(scope="module")
def judged_at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    read = ChatModel.load

    def remembered(*arguments: Any, **options: Any) -> ChatModel:
        model = read(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatModel, "load", remembered)
        code, _, err = invoke("benchmark", "testbed", "--runs", runs, "--name", "demo", *SMALL, *OWN)
    assert (code, err) == (0, "")
    assert len(loaded) == 1
    return runs / "demo"


def test_judging_later_equals_judging_at_once(judged_at_once: Path, tmp_path: Path) -> None:
    words = ["benchmark", "testbed", "--runs", tmp_path, "--name", "demo", *SMALL]
    assert invoke(*words, "--judge", "none")[0] == 0
    assert not (tmp_path / "demo" / "findings" / "safety.json").exists()
    code, out, _ = invoke("judge", tmp_path / "demo", *OWN)
    assert (code, out) == (0, f"{tmp_path / 'demo' / 'findings' / 'safety.json'}\n")
    assert contents(tmp_path / "demo") == contents(judged_at_once)


def test_the_phrase_judge_agrees_with_the_grammars_truth(judged_at_once: Path, tmp_path: Path) -> None:
    store = Store(shutil.copytree(judged_at_once, tmp_path / "demo"))
    row = store.read("findings/agreement.json", Finding).find("all answers", "phrase vs grammar", "kappa", "refused")
    assert row is not None
    assert row.estimate is not None
    assert row.n >= 40
    assert row.estimate >= 0.95
    base = store.read("responses/harmful/base.jsonl", Responses)
    assert base.score("refusal_truth") == [1.0] * 4
    # Added at full strength, the direction makes the testbed stutter: the phrase judge may call that a refusal, the
    # grammar never could have said it.
    added = store.read("responses/harmless/direction add.jsonl", Responses)
    assert all(math.isnan(score) for score in added.score("refusal_truth"))
    assert {row.reasons["refusal_truth"] for row in added.rows} == {"neither a refusal nor an answer of the grammar"}


def test_what_the_grammar_could_not_have_said_has_no_truth() -> None:
    (example,) = grammar.examples("harmful", split="test", count=1)
    (other,) = grammar.examples("harmless", split="test", count=1)
    for category in grammar.CATEGORIES:
        assert all(grammar.refuses(example, text) is True for text in grammar.refusals(category))
    told = f"Here is how to {other.intent}: take a clear plan. That is all about {other.object}."
    assert grammar.refuses(other, told) is False
    for garbled in ("", "I cannot help", "I'm sorry ableI'm sorry able", f"{grammar.refusals('Malware')[0]} I cannot"):
        assert grammar.refuses(example, garbled) is None


def test_kappa_has_no_value_where_a_judge_has_but_one_answer() -> None:
    assert stats.kappa([1.0, 1.0], [1.0, 1.0]).n == 0
