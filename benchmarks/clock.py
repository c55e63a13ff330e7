"""A clock at the functions that a program is made of, and one look at when its model is first run."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

REST = "the rest"
"""What belongs to no part."""


class Clock:
    """Seconds by part; what is done inside another part counts as its own alone."""

    def __init__(self) -> None:
        self.first_pass: float | None = None
        """When the model was first run, by `time.time`."""
        self._seconds: dict[str, float] = {}
        self._inside = [REST]
        self._since = time.perf_counter()

    def around(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """`do`, clocked."""

        def clocked(*given: Any, **named: Any) -> Any:
            self._turn()
            self._inside.append(name)
            try:
                return do(*given, **named)
            finally:
                self._turn()
                self._inside.pop()

        return clocked

    def stop(self) -> dict[str, float]:
        """What was found, what belongs to no part last."""
        self._turn()
        rest = self._seconds.pop(REST)
        return {**self._seconds, REST: rest}

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self._inside[-1]] = self._seconds.get(self._inside[-1], 0.0) + now - self._since
        self._since = now


def watch_first_pass(clock: Clock, *, stop: bool) -> None:
    """Note when a model with weights is first run, the plan's model has none; with `stop`, end the process there."""
    from torch import nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    def note(module: nn.Module, _inputs: Any) -> None:
        weight = next(module.parameters(), None)
        if weight is None or weight.is_meta:
            return
        clock.first_pass = time.time()
        if stop:
            sys.stderr.flush()
            os._exit(0)
        watching.remove()

    watching = register_module_forward_pre_hook(note)
