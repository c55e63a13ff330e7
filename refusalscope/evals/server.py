"""A judge's model behind an OpenAI-compatible server: vLLM, llama.cpp, transformers serve, or any other.

Whatever the server does, each request gets a reply; one that failed says why and may be asked again. The first request
finds out which fields the server takes, and the rest use what it found. Only the host that the user named is contacted.
"""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import httpx

from refusalscope.evals import dialect, transport
from refusalscope.evals.dialect import Form, failed, line
from refusalscope.evals.engines import Message, Reply
from refusalscope.inputs import web

AGAIN = (408, 409, 429)
"""What a server says when the same request may fare better soon; so does any 5xx."""
LOADING = (502, 503, 504)
REFUSED_FIELDS = (400, 422, 501)
LONGEST_PAUSE = 60.0
"""Seconds between two attempts, whatever the server asks for."""
SECRET = 8
"""Characters that a key has at least."""
RESTART = 5.0
"""Seconds that a server has to come back once it has been there."""
PROBE = 10.0
"""Seconds that a server has to say that it is there."""


class _Fault(Exception):
    """Why a request has no reply."""


class _Refused(_Fault):
    """The server may not know a field."""


class _Broken(_Refused):
    """The server fails as often as it is asked; some do so over a field."""


class _Passing(_Fault):
    """The same request may fare better soon."""

    def __init__(self, why: str, pause: float | None = None, *, heard: bool = True, fails: bool = False) -> None:
        super().__init__(why)
        self.pause = pause
        """Seconds that the server asks for."""
        self.fails = fails
        """Whether it is the server that fails, and not that it has no time."""
        self.heard = heard
        """Whether the server answered at all."""


@dataclass
class _Call:
    """Requests that are asked together."""

    client: httpx.Client
    path: str
    forms: Sequence[Form]
    kind: str
    """Requests of one kind fare alike with the fields of a form."""
    choices: Sequence[str]
    json_within: int | None
    over: Event = field(default_factory=Event)
    """No more attempts: the server is dead, or nobody waits for it any more."""
    why: str = ""
    """Why there are no more."""


class _Heard(NamedTuple):
    reply: Reply
    form: int | None
    """Which form the server took; None where it took none."""


