"""A detector to deploy: a probe on a chat model's own activations that says how likely a prompt is a harmful request.

It reads a prompt before one token is generated, or every token while an answer is (`watching`), and names the features
that moved the score. Made by `refusalscope probe`, which chose it on plain prompts alone; it refuses any other model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from refusalscope.core.disk import write_atomically
from refusalscope.core.types import Prompt, Prompts
from refusalscope.guard.content import DESCRIPTION, Content, opened, packed, slices_of
from refusalscope.inputs import presets
from refusalscope.inputs.chat import ChatModel, Tokens
from refusalscope.inputs.template import ChatStyle
from refusalscope.mechanism.activations import encoded_features, pooled

REASONS = 5
"""Features named as reasons for a score."""
BATCH = 16


class Reason(NamedTuple):
    """What moved a score."""

    feature: str
    """`layer/index`; of a probe on the residual stream `layer 6`."""
    label: str
    contribution: float
    """Calibrated logits that it adds, beside its mean activation on the prompts the probe learned from."""


class Scored(NamedTuple):
    """One prompt."""

    probability: float
    """That it is a harmful request, calibrated on plain prompts."""
    flagged: bool
    reasons: tuple[Reason, ...]
    """The largest contributions, either way."""


class Guard:
    """A probe, what it reads of a model, and the model, which is loaded when it is first needed."""

    def __init__(self, content: Content, tensors: Mapping[str, Tensor], model: ChatModel | None = None) -> None:
        self.content = content
        self._tensors = dict(tensors)
        self._slices = slices_of(content, tensors)
        self._model = None if model is None else _fitting(content, model)

    @classmethod
    def from_run(cls, run: str | Path, *, model: ChatModel | str | Path | None = None) -> "Guard":
        """The guard that `refusalscope probe` left in a run folder. Raises ValueError as `load` does."""
        folder = Path(run) / "guard"
        if not (folder / DESCRIPTION).is_file():
            raise ValueError(f"{run} holds no guard: `refusalscope probe` makes one")
        return cls.load(folder, model=model)

    @classmethod
    def load(cls, folder: str | Path, *, model: ChatModel | str | Path | None = None) -> "Guard":
        """A saved guard on `model`: one that is loaded, a preset, repository or folder; None: where it came from.

        Raises ValueError, one line, when a file is missing or altered, of a newer format, or made for another model.
        """
        content, tensors = opened(Path(folder))
        if isinstance(model, ChatModel):
            return cls(content, tensors, model)
        made = cls(content, tensors)
        if model is not None:
            made._model = _loaded(content, str(model))
        return made

    @property
    def model(self) -> ChatModel:
        """The model that it reads. Raises ValueError when it came from a folder and none was given."""
        if self._model is None:
            if self.content.source is None:
                raise ValueError(
                    f"this guard belongs to {self.content.model}, a model from a folder: name the folder (--model)"
                )
            self._model = _loaded(self.content, self.content.source)
        return self._model

    def save(self, folder: str | Path) -> None:
        """Write `guard.json` and `guard.safetensors`, a few kilobytes a feature at most."""
        for name, written in packed(self.content, self._tensors).items():
            write_atomically(Path(folder) / name, written)

    def score(self, prompts: Prompts | Sequence[str], *, batch_size: int = BATCH) -> list[Scored]:
        """Score prompts before anything is generated, in order.

        Raises ValueError for one without any text, or longer than the model's context.
        """
        rows = prompts if isinstance(prompts, Prompts) else named(prompts)
        context = self.model.context
        if context is not None and (long := self.model.longer(rows, context)):
            raise ValueError(f"prompt {long[0]} is longer than the {context} tokens that {self.model.name} can read")
        return [one for _, tokens in self.model.batches(rows, batch_size) for one in self.score_tokens(tokens)]

    def stream(self, prompts: Iterable[str], *, batch_size: int = BATCH) -> Iterator[Scored]:
        """The same of any number of prompts, a batch in memory at a time."""
        waiting = iter(prompts)
        while batch := list(islice(waiting, batch_size)):
            yield from self.score(batch, batch_size=batch_size)

    @torch.no_grad()
    def score_tokens(self, tokens: Tokens) -> list[Scored]:
        """Score chats as they stand, with or without a part of an answer."""
        found = self.model.run(tokens, keep=self.content.layers).residuals
        roles = tokens.roles.cpu()
        inputs = self.inputs({layer: part.float() for layer, part in found.items()}, roles)
        return self._scored(inputs)

    def inputs(
        self, residuals: Mapping[int, Float[Tensor, "prompt position d_model"]], roles: Int[Tensor, "prompt position"]
    ) -> Float[Tensor, "prompt k"]:
        """What the probe is given, from the residuals of `content.layers`."""
        how = self.content.pooling
        if self.content.layer is not None:
            return pooled(residuals[self.content.layer], roles, how)
        return torch.cat([encoded_features(part, residuals[at], roles, how) for at, part in self._slices.items()], 1)

    def logits(self, inputs: Float[Tensor, "prompt k"]) -> Float64[Tensor, "prompt"]:
        """Calibrated logits of what the probe reads."""
        return (inputs.double() @ self._weights + self.content.bias) / self.content.temperature

    @property
    def _weights(self) -> Float64[Tensor, "k"]:
        if self.content.layer is not None:
            return self._tensors["weights"].double()
        return torch.tensor([feature.weight for feature in self.content.features], dtype=torch.double)

    def _scored(self, inputs: Float[Tensor, "prompt k"]) -> list[Scored]:
        logits = self.logits(inputs)
        return [
            Scored(float(torch.sigmoid(logit)), bool(logit > self.content.threshold), self._reasons(row))
            for logit, row in zip(logits, inputs, strict=True)
        ]

    def _reasons(self, row: Float[Tensor, "k"]) -> tuple[Reason, ...]:
        heat = self.content.temperature
        if self.content.layer is not None:
            moved = float((row.double() - self._tensors["means"].double()) @ self._weights) / heat
            return (Reason(f"layer {self.content.layer}", "the whole residual stream, no feature", moved),)
        found = [
            Reason(f"{one.layer}/{one.index}", one.label, (float(value) - one.mean) * one.weight / heat)
            for one, value in zip(self.content.features, row, strict=True)
        ]
        return tuple(sorted(found, key=lambda one: (-abs(one.contribution), one.feature))[:REASONS])


def _loaded(content: Content, name: str) -> ChatModel:
    """The model of that name, if it is the one that the guard belongs to."""
    found = presets.checkpoint(name, content.revision)
    if found.weights != content.weights:
        raise ValueError(_other(content, f"{found.name} ({found.weights[:12]})"))
    style = ChatStyle(content.system, content.thinking, content.template)
    return ChatModel.load(found.model, name=found.name, identity=found.weights, revision=found.revision, style=style)


def _fitting(content: Content, model: ChatModel) -> ChatModel:
    if model.identity not in (content.weights, content.identity):
        raise ValueError(_other(content, f"{model.name} ({model.identity[:12]})"))
    style = ChatStyle(content.system, content.thinking, content.template)
    if model.template.style != style:
        raise ValueError(
            f"this guard was made for {content.model} with another system prompt, template or reasoning mode: load the "
            "model as the guard does, by leaving it out or naming it"
        )
    return model


def _other(content: Content, given: str) -> str:
    return f"this guard belongs to {content.model} ({content.weights[:12]}), not to {given}: name that model"


def named(texts: Sequence[str]) -> Prompts:
    """Texts as prompts, under their places. Raises ValueError for one without any text."""
    if empty := [at for at, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"prompt {empty[0]} is empty: there is nothing to score")
    return Prompts("guarded", tuple(Prompt(str(at), text, "harmless") for at, text in enumerate(texts)))
