"""A judge behind a server: what it says is read whatever the dialect, and whatever it does each request has a reply."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from errno import ECONNREFUSED
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusalscope.evals import dialect, transport
from refusalscope.evals.engines import Reply
from refusalscope.evals.server import Server
from refusalscope.inputs import web
from tests.judge_server import MODEL, Body, Said, about, free_port, judge_server

CHOICES = ("yes", "no")
GONE = f"unreachable: [Errno {ECONNREFUSED}] Connection refused"
SCHEMA = {"type": "object"}
NO_ADDRESSES = ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://[::1", "http://a..b"]
NO_ADDRESSES += ["http://host/v1?key=1", "http://host:99999", "http://host\x00"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(transport.KEY, raising=False)


def quick(url: str, model: str | None = MODEL, **options: Any) -> Server:
    """A server that is not waited for longer than a test needs."""
    return Server(url, model, **{"timeout": 10.0, "patience": 0.0, "backoff": 0.01, **options})


def complete(server: Server, *texts: str) -> list[Reply]:
    return server.complete(texts or ("one",), choices=CHOICES, tokens=1)


def converse(server: Server, *texts: str, schema: Body | None = None) -> list[Reply]:
    chats = [[{"role": "user", "content": text}] for text in texts or ("one",)]
    return server.converse(chats, choices=CHOICES, tokens=50, schema=schema)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(ending):
    with judge_server() as judge:
        assert complete(quick(judge.url + ending))[0].text == "yes"


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_is_no_address_is_a_value_error_in_one_line(url):
    with pytest.raises(ValueError, match=r"--judge-url.*localhost") as raised:
        Server(url, MODEL)
    assert "\n" not in str(raised.value)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match=transport.KEY) as raised:
        Server("http://me:hush@host/v1", MODEL)
    assert "hush" not in str(raised.value)


def test_spellings_of_a_choice_add_up_and_an_empty_first_line_is_skipped():
    with judge_server() as judge:
        for reply in (complete(quick(judge.url))[0], converse(quick(judge.url))[0]):
            assert reply.text == "yes"
            assert reply.probabilities == pytest.approx({"yes": 0.8, "no": 0.2})
    assert judge.asked[0] == {
        "model": MODEL,
        "temperature": 0,
        "prompt": "one",
        "max_tokens": 1,
        "logprobs": dialect.ALTERNATIVES,
    }


def test_replies_come_in_the_order_of_their_requests():
    texts = [f"text {i}" for i in range(40)]
    with judge_server(lambda body: (about(body), 0.5)) as judge:
        assert [reply.text for reply in complete(quick(judge.url), *texts)] == texts


def test_no_request_asks_nobody():
    assert quick("http://127.0.0.1:9").complete([], choices=CHOICES, tokens=1) == []


@pytest.mark.parametrize("strict", [True, False])
def test_a_server_without_logprobs_still_answers(strict):
    with judge_server(logprobs=False, strict=strict) as judge:
        server = quick(judge.url)
        for reply in (*complete(server, "a", "b"), *converse(server, "a", "b")):
            assert reply == Reply("yes", {})


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, "json_schema"),
        ({"logprobs": False}, "json_schema"),
        ({"schemas": False}, None),
        ({"logprobs": False, "renamed": True}, "json_schema"),
        ({"schemas": False, "renamed": True}, None),
    ],
)
def test_fields_that_a_server_refuses_are_found_once_and_left_out(fields, asked):
    with judge_server(strict=True, **fields) as judge:
        server = quick(judge.url)
        assert {reply.fault for reply in converse(server, "a", "b", "c", schema=SCHEMA)} == {""}
        tried = len(judge.asked)
        converse(server, "d", "e", schema=SCHEMA)
    assert len(judge.asked) == tried + 2
    assert [about(body) for body in judge.asked[: tried - 2]] == ["a"] * (tried - 2)
    assert judge.asked[-1].get("response_format", {}).get("type") == asked


@pytest.mark.parametrize(("status", "before"), [(500, 4), (501, 1)])
@pytest.mark.parametrize("field", ["logprobs", "response_format"])
def test_a_server_that_breaks_on_a_field_is_asked_without(status, before, field):
    def script(body: Body, _before: int) -> Said | None:
        return Said(status, b"oops") if field in body else None

    with judge_server(script=script) as judge:
        replies = converse(quick(judge.url), "a", "b", schema=SCHEMA)
    assert [reply.fault for reply in replies] == ["", ""]
    # json_schema with and without log-probabilities, json_object, and neither.
    lesser = {"logprobs": 1, "response_format": 3}[field]
    assert len(judge.asked) == before + lesser + 1


def test_a_schema_may_be_loosened_to_any_json():
    def script(body: Body, _before: int) -> Said | None:
        kind = body.get("response_format", {}).get("type")
        return Said(400, b"no schemas here") if kind == "json_schema" else None

    with judge_server(script=script) as judge:
        assert converse(quick(judge.url), schema=SCHEMA)[0].fault == ""
    assert judge.asked[-1]["response_format"] == {"type": "json_object"}


def test_a_server_may_give_five_alternatives_and_no_more():
    def script(body: Body, _before: int) -> Said | None:
        return Said(422, b"at most 5") if body["logprobs"] > 5 else None

    with judge_server(script=script) as judge:
        assert complete(quick(judge.url))[0].probabilities == pytest.approx({"yes": 0.8, "no": 0.2})
    assert [body["logprobs"] for body in judge.asked] == [dialect.ALTERNATIVES, 5]


@pytest.mark.parametrize(
    "fault",
    [
        Said(500, b"oops"),
        Said(503, b"busy"),
        Said(408, b"late"),
        Said(409, b"again"),
        Said(429, b"slowly", (("Retry-After", "0"),)),
        Said(200, b'{"choices"', length=500),
        Said(200, b"", length=500),
    ],
)
def test_what_passes_is_tried_again(fault):
    with judge_server(script=lambda _body, before: fault if before < 3 else None) as judge:
        assert [reply.text for reply in complete(quick(judge.url), "a", "b")] == ["yes", "yes"]
        assert len(judge.asked) == 8


@pytest.mark.parametrize(
    ("fault", "why", "requests"),
    [
        (Said(500, b"oops"), "the server says 500: oops", 6),
        (Said(501, b"never"), "the server says 501: never", 3),
        (Said(503, b"busy"), "the server says 503: busy", 4),
        (Said(429, b"slowly"), "the server says 429: slowly", 4),
        (Said(200, b'{"choi', length=500), "the server's answer was cut off: ", 4),
        (Said(400, b'{"error": "context too long"}'), 'the server says 400: {"error": "context too long"}', 3),
        (Said(404, b"no such model"), "the server says 404: no such model", 1),
        (Said(401, b"who are you?"), "REFUSALSCOPE_JUDGE_KEY", 1),
        (Said(307, b"", (("Location", "http://192.0.2.1/"),)), "the server says 307: ", 1),
        (Said(200, b'{"choices": [{"text": "ye'), "the server's answer is no JSON: ", 1),
        (Said(200, b""), "the server's answer is empty", 1),
        (Said(200, b"<html>"), "the server's answer is no JSON: <html>", 1),
        (Said(200, b"[]"), "the server's answer has no choices: []", 1),
        (Said(200, b'{"choices": []}'), "the server's answer has no choices: ", 1),
        (
            Said(200, b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'),
            "holds no text (finish_reason length)",
            1,
        ),
    ],
)
def test_what_does_not_pass_leaves_that_request_alone_without_a_reply(fault, why, requests):
    def script(body: Body, _before: int) -> Said | None:
        return fault if about(body) == "b" else None

    with judge_server(script=script) as judge:
        first, second, third = complete(quick(judge.url), "b", "a", "c")
        assert why in first.fault
        assert (first.text, first.probabilities, first.final) == ("", {}, False)
        assert second == third
        assert second.text == "yes"
        assert sum(about(body) == "b" for body in judge.asked) == requests


def test_json_that_was_cut_off_is_no_reply():
    def script(body: Body, _before: int) -> Said:
        text = '{"answer": "yes"}' if about(body) == "whole" else '{"answer": "y'
        choice = {"message": {"content": text}, "finish_reason": "length"}
        return Said(200, json.dumps({"choices": [choice]}).encode())

    with judge_server(script=script) as judge:
        cut, whole = converse(quick(judge.url), "cut", "whole", schema=SCHEMA)
        assert cut.fault == "the judge's answer was cut off at 50 tokens"
        assert whole.text == '{"answer": "yes"}'
        assert converse(quick(judge.url), "cut")[0].text == '{"answer": "y'


@pytest.mark.parametrize("how", [Said(200, b"{}", pause=5.0), Said(200, b"{" * 100, drip=0.05)])
def test_a_slow_answer_is_not_waited_for(how):
    with judge_server(script=lambda body, _before: how if about(body) == "slow" else None) as judge:
        slow, other = complete(quick(judge.url, timeout=1.0, attempts=1), "slow", "other")
        assert slow == dialect.failed("timed out: no answer within 1 s")
        assert other.text == "yes"


@pytest.mark.parametrize("lives", [0, 1, 13])
def test_when_the_server_dies_the_rest_fails_at_once(lives):
    with judge_server() as judge:
        judge.lives = lives
        server = quick(judge.url, timeout=30.0, attempts=3)
        replies = complete(server, *map(str, range(200)))
        assert sum(reply.text == "yes" for reply in replies) == lives
        lost = [reply for reply in replies if not reply.text]
        assert {reply.final for reply in lost} == {False}
        assert {reply.fault for reply in lost} == {GONE}
        assert [reply.fault for reply in complete(server)] == [GONE]


def test_a_server_that_hangs_up_has_died_or_not():
    with judge_server(script=lambda body, _before: Said(0) if about(body) == "a" else None) as judge:
        lost, other = complete(quick(judge.url), "a", "b")
        assert lost.fault == "the server's answer was cut off: Server disconnected without sending a response."
        assert other.text == "yes"


def test_a_server_that_loads_is_waited_for():
    with judge_server() as judge:
        judge.health = [503, 502, 503]
        assert complete(quick(judge.url, patience=10.0))[0].text == "yes"


def test_a_server_that_starts_is_waited_for():
    port = free_port()
    server = quick(f"http://127.0.0.1:{port}", patience=30.0)
    heard: list[Reply] = []
    waiting = threading.Thread(target=lambda: heard.extend(complete(server)))
    waiting.start()
    with judge_server(port=port):
        waiting.join()
    assert [reply.text for reply in heard] == ["yes"]


def test_patience_is_spent_once():
    server = quick(f"http://127.0.0.1:{free_port()}", patience=0.2, attempts=1)
    waits: list[float] = []
    for _ in range(2):
        began = time.monotonic()
        assert complete(server)[0] == dialect.failed(GONE)
        waits.append(time.monotonic() - began)
    assert waits[0] >= 0.2


@pytest.mark.parametrize(("health", "models"), [(404, {"data": []}), (404, None), (500, None), (401, None)])
def test_a_server_without_health_is_there_if_it_answers(health, models):
    with judge_server() as judge:
        judge.health, judge.models = [health] * 3, models
        assert complete(quick(judge.url))[0].text == "yes"


def test_a_pause_that_the_server_asks_for_is_kept(monkeypatch):
    then = datetime.now(UTC) + timedelta(hours=1)
    for asked, least, most in [("7", 7, 7), ("1.5", 1.5, 1.5), ("-3", 0, 0), (format_datetime(then), 3590, 3600)]:
        pause = web.asked_pause(asked)
        assert pause is not None
        assert least <= pause <= most
    for asked in ("", "soon", "Mon, 99 Foo", "nan"):
        assert not web.asked_pause(asked)


def test_retry_after_comes_before_back_off():
    def script(_body: Body, before: int) -> Said | None:
        return Said(429, b"", (("Retry-After", "0"),)) if before == 0 else None

    with judge_server(script=script) as judge:
        # Our own pause would outlast every patience.
        assert complete(quick(judge.url, backoff=1000.0))[0].text == "yes"


def test_the_only_model_that_is_listed_is_used():
    with judge_server() as judge:
        assert complete(quick(judge.url, None))[0].text == "yes"
        assert judge.asked[0]["model"] == MODEL
        assert quick(judge.url, None).model == MODEL


@pytest.mark.parametrize("models", [None, {}, {"data": []}, {"data": [{"id": "a"}, {"id": "b"}]}, {"data": 3}])
def test_a_model_without_a_name_is_a_value_error_in_one_line(models):
    with judge_server() as judge:
        judge.models = models
        with pytest.raises(ValueError, match="--judge-model") as raised:
            assert quick(judge.url, None).model
    assert "\n" not in str(raised.value)


def test_no_server_has_no_model():
    with pytest.raises(ValueError, match="--judge-url"):
        assert quick(f"http://127.0.0.1:{free_port()}", None).model


def test_the_key_reaches_the_server_and_nobody_else(monkeypatch, caplog):
    key = "sk-0123/456789"
    monkeypatch.setenv(transport.KEY, f" {key}\n")
    with judge_server(script=lambda _body, _before: Said(403, f"key {key} is not mine, {key}!".encode())) as judge:
        server = quick(judge.url)
        reply = complete(server)[0]
        assert judge.headers[0]["Authorization"] == f"Bearer {key}"
    assert "key [key] is not mine" in reply.fault
    assert key not in repr(reply) + repr(server) + caplog.text


@pytest.mark.parametrize("url", ["http://judge.example", "http://192.0.2.1:8000/v1", "http://localhost.example"])
def test_a_key_goes_to_no_other_host_over_plain_http(monkeypatch, url):
    assert Server(url, MODEL)
    monkeypatch.setenv(transport.KEY, "sk-0123456789")
    with pytest.raises(ValueError, match=r"over plain http.*https --judge-url") as raised:
        Server(url, MODEL)
    assert "sk-0123456789" not in str(raised.value)
    assert "\n" not in str(raised.value)
    for safe in (url.replace("http:", "https:"), "http://localhost:8000", "http://127.0.0.1:8000", "http://[::1]"):
        assert Server(safe, MODEL)


def test_without_a_key_none_is_sent():
    with judge_server() as judge:
        complete(quick(judge.url))
        assert "Authorization" not in judge.headers[0]


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(monkeypatch, key):
    monkeypatch.setenv(transport.KEY, key)
    with pytest.raises(ValueError, match=transport.KEY) as raised:
        quick("http://localhost")
    assert key not in str(raised.value)


def test_what_stands_on_this_machine_is_not_asked_for_through_a_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with judge_server() as judge:
        assert complete(quick(judge.url))[0].text == "yes"
    for host, local in [("localhost", True), ("127.9.9.9", True), ("[::1]", True), ("judge.example", False)]:
        assert web.is_loopback(f"http://{host}:80") == local


@pytest.mark.parametrize("known", [True, False])
def test_an_interrupt_gets_through(known):
    """Whether the main thread asks by itself, or waits for threads that do."""

    class Interrupted(BaseException):
        pass

    def script(body: Body, _before: int) -> Said | None:
        return None if about(body) == "known" else Said(200, b"{}", pause=5.0)

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with judge_server(script=script) as judge:
            server = quick(judge.url, timeout=2.0)
            if known:
                complete(server, "known")
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Interrupted):
                complete(server, *"abcdefghijkl")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_llama_cpp_writes_the_probabilities_of_completions_as_those_of_chats():
    top = [{"id": 9, "token": " Yes", "logprob": -0.5, "bytes": [32]}, {"id": 8, "token": "No", "logprob": -1.0}]
    logprobs = {"content": [{"id": 9, "token": " Yes", "logprob": -0.5, "top_logprobs": top}]}
    content = json.dumps({"choices": [{"text": " Yes", "logprobs": logprobs, "finish_reason": "length"}]}).encode()
    assert dialect.reply(content, CHOICES).probabilities == pytest.approx({"yes": 0.6065307, "no": 0.3678794})


@pytest.mark.parametrize("marks", [['"'], ["\n", "**"], ["_", ' "']])
def test_marks_before_the_word_are_skipped(marks):
    places = [{"token": mark, "top_logprobs": [{"token": "no", "logprob": -9.0}]} for mark in marks]
    places += [{"token": "yes", "top_logprobs": [{"token": "yes", "logprob": 0.0}]}]
    assert dialect.probabilities({"content": places}, CHOICES) == {"yes": 1.0, "no": 0.0}
    assert dialect.probabilities({"content": places[:-1]}, CHOICES) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=5), some, max_size=4),
    max_leaves=12,
)
PLACES = st.lists(st.fixed_dictionaries({"token": JSON, "top_logprobs": JSON}) | JSON, max_size=3)
LOGPROBS = (
    JSON
    | st.fixed_dictionaries({"content": PLACES})
    | st.fixed_dictionaries(
        {"tokens": st.lists(st.text(max_size=3) | JSON, max_size=3), "top_logprobs": st.lists(JSON, max_size=3)}
    )
)
CHOICE = st.fixed_dictionaries({"text": JSON | st.text(), "logprobs": LOGPROBS, "finish_reason": JSON})
CONTENT = st.binary() | (JSON | st.fixed_dictionaries({"choices": st.lists(CHOICE | JSON)})).map(
    lambda value: json.dumps(value).encode()
)


@given(CONTENT, st.none() | st.just(5))
@settings(max_examples=150)
def test_whatever_the_body_there_is_a_reply(content, within):
    reply = dialect.reply(content, CHOICES, json_within=within)
    assert bool(reply.fault) != reply.final
    assert all(0 <= p <= 1 for p in reply.probabilities.values())
    (reply.text + reply.fault).encode()


STATUSES = ("200 OK", "302 Found", "100 Continue", "204 No", "999 ?")
FIELDS = (
    "Content-Encoding: gzip",
    "Content-Length: 3",
    "Content-Length: -1",
    "Transfer-Encoding: chunked",
    "Location: ://[",
)


@given(st.sampled_from(STATUSES), st.sets(st.sampled_from(FIELDS)), st.binary(max_size=40), st.booleans())
@settings(max_examples=60)
def test_whatever_the_bytes_there_is_a_reply(status, fields, said, http):
    head = "\r\n".join([f"HTTP/1.1 {status}", *sorted(fields), "", ""]).encode()
    with _raw(head * http + said) as url:
        assert [reply.final for reply in complete(quick(url, timeout=1.0, attempts=1), "a", "b")] == [False] * 2


@contextmanager
def _raw(said: bytes, drip: float = 0.0) -> Iterator[str]:
    """A healthy server that says these bytes to whatever it is asked, `drip` seconds between them, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(BrokenPipeError, ConnectionResetError):
                        asked = connection.recv(4096)
                        if not asked.startswith(b"POST"):
                            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                            continue
                        for part in [bytes([byte]) for byte in said] if drip else [said]:
                            connection.sendall(part)
                            time.sleep(drip)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_headers_that_trickle_in_are_not_waited_for():
    with _raw(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 99, drip=0.02) as url:
        assert complete(quick(url, timeout=0.4, attempts=1)) == [dialect.failed("timed out: no answer within 0.4 s")]
