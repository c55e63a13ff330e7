"""An `Intervention` becomes `{layer: edit}`: the only place where directions are removed and features scaled.

Feature edits are error-preserving: `z + sum_i (f'_i - f_i) W_dec[i]` equals decoding the edited features and adding the
SAE's error back, and encodes K columns instead of d_sae (method 5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refusalscope.core.types import Direction, FeatureSet, SaeSlice
from refusalscope.inputs.chat import Batch, Edit
from refusalscope.inputs.template import Role


@dataclass(frozen=True)
class RemoveDirection:
    """Remove the direction after every layer, at every position: `z - (z.u - b[l]) u`."""

    direction: Direction
    affine: bool = False
    """Move the projection to the harmless mean `b[l]` (Marshall et al. 2024) instead of to zero."""


@dataclass(frozen=True)
class AddDirection:
    """Add the difference of means after its own layer, at every position: `z + v`."""

    direction: Direction


@dataclass(frozen=True)
class ScaleFeatures:
    """Multiply the activations of chosen features by `factor`, at every position, prompt and generated."""

    features: FeatureSet | Mapping[str, FeatureSet]
    """One set for all prompts, or one per prompt id."""
    factor: float


Intervention = RemoveDirection | AddDirection | ScaleFeatures


@dataclass
class Editor:
    """The edits of one intervention, and how many positions they have really changed so far."""

    edits: dict[int, Edit]
    _counts: list[Tensor] = field(default_factory=list)

    @property
    def changed(self) -> int:
        """Positions (padding excluded) whose residual moved, summed over layers and calls."""
        return int(sum(int(count) for count in self._counts))

    def count(self, moved: Bool[Tensor, "prompt position"], batch: Batch) -> None:
        self._counts.append((moved & (batch.roles != Role.PADDING)).sum())


def needed_features(intervention: Intervention | None) -> dict[int, list[int]]:
    """Layer -> the features an intervention touches, ascending: what to slice from the SAEs."""
    if not isinstance(intervention, ScaleFeatures):
        return {}
    sets = [intervention.features] if isinstance(intervention.features, FeatureSet) else intervention.features.values()
    layers: dict[int, set[int]] = {}
    for chosen in sets:
        for layer, indices in chosen.by_layer().items():
            layers.setdefault(layer, set()).update(indices)
    return {layer: sorted(indices) for layer, indices in sorted(layers.items())}


def editor(
    intervention: Intervention | None,
    *,
    layers: int,
    slices: Mapping[int, SaeSlice] | None = None,
) -> Editor:
    """The edits that carry out `intervention` on a model of `layers` layers; None edits nothing.

    `slices` must hold what `needed_features` names; ValueError otherwise.
    """
    made = Editor({})
    match intervention:
        case None:
            pass
        case RemoveDirection(direction, affine):
            offsets = direction.offsets if affine else torch.zeros(layers)
            made.edits.update({layer: _remove(direction.unit, offsets[layer], made) for layer in range(layers)})
        case AddDirection(direction):
            made.edits[direction.layer] = _add(direction.vector, made)
        case ScaleFeatures(features, factor):
            for layer, wanted in needed_features(intervention).items():
                if slices is None or layer not in slices:
                    raise ValueError(f"scaling features of layer {layer} needs that layer's SAE slice")
                made.edits[layer] = _scale(slices[layer].take(wanted), features, factor, made)
    return made


def _remove(unit: Float[Tensor, "d_model"], offset: Float[Tensor, ""], made: Editor) -> Edit:
    def edit(residual: Tensor, batch: Batch) -> Tensor:
        u = unit.to(residual.device)
        # The projection is taken in float32: in bfloat16 removal would leave a visible remainder.
        excess = residual.float() @ u - offset.to(residual.device)
        made.count(excess != 0, batch)
        return (residual.float() - excess[..., None] * u).to(residual.dtype)

    return edit


def _add(vector: Float[Tensor, "d_model"], made: Editor) -> Edit:
    def edit(residual: Tensor, batch: Batch) -> Tensor:
        made.count(torch.ones_like(batch.roles, dtype=torch.bool), batch)
        return residual + vector.to(residual)

    return edit


def _scale(part: SaeSlice, features: FeatureSet | Mapping[str, FeatureSet], factor: float, made: Editor) -> Edit:
    def edit(residual: Tensor, batch: Batch) -> Tensor:
        here = part.to(residual.device)
        chosen = membership(part, features, batch.prompt_ids).to(residual.device)
        change = (factor - 1) * here.encode(residual) * chosen[:, None, :]
        moved = (change != 0).any(-1)
        made.count(moved, batch)
        # Untouched positions keep their bits: adding a zero vector in another type would round them.
        edited = (residual.float() + change @ here.decoder).to(residual.dtype)
        return torch.where(moved[..., None], edited, residual)

    return edit


def membership(
    part: SaeSlice, features: FeatureSet | Mapping[str, FeatureSet], prompt_ids: Sequence[str]
) -> Float[Tensor, "prompt k"]:
    """1 where a row's own set holds the slice's feature. Raises KeyError for a prompt that has no set."""
    rows = []
    for prompt_id in prompt_ids:
        chosen = features if isinstance(features, FeatureSet) else features[prompt_id]
        wanted = set(chosen.by_layer().get(part.layer, []))
        rows.append([float(index in wanted) for index in part.features.tolist()])
    return torch.tensor(rows).view(len(rows), len(part.features))
