"""A user's own judge: `module:function`, a Python function of prompts and answers.

It runs code, so its name comes from the command line alone, never from a file.
"""

import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from refusalscope.core.types import NaN, Verdict
from refusalscope.evals.checkpoints import first_line
from refusalscope.evals.judges import Exchange, Score
from refusalscope.inputs.releases import did_you_mean


class Found(NamedTuple):
    """A function, and what its verdicts depend on."""

    function: Callable[..., Any]
    """(prompts, answers) -> a yes, a no, None or a number from 0 to 1 for each."""
    about: Mapping[str, str]


def find(name: str) -> Found:
    """The function that `module:function` names. Raises ValueError, one line, when it cannot be imported."""
    module_name, _, function_name = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        # For good: what the module imports later lies beside it too.
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except Exception as error:
        # Whatever a user's module raises.
        raise ValueError(
            f"judge {name}: cannot import {module_name}: {type(error).__name__}: {first_line(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"judge {name}: {module_name} has no function {function_name!r}. {did_you_mean(function_name, there)}"
        )
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    return Found(function, {"function": name, "source": digest, "engine": "function"})


def score(found: Found) -> Score:
    """The function as a judge: what it raises, or answers wrongly, leaves its exchanges unscored."""

    def scored(exchanges: Sequence[Exchange]) -> list[Verdict]:
        prompts = [exchange.prompt.text for exchange in exchanges]
        answers = [exchange.response.text for exchange in exchanges]
        try:
            said = list(found.function(prompts, answers))
            if len(said) != len(exchanges):
                return _unscored(exchanges, f"{len(said)} verdicts for {len(exchanges)} answers")
            return [_verdict(exchange.prompt.id, one) for exchange, one in zip(exchanges, said, strict=True)]
        except Exception as error:
            # Whatever a user's function raises, and whatever its values do when they are read.
            return _unscored(exchanges, f"{type(error).__name__}: {first_line(error)}")

    return scored


def _verdict(prompt_id: str, said: Any) -> Verdict:
    value = said.item() if hasattr(said, "item") else said  # numpy's and torch's numbers
    if value is None:
        return Verdict(prompt_id, NaN, reason="the function says nothing")
    if isinstance(value, bool):
        return Verdict(prompt_id, float(value), reason="yes" if value else "no")
    if isinstance(value, int | float) and not math.isnan(value) and 0 <= value <= 1:
        return Verdict(prompt_id, float(value >= 0.5), float(value), f"{value:.3f}")
    return Verdict(prompt_id, NaN, reason=f"neither a yes, a no nor a number from 0 to 1: {value!r}"[:200], final=False)


def _unscored(exchanges: Sequence[Exchange], reason: str) -> list[Verdict]:
    return [Verdict(exchange.prompt.id, NaN, reason=reason, final=False) for exchange in exchanges]
