"""A judge's files at one commit, and its tokenizer: texts into ids with one BOS, words into the tokens that open them.

Card, configuration and weights come from the same commit. No weights are read here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from refusalscope.evals.engines import is_word
from refusalscope.inputs import hub, loading, releases
from refusalscope.inputs.hub import first_line

SMALL = ("README.md", "*.json", "*.jinja", "tokenizer*", "*.model")
"""All that is wanted before the weights are."""
ADAPTER = "adapter_model.safetensors"
NO_SAFETENSORS = "weights are read from .safetensors files alone, and there are none"
OTHER_JUDGE = "choose another judge, since a judge's code is never run"


@dataclass(frozen=True)
class Checkpoint:
    """A repository at a commit, or a folder; an adapter with the checkpoint that it adapts."""

    name: str
    source: str
    """What transformers is asked for: a repository, or a folder."""
    revision: str | None
    """The commit; None for a folder."""
    folder: Path
    """Where all files but the weights lie."""
    base: "Checkpoint | None" = None

    @property
    def card(self) -> Path:
        return self.folder / "README.md"

    @cached_property
    def about(self) -> dict[str, str]:
        """What changes whenever a weight does: the commit, or SHA-256 of the folder's files."""
        own = {"model": self.name, "revision": self.revision or releases.digest([self.folder])}
        base = {} if self.base is None else self.base.about
        return own | {f"base_{key}": value for key, value in base.items()}


