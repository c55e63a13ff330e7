"""What others wrote about features: Neuronpedia's explanations, for SAEs that it shows, kept on this disk once read.

`GET /api/feature/{model}/{source}/{index}` answers with an object whose `explanations` each have a `description`
(https://docs.neuronpedia.org/api-and-data/api). It is asked politely (one connection, one thing at a time, a few
requests a second) and for no longer than LIMITS says; whatever goes wrong is a reason, never an error.
"""

import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import httpx

from refusalscope import __version__
from refusalscope.core.disk import write_atomically
from refusalscope.core.types import Feature
from refusalscope.inputs import web

SITE = "https://www.neuronpedia.org"
ADDRESS, KEY, CACHE = "REFUSALSCOPE_NEURONPEDIA_URL", "NEURONPEDIA_API_KEY", "REFUSALSCOPE_CACHE"
"""Environment variables: another server that answers in the same form, a key for it, where labels are kept."""
LONGEST = 200
"""Characters of a label."""
LARGEST = 2**22
"""Bytes of an answer, which holds far more than explanations."""
FAULTS = 3
"""Answers in a row that cannot be used, after which no more are asked for."""
OFFLINE = "this run was offline"
UNREACHABLE = "Neuronpedia could not be reached"
BUSY = "Neuronpedia asked not to be asked so often"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_TRUE = ("1", "ON", "YES", "TRUE")


class Limits(NamedTuple):
    """How long Neuronpedia is waited for, in seconds."""

    whole: float = 30.0
    """For all labels of one command."""
    answer: float = 5.0
    """For one answer; a server that is later than that is not asked again."""
    pause: float = 0.25
    """From one request to the next."""


LIMITS = Limits()


class Found(NamedTuple):
    """What came of asking."""

    labels: Mapping[Feature, str | None]
    """None: Neuronpedia has no explanation. A feature that is missing here was not answered."""
    reason: str
    """Why some were not answered, as a clause; empty: all were."""


class _Fault(Exception):
    """This one feature has no usable answer."""


class _Enough(Exception):
    """No further one is asked for."""


def is_name(text: object) -> bool:
    """Whether `text` can be Neuronpedia's name of an SAE: model/source, nothing that would lead elsewhere."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def page(name: str, index: int) -> str:
    """The address of a feature's page, for people."""
    return f"{SITE}/{quote(name, safe='/')}/{index}"


