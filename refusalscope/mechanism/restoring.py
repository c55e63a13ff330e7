"""Features and projections set back, at the closing tokens of a prompt alone, to what they were on another prompt.

Values are aligned from the end, where closing tokens are the same whatever the prompts say; decoding is left alone.
Error-preserving like every feature edit: `z + sum_i (F'_i - F_i) W_dec[i]`, in residual units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import FeatureSet, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Tokens
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import Editor, Sets, membership


@dataclass(frozen=True)
class Closing:
    """What one prompt's closing tokens show at one layer, unedited, in the order in which they stand."""

    features: Float[Tensor, "closing k"]
    """Activations of the slice's features, in residual units; no columns where the layer has no slice."""
    projection: Float[Tensor, "closing"]
    """On the unit direction."""


Values = Mapping[str, Mapping[int, Closing]]
"""Prompt id -> layer -> what its closing tokens are to show: those of another prompt."""


@dataclass(frozen=True)
class RestoreFeatures:
    """Set features to the values given."""

    features: Sets
    values: Values
    """Read with the very slices that the edit is made with."""


@dataclass(frozen=True)
class RestoreDirection:
    """Move the component along a unit direction to the projections given, at these layers."""

    unit: Float[Tensor, "d_model"]
    layers: tuple[int, ...]
    values: Values


Distances = Mapping[str, Mapping[int, Float[Tensor, "closing"]]]
"""Prompt id -> layer -> how far closing tokens are moved there, in residual units."""


@dataclass(frozen=True)
class RandomDirections:
    """The control: at every layer and closing token a random direction, as far as a restoration moved the residual."""

    distances: Distances
    seed: int


Restoration = RestoreFeatures | RestoreDirection | RandomDirections


def read_closing(
    model: ChatModel,
    tokens: Tokens,
    slices: Mapping[int, SaeSlice],
    unit: Float[Tensor, "d_model"],
) -> dict[str, dict[int, Closing]]:
    """Prompt id -> layer -> activations and projections at closing tokens, of every sliced layer, in one pass."""
    residuals = model.run(tokens, keep=slices).residuals
    batch = Batch(tokens.prompt_ids, tokens.roles.cpu())
    found: dict[str, dict[int, Closing]] = {name: {} for name in tokens.prompt_ids}
    for layer, part in slices.items():
        tail, closing = _closing(residuals[layer], batch)
        active, along = part.encode(tail.float()), tail.float() @ unit
        for row, name in enumerate(tokens.prompt_ids):
            found[name][layer] = Closing(active[row][closing[row]], along[row][closing[row]])
    return found


def read_distances(
    model: ChatModel, tokens: Tokens, wanted: RestoreFeatures, slices: Mapping[int, SaeSlice]
) -> dict[str, dict[int, Tensor]]:
    """How far a restoration moves each layer's closing tokens while those of the layers before it stay moved.

    Measured under the restoration itself: where values of early layers carry forward, later ones have less to set
    back, so the distances on the unedited prompt would add up to more than was ever done.
    """
    found: dict[str, dict[int, Tensor]] = {name: {} for name in tokens.prompt_ids}

    def recorded(layer: int, edit: Edit) -> Edit:
        def step(residual: Tensor, batch: Batch) -> Tensor:
            edited = edit(residual, batch)
            moved = (edited.float() - residual.float()).norm(dim=-1)
            for name, row, closing in zip(batch.prompt_ids, moved, batch.roles == Role.CLOSING, strict=True):
                found[name][layer] = row[closing]
            return edited

        return step

    made = editor(wanted, slices=slices).edits
    model.run(tokens, edits={layer: recorded(layer, edit) for layer, edit in made.items()})
    return found


def editor(wanted: Restoration, *, slices: Mapping[int, SaeSlice]) -> Editor:
    """The edits that carry out a restoration.

    Raises ValueError when a layer that has features to be set lacks its slice.
    """
    made = Editor({})
    for layer in _layers(wanted):
        if layer not in slices and isinstance(wanted, RestoreFeatures):
            raise ValueError(f"restoring features of layer {layer} needs that layer's SAE slice")
        made.edits[layer] = _edit(_addition(wanted, layer, slices.get(layer)), made)
    return made


