"""An `Intervention` becomes `{layer: edit}`: the only place where directions and features are edited.

Feature edits are error-preserving: `z + sum_i (F'_i - F_i) W_dec[i]`, in residual units, equals decoding the edited
features and adding the SAE's error back, and encodes K columns instead of d_sae (method 5).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from refusalscope.core.types import Direction, FeatureSet, Prompts, SaeSlice, layers_of
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Tokens, scored
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


Sets = FeatureSet | Mapping[str, FeatureSet]
"""One set for all prompts, or one per prompt id."""


@dataclass(frozen=True)
class ScaleFeatures:
    """Multiply the activations of chosen features by `factor`, at every position, prompt and generated."""

    features: Sets
    factor: float


@dataclass(frozen=True)
class SetFeatures:
    """Set the activations of chosen features to `value`, in the SAE's own units, at every position."""

    features: Sets
    value: float


@dataclass(frozen=True)
class Held:
    """One layer's activations on an unedited prompt, in residual units, features ascending."""

    values: Float[Tensor, "position k"]
    """At the prompt's own positions, padding excluded."""
    mean: Float[Tensor, "k"]
    """Over instruction and closing tokens."""


@dataclass(frozen=True)
class HoldFeatures:
    """Set the activations of chosen features to what they were on the unedited prompt (see `record`)."""

    features: FeatureSet
    held: Mapping[str, Mapping[int, Held]]
    """Prompt id -> layer -> what to hold."""
    decoding: Literal["mean", "free"] = "mean"
    """While decoding: their mean over instruction and closing tokens, or left alone as published."""


@dataclass(frozen=True)
class Together:
    """Several interventions at once; at a layer that more than one edits, they act in this order."""

    parts: "tuple[Intervention, ...]"


FeatureEdit = ScaleFeatures | SetFeatures | HoldFeatures
Intervention = RemoveDirection | AddDirection | FeatureEdit | Together


@dataclass
class Editor:
    """The edits of one intervention, and how many positions they have really changed so far."""

    edits: dict[int, Edit]
    _counts: dict[torch.device, Tensor] = field(default_factory=dict)
    """Where residuals are, how many of their positions were changed: added to in place, as a recorded call can."""
    _live: tuple[Tensor, Tensor] | None = None
    """The roles last asked about, the same for all layers of a pass, and where they are no padding."""

    @property
    def changed(self) -> int:
        """Positions (padding excluded) whose residual moved, summed over layers and calls."""
        return sum(int(count) for count in self._counts.values())

    def count(self, change: Shaped[Tensor, "prompt position"], batch: Batch) -> None:
        """Count the positions at which `change` is not zero."""
        if self._live is None or self._live[0] is not batch.roles:
            self._live = (batch.roles, batch.roles != Role.PADDING)
        if change.device not in self._counts:
            self._counts[change.device] = torch.zeros((), dtype=torch.long, device=change.device)
        self._counts[change.device] += torch.logical_and(change, self._live[1]).count_nonzero()


def needed_features(intervention: Intervention | None) -> dict[int, list[int]]:
    """Layer -> the features an intervention touches, ascending: what to slice from the SAEs."""
    return layers_of(_sets(intervention))


def needs_chat(intervention: Intervention | None) -> bool:
    """Whether an intervention must know the prompt of a row or the role of a position, as no harness does.

    True for `HoldFeatures`, for sets chosen per prompt, and for several together where one of them is such.
    """
    if isinstance(intervention, Together):
        return any(needs_chat(part) for part in intervention.parts)
    return isinstance(intervention, HoldFeatures) or (
        isinstance(intervention, ScaleFeatures | SetFeatures) and not isinstance(intervention.features, FeatureSet)
    )


def check_everywhere(intervention: Intervention | None) -> None:
    """Raise ValueError, one line, unless the intervention is the same at every position of every prompt."""
    if needs_chat(intervention):
        raise ValueError(
            "features held at what they were on a prompt, and sets chosen per prompt, need to know prompts and roles: "
            "where an evaluation harness or plain text calls the model, remove or add a direction, or scale or set one "
            "set of features"
        )


