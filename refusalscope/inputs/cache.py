"""What a model keeps of the tokens it has read, with room for more of them and of rows.

Keys and values lie in buffers: a token is written where it belongs, without a copy of all that came before it (4 to 9 %
of a step at 100 to 250 tokens on a CPU), and a row comes or goes without touching the others. Buffers can also stand
still, for a call that is recorded (`replay.py`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 32
"""Columns added to a layer's buffers when they are full: a copy of the cache every so many tokens."""


def empty_cache(model: Any) -> Any:
    """An empty cache for a model: in layers with room, unless some layer keeps something else than keys and values."""
    made: Any = DynamicCache(config=model.config)
    kinds = {DynamicLayer: lambda _: Full(), DynamicSlidingWindowLayer: lambda layer: Sliding(layer.sliding_window)}
    if all(type(layer) in kinds for layer in made.layers):
        made.layers = [kinds[type(layer)](layer) for layer in made.layers]
    return made


def is_roomy(cache: Any) -> bool:
    return all(isinstance(layer, Roomy) for layer in cache.layers)


class Roomy(DynamicLayer):
    """Keys and values [row, head, column, dimension] at the start of buffers with room for more rows and columns.

    `keys` and `values` are views of the buffers. A plain layer makes both anew at every token.
    """

    keys: Any
    values: Any
    most: int | None = None
    """Columns that a later token can look back to; None: all of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._buffers: tuple[Tensor, ...] = ()
        self._end = 0
        self._column: Tensor | None = None
        """Where the next token is written, while the layer stands."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the columns of new tokens; returns all that these can look back to, themselves included."""
        if self._column is not None:
            self.keys.index_copy_(2, self._column, key_states)
            self.values.index_copy_(2, self._column, value_states)
            return self.keys, self.values
        new, rows, added = (key_states, value_states), len(key_states), key_states.shape[2]
        self._count(added)
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
            self._end = self._kept(added)
            self._buffers = tuple(_with_room(part, self._end) for part in new)
            self._view(rows, self._end)
            return new
        kept = self._kept(self.keys.shape[2])
        if self._end + added > self._buffers[0].shape[2]:
            self._buffers = tuple(_with_room(part[:, :, : self._end], kept) for part in self._buffers)
            self._end = kept
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:rows, :, self._end : self._end + added] = part
        self._end += added
        self._view(rows, kept + added)
        return self.keys, self.values

    def holds(self, columns: int) -> bool:
        """Whether that many columns can lie side by side, and a token look back to all of them."""
        return self.most is None or columns <= self.most + 1

    def stand(self, columns: int, column: Tensor) -> None:
        """Return that many columns from now on, and write tokens at `column`, which is looked up on the device."""
        rows, filled = self.keys.shape[0], self.keys.shape[2]
        if self._end - filled + columns > self._buffers[0].shape[2]:
            room = columns - filled
            self._buffers = tuple(_with_room(part[:, :, : self._end], filled, room) for part in self._buffers)
            self._end = filled
        self._end += columns - filled
        self._view(rows, columns)
        for part in (self.keys, self.values):
            # A NaN is one behind a mask too.
            part[:, :, filled:] = 0
        self._column = column

    def settle(self, columns: int) -> None:
        """Grow by what is written again; that many columns have been filled."""
        standing = self.keys.shape[2]
        self._column = None
        self._count(columns - self.get_seq_length())
        self._end -= standing - columns
        self._view(len(self.keys), columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns to be masked, and the first of them."""
        return super().get_mask_sizes(query_length) if self._column is None else (self.keys.shape[2], 0)

    def get_seq_length(self) -> int:
        """Columns before the next token; while the layer stands a token counts as the last one, masks say the rest."""
        return super().get_seq_length() if self._column is None else self.keys.shape[2] - 1

    def keep_rows(self, rows: int, holes: Sequence[int], movers: Sequence[int]) -> None:
        """Move some rows into the places of others, then let go of all but the first `rows`."""
        if holes:
            for part in (self.keys, self.values):
                part[list(holes)] = part[list(movers)]
        self._view(rows, self.keys.shape[2])

    def drop_columns(self, count: int) -> None:
        """Forget the first columns: they are padding in every row."""
        left = self.get_seq_length() - count
        self._count(-count)
        self._view(len(self.keys), min(self.keys.shape[2], left))

    def add_rows(self, other: "Roomy") -> None:
        """Append the rows of another, which has no more columns than this one, padded on the left."""
        rows, columns = len(self.keys), self.keys.shape[2]
        padding = columns - other.keys.shape[2]
        self._view(rows + len(other.keys), columns)
        for here, there in ((self.keys, other.keys), (self.values, other.values)):
            # Whatever a row before left here must go: a NaN is one behind a mask too.
            here[rows:, :, :padding] = 0
            here[rows:, :, padding:] = there

    def _kept(self, columns: int) -> int:
        return columns if self.most is None else min(columns, self.most)

    def _view(self, rows: int, columns: int) -> None:
        self.keys, self.values = (part[:rows, :, self._end - columns : self._end] for part in self._buffers)

    def _count(self, columns: int) -> None:
        """Told by how many columns the layer has grown."""


class Full(Roomy):
    """A layer that looks back to the beginning."""


class Sliding(Roomy, DynamicSlidingWindowLayer):
    """A layer that looks back so far and no further: what lies before that is let go when the buffers are full."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.most = sliding_window - 1

    def _count(self, columns: int) -> None:
        self.cumulative_length += columns


def _with_room(part: Tensor, columns: int, room: int = ROOM) -> Tensor:
    """A copy of the last columns with room for more."""
    made = part.new_empty(*part.shape[:2], columns + room, part.shape[3])
    made[:, :, :columns] = part[:, :, part.shape[2] - columns :]
    return made
