"""What a judge's model runs on: text in, a reply out, whichever engine it is."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Reply(NamedTuple):
    """What a model said to one request, or why it said nothing."""

    text: str
    probabilities: Mapping[str, float]
    """Choice -> probability that the first word is that one (case and white space aside); empty where not known."""
    fault: str = ""
    """Why there is no reply; empty where there is one."""
    final: bool = True
    """False: the same request may fare better later."""


Message = Mapping[str, str]
"""`role` and `content`."""


@runtime_checkable
class Engine(Protocol):
    """Greedy replies, one per request in order. A request that fails is a reply with a fault, never an exception."""

    def complete(self, texts: Sequence[str], *, choices: Sequence[str], tokens: int) -> list[Reply]:
        """Continue each text by at most `tokens` tokens; over-long texts lose their beginning."""
        ...

    def converse(
        self,
        chats: Sequence[Sequence[Message]],
        *,
        choices: Sequence[str],
        tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Reply]:
        """Answer each chat under the model's own template; `schema` is a JSON schema for the answer."""
        ...


def is_word(token: str) -> bool:
    """Whether a token can be the first word of a reply: white space, quotes and other marks cannot."""
    return any(letter.isalnum() for letter in token)
