"""Ctrl-C and SIGTERM end the process within two seconds, whatever it is doing, with a line that says how to go on.

The main thread is asked first, by an exception, so that it lets go of what it holds. A long call into C hears no
exception; then a thread that the signal wakes ends the process. Nothing is lost either way: every write is atomic.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.5
"""Seconds that the main thread has."""
SHOW_CURSOR = "\x1b[?25h"


class Stopped(BaseException):
    """Raised in the main thread by a signal. No Exception: nobody on the way may take it for a fault of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def obeyed(last_words: str) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM ends the process with `last_words` on standard error, code 130 or 143."""
    awake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(awake, last_words), daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, _raise)
    try:
        yield
    except Stopped as stopped:
        _end(stopped.number, last_words)


def _raise(number: int, _frame: Any) -> None:
    for known in SIGNALS:
        signal.signal(known, signal.SIG_IGN)
    raise Stopped(number)


def _watch(awake: int, last_words: str) -> None:
    number = os.read(awake, 1)[0]
    time.sleep(GRACE)
    if sys.stderr.isatty():
        # A progress bar hides it, and had no time to show it again.
        last_words = f"{SHOW_CURSOR}\n{last_words}"
    _end(number, last_words)


def _end(number: int, last_words: str) -> None:
    os.write(2, f"{last_words}\n".encode())
    os._exit(128 + number)