def find(name: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a repository or folder, without its weights. Raises ValueError, one line, where there is none.

    An adapter is known by its adapter_config.json, which names what it adapts.
    """
    is_folder = Path(name).is_dir()
    folder = Path(name) if is_folder else hub.snapshot(name, *SMALL, revision=revision, choice="with --judge-revision")
    commit = None if is_folder else folder.name
    shown = folder.resolve().name if is_folder else name
    if (adapter := folder / "adapter_config.json").is_file():
        try:
            adapted = json.loads(adapter.read_text("utf-8"))
            base_name, base_revision = str(adapted["base_model_name_or_path"]), adapted.get("revision")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}: its adapter_config.json does not say what it adapts") from error
        base = find(base_name, base_revision)
        if base.base is not None:
            raise ValueError(f"{name} adapts {base_name}, which is an adapter itself: merge one of them into its base")
        return Checkpoint(shown, name, commit, folder, base)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no checkpoint: there is neither a config.json nor an adapter_config.json")
    return Checkpoint(shown, name, commit, folder)


def adapter_folder(checkpoint: Checkpoint) -> Path:
    """The folder with an adapter's configuration and weights. Raises ValueError where there are no safetensors."""
    folder = checkpoint.folder
    if checkpoint.revision is not None:
        folder = hub.snapshot(checkpoint.source, "adapter_config.json", ADAPTER, revision=checkpoint.revision)
    if not (folder / ADAPTER).is_file():
        raise ValueError(NO_SAFETENSORS)
    return folder


class Reader:
    """A checkpoint's tokenizer, as its judge needs it."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        """Tokens the model can see, its answer included."""
        self._bos = tokenizer.bos_token_id
        self.adds_bos = self._bos is not None and tokenizer("a").input_ids[:1] == [self._bos]
        self._openings: dict[tuple[str, ...], dict[str, list[int]]] = {}

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "Reader":
        """An adapter's own tokenizer where it has one, else its base's. Raises ValueError, one line."""
        from transformers import AutoConfig, AutoTokenizer

        base = checkpoint.base or checkpoint
        own = checkpoint if (checkpoint.folder / "tokenizer_config.json").is_file() else base
        try:
            tokenizer = AutoTokenizer.from_pretrained(own.folder, trust_remote_code=False)
            config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False).get_text_config()
        except Exception as error:
            # Libraries fail in their own ways; what tokenizers raises for a file is a bare Exception.
            reason = loading.why(error, base.folder, None, code=OTHER_JUDGE) or first_line(error)
            raise ValueError(f"cannot read the tokenizer of {checkpoint.name}: {reason}") from error
        positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        return cls(tokenizer, min(int(tokenizer.model_max_length), int(positions)))

    def room(self, new: int) -> int:
        """Tokens that fit beside BOS and `new` more. Raises ValueError, one line, where none does."""
        room = self.context - new - (self._bos is not None)
        if room <= 0:
            raise ValueError(f"the judge's context of {self.context} tokens has no room beside the {new} of its reply")
        return room

    def encode(self, text: str, *, new: int) -> list[int]:
        """Ids with exactly one BOS where the text or the tokenizer has one, short enough for `new` more (see `room`).

        What is too long loses its beginning, so that the question at the template's end is never lost.
        """
        room = self.room(new)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        bos = [self._bos] if self.adds_bos or (ids and ids[0] == self._bos) else []
        kept = [token for token in ids if token != self._bos]
        return bos + kept[-room:]

    def head(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text, as they stand in it."""
        ends = [0, *(end for _, end in self._offsets(text))]
        return text[: ends[tokens]] if len(ends) > tokens + 1 else text

    def tail(self, text: str, *, new: int) -> str:
        """For a server that adds BOS: the text without one, its beginning cut so that `new` more fit (see `room`)."""
        text = text.removeprefix(self.tokenizer.bos_token or "")
        starts = [start for start, _ in self._offsets(text)]
        room = self.room(new)
        return text[starts[-room] :] if len(starts) > room else text

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping

    def render(self, chat: Sequence[Mapping[str, str]]) -> str:
        """A chat under the tokenizer's own template, ready for an answer."""
        return self._rendered(chat, parts=self._in_parts)

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template wants contents as lists of parts: told by what it shows of a chat of ours."""
        chat = ({"role": "user", "content": "one-question"}, {"role": "assistant", "content": "one-answer"})
        for parts in (False, True):
            try:
                shown = self._rendered(chat, parts=parts)
            except Exception:
                # Templates say no in many ways: an error of jinja's, of Python's, or one they raise themselves.
                continue
            # A list that is printed whole shows the text too, in quotes.
            if "one-question" in shown and "one-answer" in shown and "'one-answer'" not in shown:
                return parts
        raise ValueError("the judge's chat template shows neither plain contents nor lists of parts")

    def _rendered(self, chat: Sequence[Mapping[str, str]], *, parts: bool) -> str:
        turns = [dict(turn) for turn in chat]
        if parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def openings(self, words: Sequence[str]) -> dict[str, list[int]]:
        """Word -> the tokens that are it, white space and case aside; empty where two words open alike.

        A word that no token is whole is known by its first piece.
        """
        if not words:
            return {}
        key = tuple(words)
        if key not in self._openings:
            texts = self.tokens(range(len(self.tokenizer)))
            # A byte is no way to write a letter that has a token; published judges leave it out.
            found = {word: [at for at, text in enumerate(texts) if text.casefold() == word] for word in words}
            found = {word: [at for at in tokens if not self._is_byte(at)] for word, tokens in found.items()}
            found = {word: tokens or self._first_pieces(word) for word, tokens in found.items()}
            every = [token for tokens in found.values() for token in tokens]
            self._openings[key] = found if len(set(every)) == len(every) else {}
        return self._openings[key]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each single token, without the white space around it."""
        return [text.strip() for text in self.tokenizer.batch_decode([[token] for token in ids])]

    def _is_byte(self, token: int) -> bool:
        return re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.convert_ids_to_tokens(token)) is not None

    def first_word(self, ids: Sequence[int]) -> int | None:
        """Where the first token stands with a letter or digit in it; an end of turn has one."""
        return next((at for at, token in enumerate(ids) if is_word(self.tokenizer.decode([token]))), None)

    def _first_pieces(self, word: str) -> list[int]:
        spelled = [before + form for before in ("", "\n\n", " ") for form in (word, word.capitalize())]
        pieces = set()
        for text in spelled:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            pieces |= {next(token for token, shown in zip(ids, self.tokens(ids), strict=True) if shown)}
        return sorted(pieces)
