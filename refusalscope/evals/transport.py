"""Speaks to the host that the user named and to no other: its address, its key, the words for what goes wrong.

Knows HTTP, nothing of judges; one answer in time is `inputs/web.py`.
"""

import os

import httpx

from refusalscope.inputs.web import is_loopback

KEY = "REFUSALSCOPE_JUDGE_KEY"
"""The environment variable that holds the server's API key."""


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
    # What stands on this machine is not asked for through a proxy. Every request opens a socket: see `web.Line`.
    alone = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(headers=headers, follow_redirects=False, trust_env=not is_loopback(root), limits=alone)


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
