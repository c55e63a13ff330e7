"""Labels from Neuronpedia, whatever it does: there, slow, wrong, busy or away; kept once read, and never in the way."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from refusalscope.core.types import Feature
from refusalscope.inputs import neuronpedia as asking
from refusalscope.inputs.neuronpedia import Limits, look_up
from tests.judge_server import free_port
from tests.neuronpedia_server import NAME, Neuronpedia, Said, feature, neuronpedia

NAMES = {layer: NAME.format(layer=layer) for layer in range(3)}
FEATURES = [Feature(0, 7), Feature(1, 8), Feature(2, 9)]
KNOWN = {f"{NAMES[one.layer]}/{one.index}": feature(one.index, f"words of {one}") for one in FEATURES}
TOLD = {one: f"words of {one}" for one in FEATURES}
QUICK = Limits(pause=0.0)
"""As in earnest, without the pauses of politeness."""
SOON = Limits(answer=0.3, pause=0.0)
"""Of a server that never answers, not much is waited for."""


@pytest.fixture(autouse=True)
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are allowed, and what they bring is kept in an empty folder."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", asking.KEY, asking.ADDRESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(asking.CACHE, str(tmp_path / "cache"))


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., asking.Found]:
    """Look up FEATURES at a server."""

    def asked(site: Neuronpedia, limits: Limits = QUICK, features: list[Feature] = FEATURES) -> asking.Found:
        monkeypatch.setenv(asking.ADDRESS, site.url)
        return look_up(NAMES, features, limits=limits)

    return asked


def test_labels_appear_and_are_asked_for_once(ask) -> None:
    with neuronpedia(KNOWN) as site:
        assert ask(site) == (TOLD, "")
        assert site.asked == [f"/api/feature/tiny-model/{one.layer}-tiny-res/{one.index}" for one in FEATURES]
        assert ask(site) == (TOLD, "")
        assert len(site.asked) == 3
        assert len(site.connections) == 1
        assert site.headers[0]["user-agent"].startswith("refusalscope/")
        assert "x-api-key" not in site.headers[0]


def test_what_neuronpedia_does_not_explain_has_no_label_and_is_not_asked_again(ask) -> None:
    unexplained = {**KNOWN, f"{NAMES[0]}/7": feature(7), f"{NAMES[1]}/8": None}
    for known in (unexplained, {key: value for key, value in unexplained.items() if "1-" not in key}):
        with neuronpedia(known) as site:
            expected = {FEATURES[0]: None, FEATURES[1]: None, FEATURES[2]: TOLD[FEATURES[2]]}
            assert ask(site) == (expected, "")
            assert ask(site) == (expected, "")
            assert len(site.asked) == 3


def test_of_several_explanations_the_first_that_says_something(ask) -> None:
    with neuronpedia({f"{NAMES[0]}/7": feature(7, None, " \u200b", "second", "third")}) as site:
        assert ask(site, features=FEATURES[:1]).labels == {FEATURES[0]: "second"}


def test_somebody_elses_text_is_one_short_plain_line(ask) -> None:
    text = "  a\u202eb\x00\nc\u2028d\ud800 \x1b[31m" + "long " * 100
    with neuronpedia({f"{NAMES[0]}/7": feature(7, text)}) as site:
        label = ask(site, features=FEATURES[:1]).labels[FEATURES[0]]
        assert label.startswith("ab c d [31mlong long")
        assert len(label) == asking.LONGEST
        assert label.endswith("…")
        assert ask(site, features=FEATURES[:1]).labels[FEATURES[0]] == label


WRONG = {
    "a page of a hotel": (Said(200, b"<html>log in</html>"), "could not be read"),
    "a page that is not there": (Said(404, b"<html>nothing</html>"), "could not be read"),
    "no object": (Said(200, b"[1, 2]"), "could not be read"),
    "no explanations": (Said(200, b"{}"), "could not be read"),
    "explanations of another form": (Said(200, b'{"explanations": {"a": 1}}'), "could not be read"),
    "another feature": (Said(200, json.dumps(feature(999, "of another")).encode()), "could not be read"),
    "nested without end": (Said(200, b"[" * 100_000), "could not be read"),
    "no text": (Said(200, b"\xff\xfe\xff"), "could not be read"),
    "an error": (Said(500, b"{}"), "answered with HTTP status 500"),
    "another place": (Said(308, b"", (("Location", "http://127.0.0.1:1/"),)), "answered with HTTP status 308"),
    "too long": (Said(200, b" " * (asking.LARGEST + 1)), "too long or garbled"),
    "garbled": (Said(200, b"no gzip", (("Content-Encoding", "gzip"),)), "too long or garbled"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_no_label_and_asked_for_again_another_time(wrong: str, ask) -> None:
    said, why = WRONG[wrong]
    many = [*FEATURES, Feature(0, 10), Feature(0, 11)]
    with neuronpedia(KNOWN, lambda _path, _before: said) as site:
        found = ask(site, features=many)
        assert found.labels == {}
        assert why in found.reason
        assert len(site.asked) <= asking.FAULTS
    with neuronpedia(KNOWN) as site:
        assert ask(site) == (TOLD, "")


def test_one_wrong_answer_costs_one_label(ask) -> None:
    with neuronpedia(KNOWN, lambda _path, before: Said(500) if before == 1 else None) as site:
        found = ask(site)
        assert found.labels == {one: TOLD[one] for one in (FEATURES[0], FEATURES[2])}
        assert found.reason == "Neuronpedia answered with HTTP status 500"
        assert ask(site) == (TOLD, "")
        assert len(site.asked) == 4


@pytest.mark.parametrize("said", [Said(never=True), Said(drips=True)], ids=["silent", "dripping"])
def test_who_does_not_answer_in_time_is_asked_no_more(said: Said, ask) -> None:
    with neuronpedia(KNOWN, lambda _path, before: said if before == 1 else None) as site:
        found = ask(site, SOON)
        assert found.labels == {FEATURES[0]: TOLD[FEATURES[0]]}
        assert found.reason == "Neuronpedia did not answer within 0.3 s"
        assert len(site.asked) == 2


def test_a_server_that_hears_but_never_takes_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv(asking.ADDRESS, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert look_up(NAMES, FEATURES, limits=SOON) == ({}, "Neuronpedia did not answer within 0.3 s")


def test_a_name_that_is_never_found_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch, request) -> None:
    """As behind a name server that does not answer, which no time-out of a connection covers."""
    over = Event()
    request.addfinalizer(over.set)

    def find(*_words: object, **_more: object) -> list[object]:
        over.wait()
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setenv(asking.ADDRESS, "http://neuronpedia.example")
    assert look_up(NAMES, FEATURES, limits=SOON) == ({}, "Neuronpedia did not answer within 0.3 s")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(asking.ADDRESS, f"http://127.0.0.1:{free_port()}")
    assert look_up(NAMES, FEATURES) == ({}, asking.UNREACHABLE)


def test_hanging_up_is_no_label(ask) -> None:
    short = Said(200, b"{", (("Content-Length", "100"), ("Connection", "close")))
    with neuronpedia(KNOWN, lambda _path, _before: short) as site:
        found = ask(site, SOON)
        assert (found.labels, len(site.asked)) == ({}, 1)
        assert found.reason


def test_after_the_time_for_all_nothing_more_is_asked(ask) -> None:
    with neuronpedia(KNOWN) as site:
        found = ask(site, Limits(whole=0.0))
        assert found == ({}, "the 0 s that a command has for labels were over")
        assert site.asked == []


def busy(after: str, times: int) -> Callable[[str, int], Said | None]:
    headers = (("Retry-After", after),) if after else ()
    return lambda _path, before: Said(429, b"{}", headers) if 1 <= before <= times else None


def test_a_short_pause_that_is_asked_for_is_made(ask) -> None:
    with neuronpedia(KNOWN, busy("0.01", 1)) as site:
        assert ask(site) == (TOLD, "")
        assert site.asked[1] == site.asked[2]
        assert len(site.asked) == 4


@pytest.mark.parametrize(("after", "times", "asked"), [("3600", 9, 2), ("", 9, 2), ("inf", 9, 2), ("0", 9, 3)])
def test_a_long_pause_or_a_second_one_ends_the_asking(after: str, times: int, asked: int, ask) -> None:
    with neuronpedia(KNOWN, busy(after, times)) as site:
        assert ask(site) == ({FEATURES[0]: TOLD[FEATURES[0]]}, asking.BUSY)
        assert len(site.asked) == asked
    with neuronpedia(KNOWN) as site:
        assert ask(site) == (TOLD, "")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_makes_no_request_and_shows_what_is_kept(variable: str, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with neuronpedia(KNOWN) as site:
        ask(site, features=FEATURES[:1])
        monkeypatch.setenv(variable, "1")
        assert ask(site) == ({FEATURES[0]: TOLD[FEATURES[0]]}, asking.OFFLINE)
        assert len(site.asked) == 1


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "../b", "a/..", "a/b?c=d", "a/b#c", "a\n/b", "a/b%2f", "ä/b"])
def test_what_is_no_name_is_not_asked_for(name: str) -> None:
    assert not asking.is_name(name)
    with neuronpedia() as site:
        assert look_up({0: name}, [Feature(0, 1), Feature(5, 1)]) == ({}, "")
        assert site.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "neuronpedia.org",
        "ftp://a.b",
        "http://",
        "http://u:p@a.b",
        "http://a.b:99999",
        "http://a.b?c",
        "http://\udcff",
    ],
)
def test_an_address_that_is_none_is_a_reason(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(asking.ADDRESS, address)
    assert look_up(NAMES, FEATURES) == ({}, f"{asking.ADDRESS} holds no server’s address")


def test_a_key_goes_over_https_alone(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(asking.KEY, "secret-key")
    with neuronpedia(KNOWN) as site:
        assert ask(site).labels == TOLD
        assert not [value for headers in site.headers for value in headers.values() if "secret" in value]
    with asking._client("https://neuronpedia.example") as client:
        assert client.headers["x-api-key"] == "secret-key"
    monkeypatch.setenv(asking.KEY, "schlüssel\n")
    with neuronpedia(KNOWN) as site:
        assert ask(site, features=[Feature(0, 70)]) == ({}, f"{asking.KEY} holds characters that are in no key")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"label": 3}', b"\xff", b"null", b"[" * 100_000])
def test_a_damaged_cache_is_asked_for_again(content: bytes, ask, tmp_path: Path) -> None:
    with neuronpedia(KNOWN) as site:
        ask(site)
        (kept,) = (tmp_path / "cache").rglob("7.json")
        kept.write_bytes(content)
        assert ask(site) == (TOLD, "")
        assert len(site.asked) == 4
        assert json.loads(kept.read_bytes()) == {"label": "words of 0/7"}


def test_a_cache_that_cannot_be_written_costs_nothing_else(ask, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with neuronpedia(KNOWN) as site:
        assert ask(site) == (TOLD, "")


def test_labels_are_kept_where_the_user_keeps_such_things(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(asking.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with neuronpedia(KNOWN) as site:
        ask(site)
    assert len(list((tmp_path / "xdg" / "refusalscope" / "neuronpedia").rglob("*.json"))) == 3


def test_a_proxy_that_cannot_be_used_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "gopher://127.0.0.1:1")
    found = look_up(NAMES, FEATURES, limits=SOON)
    assert (found.labels, found.reason) == ({}, "this user’s proxy or certificates are set to what cannot be used")


def test_pages_are_addressed_by_us() -> None:
    assert asking.page("gemma-2-2b/0-gemmascope-res-65k", 12) == f"{asking.SITE}/gemma-2-2b/0-gemmascope-res-65k/12"
