"""A chat model with one door: every capture, edit and generation passes through `ChatModel`.

Hooks are attached to the decoder layers of the text stack inside a context manager and nowhere else. Parameters never
receive gradients; a graph exists only where an edit brings a tensor that requires one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refusalscope.core.types import Prompts, Response
from refusalscope.inputs import decoding, hooks, loading, norms, replay
from refusalscope.inputs.decoding import Limits
from refusalscope.inputs.loading import Bits, DeviceMap, DType, Placement, find_layers
from refusalscope.inputs.loading import choose_device as choose_device  # where this stood before
from refusalscope.inputs.template import ChatStyle, ChatTemplate, Role, Thinking


@dataclass(frozen=True)
class Tokens:
    """Left-padded chats."""

    prompt_ids: tuple[str, ...]
    ids: Int[Tensor, "prompt position"]
    roles: Int[Tensor, "prompt position"]
    """A `Role` per position."""
    thinking: Thinking = "off"
    """Whether the model is to reason before it answers these."""

    @property
    def mask(self) -> Bool[Tensor, "prompt position"]:
        return self.roles != Role.PADDING

    def to(self, device: torch.device | str) -> "Tokens":
        return replace(self, ids=self.ids.to(device), roles=self.roles.to(device))

    def repeated(self, times: int) -> "Tokens":
        """All rows, and all of them again, `times` in all."""
        ids, roles = (part.repeat(times, 1) for part in (self.ids, self.roles))
        return replace(self, prompt_ids=self.prompt_ids * times, ids=ids, roles=roles)


class Batch(NamedTuple):
    """What an edit may know of the activations it is given."""

    prompt_ids: tuple[str, ...]
    """One per row."""
    roles: Int[Tensor, "prompt position"]
    """One per position; a row that has ended its turn is padding from then on, or gone."""
    answering: bool = False
    """Whether it is known, without a look at `roles`, that they are an answer's or padding."""

    def to(self, device: torch.device) -> "Batch":
        return self._replace(roles=self.roles.to(device))


def scored(roles: Int[Tensor, "*batch position"]) -> Bool[Tensor, "*batch position"]:
    """Instruction and closing tokens: the positions that a feature's score is averaged over."""
    return (roles == Role.INSTRUCTION) | (roles == Role.CLOSING)


Edit = Callable[[Tensor, Batch], Tensor]
"""(residual [prompt, position, d_model], batch) -> residual of the same shape."""
Edits = Mapping[int, Edit]


class Given(NamedTuple):
    """A layer's output that is known from an unedited run."""

    layer: int
    residual: Float[Tensor, "prompt position d_model"]

    def repeated(self, times: int) -> "Given":
        """All rows, and all of them again, `times` in all."""
        return self._replace(residual=self.residual.repeat(times, 1, 1))


class Run(NamedTuple):
    """What a forward pass was asked to keep."""

    residuals: dict[int, Float[Tensor, "prompt position d_model"]]
    """Layer -> the residual stream after that decoder layer, after its edit; on the CPU unless it was to stay."""
    logits: Float[Tensor, "prompt kept vocabulary"]
    """At the last positions asked for, float32 or better; zero positions when none were asked for."""


