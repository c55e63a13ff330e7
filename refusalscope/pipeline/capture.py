"""Activations of prompts, however many: read once in a stream, kept in shards, read back a column at a time.

A shard holds `ROWS` prompts in one safetensors file that is mapped, not loaded; a run that is killed makes one shard
again. In memory there is one shard while capturing, and one column of one shard while reading.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from refusalscope.core.activations import Activations
from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Feature, Prompts
from refusalscope.evals.probes import Probe

ROWS = 256
"""Prompts in a shard."""
Matrix = NDArray[np.float64] | csr_matrix
Reader = Callable[[Store, str], Matrix]
"""(store, path of a shard) -> its inputs to a probe, a row a prompt."""
Source = Callable[[str], Iterator[Matrix]]
"""Name of a set -> its inputs to a probe, part by part."""


def shards(prompts: Prompts) -> Iterator[Prompts]:
    """A set in parts of `ROWS`, in order."""
    for start in range(0, len(prompts), ROWS):
        yield prompts[start : start + ROWS]


def capture(
    store: Store, folder: str, parts: Iterable[Prompts], *, key: str, make: Callable[[Prompts], Activations]
) -> list[str]:
    """Make the shards of `parts` that do not stand yet, one after the other; the paths of all, in order.

    `key` names everything but the prompts that `make` depends on.
    """
    paths = []
    for number, rows in enumerate(parts):
        paths.append(f"{folder}/{number:05d}.safetensors")
        store.ensure(paths[-1], fingerprint(key, rows), partial(make, rows))
    return paths


def dense(layer: int, layers: Sequence[int]) -> Reader:
    """The residual stream after `layer`; `layers` are those that the shards hold."""
    at = list(layers).index(layer)

    def read(store: Store, path: str) -> Matrix:
        values, scale = (store.tensor(path, name, at) for name in ("residual", "residual_scale"))
        return (values.double() * scale.double()[:, None]).numpy()

    return read


def chosen(wanted: Sequence[Feature], held: Sequence[Feature]) -> Reader:
    """The activations of `wanted` in their order; `held` are the columns that the shards hold."""
    place = {feature: at for at, feature in enumerate(held)}
    columns = [place[feature] for feature in wanted]

    def read(store: Store, path: str) -> Matrix:
        values, scale = (store.tensor(path, name) for name in ("chosen", "chosen_scale"))
        return (values[:, columns].double() * scale.double()[:, None]).numpy()

    return read


def whole(size: int) -> Reader:
    """Every feature of the layer that was read whole, of `size` features."""

    def read(store: Store, path: str) -> Matrix:
        starts, index, value, scale = (
            store.tensor(path, name).numpy() for name in ("starts", "index", "value", "value_scale")
        )
        values = value.astype(float) * np.repeat(scale.astype(float), np.diff(starts))
        return csr_matrix((values, index, starts), shape=(len(starts) - 1, size))

    return read


def columns(indices: Sequence[int], size: int) -> Reader:
    """Some features of the layer that was read whole."""
    every = whole(size)
    return lambda store, path: np.asarray(csr_matrix(every(store, path))[:, list(indices)].todense())


class Captured(NamedTuple):
    """The shards of several sets of prompts."""

    store: Store
    paths: Mapping[str, Sequence[str]]
    """Name of a set -> its shards, in the order of its prompts."""

    def source(self, reader: Reader) -> Source:
        """A set's inputs, shard by shard."""
        return lambda name: (reader(self.store, path) for path in self.paths[name])


def matrix(source: Source, name: str) -> Any:
    """A set's inputs, all of them in memory: for what is fitted on. Raises ValueError for an empty set."""
    parts: list[Any] = list(source(name))
    if not parts:
        raise ValueError(f"{name} holds no prompt")
    return vstack(parts, format="csr") if isinstance(parts[0], csr_matrix) else np.concatenate(parts)


def scores(source: Source, name: str, probe: Probe) -> list[float]:
    """A probe's logits on a set, shard by shard."""
    return [score for part in source(name) for score in probe.score(part).tolist()]