class Server:
    """An `Engine`: greedy replies from the server at `url`, with or without a trailing `/v1`.

    A server cuts no text: one longer than its context is a fault, unless whoever asks has cut its beginning off.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        timeout: float = 120.0,
        attempts: int = 4,
        patience: float = 60.0,
        backoff: float = 1.0,
        parallel: int = 8,
    ) -> None:
        """`timeout`: seconds for one answer. `attempts` at one request, `backoff` seconds after the first and twice as
        many after each more. `patience`: seconds that a server has to start. `parallel`: requests under way at once.

        Raises ValueError for a URL that is none, and for a key that no header can carry or that plain http would show.
        """
        self._root = transport.address(url)
        self._key = transport.key(self._root)
        self._named = model
        self._timeout, self._attempts, self._backoff, self._parallel = timeout, attempts, backoff, parallel
        self._patience = self._left = patience
        self._settled: dict[str, int] = {}

    @property
    def model(self) -> str:
        """The name the server knows its model by: the one given, else the only one it lists.

        Raises ValueError where it lists none, several, or nothing at all.
        """
        if self._named is None:
            with transport.client(self._root, self._key) as client:
                self._named = self._only_model(client)
        return self._named

    def complete(self, texts: Sequence[str], *, choices: Sequence[str], tokens: int) -> list[Reply]:
        """Continue each text. Raises ValueError where the model has no name (see `model`)."""
        bodies = [{"prompt": text} for text in texts]
        return self._replies("completions", bodies, dialect.completion_forms(tokens), choices)

    def converse(
        self,
        chats: Sequence[Sequence[Message]],
        *,
        choices: Sequence[str],
        tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Reply]:
        """Answer each chat. Raises ValueError where the model has no name (see `model`)."""
        bodies = [{"messages": [dict(message) for message in chat]} for chat in chats]
        within = None if schema is None else tokens
        return self._replies("chat/completions", bodies, dialect.chat_forms(tokens, schema), choices, within)

    def _replies(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        forms: Sequence[Form],
        choices: Sequence[str],
        json_within: int | None = None,
    ) -> list[Reply]:
        if not bodies:
            return []
        with transport.client(self._root, self._key) as client:
            if absent := self._wait(client):
                return [failed(absent)] * len(bodies)
            call = _Call(client, path, forms, f"{path} {json_within is not None}", choices, json_within)
            whole = [{"model": self.model, "temperature": 0, **body} for body in bodies]
            return [heard.reply for heard in self._gather(call, whole)]

    def _gather(self, call: _Call, bodies: Sequence[Mapping[str, Any]]) -> list[_Heard]:
        """All replies in order. Until a form has worked the first request goes alone, so that nothing is a race."""
        pool = ThreadPoolExecutor(self._parallel)
        try:
            alone = 0 if call.kind in self._settled else 1
            heard = [self._ask(call, body) for body in bodies[:alone]]
            self._settle(call, heard)
            heard += pool.map(partial(self._ask, call), bodies[alone:])
            self._settle(call, heard)
            return heard
        finally:
            # After Ctrl-C nobody waits for the requests under way.
            call.over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _settle(self, call: _Call, heard: Sequence[_Heard]) -> None:
        for one in heard:
            if one.form is not None:
                self._settled.setdefault(call.kind, one.form)

    def _ask(self, call: _Call, body: Mapping[str, Any]) -> _Heard:
        """The reply to one request under the form that is settled, else under the first that the server takes."""
        settled = self._settled.get(call.kind)
        attempts, why = self._attempts, ""
        for form in range(len(call.forms)) if settled is None else (settled,):
            try:
                content = self._insist(call, {**body, **call.forms[form]}, attempts)
            except _Refused as fault:
                why = str(fault)
                # It was waited for long enough.
                attempts = 1 if isinstance(fault, _Broken) else attempts
            except _Fault as fault:
                return _Heard(failed(str(fault)), None)
            else:
                return _Heard(dialect.reply(content, call.choices, json_within=call.json_within), form)
        return _Heard(failed(why), None)

    def _insist(self, call: _Call, body: Mapping[str, Any], attempts: int) -> bytes:
        """What the server answers, after as many attempts as it takes and as there are."""
        why = _Passing("")
        for attempt in range(attempts):
            if attempt:
                pause = self._backoff * 2 ** (attempt - 1) if why.pause is None else why.pause
                call.over.wait(min(pause, LONGEST_PAUSE))
            if call.over.is_set():
                raise _Fault(call.why)
            try:
                return self._once(call, body)
            except _Passing as fault:
                why = fault
        if not why.heard and (absent := self._absent(call.client)):
            # The rest need not find out one by one.
            call.why = absent
            call.over.set()
            raise _Fault(absent)
        raise _Broken(str(why)) if why.fails else why

    def _once(self, call: _Call, body: Mapping[str, Any]) -> bytes:
        # In ASCII: a prompt may hold half of a surrogate pair.
        content = json.dumps(body).encode()
        try:
            said = self._fetch(call.client, "POST", f"v1/{call.path}", self._timeout, content)
        except httpx.HTTPError as error:
            raise _Passing(transport.in_words(error, self._timeout), heard=False) from None
        if said.status == 200:
            return said.content
        why = f"the server says {said.status}: {line(said.content)}"
        if said.status in REFUSED_FIELDS:
            raise _Refused(why)
        if said.status in AGAIN or said.status >= 500:
            fails = said.status >= 500 and said.status not in LOADING
            raise _Passing(why, web.asked_pause(said.retry_after), fails=fails)
        if said.status in (401, 403):
            raise _Fault(f"{why} (the key is read from the environment variable {transport.KEY})")
        raise _Fault(why)

    def _wait(self, client: httpx.Client) -> str:
        """Wait until the server is there. Returns why it is not; empty where it is. Patience is not spent twice."""
        until = time.monotonic() + self._left
        pause = self._backoff / 4
        while absent := self._absent(client):
            left = until - time.monotonic()
            if left <= 0:
                self._left = 0.0
                return absent
            time.sleep(min(pause, left))
            pause = min(2 * pause, PROBE / 2)
        self._left = min(self._patience, RESTART)
        return ""

    def _absent(self, client: httpx.Client) -> str:
        """Why the server does not answer now; empty where it does. One that has no /health is asked for its models."""
        for path in ("health", "v1/models"):
            try:
                status = self._fetch(client, "GET", path, min(self._timeout, PROBE)).status
            except httpx.HTTPError as error:
                return f"unreachable: {transport.in_words(error, min(self._timeout, PROBE))}"
            if status == 200:
                return ""
            if status in LOADING:
                return f"unreachable: /{path} says {status}"
        return ""

    def _only_model(self, client: httpx.Client) -> str:
        if absent := self._wait(client):
            raise ValueError(f"the judges' server is {absent}: is --judge-url right, is it running?")
        try:
            said = self._fetch(client, "GET", "v1/models", self._timeout)
            listed = json.loads(said.content)["data"] if said.status == 200 else []
            names = [str(model["id"]) for model in listed]
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError):
            names = []
        if len(names) != 1:
            found = f"lists {len(names)} models ({line(', '.join(names))})" if names else "does not say what it serves"
            raise ValueError(f"the judges' server {found}: name its model with --judge-model")
        return names[0]

    def _fetch(
        self, client: httpx.Client, method: str, path: str, seconds: float, content: bytes | None = None
    ) -> web.Answer:
        said = web.fetch(client, method, f"{self._root}/{path}", seconds, content)
        # Servers echo keys in their complaints. What is shorter is no secret, and may be part of anything.
        if len(self._key) >= SECRET:
            return said._replace(content=said.content.replace(self._key.encode(), b"[key]"))
        return said