class ChatModel:
    """A Hugging Face causal language model with a chat template.

    `identity` goes into cache keys: it must change whenever the weights do.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, identity: str, style: ChatStyle | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.identity = identity
        self.template = ChatTemplate(tokenizer, name, style)
        self.layers = find_layers(model, name)
        loading.keep_softcapping(model)
        self._norms = norms.fused(model)
        self.resumable = not getattr(model.config.get_text_config(), "num_kv_shared_layers", None)
        """Whether layers pass on a residual and nothing else; as far as the layers looked at so far have shown."""
        self.end_of_turn, self.end_tokens = loading.end_tokens(model, tokenizer, self.template.end_of_turn)
        self.pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_tokens[0]
        # Penalties and sampling defaults a checkpoint ships would break greedy decoding; only its end tokens stay.
        model.generation_config = type(model.generation_config)(
            eos_token_id=self.end_tokens, pad_token_id=self.pad_token
        )

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        name: str,
        identity: str,
        revision: str | None = None,
        device: str = "auto",
        dtype: DType = "auto",
        quantize: Bits | None = None,
        device_map: DeviceMap | None = None,
        offload_folder: str | Path | None = None,
        style: ChatStyle | None = None,
        trust_remote_code: bool = False,
        tokenizer: Any = None,
    ) -> "ChatModel":
        """Load from a folder or a hub name, at `revision`; what the rest means says `Placement`.

        `tokenizer` is the checkpoint's own, for whoever has it already.

        Raises ValueError with one line when there is no such model, it is not a causal language model, or what was
        asked for is not installed or not there.
        """
        placement = Placement(device, dtype, quantize, device_map, offload_folder)
        model, tokenizer = loading.load(
            *(source, tokenizer),
            name=name,
            revision=revision,
            placement=placement,
            trust_remote_code=trust_remote_code,
        )
        return cls(model, tokenizer, name=name, identity=identity, style=style)

    @property
    def device(self) -> torch.device:
        """Where tokens go in and logits come out; offloaded weights are nowhere until they are needed."""
        held = (weight.device for weight in self.model.get_decoder().parameters() if weight.device.type != "meta")
        return next(held, torch.device("cpu"))

    @property
    def width(self) -> int:
        """d_model."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int | None:
        """Positions the model was made for, answer included; None where its configuration names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def longer(self, prompts: Prompts, limit: int) -> list[str]:
        """Ids of the prompts that are more than `limit` tokens once the template is around them, in either mode."""
        return [prompt.id for prompt in prompts if self.template.length(prompt.text) > limit]

    def tokens(self, prompts: Prompts, responses: Mapping[str, Response] | None = None) -> Tokens:
        """Render and left-pad `prompts`; with `responses` (by prompt id) each is followed by its answer.

        Reasoning is skipped: what follows a prompt is the first token of its answer.
        """
        return self._tokens(prompts, responses, "off")

    def answer_tokens(self, prompts: Prompts, responses: Mapping[str, Response] | None = None) -> Tokens:
        """The same in the mode answers are given in: what a model lets be known of its reasoning is part of them."""
        return self._tokens(prompts, responses, self.template.style.thinking)

    def _tokens(self, prompts: Prompts, responses: Mapping[str, Response] | None, thinking: Thinking) -> Tokens:
        rows = []
        for prompt in prompts:
            ids, roles = self.template.encode(prompt.text, thinking=thinking)
            if responses is not None:
                answer = self._answer(responses[prompt.id], thinking)
                ids, roles = [*ids, *answer], [*roles, *[int(Role.RESPONSE)] * len(answer)]
            rows.append((ids, roles))
        return self._padded(prompts.ids, rows, thinking)

    def _padded(self, names: tuple[str, ...], rows: list[tuple[list[int], list[int]]], thinking: Thinking) -> Tokens:
        width = max((len(ids) for ids, _ in rows), default=0)
        padded = [[self.pad_token] * (width - len(ids)) + ids for ids, _ in rows]
        roles = [[int(Role.PADDING)] * (width - len(ids)) + roles for ids, roles in rows]
        ids, kinds = (torch.tensor(part).long().view(len(rows), width) for part in (padded, roles))
        return Tokens(names, ids, kinds, thinking)

    def _answer(self, response: Response, thinking: Thinking) -> list[int]:
        before = self.template.encode_reasoning(response) if thinking == "on" else []
        end = self.end_of_turn if response.finish == "end" else None
        return [*before, *self.template.encode_response(response.text, end)]

    def batches(self, prompts: Prompts, size: int) -> Iterator[tuple[Prompts, Tokens]]:
        """Consecutive batches in prompt order, each padded to its own longest chat."""
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            yield part, self.tokens(part).to(self.device)

    def text_tokens(self, documents: Prompts, limit: int) -> Tokens:
        """Plain text outside any chat, cut off after `limit` tokens.

        The first token of each (BOS, where chats open with one) counts as header and the rest as response: it is what
        the model can be scored on.
        """
        rows = [self.template.encode_text(document.text)[:limit] for document in documents]
        kinds = [[int(Role.HEADER if at == 0 else Role.RESPONSE) for at in range(len(ids))] for ids in rows]
        return self._padded(documents.ids, list(zip(rows, kinds, strict=True)), "off")

    def run(
        self,
        tokens: Tokens,
        *,
        edits: Edits | None = None,
        keep: Iterable[int] = (),
        logits: int = 0,
        offload: bool = True,
        given: Given | None = None,
        only_last: bool = False,
        vocabulary: Int[Tensor, "token"] | None = None,
    ) -> Run:
        """One forward pass.

        `edits` maps layers to functions of their output; `keep` lists layers whose edited output is returned, on the
        CPU if `offload`; `logits` is at how many last positions logits are computed (0: the unembedding is not run),
        of the tokens of `vocabulary` alone, in its order, if it is given.
        On a model that is `resumable`, up to the layer of `given` nothing is run, and with `only_last` the last layer's
        MLP sees the last position alone, for who reads nothing of that layer but the last position's logits.
        """
        residuals: dict[int, Tensor] = {}
        tokens = tokens.to(self.device)
        batch = Batch(tokens.prompt_ids, tokens.roles)
        inputs = {
            "input_ids": tokens.ids,
            "attention_mask": tokens.mask.long(),
            "position_ids": (tokens.mask.long().cumsum(1) - 1).clamp(min=0),
            "use_cache": False,
        }
        with (
            nullcontext() if given is None else hooks.known(self.layers[: given.layer + 1], given.residual),
            hooks.at_last_position(self.layers[-1]) if only_last else nullcontext(),
            nullcontext() if vocabulary is None else hooks.some_tokens(self.model.get_output_embeddings(), vocabulary),
            self._hooked(edits or {}, lambda _: batch, keep=set(keep), residuals=residuals, offload=offload),
        ):
            if logits == 0:
                self.model.get_decoder()(**inputs)
                return Run(residuals, torch.empty(len(tokens.prompt_ids), 0, 0))
            output = self.model(**inputs, logits_to_keep=logits)
        return Run(residuals, output.logits.to(torch.promote_types(output.logits.dtype, torch.float32)))

    def generate(
        self,
        tokens: Tokens,
        *,
        edits: Edits | None = None,
        max_new_tokens: int,
        batch_size: int | None = None,
        recordable: bool = False,
    ) -> tuple[Response, ...]:
        """Greedy answers with a KV cache, each ended by the model's own end-of-turn tokens or the limit.

        At most `batch_size` prompts are in the model at once, all of them unless it is given; as answers end, the next
        prompts take their place. Edits see the prompts of a batch in one call, then one position per call, until their
        row has ended: from then on it is padding or gone. Answers come back in the prompts' order.
        With edits that are `recordable`, which do all they do on the device as those of an `Editor`, a token's call is
        recorded on a card and replayed (`replay.py`): edits are not called again then. Without edits it always is.
        """
        batch = _unknown(torch.Size((0, 0)))

        def announce(rows: Sequence[int], roles: Tensor, answering: bool) -> None:
            nonlocal batch
            batch = Batch(tuple(tokens.prompt_ids[row] for row in rows), roles, answering)

        with self._hooked(edits or {}, lambda _: batch, keep=set(), residuals={}):
            answers = decoding.greedy(
                *(self.model, tokens.ids, tokens.roles),
                limits=Limits(frozenset(self.end_tokens), max_new_tokens),
                rows=batch_size or max(1, len(tokens.prompt_ids)),
                device=self.device,
                announce=announce,
                record=replay.recorder(self.model) if recordable or not edits else None,
            )
        pairs = zip(tokens.prompt_ids, answers, strict=True)
        return tuple(self._response(name, ids, tokens.thinking) for name, ids in pairs)

    @contextmanager
    def edited(self, edits: Edits) -> Iterator[None]:
        """Attach `edits` to the bare `model` for whoever calls it inside, an evaluation harness say.

        Nobody knows there which positions hold what: every one counts as instruction and every row has an empty prompt
        id, so interventions of which `needs_chat` is true cannot be used. Gone on exit, whatever happens inside.
        """
        with self._hooked(edits, _unknown, keep=set(), residuals={}):
            yield

    def decode(self, tokens: Sequence[int]) -> list[str]:
        """The text of each single token."""
        return [self.tokenizer.decode([token]) for token in tokens]

    def promoted(self, vectors: Float[Tensor, "vector d_model"], k: int) -> list[list[str]]:
        """The `k` tokens that each residual vector raises most through the unembedding."""
        head = self.model.get_output_embeddings()
        # Asked as a module, since its weights may lie elsewhere until they are needed; a bias promotes nothing itself.
        with torch.no_grad():
            scores = head(vectors.to(self.device, head.weight.dtype))
            scores = scores if getattr(head, "bias", None) is None else scores - head.bias.to(scores)
        return [self.decode(row) for row in scores.topk(k).indices.tolist()]

    def _response(self, prompt_id: str, ids: list[int], thinking: Thinking) -> Response:
        stop = next((i for i, token in enumerate(ids) if token in self.end_tokens), None)
        said = ids if stop is None else ids[:stop]
        reasoning, answer = self.template.split(said) if thinking == "on" else ("", said)
        return Response(
            prompt_id=prompt_id,
            text=self.tokenizer.decode(answer, skip_special_tokens=True),
            first_token=answer[0] if answer else None,
            tokens=len(ids) if stop is None else stop + 1,
            finish="length" if stop is None else "end",
            reasoning=reasoning,
        )

    @contextmanager
    def _hooked(
        self,
        edits: Edits,
        batch_for: Callable[[torch.Size], Batch],
        *,
        keep: set[int],
        residuals: dict[int, Tensor],
        offload: bool = True,
    ) -> Iterator[None]:
        """Attach one hook per edited or kept layer; all are gone on exit, whatever happens inside.

        Compiled code is left aside in here, with nothing to edit too, lest base and edited differ by rounding.
        """
        wanted = set(edits) | keep
        if unknown := sorted(layer for layer in wanted if not 0 <= layer < len(self.layers)):
            raise ValueError(f"{self.name} has layers 0 to {len(self.layers) - 1}, not {unknown}")

        def hook_for(layer: int) -> Callable[..., Any]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                residual = output[0] if isinstance(output, tuple) else output
                self.resumable &= residual is output
                if layer in edits:
                    residual = edits[layer](residual, batch_for(residual.shape).to(residual.device))
                if layer in keep:
                    residuals[layer] = residual.detach().cpu() if offload else residual.detach()
                return (residual, *output[1:]) if isinstance(output, tuple) else residual

            return hook

        with ExitStack() as stack:
            stack.enter_context(hooks.as_written())
            stack.enter_context(norms.quick(self._norms))
            for layer in sorted(wanted):
                handle = self.layers[layer].register_forward_hook(hook_for(layer))
                stack.callback(handle.remove)
            stack.enter_context(hooks.quick_unembedding(self.model.get_output_embeddings()))
            yield


def _unknown(shape: torch.Size) -> Batch:
    """A batch of which nothing but its shape is known."""
    return Batch(("",) * shape[0], torch.full(shape[:2], int(Role.INSTRUCTION)))
