"""Judges' models in this process, on transformers: language models, adapters on them, sequence classifiers.

Weights are loaded by the first request and gone after `release`. Nothing here knows what is asked or how it is read.
"""

import gc
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.memory import is_out_of_memory
from refusalscope.evals.checkpoints import NO_SAFETENSORS, OTHER_JUDGE, Checkpoint, Reader, adapter_folder, first_line
from refusalscope.evals.engines import Message, Reply
from refusalscope.inputs import loading
from refusalscope.inputs.loading import choose_device, choose_dtype, end_tokens

Item = TypeVar("Item")


class Weights:
    """What the first request loads and `release` lets go."""

    model: Any = None

    def release(self) -> None:
        """Let the weights go; the next request loads them again."""
        if self.model is not None:
            self.model = None
            tidy()


class Generator(Weights, ABC):
    """An `Engine` in this process; which library it runs on is for `_load`, `_batched` and `_generate` to say."""

    reader: Reader

    def complete(self, texts: Sequence[str], *, choices: Sequence[str], tokens: int) -> list[Reply]:
        """Continue each text by at most `tokens` tokens. Raises ValueError when the weights cannot be loaded."""
        return self._replies(texts, str, choices, tokens)

    def converse(
        self,
        chats: Sequence[Sequence[Message]],
        *,
        choices: Sequence[str],
        tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Reply]:
        """Answer each chat. Raises ValueError for a schema, and when the weights cannot be loaded."""
        if schema is not None:
            raise ValueError("a model in this process follows no schema: ask one behind a server")
        return self._replies(chats, self.reader.render, choices, tokens)

    def _replies(
        self, items: Sequence[Item], text: Callable[[Item], str], choices: Sequence[str], tokens: int
    ) -> list[Reply]:
        if items and self.model is None:
            self.reader.room(tokens)
            self.model = self._load()

        def answer(part: Sequence[Item]) -> list[Reply]:
            return self._generate([self.reader.encode(text(item), new=tokens) for item in part], choices, tokens)

        return self._batched(items, answer)

    @abstractmethod
    def _load(self) -> Any:
        """The weights, ready to be asked. Raises ValueError when they cannot be had."""

    @abstractmethod
    def _batched(self, items: Sequence[Item], answer: Callable[[Sequence[Item]], list[Reply]]) -> list[Reply]:
        """A reply per item, asked in as large parts as may be."""

    @abstractmethod
    def _generate(self, rows: Sequence[list[int]], choices: Sequence[str], tokens: int) -> list[Reply]:
        """A greedy reply to each row of token ids."""


class Local(Generator):
    """An `Engine` on transformers: greedy, left-padded, in batches that halve when memory runs out."""

    def __init__(self, checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "auto", batch_size: int) -> None:
        if checkpoint.base is not None and find_spec("peft") is None:
            raise ValueError(
                f"{checkpoint.name} is an adapter, which needs peft, which is not installed: "
                "pip install 'refusalscope[judges]'"
            )
        self.checkpoint = checkpoint
        self.device = choose_device(device)
        self.dtype = _dtype(dtype, self.device)
        self.batch_size = batch_size
        self.reader = Reader.load(checkpoint)
        self.about = {**checkpoint.about, "engine": "transformers", "dtype": _named(self.dtype)}

    def _load(self) -> Any:
        return _loaded(partial(_causal, self.checkpoint, self.reader, self.dtype), self.checkpoint, self.device)

    def _batched(self, items: Sequence[Item], answer: Callable[[Sequence[Item]], list[Reply]]) -> list[Reply]:
        replies, self.batch_size = in_batches(items, self.batch_size, answer)
        return replies

    @torch.no_grad()
    def _generate(self, rows: Sequence[list[int]], choices: Sequence[str], tokens: int) -> list[Reply]:
        from transformers import GenerationConfig

        tokenizer = self.reader.tokenizer
        _, ends = end_tokens(self.model, tokenizer, None)
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        # Ends count as part of a reply until here: where one comes first, it comes where a word might have come.
        said = [_until(row, ends) for row in made.sequences[:, width:].tolist()]
        openings = self.reader.openings(choices)
        return [
            Reply(tokenizer.decode(row, skip_special_tokens=True), _shares(made.logits, at, first, openings))
            for at, (row, first) in enumerate(zip(said, map(self.reader.first_word, said), strict=True))
        ]


