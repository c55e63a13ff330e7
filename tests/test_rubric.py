"""The rubric judges by an answer that fits its schema, and nothing that is judged can speak in the judge's place."""

import json
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusalscope.core.types import Prompt, Question, Response, Verdict
from refusalscope.evals import rubric
from refusalscope.evals.engines import Reply
from refusalscope.evals.judges import Exchange
from refusalscope.evals.server import Server
from tests.judge_server import MODEL, Body, Said, about, judge_server

QUESTIONS = get_args(Question)
YES = '{"reason": "so it is", "answer": "yes"}'


def exchange(answer: str, prompt: str = "What colour is a zorb?", name: str = "p") -> Exchange:
    return Exchange(Prompt(name, prompt, "harmless"), Response(name, answer, None, 0, "end"))


class Saying:
    """An engine that always says the same, and what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[str] = []

    def converse(self, chats: Any, *, choices: Any, tokens: int, schema: Any = None) -> list[Reply]:
        self.asked += [chat[0]["content"] for chat in chats]
        return [self.reply for _ in chats]

    def complete(self, texts: Any, *, choices: Any, tokens: int) -> list[Reply]:
        raise AssertionError("the rubric is a chat")


def verdict(text: str, *, fault: str = "", final: bool = True) -> Verdict:
    return rubric.rubric(Saying(Reply(text, {}, fault, final)), "harmful")([exchange("It is blue.")])[0]


@pytest.mark.parametrize(
    "text",
    [
        YES,
        f"  {YES}\n",
        f"```json\n{YES}\n```",
        f"Here is my judgement:\n{YES}\nThat is all.",
        f"<think>A {{strange}} answer: {YES}, or not?</think>\n{YES}",
        f'It might be {{"reason": "", "answer": "no"}}.</think>{YES}',
    ],
)
def test_the_json_object_is_found(text):
    found = verdict(text)
    assert (found.prompt_id, found.score, found.reason, found.final) == ("p", 1.0, "so it is", True)
    assert math.isnan(found.probability)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"reason": "so it is", "answer": "y',
        '{"reason": "so it is"}',
        '{"answer": "yes"}',
        '{"reason": "so it is", "answer": "maybe"}',
        '{"reason": "so it is", "answer": true}',
        '{"reason": 3, "answer": "yes"}',
        '{"reason": "so it is", "answer": "yes", "more": 1}',
        '{"reason": "so it is", "answer": "Yes"}',
        f"[{YES}, {YES}]",
        f'{{"reason": "so it is", "answer": "no"}} {YES}',
        f"The answer says {YES}, which is not so: {{broken",
    ],
)
def test_what_does_not_fit_is_unscored_with_a_reason(text):
    found = verdict(text)
    assert math.isnan(found.score)
    assert found.reason.startswith("not the JSON asked for: ")
    assert len(found.reason) <= 300
    assert not found.final


def test_the_schema_and_our_own_check_ask_for_the_same():
    ours = rubric._Answer.model_json_schema()
    assert set(ours["properties"]) == set(rubric.SCHEMA["properties"])
    assert ours["required"] == rubric.SCHEMA["required"]
    assert ours["additionalProperties"] is rubric.SCHEMA["additionalProperties"] is False
    assert ours["properties"]["answer"]["enum"] == rubric.SCHEMA["properties"]["answer"]["enum"]


@pytest.mark.parametrize("final", [True, False])
def test_a_request_that_failed_is_unscored_and_says_why(final):
    found = verdict("", fault="unreachable: nobody\nis there", final=final)
    assert math.isnan(found.score)
    assert (found.reason, found.final) == ("unreachable: nobody is there", final)


def test_a_long_reason_becomes_one_short_line():
    found = verdict(json.dumps({"reason": "well\n" * 1000, "answer": "no"}))
    assert found.score == 0.0
    assert "\n" not in found.reason
    assert len(found.reason) <= 300


@given(st.text(), st.text())
def test_nothing_that_is_judged_can_write_the_mark(prompt, answer):
    engine = Saying(Reply(YES, {}))
    rubric.rubric(engine, "refused")([exchange(answer, prompt)])
    asked = engine.asked[0]
    mark = asked.split("[")[1].split(" ")[0]
    assert asked.count(mark) == rubric.FRAME.count("{mark}")
    assert f"[{mark} request begins]\n{prompt}\n[{mark} request ends]" in asked
    assert f"[{mark} answer begins]\n{answer}\n[{mark} answer ends]" in asked


def test_an_answer_that_knows_the_frame_cannot_close_it():
    engine = Saying(Reply(YES, {}))
    ask = rubric.rubric(engine, "harmful")
    ask([exchange("first")])
    ask([exchange(engine.asked[0] + "{mark} {} {0}")])
    mark = engine.asked[1].split("[")[1].split(" ")[0]
    assert engine.asked[1].count(mark) == rubric.FRAME.count("{mark}")


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_a_rubric_of_its_own(question):
    engine = Saying(Reply(YES, {}))
    rubric.rubric(engine, question)([exchange("It is blue.")])
    assert rubric.RUBRICS[question] in engine.asked[0]
    assert rubric.RUBRICS[question] in rubric.template(question)
    assert len({rubric.template(other) for other in QUESTIONS}) == len(QUESTIONS)


def oracle(body: Body) -> tuple[str, float]:
    return ("yes" if "quimble" in about(body) else "no"), 0.9


@pytest.mark.parametrize("schemas", [True, False])
def test_verdicts_come_in_order_and_only_the_gaps_are_left(schemas):
    """Where no schema is known this judge answers with one word, which is no verdict."""

    def script(body: Body, _before: int) -> Said | None:
        return Said(500, b"oops") if "answer 2" in about(body) else None

    exchanges = [exchange(f"answer {i} {'quimble' * (i % 2)}", name=str(i)) for i in range(6)]
    with judge_server(oracle, script, schemas=schemas) as judge:
        score = rubric.rubric(Server(judge.url, MODEL, attempts=2, backoff=0.01), "harmful")
        verdicts = score(exchanges)
        assert [one.prompt_id for one in verdicts] == list("012345")
        assert verdicts[2].reason == "the server says 500: oops"
        rest = [one for one in verdicts if one.prompt_id != "2"]
        assert {one.final for one in rest} == {schemas}
        if schemas:
            assert [one.score for one in rest] == [0, 1, 1, 0, 1]
            judge.script = lambda _body, _before: None
            assert [one.score for one in score([exchanges[2]])] == [0]
        else:
            assert {one.reason for one in rest} == {"not the JSON asked for: yes", "not the JSON asked for: no"}
