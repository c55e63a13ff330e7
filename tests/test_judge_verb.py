"""`refusalscope judge` against servers: what a failing one leaves open, and no more than that, is asked again.

A loopback server of ours fails as it is told to; a real `transformers serve` process serves tiny checkpoints.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from refusalscope.core.store import Store
from refusalscope.core.types import Finding, Prompt, Prompts, Response, Responses, Verdict, Verdicts
from refusalscope.evals import transport
from refusalscope.evals.judges import Settings
from refusalscope.evals.server import Server
from refusalscope.pipeline import judge as judging
from tests import judge_models
from tests.judge_models import ANSWERS, ASKED
from tests.judge_server import MODEL, JudgeServer, about, judge_server, transformers_serve
from tests.judge_server import Said as Says
from tests.test_judging import contents, invoke

COUNT = 12
TEMPLATE = "Tea?\n{behavior}\n{generation}\nYes or no?"
VERDICTS = "judged/{}/harmful/base.jsonl"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(transport.KEY, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tuple(f"prompt {i}." for i in range(COUNT)), ("tea",) * COUNT)


def make_run(folder: Path, asked: tuple[str, ...], answers: tuple[str, ...]) -> Path:
    store = Store(folder)
    prompts = tuple(Prompt(f"p{i}", text, "harmful") for i, text in enumerate(asked))
    rows = tuple(Response(f"p{i}", text, 3, 5, "end", {"refused": 0.0}) for i, text in enumerate(answers))
    store.put("prompts/harmful.jsonl", "", Prompts("harmful", prompts))
    store.put("responses/harmful/base.jsonl", "", Responses("harmful", "base", "", rows))
    return folder


def judged(run: Path, url: str, *more: object) -> tuple[list[Verdict], str]:
    """The verdicts of harmbench after one call of the verb, and what it said on standard error."""
    template = run.parent / "template.txt"
    template.write_text(TEMPLATE)
    words = ("--judge", "harmbench", "--judge-url", url, "--judge-model", "a-judge", "--judge-template", template)
    code, _, err = invoke("judge", run, *words, *more)
    assert code == 0, err
    return list(Store(run).read(VERDICTS.format("harmbench"), Verdicts).rows), err


def prompts_asked(server: JudgeServer) -> set[int]:
    return {i for body in server.asked for i in range(COUNT) if f"prompt {i}." in about(body)}


def only(*numbers: int) -> Callable[[dict[str, object]], bool]:
    return lambda body: any(f"prompt {i}." in about(body) for i in numbers)


FAULTS = {
    "a refusal to answer": (Says(403, b'{"error": {"message": "not today"}}'), "403"),
    "cut-off JSON": (Says(200, b'{"choices": [{"text": "ye'), "JSON"),
    "nonsense": (Says(200, b'{"choices": [{"text": "perhaps", "logprobs": null}]}'), "neither yes nor no"),
    "no choice": (Says(200, b'{"choices": []}'), "choices"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_its_own_rows_open_and_they_alone_are_asked_again(fault: str, run: Path, tmp_path: Path) -> None:
    said, reason = FAULTS[fault]
    fails = only(3, 7)
    with judge_server(script=lambda body, _before: said if fails(body) else None) as server:
        rows, err = judged(run, server.url, "--batch-size", "5")
        assert prompts_asked(server) == set(range(COUNT))
    assert [i for i, row in enumerate(rows) if math.isnan(row.score)] == [3, 7]
    assert all(reason in rows[i].reason and not rows[i].final for i in (3, 7))
    assert [row.probability for i, row in enumerate(rows) if i not in (3, 7)] == pytest.approx([0.8] * 10)
    assert "harmbench: 2 of 12 answers unscored" in err
    with judge_server() as server:
        rows, err = judged(run, server.url, "--batch-size", "5")
        assert prompts_asked(server) == {3, 7}
    assert ([row.score for row in rows], err) == ([1.0] * COUNT, "")
    with judge_server() as server:
        judged(run, server.url)
        assert server.asked == []
        twin = make_run(tmp_path / "twin", tuple(f"prompt {i}." for i in range(COUNT)), ("tea",) * COUNT)
        judged(twin, server.url)
    assert contents(twin) == contents(run)
    (caveat,) = Store(run).read("findings/safety.json", Finding).caveats
    assert "judge harmbench was a-judge: what is known of cais/HarmBench-Llama-2-13b-cls holds only if" in caveat


def test_a_server_that_dies_half_way_leaves_the_rest_open(run: Path) -> None:
    with judge_server() as server:
        server.lives = 5
        rows, err = judged(run, server.url, "--batch-size", "4")
    scored = [i for i, row in enumerate(rows) if row.score == 1]
    assert 1 <= len(scored) <= 5
    assert all("unreachable" in row.reason for i, row in enumerate(rows) if i not in scored)
    assert f"harmbench: {COUNT - len(scored)} of {COUNT} answers unscored, mostly: unreachable" in err
    with judge_server() as server:
        rows, _ = judged(run, server.url, "--batch-size", "4")
        assert prompts_asked(server) == set(range(COUNT)) - set(scored)
    assert all(row.score == 1 for row in rows)


def test_a_server_that_is_gone_when_it_is_asked_leaves_all_open(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refusalscope.evals.server.PROBE", 0.1)
    template = run.parent / "template.txt"
    template.write_text(TEMPLATE)
    with judge_server() as server:
        settings = judging.check(["harmbench"], Settings(url=server.url, template=template))
    assert settings.model == MODEL
    gone = partial(Server, patience=0.0, backoff=0.0)
    monkeypatch.setattr("refusalscope.evals.server.Server", gone)
    (left,) = judging.judge_run(Store(run), ["harmbench"], settings)
    assert (left.unscored, left.answers) == (COUNT, COUNT)
    assert left.reason.startswith("unreachable")
    assert (run / "findings" / "safety.json").is_file()
    code, _, err = invoke("judge", run, "--judge", "nobody", "--judge-url", server.url)
    assert (code, err.count("\n")) == (2, 1)


def test_without_log_probabilities_the_word_is_kept(run: Path) -> None:
    with judge_server(logprobs=False) as server:
        rows, _ = judged(run, server.url)
    assert {row.score for row in rows} == {1.0}
    assert all(math.isnan(row.probability) for row in rows)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "harmbench"
    judge_models.harmbench(folder)
    return folder


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "guard"
    judge_models.llama_guard(folder, judge_models.GUARD["meta-llama/Llama-Guard-3-8B"])
    return folder


@pytest.fixture(params=["harmbench", "llama-guard"])
def served(
    request: pytest.FixtureRequest, classifier: Path, guard: Path, tmp_path: Path
) -> Iterator[tuple[str, Path, str]]:
    """A judge's name, its checkpoint, and the URL of a `transformers serve` process: completions, and chats."""
    folder = classifier if request.param == "harmbench" else guard
    with transformers_serve(folder, tmp_path / "said") as url:
        yield request.param, folder, url


def test_served_by_transformers_it_says_what_it_says_in_process(served: tuple[str, Path, str], tmp_path: Path) -> None:
    name, folder, url = served
    template = tmp_path / "template.txt"
    template.write_text(judge_models.HARMBENCH)
    scores = []
    for way in ([], ["--judge-url", url]):
        run = make_run(tmp_path / f"run{len(way)}", ASKED, ANSWERS)
        code, _, err = invoke(
            *("judge", run, "--judge", name, "--judge-model", folder, *way),
            *(["--judge-template", template] if name == "harmbench" else []),
        )
        assert (code, err) == (0, "")
        scores.append([row.score for row in Store(run).read(VERDICTS.format(name), Verdicts).rows])
    assert scores[0] == scores[1]
    assert set(scores[0]) == {0.0, 1.0}
