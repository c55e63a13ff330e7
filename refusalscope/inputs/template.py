"""Chat templates: user text in, token ids and the role of every token out.

Roles are read off the model's own template, never a per-model constant. Special tokens inside the user's text are
tokenised as plain text, so no prompt can open a turn of its own. Prompts are rendered with reasoning skipped, so that
what follows is the first token of an answer; answers are asked for in the mode that `ChatStyle.thinking` names.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import dropwhile, takewhile
from typing import Any, Literal, NamedTuple

from refusalscope.core.types import Response

REMEMBERED = 2048
"""Chats that a template keeps as tokens, those asked for last: 3 kB each where they are 64 tokens."""
SENTINEL = "refusalscope-user-text"
SYSTEM_SENTINEL = "refusalscope-system-text"
ANSWER_SENTINEL = "refusalscope-answer-text"
DATE = datetime(2024, 7, 26)
"""What templates that stamp the day are told, so that a run renders the same whenever it is made."""
CLOCK = "strftime_now"
"""The function by which they ask. Renderers take plain data only, so ours is a macro written before the template."""
FORMS = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdeFHIjmMpSTuwyY"))
CLOCK_MACRO = "{% macro strftime_now(form) %}{{ form CHANGES }}{% endmacro %}\n".replace(
    "CHANGES", " ".join(f"| replace('{form}', '{DATE.strftime(form)}')" for form in FORMS)
)
SWITCH = "enable_thinking"
"""The variable by which templates switch reasoning on and off."""

Thinking = Literal["off", "on"]


@dataclass(frozen=True)
class ChatStyle:
    """How chats are rendered."""

    system: str | None = None
    """The system prompt; None leaves it to the template."""
    thinking: Thinking = "off"
    """Whether a reasoning model reasons before it answers."""
    template: str | None = None
    """Jinja text used in place of the tokenizer's own template."""


class Marks(NamedTuple):
    """How one kind of reasoning model sets its reasoning apart from its answer."""

    opens: str
    ends: str
    """Written after the reasoning, before what opens the answer."""
    answers: str
    """Opens the answer."""
    before: str
    """A generation prompt that ends so leaves it to the model to reason."""
    skip: str
    """What such a prompt has to go on with for the answer to come at once."""


MARKS = (
    Marks("<think>", "", "</think>", before="<think>", skip="\n</think>\n\n"),
    Marks("<|channel>thought", "", "<channel|>", before="<|channel>thought", skip="\n<channel|>"),
    Marks(
        opens="<|channel|>analysis<|message|>",
        ends="<|end|><|start|>assistant",
        answers="<|channel|>final<|message|>",
        before="<|start|>assistant",
        skip="<|channel|>final<|message|>",
    ),
)


class Role(IntEnum):
    """What a token position holds."""

    PADDING = 0
    HEADER = 1
    """BOS and all that the template writes before the user's text, a system prompt included."""
    INSTRUCTION = 2
    CLOSING = 3
    """Template tokens after the user's text, generation prompt included."""
    RESPONSE = 4


class NotOneBos(ValueError):
    """A chat opens with more than one BOS, or with none where the tokenizer has one to open it with."""


class Encoded(NamedTuple):
    """One rendered chat."""

    ids: list[int]
    roles: list[int]


class Frame(NamedTuple):
    """What a template writes around the user's text."""

    header: str
    closing: str
    appended: str
    """The end of `closing` that is ours: it skips reasoning where the template itself cannot."""


