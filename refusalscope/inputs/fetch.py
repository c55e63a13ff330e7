"""Download a prompt collection at its pinned commit: every file checked, nothing half-written."""

import hashlib
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from refusalscope.core.disk import write_atomically


def sources() -> dict[str, Any]:
    """The collections that can be fetched, by name."""
    return tomllib.loads((files("refusalscope.inputs") / "sources.toml").read_text("utf-8"))


def fetch(name: str, folder: Path, *, url: str | None = None, progress: Callable[[str, int, int], None]) -> None:
    """Download collection `name` into `folder`; files that are there with the right checksum are kept.

    `url` overrides where the files are served from. Raises ValueError when a file cannot be had or its checksum is
    wrong; the files before it stay and are not downloaded again.
    """
    import httpx

    known = sources()
    if name not in known:
        raise ValueError(f"unknown collection {name!r}: there are {sorted(known)}")
    expected: dict[str, str] = known[name]["sha256"]
    base = (url or known[name]["url"]).rstrip("/")
    with httpx.Client(follow_redirects=True, timeout=60) as client:
        for done, (path, checksum) in enumerate(expected.items()):
            progress(f"fetching {name}", done, len(expected))
            target = folder / path
            if target.is_file() and _sha256(target.read_bytes()) == checksum:
                continue
            try:
                content = client.get(f"{base}/{path}").raise_for_status().content
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"cannot download {base}/{path}: {reason}") from error
            if (found := _sha256(content)) != checksum:
                raise ValueError(f"{base}/{path} has sha256 {found[:12]}, expected {checksum[:12]}: not kept")
            write_atomically(target, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
