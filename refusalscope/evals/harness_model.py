"""A `ChatModel` as lm-evaluation-harness sees one. Imports lm_eval, an extra; `harness.py` imports this when needed.

The harness asks with chats and takes text or log-likelihoods. Everything between is this package's: the run's template,
system prompt and reasoning, one BOS at most, greedy answers that end where the model ends its turn.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any, TextIO, cast

import torch
from jaxtyping import Float, Int
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from transformers import GenerationConfig

from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.template import Thinking

Progress = Callable[[str, int, int], None]
# The decorator that registers the class hides what it is from a type checker.
Parent: Any = cast(Any, HFLM)


class HarnessModel(Parent):
    """The bare model behind a `ChatModel`, edited or not by whoever calls the harness.

    While the model runs standard error is `stderr`, so that `progress` shows whatever swallows what the harness prints.
    """

    def __init__(
        self, chat: ChatModel, *, batch_size: int, stderr: TextIO, progress: Progress = lambda *_: None
    ) -> None:
        # A tokenizer without a padding token is given one, which is no business of the chat model's.
        tokenizer = chat.tokenizer if chat.tokenizer.pad_token_id is not None else copy.deepcopy(chat.tokenizer)
        super().__init__(
            pretrained=chat.model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=chat.context,
            softmax_dtype="float32",
        )
        self._device = chat.device
        self.chat = chat
        self.thinking: Thinking = "off"
        """How chats are rendered and answers read."""
        self.shortened = 0
        """Requests that were longer than the model's context and lost part of their beginning."""
        self._progress = progress
        self._stderr = stderr
        self._asked = ("", 0, 0)

    @property
    def eot_token_id(self) -> int:
        return self.chat.end_of_turn

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the run renders it; a last message of the assistant's begins the answer."""
        return self.chat.template.render(chat_history, thinking=self.thinking)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Ids of a rendered chat, or of what only continues one."""
        if add_special_tokens is False:
            return list(self.tokenizer(string, add_special_tokens=False).input_ids)
        ids = self.chat.template.encode_rendered(string)
        return ids if left_truncate_len is None else self._fitting(ids, left_truncate_len)

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Int[Tensor, "request position"], Int[Tensor, "request position"]]:
        """Left-padded ids and their mask."""
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        width = max(len(ids) for ids in rows)
        padded = [[self.chat.pad_token] * (width - len(ids)) + ids for ids in rows]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        return torch.tensor(padded), torch.tensor(mask)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        return self._fitting(before, self.max_length + 1 - len(after)), after

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """The last ids that there is room for, after the BOS that was there."""
        if len(ids) <= room:
            return ids
        self.shortened += 1
        opening = ids[: len(self.chat.template.opening)]
        return [*opening, *ids[len(ids) - room + len(opening) :]]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of one token, or of an answer: what stands before its end and after its reasoning."""
        if not isinstance(tokens, list):
            return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        stop = next((at for at, token in enumerate(tokens) if token in self.chat.end_tokens), len(tokens))
        said = tokens[:stop]
        if self.thinking == "on":
            _, said = self.chat.template.split(said)
        return self.tokenizer.decode(said, skip_special_tokens=skip_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = ("scoring", 0, len(requests))
        with redirect_stderr(self._stderr):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._asked = ("answering", 0, len(requests))
        with redirect_stderr(self._stderr):
            return super().generate_until(requests, disable_tqdm=True)

    def _count(self, rows: int) -> None:
        what, done, total = self._asked
        self._asked = (what, min(done + rows, total), total)
        self._progress(*self._asked)

    def _model_call(
        self, inps: Int[Tensor, "request position"], *_: Any, **__: Any
    ) -> Float[Tensor, "request position vocabulary"]:
        self._count(len(inps))
        with torch.no_grad():
            return self.model(inps).logits

    def _model_generate(
        self,
        context: Int[Tensor, "request position"],
        max_length: int,
        stop: list[str],
        attention_mask: Int[Tensor, "request position"] | None = None,
        **_: Any,
    ) -> Int[Tensor, "request longer"]:
        """Greedy whatever the task asks for, so that the same edit gives the same answers."""
        self._count(len(context))
        # What ends an answer may well stand in the reasoning before it; the harness cuts the answer off there itself.
        ends = stop if self.thinking == "off" else []
        return self.model.generate(
            input_ids=context,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_length - context.shape[1],
                eos_token_id=self.chat.end_tokens,
                pad_token_id=self.chat.pad_token,
            ),
            stopping_criteria=stop_sequences_criteria(self.tokenizer, ends, context.shape[1], len(context)),
        )
