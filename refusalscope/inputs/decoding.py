"""Greedy decoding of many prompts: rows leave the batch as their answers end, and the next prompts take their place.

Prompts are taken longest first: whoever joins fits into the columns that are there, and the first batch is the one that
needs most memory. Knows nothing of text, names or edits.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from refusalscope.inputs import loading
from refusalscope.inputs.cache import Roomy, empty_cache, is_roomy
from refusalscope.inputs.replay import Record
from refusalscope.inputs.template import Role

LEAVING = 4
"""Rows leave, and others take their place, once one in so many has ended: 3 to 10 % faster than one in 8 on a CPU."""
Announce = Callable[[Sequence[int], Int[Tensor, "row position"], bool], None]
"""Told which prompt each row is, the role of each position and whether all of them are an answer's, before the first
call of the model that has them so."""


class Limits(NamedTuple):
    """When an answer is over."""

    ends: Collection[int]
    """Tokens that end it."""
    longest: int
    """Tokens it has at most."""


@torch.no_grad()
def greedy(
    model: Any,
    ids: Int[Tensor, "prompt position"],
    roles: Int[Tensor, "prompt position"],
    *,
    limits: Limits,
    rows: int,
    device: torch.device,
    announce: Announce,
    record: Record | None = None,
) -> list[list[int]]:
    """The tokens of each prompt's answer, its end token included; at most `rows` prompts are in the model at once.

    `ids` are left-padded. The order in which prompts are taken depends on their lengths and `rows` alone. With `record`
    the calls for one token after another are made on the same tensors, as long as the rows stay.
    """
    running = _Running(model, ids, roles, limits, device, announce, record)
    waiting = sorted(range(len(ids)), key=lambda prompt: (-running.lengths[prompt], prompt))
    while waiting or running.rows:
        if running.is_leaving:
            running.leave()
            taken = rows - len(running.rows) if running.has_room else 0
            running.join(waiting[:taken])
            waiting = waiting[taken:]
        else:
            running.step()
    return running.answers


class _Running:
    """The rows in the model, and the answers so far."""

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        roles: Tensor,
        limits: Limits,
        device: torch.device,
        announce: Announce,
        record: Record | None,
    ) -> None:
        self._model, self._limits, self._device, self._announce = model, limits, device, announce
        self._record = record
        self._again: Callable[[], None] | None = None
        """The call for one more token, where it is made on the same tensors until rows come or go."""
        self._ids, self._roles = ids.cpu(), roles.cpu()
        self.lengths: list[int] = (self._roles != Role.PADDING).sum(1).tolist()
        self.answers: list[list[int]] = [[] for _ in self.lengths]
        self.rows: list[int] = []
        """Which prompt each row is."""
        self._ended: list[bool] = []
        """Per row; one that has ended may stay for a while."""
        self._cache: Any = None
        self._columns = 0
        """Positions the cache stands for, those to the left of a row's first token included."""
        self._fed = self._filled = self._going = torch.empty(0)
        """Per row: the token to be read next [row, 1]; how many the cache holds [row]; 1 until the row has ended."""

    @property
    def has_room(self) -> bool:
        """Whether prompts can join: always, unless the model keeps something else of them than keys and values."""
        return not self.rows or is_roomy(self._cache)

    @property
    def is_leaving(self) -> bool:
        """Whether so many rows have ended that it is worth the while to let them go."""
        ended = sum(self._ended)
        return ended == len(self.rows) or (is_roomy(self._cache) and LEAVING * ended >= len(self.rows))

    def leave(self) -> None:
        """Let the rows that have ended go; the last rows move into their places."""
        if self._again is not None:
            self._again = None
            for layer in self._cache.layers:
                layer.settle(self._columns)
        staying = [row for row, ended in enumerate(self._ended) if not ended]
        if not staying:
            self._cache, self.rows, self._ended = None, [], []
            return
        holes = [row for row, ended in enumerate(self._ended) if ended and row < len(staying)]
        movers = staying[len(staying) - len(holes) :]
        order = list(range(len(staying)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.rows = [self.rows[row] for row in order]
        self._ended = [False] * len(order)
        # The oldest rows may have gone: columns that are padding for all who stay are dropped.
        needed = max(self.lengths[prompt] + len(self.answers[prompt]) - 1 for prompt in self.rows)
        for layer in self._cache.layers:
            layer.keep_rows(len(order), holes, movers)
            layer.drop_columns(self._columns - needed)
        self._columns = needed
        at = torch.tensor(order, device=self._device)
        self._hold(self._fed[at], self._filled[at])

    def join(self, prompts: Sequence[int]) -> None:
        """Read prompts, in one call, and append them as rows."""
        if not prompts:
            return
        width = max(self.lengths[prompt] for prompt in prompts)
        at = torch.tensor(prompts)
        ids, roles = (part[at, part.shape[1] - width :].to(self._device) for part in (self._ids, self._roles))
        mask = (roles != Role.PADDING).long()
        cache = empty_cache(self._model)
        self._announce(prompts, roles, False)
        fed = self._read(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        filled = mask.sum(1)
        if self.rows:
            for layer, added in zip(self._cache.layers, cache.layers, strict=True):
                layer.add_rows(added)
            fed, filled = torch.cat([self._fed, fed]), torch.cat([self._filled, filled])
        else:
            self._cache, self._columns = cache, width
        self.rows += prompts
        self._ended += [False] * len(prompts)
        self._take(fed[len(self.rows) - len(prompts) :].flatten().tolist(), len(self.rows) - len(prompts))
        self._hold(fed, filled)

    def step(self) -> None:
        """One more token for every row."""
        if self._again is None and self._record is not None and (columns := self._needed()):
            self._again = self._record(self._in_place(columns))
        if self._again is not None:
            self._again()
        else:
            at = torch.arange(self._columns + 1, device=self._device)
            mask = (at >= (self._columns - self._filled)[:, None]).long()
            self._fed = self._read(self._fed, mask, self._filled[:, None], self._cache)
            # A row that has ended stays at its position: further on the model may know none.
            self._filled = self._filled + self._going
        self._columns += 1
        if self._take(self._fed.flatten().tolist(), 0):
            if self._again is None:
                self._hold(self._fed, self._filled)
            else:
                self._going.copy_(~torch.tensor(self._ended))

    def _needed(self) -> int:
        """Columns until the last row has ended at the latest; 0 where layers cannot keep them all in one place."""
        rows = zip(self.rows, self._ended, strict=True)
        columns = self._columns + self._limits.longest - min(len(self.answers[row]) for row, ended in rows if not ended)
        return columns if all(isinstance(layer, Roomy) and layer.holds(columns) for layer in self._cache.layers) else 0

    def _in_place(self, columns: int) -> Callable[[], None]:
        """What reads a token of every row and puts the next one in its place, without a look at any value."""
        cache, rows, at = self._cache, tuple(self.rows), torch.arange(columns, device=self._device)
        column = torch.full((1,), self._columns, device=self._device)
        fed, filled, going = (part.clone() for part in (self._fed, self._filled, self._going))
        self._fed, self._filled, self._going = fed, filled, going
        for layer in cache.layers:
            layer.stand(columns, column)

        def call() -> None:
            mask = (at >= (column - filled)[:, None]) & (at <= column)
            self._announce(rows, torch.where(going == 1, int(Role.RESPONSE), int(Role.PADDING))[:, None], True)
            fed.copy_(self._read(fed, self._recordable(mask), filled[:, None], cache))
            filled.add_(going)
            column.add_(1)

        return call

    def _recordable(self, visible: Tensor) -> Tensor:
        """A mask of what each row may look back to, in the form that a recorded call can be given."""
        eager = self._model.config.get_text_config()._attn_implementation == "eager"
        if not (eager and loading.caps_attention(self._model)):
            return visible.long()
        # Of that transformers would make the mask to be added by a copy of a number from the host.
        added = visible.new_zeros(visible.shape, dtype=self._model.dtype)
        return added.masked_fill_(~visible, torch.finfo(added.dtype).min)[:, None, None]

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Int[Tensor, "row 1"]:
        """One call of the model: the likeliest token after each row."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].argmax(-1, keepdim=True).to(self._device)

    def _take(self, tokens: Sequence[int], first: int) -> bool:
        """Append a token to the answer of every row from `first` on; whether any of them has ended with it."""
        before = sum(self._ended)
        for row, token in enumerate(tokens, first):
            if not self._ended[row]:
                answer = self.answers[self.rows[row]]
                answer.append(token)
                self._ended[row] = token in self._limits.ends or len(answer) == self._limits.longest
        return sum(self._ended) > before

    def _hold(self, fed: Tensor, filled: Tensor) -> None:
        """Keep what the next call needs, and announce the rows of it."""
        ended = torch.tensor(self._ended, device=self._device)
        self._fed, self._filled, self._going = fed, filled, (~ended).long()
        self._announce(self.rows, torch.where(ended, int(Role.PADDING), int(Role.RESPONSE))[:, None], True)
