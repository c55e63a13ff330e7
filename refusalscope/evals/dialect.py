"""How OpenAI-compatible servers are asked, and how their answers read: forms of a request, bytes to a reply. Pure.

Servers differ in the fields they take and in how they write log-probabilities: vLLM as OpenAI does, llama.cpp as chats
do even for completions, `transformers serve` not at all. Nothing here fails on what a server says.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refusalscope.evals.engines import Reply, is_word

Form = Mapping[str, Any]
"""The fields of a request that not every server takes."""
ALTERNATIVES = 20
"""First tokens that a server is asked about; OpenAI's own completions give five."""
LONGEST_REASON = 300
"""Characters."""


def completion_forms(tokens: int) -> list[Form]:
    """Ways to ask for a completion of `tokens` tokens, the one that tells most first."""
    told = [{"logprobs": ALTERNATIVES}, {"logprobs": 5}, {}]
    return [{"max_tokens": tokens, **form} for form in told]


def chat_forms(tokens: int, schema: Mapping[str, Any] | None) -> list[Form]:
    """Ways to ask for an answer to a chat: without log-probabilities, then with less of the schema, then renamed."""
    told: Form = {"logprobs": True, "top_logprobs": ALTERNATIVES}
    shapes = [told, {}]
    if schema is not None:
        named = {"name": "answer", "strict": True, "schema": schema}
        exact = {"response_format": {"type": "json_schema", "json_schema": named}}
        shapes = [{**told, **exact}, exact, {"response_format": {"type": "json_object"}}, {}]
    return [{limit: tokens, **shape} for limit in ("max_tokens", "max_completion_tokens") for shape in shapes]


def reply(content: bytes, choices: Sequence[str], *, json_within: int | None = None) -> Reply:
    """What the body of a server's answer says. `json_within`: the answer is JSON of at most so many tokens.

    A body that does not say it is a reply with a fault.
    """
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return failed(f"the server's answer is no JSON: {line(content)}" if content else "the server's answer is empty")
    match said:
        case {"choices": [{"message": {"content": str(text)}} | {"text": str(text)} as choice, *_]}:
            pass
        case {"choices": [{"finish_reason": finish}, *_]}:
            return failed(f"the server's answer holds no text (finish_reason {line(str(finish))})")
        case _:
            return failed(f"the server's answer has no choices: {line(content)}")
    if json_within is not None and choice.get("finish_reason") == "length" and not _is_json(text):
        return failed(f"the judge's answer was cut off at {json_within} tokens")
    return Reply(_storable(text), probabilities(choice.get("logprobs"), choices))


def failed(fault: str) -> Reply:
    """A reply that may come later."""
    return Reply("", {}, fault, final=False)


def line(said: str | bytes) -> str:
    """One short line of what somebody said."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    text = " ".join(_storable(text).split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def probabilities(logprobs: Any, choices: Sequence[str]) -> dict[str, float]:
    """Choice -> probability that it is the first word generated; empty where the server does not tell.

    The first token with a letter or digit in it counts; every alternative that reads as the choice adds to it.
    """
    for token, alternatives in _positions(logprobs):
        if is_word(token):
            found = dict.fromkeys(choices, 0.0)
            for text, logprob in alternatives:
                for choice in choices:
                    if text.strip().casefold() == choice.strip().casefold():
                        found[choice] += _probability(logprob)
            return {choice: min(1.0, p) for choice, p in found.items()} if alternatives else {}
    return {}


def _positions(logprobs: Any) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Each generated token with its alternatives, up to the first that is not understood."""
    match logprobs:
        case {"content": [*places]}:
            for place in places:
                match place:
                    case {"token": str(token), "top_logprobs": top}:
                        yield token, _alternatives(top)
                    case _:
                        return
        case {"tokens": [*tokens], "top_logprobs": [*tops]}:
            for token, top in zip(tokens, tops, strict=False):
                if not isinstance(token, str):
                    return
                yield token, _alternatives(top)


def _alternatives(top: Any) -> list[tuple[str, Any]]:
    match top:
        case dict():
            return [(str(text), logprob) for text, logprob in top.items()]
        case list():
            return [(one["token"], one["logprob"]) for one in top if _is_alternative(one)]
    return []


def _is_alternative(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("token"), str) and "logprob" in one


def _probability(logprob: Any) -> float:
    """Of a natural logarithm; 0 where it is none."""
    known = isinstance(logprob, int | float) and not isinstance(logprob, bool) and logprob <= 1e-3
    return math.exp(max(logprob, -1e4)) if known else 0.0


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _storable(text: str) -> str:
    """Half of a surrogate pair, which JSON can spell, cannot be written to a file."""
    return text.encode(errors="replace").decode()
