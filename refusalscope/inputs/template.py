"""Chat templates: user text in, token ids and the role of every token out.

Roles are read off the model's own template, never a per-model constant. Special tokens inside the user's text are
tokenised as plain text, so no prompt can open a turn of its own.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

SENTINEL = "refusalscope-user-text"


class Role(IntEnum):
    """What a token position holds."""

    PADDING = 0
    HEADER = 1
    """BOS and all that the template writes before the user's text, a system block included."""
    INSTRUCTION = 2
    CLOSING = 3
    """Template tokens after the user's text, generation prompt included."""
    RESPONSE = 4


class Encoded(NamedTuple):
    """One rendered chat."""

    ids: list[int]
    roles: list[int]


class ChatTemplate:
    """Renders one user message (and optionally an answer) with a tokenizer's own chat template.

    Raises ValueError when the tokenizer has no template, is not a fast one, or its template does not show the user's
    text exactly once.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(f"{name} has no chat template: choose an instruction-tuned model that has one")
        if not tokenizer.is_fast:
            raise ValueError(f"{name} has a slow tokenizer without character offsets: save a tokenizer.json for it")
        self.tokenizer = tokenizer
        self.name = name
        parts = self._render(SENTINEL).split(SENTINEL)
        if len(parts) != 2:
            raise ValueError(f"the chat template of {name} shows the user's text {len(parts) - 1} times, not once")
        self._header, self._closing = parts
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._bos = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and tokenizer("a").input_ids[0] == self._bos

    def encode(self, text: str) -> Encoded:
        """Ids and roles of the prompt that asks `text`, up to and including the generation prompt, exactly one BOS."""
        rendered = self._render(text)
        if not (rendered.startswith(self._header) and rendered.endswith(self._closing)):
            raise ValueError(f"the chat template of {self.name} changes with the user's text {text[:60]!r}")
        instruction = rendered[len(self._header) : len(rendered) - len(self._closing)]
        if any(token in instruction for token in self._special):
            encoded = self._encode_pieces(instruction)
        else:
            encoded = self._encode_whole(rendered, len(instruction))
        return self._with_one_bos(encoded)

    def encode_response(self, text: str, end: int | None) -> list[int]:
        """Ids of an answer, special tokens in it taken as plain text, closed by the token `end` if given."""
        ids = self._ids(text, plain=True)
        return ids if end is None else [*ids, end]

    def _render(self, text: str) -> str:
        chat = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str, *, plain: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)

    def _encode_whole(self, rendered: str, length: int) -> Encoded:
        encoding = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        start, end = len(self._header), len(self._header) + length
        roles = [
            Role.HEADER if first < start else Role.CLOSING if first >= end else Role.INSTRUCTION
            for first, _ in encoding.offset_mapping
        ]
        return Encoded(list(encoding.input_ids), [int(role) for role in roles])

    def _encode_pieces(self, instruction: str) -> Encoded:
        header, closing = self._ids(self._header, plain=False), self._ids(self._closing, plain=False)
        middle = self._ids(instruction, plain=True)
        roles: Sequence[int] = [Role.HEADER] * len(header) + [Role.INSTRUCTION] * len(middle)
        return Encoded(header + middle + closing, [int(role) for role in [*roles, *[Role.CLOSING] * len(closing)]])

    def _with_one_bos(self, encoded: Encoded) -> Encoded:
        ids, roles = encoded
        if self._bos is None or not (self._adds_bos or self._bos in ids):
            return encoded
        if ids[0] != self._bos:
            ids, roles = [self._bos, *ids], [int(Role.HEADER), *roles]
        if ids.count(self._bos) != 1:
            raise ValueError(f"the chat template of {self.name} gives {ids.count(self._bos)} BOS tokens, not one")
        return Encoded(ids, roles)
