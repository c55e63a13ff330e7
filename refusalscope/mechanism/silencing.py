"""What a model does with features silenced, each row with a set of its own: first tokens, answers, other features.

Silenced means scaled by c = 0 at every position. The same prompt may stand in many rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refusalscope.core.types import FeatureSet, Response, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Edits, Tokens, scored
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import ScaleFeatures, editor
from refusalscope.mechanism.minimal import Question

ANSWERED = 20
"""Tokens of an answer that must be coherent."""
ASLEEP = 0.1
"""Of its value afterwards: below that share of it, a feature was not active before."""
RAISED = 2.0
"""Times its mean over clean prompts: at least that high is a feature that woke up."""
Slices = Mapping[int, SaeSlice]


class Rows(NamedTuple):
    """A batch in which each row has features of its own silenced."""

    tokens: Tokens
    edits: Edits


def batches(
    model: ChatModel, tokens: Tokens, asked: Sequence[Question], slices: Slices, *, size: int
) -> Iterator[tuple[Sequence[Question], Rows]]:
    """The questions, up to `size` at a time, as rows to run; `tokens` hold their prompts, `slices` their features."""
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        at = torch.tensor([tokens.prompt_ids.index(name) for name, _ in part], device=tokens.ids.device)
        roles = tokens.roles[at]
        inside = (roles != Role.PADDING).any(0)
        # Rows of one prompt need names of their own: sets go by name.
        names = tuple(f"{row}" for row in range(len(part)))
        rows = replace(tokens, prompt_ids=names, ids=tokens.ids[at][:, inside], roles=roles[:, inside])
        sets = {
            name: FeatureSet("silenced", tuple(sorted(chosen)), (0.0,) * len(chosen))
            for name, (_, chosen) in zip(names, part, strict=True)
        }
        yield part, Rows(rows, editor(ScaleFeatures(sets, 0.0), layers=len(model.layers), slices=slices).edits)


def answers(
    model: ChatModel, tokens: Tokens, asked: Sequence[Question], slices: Slices, *, size: int
) -> list[Response]:
    """The first tokens of each question's answer, as many as must be coherent."""
    if not asked:
        return []
    _, rows = next(batches(model, tokens, asked, slices, size=len(asked)))
    limits = {"max_new_tokens": ANSWERED, "batch_size": size}
    return list(model.generate(rows.tokens, edits=rows.edits, recordable=True, **limits))


def flips(
    model: ChatModel,
    tokens: Tokens,
    asked: Sequence[Question],
    slices: Slices,
    *,
    refusal_tokens: Sequence[int],
    coherent: Callable[[Response], bool],
    size: int,
) -> list[bool]:
    """Whether each question's answer opens without a refusal token and `coherent` holds of its first 20 tokens.

    Only what opens so is generated.
    """
    opened: list[Question] = []
    for part, rows in batches(model, tokens, asked, slices, size=size):
        first = model.run(rows.tokens, edits=rows.edits, logits=1).logits[:, -1].argmax(-1).tolist()
        opened += [one for one, token in zip(part, first, strict=True) if token not in refusal_tokens]
    said = answers(model, tokens, opened, slices, size=size)
    turned = {one for one, r in zip(opened, said, strict=True) if r.first_token not in refusal_tokens and coherent(r)}
    return [one in turned for one in asked]


def activations(
    model: ChatModel, tokens: Tokens, asked: Sequence[Question], slices: Slices, watched: Slices, *, size: int
) -> Float[Tensor, "question feature"]:
    """Mean activation of the watched features over each prompt's scored tokens, in residual units, layers ascending.

    A layer is read before its own edit: what is seen there is what the silence of lower layers brought about, not what
    taking a decoder row out of the residual does to the reading of its neighbours.
    """
    found = []
    for _, rows in batches(model, tokens, asked, slices, size=size):
        seen: dict[int, Tensor] = {}
        edits = {layer: _listening(part, rows.edits.get(layer), seen) for layer, part in watched.items()}
        model.run(rows.tokens, edits={**rows.edits, **edits})
        found.append(torch.cat([seen[layer] for layer in sorted(watched)], -1))
    return torch.cat(found)


def _listening(part: SaeSlice, edit: Edit | None, seen: dict[int, Tensor]) -> Edit:
    def listen(residual: Tensor, batch: Batch) -> Tensor:
        inside = scored(batch.roles)[..., None]
        values = part.to(residual.device).encode(residual) * inside
        seen[part.layer] = (values.sum(1) / inside.sum(1).clamp(min=1)).float().cpu()
        return residual if edit is None else edit(residual, batch)

    return listen


def woken(
    before: Float[Tensor, "*row feature"], after: Float[Tensor, "*row feature"], usual: Float[Tensor, "feature"]
) -> Bool[Tensor, "*row feature"]:
    """Features that slept and woke: under a tenth of `after` before, and `after` at least twice what is `usual`.

    One that is never active on clean prompts wakes with any positive value.
    """
    return (before < ASLEEP * after) & (after >= RAISED * usual)