class Sequences(Weights):
    """A sequence classifier on transformers: a text in, a probability per label out."""

    def __init__(self, checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "auto", batch_size: int) -> None:
        from transformers import AutoConfig

        self.checkpoint = checkpoint
        self.device = choose_device(device)
        self.dtype = _dtype(dtype, self.device)
        self.batch_size = batch_size
        self.reader = Reader.load(checkpoint)
        named: Any = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False).id2label
        self.labels = [named[at] for at in sorted(named)]
        self.about = {**checkpoint.about, "engine": "transformers", "dtype": _named(self.dtype)}

    def classify(self, texts: Sequence[str]) -> list[Reply]:
        """The likeliest label of each text and the probabilities of all; over-long texts lose their beginning.

        Raises ValueError when the weights cannot be loaded.
        """
        if texts and self.model is None:
            from transformers import AutoModelForSequenceClassification

            load = partial(_pretrained, AutoModelForSequenceClassification, self.checkpoint, self.dtype)
            self.model = _loaded(load, self.checkpoint, self.device)
        replies, self.batch_size = in_batches(texts, self.batch_size, self._labelled)
        return replies

    @torch.no_grad()
    def _labelled(self, texts: Sequence[str]) -> list[Reply]:
        # Padded on the right: where the first token speaks for the text, padding must not stand there.
        tokenizer = self.reader.tokenizer
        tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
        inputs = tokenizer(
            list(texts), truncation=True, max_length=self.reader.context, padding=True, return_tensors="pt"
        )
        rows = self.model(**inputs.to(self.device)).logits.float().softmax(-1).tolist()
        found = [dict(zip(self.labels, row, strict=True)) for row in rows]
        return [Reply(max(row, key=lambda label: row[label]), row) for row in found]


def in_batches(
    items: Sequence[Item], size: int, answer: Callable[[Sequence[Item]], list[Reply]]
) -> tuple[list[Reply], int]:
    """A reply per item, and the batch size that memory was enough for.

    A batch for which memory is not enough is halved. Whatever else goes wrong has its batch asked one by one, so that
    it is the reply of no exchange but its own.
    """
    replies: list[Reply] = []
    while len(replies) < len(items):
        part = items[len(replies) : len(replies) + size]
        try:
            replies += answer(part)
            continue
        except Exception as error:
            # Libraries fail in their own ways.
            is_memory = is_out_of_memory(error)
            fault = f"out of memory, even alone: {first_line(error)}" if is_memory else f"failed: {first_line(error)}"
        # The error is gone here, and with it the tensors that its traceback held.
        tidy()
        if len(part) == 1:
            replies.append(Reply("", {}, fault, final=False))
        elif is_memory:
            size = len(part) // 2
        else:
            replies += in_batches(part, 1, answer)[0]
    return replies, size


def _causal(checkpoint: Checkpoint, reader: Reader, dtype: Any) -> Any:
    """The model; an adapter's on its base."""
    from transformers import AutoModelForCausalLM

    model = _pretrained(AutoModelForCausalLM, checkpoint.base or checkpoint, dtype)
    # Sampling defaults and penalties that a checkpoint ships would break greedy decoding; only its end tokens stay.
    kept = {"eos_token_id": model.generation_config.eos_token_id}
    model.generation_config = type(model.generation_config)(**kept)
    if checkpoint.base is None:
        return model
    from peft import PeftModel

    if len(reader.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(reader.tokenizer))
    with warnings.catch_warnings():
        # peft asks transformers by a name that is going away; only peft can change that.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        # An adapter with a part missing is another judge, which peft only warns of.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        return PeftModel.from_pretrained(model, str(adapter_folder(checkpoint)))


def _pretrained(kind: Any, checkpoint: Checkpoint, dtype: Any) -> Any:
    """The weights at the checkpoint's commit. Raises ValueError when some are missing, and whatever libraries raise."""
    where = {"trust_remote_code": False, **({} if checkpoint.revision is None else {"revision": checkpoint.revision})}
    # What does not fit is reported by us, in a line.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = kind.from_pretrained(checkpoint.source, dtype=dtype, use_safetensors=True, **told, **where)
    except OSError as error:
        # transformers advises to read pickles then, which can run anything.
        raise ValueError(NO_SAFETENSORS if "file named model.safetensors" in str(error) else str(error)) from error
    # transformers fills such weights with random numbers, which would judge all the same.
    if lacking := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise ValueError(f"{len(lacking)} are missing or of another size, such as {lacking[0]}")
    return model


def _loaded(load: Callable[[], Any], checkpoint: Checkpoint, device: str) -> Any:
    """What `load` makes, on the device, without gradients. Raises ValueError, one line, whatever goes wrong."""
    try:
        return load().to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{checkpoint.name} does not fit into the memory of {device}: {first_line(error)}") from error
    except Exception as error:
        # Libraries fail in their own ways: by a file's bytes, a size, a key, a module that is not there.
        base = checkpoint.base or checkpoint
        reason = loading.why(error, base.source, base.revision, code=OTHER_JUDGE) or first_line(error)
        raise ValueError(f"cannot load the weights of {checkpoint.name}: {reason}") from error


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    """A reply up to its end token, that one included."""
    return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]


def _shares(
    logits: Sequence[Float[Tensor, "row vocabulary"]],
    row: int,
    first: int | None,
    openings: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Word -> the probability of the tokens that open it, where the first word of the reply stands."""
    if first is None:
        return {}
    probabilities = logits[first][row].double().softmax(-1)
    return {word: float(probabilities[list(tokens)].sum()) for word, tokens in openings.items()}


def _dtype(dtype: str, device: str) -> torch.dtype:
    chosen = choose_dtype(dtype, device)
    return torch.bfloat16 if chosen == "auto" else chosen


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tidy() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
