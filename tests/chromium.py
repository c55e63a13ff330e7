"""Headless Chromium over its own DevTools pipe: opens a page at a width, notes what goes wrong, answers scripts.

No driver, no port and no package: messages are JSON ended by a zero byte on descriptors 3 and 4.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
PATIENCE = 60.0
"""Seconds to wait for one message: a page has loaded long before."""


class Chromium:
    """One browser with one page in it. Every call raises TimeoutError when the browser says nothing for a minute."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self.events: list[dict[str, Any]] = []
        """Everything the browser reported by itself, in order."""
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command. Raises RuntimeError with the browser's message when it is refused."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = next(said for said in self._messages() if said.get("id") == self._number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, file: Path, width: int) -> None:
        """Load a file in a window of this width, and wait until all of it is there."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=file.as_uri())
        if not self.said("Page.loadEventFired"):
            next(said for said in self._messages() if said.get("method") == "Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """What an expression comes to in the page. Raises RuntimeError when it throws."""
        made = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in made:
            raise RuntimeError(str(made["exceptionDetails"]))
        return made["result"].get("value")

    def said(self, method: str) -> list[dict[str, Any]]:
        """The events of one kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._rest:
                if not select.select([self._read], [], [], PATIENCE)[0]:
                    raise TimeoutError(f"Chromium said nothing for {PATIENCE:.0f} seconds")
                if not (received := os.read(self._read, 1 << 16)):
                    raise RuntimeError("Chromium ended")
                self._rest += received
            line, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(line)
            if "method" in message:
                self.events.append(message)
            yield message


@contextlib.contextmanager
def chromium(binary: str, profile: Path) -> Iterator[Chromium]:
    """A browser with an empty profile of its own, ended afterwards."""
    ends = [*_pipe(), *_pipe()]
    theirs = (ends[0], ends[3])
    # A shell puts the two ends where the browser looks for them; bash, since dash knows no descriptor above 9.
    place = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    process = subprocess.Popen(
        ["bash", "-c", place, "bash", binary, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for end in theirs:
            os.close(end)
        yield Chromium(ends[1], ends[2])
    finally:
        os.close(ends[1])  # the browser ends with its pipe
        os.close(ends[2])
        _end(process)


def _pipe() -> Sequence[int]:
    """A pipe whose ends lie above the descriptors that the browser needs."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return high


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