def _sets(intervention: Intervention | None) -> list[FeatureSet]:
    if isinstance(intervention, Together):
        return [chosen for part in intervention.parts for chosen in _sets(part)]
    if not isinstance(intervention, FeatureEdit):
        return []
    features = intervention.features
    return [features] if isinstance(features, FeatureSet) else list(features.values())


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
    _carry_out(made, intervention, layers, slices)
    return made


def _carry_out(
    made: Editor, intervention: Intervention | None, layers: int, slices: Mapping[int, SaeSlice] | None
) -> None:
    """Add to an editor the edits of one more intervention; at a layer that it edits already they act last."""
    match intervention:
        case None:
            pass
        case RemoveDirection(direction, affine):
            offsets = direction.offsets if affine else torch.zeros(layers)
            for layer in range(layers):
                _then(made, layer, _remove(direction.unit, offsets[layer], made))
        case AddDirection(direction):
            _then(made, direction.layer, _add(direction.vector, made))
        case Together(parts):
            for part in parts:
                _carry_out(made, part, layers, slices)
        case ScaleFeatures() | SetFeatures() | HoldFeatures():
            for layer, wanted in needed_features(intervention).items():
                if slices is None or layer not in slices:
                    raise ValueError(f"editing features of layer {layer} needs that layer's SAE slice")
                part = slices[layer].take(wanted)
                _then(made, layer, _activations(part, intervention.features, _rule(intervention, part), made))


def record(
    model: ChatModel,
    prompts: Prompts,
    slices: Mapping[int, SaeSlice],
    *,
    batch_size: int,
    render: Callable[[Prompts], Tokens] | None = None,
) -> dict[str, dict[int, Held]]:
    """What `HoldFeatures` holds: the activations of the sliced features on every prompt, unedited.

    `slices` hold the features of the set and no others. `render` is `model.tokens` unless told otherwise: where answers
    are to be held, `model.answer_tokens`.
    """
    held: dict[str, dict[int, Held]] = {}
    # The order in which an editor takes the features of a layer.
    slices = {layer: part.take(sorted(part.features.tolist())) for layer, part in slices.items()}
    for start in range(0, len(prompts), batch_size):
        tokens = (render or model.tokens)(prompts[start : start + batch_size]).to(model.device)
        residuals = model.run(tokens, keep=slices).residuals
        roles = tokens.roles.cpu()
        for row, name in enumerate(tokens.prompt_ids):
            inside = roles[row] != Role.PADDING
            averaged = scored(roles[row][inside])
            held[name] = {}
            for layer, part in slices.items():
                values = part.encode(residuals[layer][row][inside])
                held[name][layer] = Held(values, values[averaged].mean(0))
    return held


def _then(made: Editor, layer: int, edit: Edit) -> None:
    before = made.edits.get(layer)
    made.edits[layer] = edit if before is None else _in_turn(before, edit)


def _in_turn(first: Edit, then: Edit) -> Edit:
    return lambda residual, batch: then(first(residual, batch), batch)


def _remove(unit: Float[Tensor, "d_model"], offset: Float[Tensor, ""], made: Editor) -> Edit:
    @lru_cache(maxsize=1)
    def placed(device: torch.device) -> tuple[Tensor, Tensor]:
        return unit.to(device), offset.to(device)

    def edit(residual: Tensor, batch: Batch) -> Tensor:
        u, stays = placed(residual.device)
        # The projection is taken in float32: in bfloat16 removal would leave a visible remainder.
        exact = residual.float()
        excess = torch.matmul(exact, u).sub_(stays)
        made.count(excess, batch)
        return torch.addcmul(exact, excess[..., None], u, value=-1).to(residual.dtype)

    return edit


