"""One answer of one server: in time, of bounded size, from the host that the user named and no other.

Knows HTTP, the key and the words for what goes wrong; nothing of judges.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from socket import SHUT_RDWR, socket
from threading import Lock, Timer
from typing import Any, NamedTuple

import httpx

KEY = "REFUSALSCOPE_JUDGE_KEY"
"""The environment variable that holds the server's API key."""
LARGEST = 2**24
"""Bytes of an answer."""


class Answer(NamedTuple):
    """What a server says."""

    status: int
    retry_after: str
    content: bytes


def address(url: str) -> str:
    """The server's address without a slash or /v1 at its end. Raises ValueError where it is none."""
    try:
        parsed = httpx.URL(url.strip())
        # A name that cannot be looked up, which the first request would stumble over.
        parsed.host.encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"--judge-url is no URL: {error}; such as http://localhost:8000/v1 would do") from None
    if parsed.userinfo:
        raise ValueError(f"--judge-url must not hold a password: put the server's key into the variable {KEY}")
    usable = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 0) < 2**16
    if not usable or parsed.query or parsed.fragment:
        raise ValueError(f"--judge-url {url!r} is no server's address: such as http://localhost:8000/v1 would do")
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def key(root: str) -> str:
    """The key of the server at `root`; empty where there is none.

    Raises ValueError for one that no header can carry, and where anybody on the way could read it.
    """
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"the environment variable {KEY} holds characters that are in no key")
    if key and httpx.URL(root).scheme != "https" and not is_loopback(root):
        raise ValueError(
            f"the key in {KEY} would go to {httpx.URL(root).host} over plain http, where others can read it: give an "
            "https --judge-url, reach the server through a tunnel to localhost, or unset the variable"
        )
    return key


def client(root: str, secret: str) -> httpx.Client:
    """Speaks to the server at `root`, with `secret` as bearer token where there is one."""
    headers = {"Content-Type": "application/json"}
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    # What stands on this machine is not asked for through a proxy. Every request opens a socket: see `_Deadline`.
    alone = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(headers=headers, follow_redirects=False, trust_env=not is_loopback(root), limits=alone)


def is_loopback(root: str) -> bool:
    """Whether the address is this machine's own."""
    host = httpx.URL(root).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def fetch(client: httpx.Client, method: str, url: str, seconds: float, content: bytes | None = None) -> Answer:
    """One answer, whole within `seconds` and LARGEST bytes. Raises httpx.HTTPError."""
    body = bytearray()
    with _Deadline(seconds) as deadline:
        told = {"trace": deadline.trace}
        with client.stream(method, url, content=content, timeout=seconds, extensions=told) as response:
            for part in response.iter_bytes():
                body += part
                if len(body) > LARGEST:
                    raise httpx.DecodingError(f"the server's answer is longer than {LARGEST} bytes")
        return Answer(response.status_code, response.headers.get("Retry-After", ""), bytes(body))


class _Deadline:
    """Hangs up when it is over: httpx times each part alone, and would wait without end for a byte now and then."""

    def __init__(self, seconds: float) -> None:
        self._timer = Timer(seconds, self._hang_up)
        self._timer.daemon = True
        self._lock = Lock()
        self._socket: socket | None = None
        self._over = False

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """What httpcore tells of a request as it goes on; the last socket that it opens is the one that counts."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            if self._over:
                self._hang_up()

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        # Whatever a socket says that was shut under its reader, and a body that seems to end there.
        if self._over and (error is None or isinstance(error, Exception)):
            raise httpx.ReadTimeout("") from error

    def _hang_up(self) -> None:
        with self._lock:
            self._over = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(SHUT_RDWR)


def in_words(error: httpx.HTTPError, seconds: float) -> str:
    """Why there is no answer, in one line; `seconds`: how long it was waited for."""
    said = " ".join(str(error).split()) or type(error).__name__
    match error:
        case httpx.TimeoutException():
            return f"timed out: no answer within {seconds:g} s"
        case httpx.ConnectError():
            return said
        case httpx.RemoteProtocolError():
            return f"the server's answer was cut off: {said}"
    return f"the connection was lost: {said}"


def asked_pause(retry_after: str) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date; None where it does not say."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(retry_after)
        return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
