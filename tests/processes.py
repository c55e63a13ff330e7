"""Real `refusalscope` processes that start at once, and what can befall them: signals, full disks, lost rights.

Each is forked from a server that has loaded the libraries, runs the real entry point, and can be killed like any other.
"""

import ctypes
import hashlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
Prepare = Callable[[], None]


class Ended(NamedTuple):
    """How a process ended and what it had said, its plan of memory aside."""

    code: int
    out: str
    err: str


def without_plan(said: str) -> str:
    """What a command said on standard error beside the plan that a new run begins with."""
    return re.sub(r"\Amemory for .+\n(  .+\n)+", "", said)


class Running:
    """A process under way; its output goes to files beside each other in `folder`."""

    def __init__(self, words: list[str], folder: Path, prepare: Prepare | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.said = folder / "out", folder / "err"
        self.process = _server().Process(target=_main, args=(words, self.said, prepare))
        self.process.start()

    def until(self, seen: Callable[[], bool]) -> "Running":
        """Wait until something is to be seen, or the process has ended."""
        while self.process.is_alive() and not seen():
            time.sleep(0.01)
        return self

    def send(self, number: int) -> "Running":
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self

    def end(self) -> Ended:
        """Wait for the end. The bound is for a process that hangs, not for how long it may take."""
        self.process.join(1800)
        assert self.process.exitcode is not None, "the process hangs"
        out, err = (file.read_text() for file in self.said)
        return Ended(self.process.exitcode, out, without_plan(err))


def run(words: list[str], folder: Path, prepare: Prepare | None = None) -> Ended:
    return Running(words, folder, prepare).end()


def _server() -> ForkServerContext:
    # The server is another interpreter: it finds the tests by this alone.
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _main(words: list[str], said: tuple[Path, Path], prepare: Prepare | None) -> None:
    from refusalscope.__main__ import main

    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["refusalscope", *words]
    if prepare is not None:
        prepare()
    main()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(seconds: float) -> None:
    """Be killed at some moment, whatever is going on."""
    threading.Timer(seconds, die).start()


def die_at_write(number: int, seconds: float | None = None) -> None:
    """Be killed inside the write of this number, the new bytes beside the old ones; or so many seconds after it."""
    writes = count(1)

    def hear(event: str, _arguments: object) -> None:
        if event == "os.rename" and next(writes) == number:
            die() if seconds is None else die_after(seconds)

    sys.addaudithook(hear)


def no_file_above(size: int) -> None:
    """As on a full disk: writing fails once a file would grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_memory_above(more: int) -> None:
    """Address space for `more` bytes beside what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def no_rights() -> None:
    """Permissions bind even root."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0, ctypes.get_errno()


def deaf(begun: Path) -> None:
    """Hear no exception for minutes: the hash is computed in C, which looks at no signal."""
    from refusalscope.__main__ import LAST_WORDS
    from refusalscope.core import interrupt

    with interrupt.obeyed(LAST_WORDS):
        begun.touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def full_disk(folder: Path) -> None:
    """Have the folder on a disk of this process alone, with no room left. Ends with code 77 where that is forbidden."""
    libc = ctypes.CDLL(None)
    kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    alone = libc.unshare(0x00020000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
    if not (alone and libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=16m") == 0):
        os._exit(77)
    for file, content in kept.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