def look_up(
    names: Mapping[int, str],
    features: Sequence[Feature],
    *,
    limits: Limits = LIMITS,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> Found:
    """Labels of the features whose layer has a name in `names`: those on this disk, then Neuronpedia's, in this order.

    Never raises for a server, a network or a disk; offline it makes no request. `progress` hears (asked, to ask).
    """
    named = {feature: names[feature.layer] for feature in features if is_name(names.get(feature.layer))}
    root = (os.environ.get(ADDRESS, "").strip() or SITE).rstrip("/")
    places = {feature: _place(root, name, feature.index) for feature, name in named.items()}
    labels = {feature: kept[0] for feature, place in places.items() if (kept := _kept(place)) is not None}
    missing = [feature for feature in named if feature not in labels]
    reason = ""
    if missing and _offline():
        return Found(labels, OFFLINE)
    if missing:
        until = time.monotonic() + limits.whole
        try:
            with _client(root) as client:
                asker = _Asker(client, root, limits, until)
                for done, feature in enumerate(missing):
                    progress(done, len(missing))
                    try:
                        labels[feature] = asker.label(named[feature], feature.index)
                    except _Fault as fault:
                        reason = str(fault)
                    else:
                        _keep(places[feature], labels[feature])
        except _Enough as enough:
            reason = str(enough)
    return Found(labels, reason)


class _Asker:
    """Asks for one feature after the other over one connection."""

    def __init__(self, client: httpx.Client, root: str, limits: Limits, until: float) -> None:
        self._client, self._root, self._limits, self._until = client, root, limits, until
        self._line = web.Line()
        self._next = 0.0
        self._faults = 0

    def label(self, name: str, index: int) -> str | None:
        """The explanation of one feature, None where there is none. Raises _Fault or _Enough, each with its reason."""
        said = self._ask(name, index)
        if said.status == 429:
            pause = web.asked_pause(said.retry_after)
            if pause is None or time.monotonic() + pause >= self._until:
                raise _Enough(BUSY)
            self._next = max(self._next, time.monotonic() + pause)
            said = self._ask(name, index)
        if said.status == 429:
            raise _Enough(BUSY)
        try:
            label = _label(said, index)
        except _Fault as fault:
            self._faults += 1
            if self._faults == FAULTS:
                raise _Enough(str(fault)) from None
            raise
        self._faults = 0
        return label

    def _ask(self, name: str, index: int) -> web.Answer:
        url = f"{self._root}/api/feature/{quote(name, safe='/')}/{index}"
        left = self._until - max(time.monotonic(), self._next)
        if left <= 0:
            raise self._over()
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self._limits.pause
        seconds = min(self._limits.answer, left)
        try:
            return web.promptly(
                seconds, lambda: web.fetch(self._client, "GET", url, seconds, largest=LARGEST, line=self._line)
            )
        except httpx.ConnectError:
            raise _Enough(UNREACHABLE) from None
        except httpx.TimeoutException:
            late = _Enough(f"Neuronpedia did not answer within {self._limits.answer:g} s")
            raise (late if seconds == self._limits.answer else self._over()) from None
        except httpx.DecodingError:
            raise _Enough("Neuronpedia’s answer was too long or garbled") from None
        except (httpx.HTTPError, OSError):
            raise _Enough("the connection to Neuronpedia was lost") from None

    def _over(self) -> _Enough:
        return _Enough(f"the {self._limits.whole:g} s that a command has for labels were over")


def _client(root: str) -> httpx.Client:
    """Raises _Enough for an address or a key that cannot be used."""
    try:
        url = httpx.URL(root)
        url.host.encode("idna")
        local = web.is_loopback(root)
    except (httpx.InvalidURL, UnicodeError):
        url, local = httpx.URL(), False
    usable = url.scheme in ("http", "https") and url.host and (url.port or 0) < 2**16
    if not usable or url.userinfo or url.query or url.fragment:
        raise _Enough(f"{ADDRESS} holds no server’s address")
    headers = {"Accept": "application/json", "User-Agent": f"refusalscope/{__version__}"}
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise _Enough(f"{KEY} holds characters that are in no key")
    if key and url.scheme == "https":
        headers["x-api-key"] = key
    try:
        # What stands on this machine is not asked for through a proxy, and over plain http needs no certificates.
        verify = url.scheme == "https" or not local
        return httpx.Client(headers=headers, follow_redirects=False, trust_env=not local, verify=verify)
    except (ValueError, OSError, ImportError):
        raise _Enough("this user’s proxy or certificates are set to what cannot be used") from None


def _label(said: web.Answer, index: int) -> str | None:
    """The first explanation that says anything. Raises _Fault for an answer in another form, or about another feature.

    A feature that Neuronpedia does not know is `null`, or status 404 with JSON.
    """
    if said.status not in (200, 404):
        raise _Fault(f"Neuronpedia answered with HTTP status {said.status}")
    unreadable = _Fault("Neuronpedia’s answer could not be read")
    try:
        data = json.loads(said.content)
    except (ValueError, RecursionError):
        raise unreadable from None
    if data is None or said.status == 404:
        return None
    if not isinstance(data, dict) or str(data.get("index", index)) != str(index):
        raise unreadable
    explanations = data.get("explanations")
    if not isinstance(explanations, list):
        raise unreadable
    texts = [item.get("description") for item in explanations if isinstance(item, dict)]
    return next((label for text in texts if isinstance(text, str) and (label := plain(text))), None)


def plain(text: str) -> str:
    """Somebody's text on one line of at most LONGEST characters, without control, format and unassigned ones."""
    visible = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    visible = "".join(letter for letter in visible if not unicodedata.category(letter).startswith("C"))
    line = " ".join(visible.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip() + "…"


def _offline() -> bool:
    """Whether the user's environment says so, as it does to the Hugging Face libraries."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _TRUE


def _place(root: str, name: str, index: int) -> Path | None:
    """Where a label is kept, by the server that gave it; None where this user has no folder for such things."""
    own = os.environ.get(CACHE, "").strip()
    above = own or os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.expanduser("~/.cache")
    if not own and not os.path.isabs(above):
        return None
    folder = Path(above) / ("" if own else "refusalscope") / "neuronpedia"
    return folder / quote(root, safe="", errors="surrogateescape") / name / f"{index}.json"


def _kept(place: Path | None) -> tuple[str | None] | None:
    """What was kept there, which may be that there is no label; None where nothing is, or nothing that can be read."""
    if place is None:
        return None
    try:
        label = json.loads(place.read_bytes())["label"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if label is None:
        return (None,)
    return (plain(label) or None,) if isinstance(label, str) else None


def _keep(place: Path | None, label: str | None) -> None:
    # A disk that is full or read-only costs asking again, not the run.
    with suppress(OSError):
        if place is not None:
            write_atomically(place, (json.dumps({"label": label}) + "\n").encode())
