"""A guard beside an answer as it is written: one score for the prompt, and one for the text so far at every token.

It reads the residuals that pass while the model generates and changes none, so watching costs no further pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refusalscope.core.types import Prompts, Response
from refusalscope.guard.detector import BATCH, Guard, named
from refusalscope.inputs.chat import Batch, Edit
from refusalscope.inputs.template import Role

OnScore = Callable[[Mapping[str, float]], None]
"""Told at each step the probability of every prompt that is still being answered; what it raises ends the answer."""


class Watched(NamedTuple):
    """One answer, watched while it was written."""

    response: Response
    probabilities: tuple[float, ...]
    """After the prompt, then after every token that was fed back."""
    flagged: bool
    """Whether any of them was above the threshold."""


@torch.no_grad()
def watch(
    guard: Guard,
    prompts: Prompts | Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH,
    on_score: OnScore | None = None,
) -> list[Watched]:
    """Answer prompts, greedily, and score the text so far at every token. Raises ValueError for an empty prompt."""
    rows = prompts if isinstance(prompts, Prompts) else named(prompts)
    watching = _Watching(guard, on_score)
    answers = guard.model.generate(
        guard.model.answer_tokens(rows),
        edits=watching.edits(guard.content.layers),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    made = []
    for response in answers:
        seen = torch.tensor(watching.logits[response.prompt_id], dtype=torch.double)
        flagged = bool((seen > guard.content.threshold).any())
        made.append(Watched(response, tuple(torch.sigmoid(seen).tolist()), flagged))
    return made


class _Said(NamedTuple):
    """What was pooled of one prompt so far, over how many tokens."""

    pooled: Float[Tensor, "k"]
    tokens: int


class _Watching:
    """Reads residuals as they pass, changes none, and scores once the last layer it needs has been seen."""

    def __init__(self, guard: Guard, on_score: OnScore | None) -> None:
        self._guard = guard
        self._on_score = on_score
        self._seen: dict[int, Tensor] = {}
        self._said: dict[str, _Said] = {}
        self.logits: dict[str, list[float]] = {}

    def edits(self, layers: Sequence[int]) -> dict[int, Edit]:
        """An edit for each layer that leaves its residual as it is."""
        last = max(layers)

        def edit(layer: int) -> Edit:
            def reading(residual: Tensor, batch: Batch) -> Tensor:
                self._seen[layer] = residual.float().cpu()
                if layer == last:
                    self._score(batch)
                return residual

            return reading

        return {layer: edit(layer) for layer in layers}

    def _score(self, batch: Batch) -> None:
        """Score what is being written; rows that have ended their turn are padding and keep what they had."""
        roles = batch.roles.cpu()
        alive = (roles[:, -1] != Role.PADDING).tolist()
        logits = self._guard.logits(self._so_far(batch.prompt_ids, roles))
        now = {}
        for name, own, logit in zip(batch.prompt_ids, alive, logits, strict=True):
            if own:
                self.logits.setdefault(name, []).append(float(logit))
                now[name] = float(torch.sigmoid(logit))
        if self._on_score is not None and now:
            self._on_score(now)

    def _so_far(self, names: Sequence[str], roles: Int[Tensor, "prompt position"]) -> Float[Tensor, "prompt k"]:
        """The probe's inputs for the text so far, from those of the new positions and what was kept."""
        how = self._guard.content.pooling
        if how == "last":
            return self._guard.inputs(self._seen, roles)
        said = (roles == Role.INSTRUCTION) | (roles == Role.RESPONSE)
        if not (roles == Role.INSTRUCTION).any():
            # A row that has ended has no position of its own to pool: it is read all the same, and not used.
            roles = torch.full_like(roles, int(Role.RESPONSE))
        fresh = self._guard.inputs(self._seen, roles)
        rows = zip(names, fresh, said.sum(1).tolist(), strict=True)
        return torch.stack([self._together(name, pooled, count) for name, pooled, count in rows])

    def _together(self, name: str, fresh: Float[Tensor, "k"], count: int) -> Float[Tensor, "k"]:
        """One prompt's pooled inputs once `count` more tokens are among them."""
        before = self._said.get(name)
        if before is None:
            self._said[name] = _Said(fresh, count)
        elif count:
            how, total = self._guard.content.pooling, before.tokens + count
            mean = (before.pooled * before.tokens + fresh * count) / total
            self._said[name] = _Said(torch.maximum(before.pooled, fresh) if how == "max" else mean, total)
        return self._said[name].pooled
