"""Judges' models in this process, on vLLM where it is installed."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from refusalscope.evals.checkpoints import Checkpoint, Reader, adapter_folder, first_line
from refusalscope.evals.engines import Reply
from refusalscope.evals.local import Generator, Item, in_batches

TOP = 20
"""Tokens whose probabilities vLLM gives at most, unless it is told otherwise."""
LONGEST = 16384
"""Tokens that memory is set aside for at most: no exchange is nearly as long, some contexts are."""


class Vllm(Generator):
    """An `Engine` on vLLM in this process: it makes its own batches; words outside its top tokens count as nothing."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str = "auto") -> None:
        if find_spec("vllm") is None:
            raise ValueError("the engine vllm needs vLLM, which is not installed: pip install vllm")
        self.checkpoint = checkpoint
        self.reader = Reader.load(checkpoint)
        self.reader.context = min(self.reader.context, LONGEST)
        self.dtype = "bfloat16" if dtype == "auto" else dtype
        self.about = {**checkpoint.about, "engine": "vllm", "dtype": self.dtype}

    def _batched(self, items: Sequence[Item], answer: Callable[[Sequence[Item]], list[Reply]]) -> list[Reply]:
        return in_batches(items, max(1, len(items)), answer)[0]

    def _generate(self, rows: Sequence[list[int]], choices: Sequence[str], tokens: int) -> list[Reply]:
        from vllm import SamplingParams  # type: ignore[reportMissingImports]

        greedy = SamplingParams(temperature=0, max_tokens=tokens, logprobs=TOP)
        prompts = [{"prompt_token_ids": row} for row in rows]
        made = self.model.generate(prompts, greedy, use_tqdm=False, lora_request=self._adapter())
        openings = self.reader.openings(choices)
        return [self._reply(request.outputs[0], openings) for request in made]

    def _reply(self, output: Any, openings: Mapping[str, Sequence[int]]) -> Reply:
        first = self.reader.first_word(list(output.token_ids))
        if first is None:
            return Reply(output.text, {})
        top = {token: entry.logprob for token, entry in output.logprobs[first].items()}
        shares = {
            word: sum(math.exp(top[token]) for token in tokens if token in top) for word, tokens in openings.items()
        }
        return Reply(output.text, shares if any(shares.values()) else {})

    def _load(self) -> Any:
        from vllm import LLM  # type: ignore[reportMissingImports]

        base = self.checkpoint.base or self.checkpoint
        try:
            return LLM(
                model=base.source,
                revision=base.revision,
                tokenizer=self.reader.tokenizer.name_or_path,
                dtype=self.dtype,
                load_format="safetensors",
                max_model_len=self.reader.context,
                enable_lora=self.checkpoint.base is not None,
            )
        except Exception as error:
            # Whatever it is (memory, a device, an architecture), no exchange is to blame for it.
            raise ValueError(f"vLLM cannot run {self.checkpoint.name}: {first_line(error)}") from error

    def _adapter(self) -> Any:
        if self.checkpoint.base is None:
            return None
        from vllm.lora.request import LoRARequest  # type: ignore[reportMissingImports]

        return LoRARequest(self.checkpoint.name, 1, str(adapter_folder(self.checkpoint)))