class ChatTemplate:
    """Renders one user message (and optionally an answer) with a tokenizer's own chat template, or that of `style`.

    `about` says what was fixed in doing so. Raises ValueError when there is no template, it cannot be rendered or does
    not show the user's text exactly once, the tokenizer is not a fast one, the system prompt holds special tokens, or
    reasoning is asked of a template that knows none.
    """

    def __init__(self, tokenizer: Any, name: str, style: ChatStyle | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.style = style or ChatStyle()
        if self.style.template is None and tokenizer.chat_template is None:
            raise ValueError(f"{name} has no chat template: choose an instruction-tuned model, or give a template")
        if not tokenizer.is_fast:
            raise ValueError(f"{name} has a slow tokenizer without character offsets: save a tokenizer.json for it")
        self.about: dict[str, str] = {}
        # A run of the testbed asks 29,000 times for 4,000 chats: 3.4 s of its three minutes.
        self._remembered = lru_cache(REMEMBERED)(self._encode)
        source: str = tokenizer.get_chat_template(self.style.template)
        self._source = CLOCK_MACRO + source if CLOCK in source else source
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._bos = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and tokenizer("a").input_ids[0] == self._bos
        self._folds_system = not self._takes_system()
        self._check_system()
        self._marks = self._reasoning_marks()
        self._frames = {thinking: self._frame(thinking) for thinking in dict.fromkeys(("off", self.style.thinking))}
        self.end_of_turn = self._end_of_turn()
        self._record()

    def encode(self, text: str, *, thinking: Thinking = "off") -> Encoded:
        """Ids and roles of the prompt that asks `text`, up to and including the generation prompt, exactly one BOS.

        To be read and not changed: whoever asks for the same again gets the same.
        """
        return self._remembered(text, thinking)

    def _encode(self, text: str, thinking: Thinking) -> Encoded:
        header, closing, appended = self._frames[thinking]
        rendered = self._render(text, thinking) + appended
        if not (rendered.startswith(header) and rendered.endswith(closing)):
            raise ValueError(f"the chat template of {self.name} changes with the user's text {text[:60]!r}")
        instruction = rendered[len(header) : len(rendered) - len(closing)]
        if any(token in instruction for token in self._special):
            encoded = self._encode_pieces(header, instruction, closing)
        else:
            encoded = self._encode_whole(rendered, len(header), len(header) + len(instruction))
        return self._with_one_bos(encoded)

    def length(self, text: str) -> int:
        """Tokens of the prompt that asks `text`, in the longer of the ways it is asked: with reasoning, or without."""
        modes: set[Thinking] = {"off", self.style.thinking}
        return max(len(self.encode(text, thinking=mode).ids) for mode in modes)

    def encode_text(self, text: str) -> list[int]:
        """Ids of text outside any chat, special tokens in it taken as plain; after BOS where chats open with it."""
        return [*self.opening, *self._ids(text, plain=True)]

    def encode_rendered(self, chat: str) -> list[int]:
        """Ids of a chat that `render` wrote, or of its beginning: one BOS opens it, or none where chats have none."""
        ids = self._ids(chat, plain=False)
        return [*self.opening, *dropwhile(lambda token: token in self.opening, ids)]

    def render(self, messages: Sequence[Mapping[str, str]], *, thinking: Thinking = "off") -> str:
        """Any chat (`role`, `content`) as the template writes it, up to and including the generation prompt.

        A system message stands in place of the style's and goes where that would; a last message of the assistant's is
        left open, to be gone on with. Raises ValueError, one line, when the template does not take such a chat.
        """
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        chat = [dict(message) for message in (messages[:-1] if begun else messages)]
        system = chat.pop(0)["content"] if chat[0]["role"] == "system" else self.style.system
        try:
            rendered = self._apply(self._with_system(chat, system), thinking=thinking)
        except Exception as error:  # jinja2's own errors, which cannot be named here
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template of {self.name} does not take the turns {roles}: {error}") from error
        return rendered + self._frames[thinking].appended + begun

    def encode_response(self, text: str, end: int | None) -> list[int]:
        """Ids of an answer, special tokens in it taken as plain text, closed by the token `end` if given."""
        ids = self._ids(text, plain=True)
        return ids if end is None else [*ids, end]

    def encode_reasoning(self, response: Response) -> list[int]:
        """Ids of what a model that was let reason wrote before the text of `response`, markers included."""
        marks, frame = self._marks, self._frames["on"]
        if marks is None or not (response.reasoning or frame.closing.rstrip().endswith(marks.before)):
            return []
        opens = "" if self._is_open(frame) or not response.reasoning else marks.opens
        _, skipped, gap = self._frames["off"].closing.rpartition(marks.answers)
        closes = (marks.ends if response.reasoning else "") + marks.answers + (gap if skipped else "")
        unfinished = not response.text and response.finish == "length"
        after = [] if unfinished else self._ids(closes, plain=False)
        return [*self._ids(opens, plain=False), *self._ids(response.reasoning, plain=True), *after]

    def split(self, ids: list[int]) -> tuple[str, list[int]]:
        """The reasoning in what a model that was let reason wrote, markers excluded, and the ids of its answer.

        White space between the two is in neither. There are no ids where the reasoning never ended.
        """
        marks, said = self._marks, self.tokenizer.decode(ids)
        if marks is None:
            return "", ids
        before, found, _ = said.partition(marks.answers)
        if not found and not (self._is_open(self._frames["on"]) or marks.opens in said):
            return "", ids
        reasoning = before.partition(marks.opens)[2] if marks.opens in before else before
        if not found:
            return reasoning, []
        # By text, not by ids: where a marker is no token of its own, its pieces may have merged with their neighbours.
        ends = bisect_left(range(len(ids)), True, key=lambda at: marks.answers in self.tokenizer.decode(ids[: at + 1]))
        start = next((at for at in range(ends + 1, len(ids)) if self.tokenizer.decode([ids[at]]).strip()), len(ids))
        return reasoning.removesuffix(marks.ends), ids[start:]

    def _apply(self, chat: list[dict[str, str]], *, prompt: bool = True, thinking: Thinking = "off") -> str:
        settings: dict[str, Any] = {SWITCH: thinking == "on"} if SWITCH in self._source else {}
        return self.tokenizer.apply_chat_template(
            chat, chat_template=self._source, tokenize=False, add_generation_prompt=prompt, **settings
        )

    def _chat(self, text: str) -> list[dict[str, str]]:
        return self._with_system([{"role": "user", "content": text}], self.style.system)

    def _with_system(self, chat: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
        if system is None or (self._folds_system and not system):
            return chat
        if self._folds_system:
            return [{**chat[0], "content": f"{system}\n\n{chat[0]['content']}"}, *chat[1:]]
        return [{"role": "system", "content": system}, *chat]

    def _render(self, text: str, thinking: Thinking) -> str:
        return self._apply(self._chat(text), thinking=thinking)

    def _check_system(self) -> None:
        if found := [token for token in self._special if token in (self.style.system or "")]:
            raise ValueError(f"the system prompt holds {found[0]!r}, a special token of {self.name}: leave it out")

    def _takes_system(self) -> bool:
        """Whether the template neither refuses a system prompt nor silently drops it."""
        try:
            shown = self._apply([{"role": "system", "content": SYSTEM_SENTINEL}, {"role": "user", "content": SENTINEL}])
        except Exception:  # jinja2's own errors, which cannot be named here: this file does without jinja2
            return False
        return SYSTEM_SENTINEL in shown

    @cached_property
    def opening(self) -> list[int]:
        """BOS, where chats open with it."""
        return [token for token in self.encode(SENTINEL).ids[:1] if token == self._bos]

    def _split_rendered(self, thinking: Thinking) -> tuple[str, str]:
        try:
            parts = self._render(SENTINEL, thinking).split(SENTINEL)
        except Exception as error:
            raise ValueError(f"the chat template of {self.name} cannot be rendered: {error}") from error
        if len(parts) != 2:
            raise ValueError(f"the chat template of {self.name} shows the user's text {len(parts) - 1} times, not once")
        return parts[0], parts[1]

    def _reasoning_marks(self) -> Marks | None:
        """The markers of the template, if its generation prompt lets the model reason or can be told to."""
        closing = self._split_rendered("on")[1].rstrip()
        for marks in MARKS:
            # Naming the markers is not enough: templates of models that do not reason take them out of past answers.
            if marks.opens in self._source and (SWITCH in self._source or closing.endswith(marks.before)):
                return marks
        if self.style.thinking == "on":
            raise ValueError(f"the chat template of {self.name} knows no reasoning: turn thinking off")
        return None

    def _frame(self, thinking: Thinking) -> Frame:
        header, closing = self._split_rendered(thinking)
        marks = self._marks
        lets_reason = marks is not None and closing.rstrip().endswith(marks.before)
        appended = marks.skip if marks is not None and lets_reason and thinking == "off" else ""
        return Frame(header, closing + appended, appended)

    def _is_open(self, frame: Frame) -> bool:
        """Whether the prompt itself has opened the reasoning."""
        return self._marks is not None and frame.closing.rstrip().endswith(self._marks.opens)

    def _end_of_turn(self) -> int | None:
        """The special token that the template writes right after an answer."""
        try:
            chat = [*self._chat(SENTINEL), {"role": "assistant", "content": ANSWER_SENTINEL}]
            rendered = self._apply(chat, prompt=False)
        except Exception:  # a template that knows no answers
            return None
        after = self._ids(rendered.rpartition(ANSWER_SENTINEL)[2].lstrip(), plain=False)
        return after[0] if ANSWER_SENTINEL in rendered and after[:1] and self._is_special(after[0]) else None

    def _is_special(self, token: int) -> bool:
        return token in self.tokenizer.added_tokens_decoder

    def _record(self) -> None:
        if CLOCK in self._source:
            self.about["date"] = DATE.strftime("%d %b %Y")
        if self._marks is not None or SWITCH in self._source:
            self.about["thinking"] = self.style.thinking
        if self._folds_system and self.style.system:
            self.about["system"] = "folded into the user turn"
        if self.style.template is not None:
            self.about["template"] = "given, in place of the tokenizer's own"

    def _ids(self, text: str, *, plain: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)

    def _encode_whole(self, rendered: str, start: int, end: int) -> Encoded:
        encoding = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        roles = [
            Role.HEADER if first < start else Role.CLOSING if first >= end else Role.INSTRUCTION
            for first, _ in encoding.offset_mapping
        ]
        return Encoded(list(encoding.input_ids), [int(role) for role in roles])

    def _encode_pieces(self, header: str, instruction: str, closing: str) -> Encoded:
        pieces = (Role.HEADER, header, False), (Role.INSTRUCTION, instruction, True), (Role.CLOSING, closing, False)
        encoded = [(int(role), self._ids(text, plain=plain)) for role, text, plain in pieces]
        return Encoded([i for _, ids in encoded for i in ids], [role for role, ids in encoded for _ in ids])

    def _with_one_bos(self, encoded: Encoded) -> Encoded:
        ids, roles = encoded
        bos = self._bos
        # Where one token is BOS and end of turn both, only what a chat opens with is BOS.
        counted = takewhile(lambda token: token == bos, ids) if bos == self.tokenizer.eos_token_id else ids
        count = list(counted).count(bos)
        if bos is None or not (self._adds_bos or count):
            return encoded
        if ids[0] != bos:
            ids, roles, count = [bos, *ids], [int(Role.HEADER), *roles], count + 1
        if count != 1:
            raise NotOneBos(f"the chat template of {self.name} gives {count} BOS tokens, not one")
        return Encoded(ids, roles)