def _add(vector: Float[Tensor, "d_model"], made: Editor) -> Edit:
    @lru_cache(maxsize=1)
    def placed(device: torch.device, kind: torch.dtype) -> Tensor:
        return vector.to(device, kind)

    def edit(residual: Tensor, batch: Batch) -> Tensor:
        made.count(torch.ones_like(batch.roles), batch)
        return residual + placed(residual.device, residual.dtype)

    return edit


Rule = Callable[[Tensor, Tensor, Batch], Tensor]
"""(activations [prompt, position, k], s(z) [prompt, position, 1] or a single 1, batch) -> by how much they change, in
residual units."""


def _rule(intervention: FeatureEdit, part: SaeSlice) -> Rule:
    match intervention:
        case ScaleFeatures(_, factor):
            return lambda active, scale, batch: (factor - 1) * active
        case SetFeatures(_, value):
            return lambda active, scale, batch: value * scale - active
        case HoldFeatures(_, held, decoding):
            return _recall(held, part.layer, decoding)


def _recall(held: Mapping[str, Mapping[int, Held]], layer: int, decoding: str) -> Rule:
    """To the held values at prompt positions; at positions of the answer to their mean, or not at all."""

    @lru_cache(maxsize=1)
    def means(prompt_ids: tuple[str, ...], device: torch.device) -> Float[Tensor, "prompt 1 k"]:
        return torch.stack([held[name][layer].mean for name in prompt_ids])[:, None].to(device)

    def recalled(active: Tensor, scale: Tensor, batch: Batch) -> Float[Tensor, "prompt position k"]:
        given = (batch.roles != Role.PADDING) & (batch.roles != Role.RESPONSE)
        wanted = active
        if decoding == "mean":
            answered = (batch.roles == Role.RESPONSE)[..., None]
            wanted = torch.where(answered, means(batch.prompt_ids, active.device).to(active.dtype), active)
        # Whether any is a prompt's is looked up on the host: a recorded call may not ask the device.
        if not batch.answering and given.any():
            wanted = wanted.clone()
            for row, name in enumerate(batch.prompt_ids):
                wanted[row, given[row]] = held[name][layer].values.to(active)
        return wanted - active

    return recalled


def _activations(part: SaeSlice, features: Sets, rule: Rule, made: Editor) -> Edit:
    # K columns stay where they were first needed. A slice that holds a whole encoder comes and goes: the device never
    # keeps more than one layer's.
    placed: dict[torch.device, SaeSlice] = {}

    @lru_cache(maxsize=1)
    def members(prompt_ids: tuple[str, ...], device: torch.device) -> Float[Tensor, "prompt 1 k"]:
        # An answer asks for the same rows token after token.
        return membership(part, features, prompt_ids)[:, None].to(device)

    # One set for all prompts, and no other feature in the slice: there is nothing to leave out.
    chooses = not isinstance(features, FeatureSet)

    def edit(residual: Tensor, batch: Batch) -> Tensor:
        here = placed.get(residual.device) or part.to(residual.device)
        if part.active is None:
            placed[residual.device] = here
        own, scale = here.read(residual)
        active = own if part.normalisation == "none" else own * scale
        change = rule(active, scale, batch)
        if chooses:
            change = change * members(batch.prompt_ids, residual.device)
        made.count(change.any(-1), batch)
        # The sum is taken in float32 or better: where nothing changes, adding zero leaves every bit in its place.
        exact = residual.to(torch.promote_types(residual.dtype, torch.float32))
        return (exact + change @ here.decoder).to(residual.dtype)

    return edit


def membership(part: SaeSlice, features: Sets, prompt_ids: Sequence[str]) -> Float[Tensor, "prompt k"]:
    """1 where a row's own set holds the slice's feature. Raises KeyError for a prompt that has no set."""
    rows = []
    for prompt_id in prompt_ids:
        chosen = features if isinstance(features, FeatureSet) else features[prompt_id]
        wanted = set(chosen.by_layer().get(part.layer, []))
        rows.append([float(index in wanted) for index in part.features.tolist()])
    return torch.tensor(rows).view(len(rows), len(part.features))
