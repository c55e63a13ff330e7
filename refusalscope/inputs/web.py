"""One answer of one HTTP server: whole within a set time and of bounded size, or an error. Knows of no service."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR, socket
from threading import Lock, Thread, Timer
from typing import Any, NamedTuple, TypeVar

import httpx

T = TypeVar("T")
LARGEST = 2**24
"""Bytes of an answer."""


class Answer(NamedTuple):
    """What a server says."""

    status: int
    retry_after: str
    content: bytes


def is_loopback(root: str) -> bool:
    """Whether the address is this machine's own."""
    host = httpx.URL(root).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Line:
    """The connection that a client holds to its server, from one request to the next."""

    def __init__(self) -> None:
        self.socket: socket | None = None


def fetch(
    client: httpx.Client,
    method: str,
    url: str,
    seconds: float,
    content: bytes | None = None,
    *,
    largest: int = LARGEST,
    line: Line | None = None,
) -> Answer:
    """One answer, whole within `seconds` from the connection on, and within `largest` bytes. Raises httpx.HTTPError.

    A client that keeps its connection alive, and asks one thing at a time, is given the same `line` in every call.
    """
    body = bytearray()
    with _Deadline(seconds, Line() if line is None else line) as deadline:
        told = {"trace": deadline.trace}
        with client.stream(method, url, content=content, timeout=seconds, extensions=told) as response:
            for part in response.iter_bytes():
                body += part
                if len(body) > largest:
                    raise httpx.DecodingError(f"the server's answer is longer than {largest} bytes")
        return Answer(response.status_code, response.headers.get("Retry-After", ""), bytes(body))


class _Deadline:
    """Hangs up when it is over: httpx times each part alone, and would wait without end for a byte now and then."""

    def __init__(self, seconds: float, line: Line) -> None:
        self._timer = Timer(seconds, self._hang_up)
        self._timer.daemon = True
        self._lock = Lock()
        self._line = line
        self._over = False

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """What httpcore tells of a request as it goes on; the last socket that it opens is the one that counts."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                self._line.socket = info["return_value"].get_extra_info("socket")
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
            if self._line.socket is not None:
                with suppress(OSError):
                    self._line.socket.shutdown(SHUT_RDWR)


def promptly(seconds: float, do: Callable[[], T]) -> T:
    """`do()`, waited for `seconds` at most: looking up a name and trying its addresses one by one hear no deadline.

    Raises httpx.ConnectTimeout then, and leaves a thread behind that ends by itself or with the process.
    """
    made: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def work() -> None:
        try:
            made.put((do(), None))
        except BaseException as error:
            made.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        value, error = made.get(timeout=seconds)
    except Empty:
        raise httpx.ConnectTimeout("") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


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