def _layers(wanted: Restoration) -> tuple[int, ...]:
    match wanted:
        case RestoreDirection(_, layers):
            return layers
        case RandomDirections(distances):
            return tuple(sorted({layer for of in distances.values() for layer in of}))
        case RestoreFeatures(features):
            sets = [features] if isinstance(features, FeatureSet) else list(features.values())
            return tuple(sorted({feature.layer for chosen in sets for feature in chosen.features}))


Addition = Callable[[Tensor, Tensor, Batch], Tensor]
"""(residual [prompt, position, d_model], which positions are closing tokens, batch) -> what to add, float32."""


def _edit(addition: Addition, made: Editor) -> Edit:
    def edit(residual: Tensor, batch: Batch) -> Tensor:
        tail, closing = _closing(residual, batch)
        if not tail.shape[1]:
            return residual
        added = addition(tail.float(), closing, batch) * closing[..., None]
        moved = (added != 0).any(-1)
        made.count(moved, Batch(batch.prompt_ids, batch.roles[:, -tail.shape[1] :]))
        # Untouched positions keep their bits: adding a zero vector in another type would round them.
        edited = torch.where(moved[..., None], (tail.float() + added).to(residual.dtype), tail)
        return torch.cat([residual[:, : -tail.shape[1]], edited], 1)

    return edit


def _closing(residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The last positions, as many as the longest closing, and which of them are closing tokens; none while decoding.

    A chat is padded on the left and ends with them, so nothing else needs to be encoded.
    """
    closing = batch.roles == Role.CLOSING
    width = int(closing.sum(1).max()) if len(closing) and not batch.answering else 0
    start = residual.shape[1] - width
    return residual[:, start:], closing[:, start:]


def _addition(wanted: Restoration, layer: int, part: SaeSlice | None) -> Addition:
    match wanted:
        case RestoreDirection(unit, _, values):
            return lambda tail, closing, batch: _along(tail, closing, batch, unit, values, layer)
        case RestoreFeatures(features, values):
            assert part is not None  # `editor` has made sure
            return lambda tail, closing, batch: _decoded(tail, closing, batch, part, features, values)
        case RandomDirections(distances, seed):
            return lambda tail, closing, batch: _astray(tail, closing, batch, distances, seed, layer)


def _along(
    tail: Tensor, closing: Tensor, batch: Batch, unit: Tensor, values: Values, layer: int
) -> Float[Tensor, "prompt position d_model"]:
    u = unit.to(tail.device)
    projection = tail @ u
    goal = _aligned(
        projection[..., None], closing, [values[name][layer].projection[:, None] for name in batch.prompt_ids]
    )
    return (goal[..., 0] - projection)[..., None] * u


def _decoded(
    tail: Tensor, closing: Tensor, batch: Batch, part: SaeSlice, features: Sets, values: Values
) -> Float[Tensor, "prompt position d_model"]:
    here = part.to(tail.device)
    chosen = membership(part, features, batch.prompt_ids).to(tail.device)
    active = here.encode(tail)
    goal = _aligned(active, closing, [values[name][part.layer].features for name in batch.prompt_ids])
    return ((goal - active) * chosen[:, None, :]) @ here.decoder


def _aligned(
    present: Float[Tensor, "prompt position k"], closing: Tensor, given: list[Tensor]
) -> Float[Tensor, "prompt position k"]:
    """What is there, with the values given in its place, the last closing token first; shorter ones leave the rest."""
    goal = present.clone()
    for row, values in enumerate(given):
        count = min(int(closing[row].sum()), len(values))
        if count:
            goal[row, -count:] = values[-count:].to(goal)
    return goal


def _astray(
    tail: Tensor, closing: Tensor, batch: Batch, distances: Distances, seed: int, layer: int
) -> Float[Tensor, "prompt position d_model"]:
    """A direction for every prompt and position, whatever else is in the batch; drawn from the last position on."""
    still = torch.zeros_like(tail[..., :1])
    far = _aligned(still, closing, [distances[name][layer][:, None] for name in batch.prompt_ids])
    rows = []
    for name in batch.prompt_ids:
        generator = torch.Generator().manual_seed(int(fingerprint(seed, name, layer)[:15], 16))
        drawn = torch.randn(tail.shape[1:], generator=generator).flip(0)
        rows.append(drawn / drawn.norm(dim=-1, keepdim=True))
    return torch.stack(rows).to(tail.device) * far
