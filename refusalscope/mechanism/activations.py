"""What a probe reads while a model reads a prompt: one forward pass, residuals and features at a position or pooled.

Features are encoded from the residuals as they are, before anything is rounded. At most one SAE is read whole; of all
others only the slices of the features that were asked for. Knows nothing of files and of what is made of the numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refusalscope.core.activations import Activations, half
from refusalscope.core.types import Feature, Prompts, SaeSlice
from refusalscope.inputs.chat import ChatModel, Tokens
from refusalscope.inputs.saes import LayerSae
from refusalscope.inputs.template import Role

Pooling = Literal["last", "max", "mean"]
"""The last position, or the largest or mean value over what was said: the instruction and, in an answer, its tokens."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
Pool = Callable[[Float[Tensor, "prompt position k"], Int[Tensor, "prompt position"]], Float[Tensor, "prompt k"]]


@dataclass(frozen=True)
class Plan:
    """What is read of every prompt."""

    layers: tuple[int, ...]
    """Layers whose residuals are kept."""
    slices: Mapping[int, SaeSlice]
    """Layer -> the features whose activations are kept."""
    layer: int
    """The layer whose SAE is read whole."""
    pooling: Pooling = "last"

    @property
    def features(self) -> tuple[Feature, ...]:
        """The columns of `Activations.chosen`."""
        return tuple(Feature(layer, i) for layer, part in self.slices.items() for i in part.features.tolist())


def pooled(
    values: Float[Tensor, "prompt position k"], roles: Int[Tensor, "prompt position"], how: Pooling
) -> Float[Tensor, "prompt k"]:
    """One row a prompt. Raises ValueError where a prompt has no token of its own to pool over."""
    if how == "last":
        return values[:, -1]
    said = (roles == Role.INSTRUCTION) | (roles == Role.RESPONSE)
    count = said.sum(1)
    if bool((count == 0).any()):
        raise ValueError("a prompt has no token between the template's own: it cannot be pooled over")
    if how == "max":
        return values.masked_fill(~said[..., None], -torch.inf).amax(1)
    return (values * said[..., None]).sum(1) / count[:, None]


def encoded_features(
    part: SaeSlice,
    residual: Float[Tensor, "prompt position d_model"],
    roles: Int[Tensor, "prompt position"],
    how: Pooling,
) -> Float[Tensor, "prompt k"]:
    """A slice's features, pooled; only positions that count are encoded."""
    if how == "last":
        return part.encode(residual[:, -1].float())
    return pooled(part.encode(residual.float()), roles, how)


def read(model: ChatModel, sae: LayerSae, prompts: Prompts, plan: Plan, *, batch_size: int) -> Activations:
    """What `plan` asks for of every prompt; `sae` is that of `plan.layer`."""
    parts = [_read(model, sae, tokens, plan) for _, tokens in model.batches(prompts, batch_size)]
    residual, chosen, whole = (torch.cat(column) for column in zip(*parts, strict=True))
    kept, features, active = half(residual), half(chosen), half(whole)
    # What is too small for half precision is not active.
    row, index = active.values.nonzero(as_tuple=True)
    return Activations(
        prompts.ids,
        plan.layers,
        *kept,
        plan.features,
        *features,
        plan.layer,
        torch.cat([torch.zeros(1), torch.bincount(row, minlength=len(prompts)).cumsum(0)]).long(),
        index.int(),
        active.values[row, index],
        active.scale,
        sae.size,
    )


def _read(model: ChatModel, sae: LayerSae, tokens: Tokens, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    found = model.run(tokens, keep={*plan.layers, *plan.slices, plan.layer}).residuals
    roles = tokens.roles.cpu()
    residual = torch.stack([pooled(found[layer].float(), roles, plan.pooling) for layer in plan.layers], 1)
    encoded = [encoded_features(part, found[layer], roles, plan.pooling) for layer, part in plan.slices.items()]
    chosen = torch.cat(encoded, 1) if encoded else residual.new_zeros(len(roles), 0)
    return residual, chosen, _whole(sae, found[plan.layer], roles, plan.pooling)


def _whole(
    sae: LayerSae,
    residual: Float[Tensor, "prompt position d_model"],
    roles: Int[Tensor, "prompt position"],
    how: Pooling,
) -> Float[Tensor, "prompt d_sae"]:
    """Every feature of one layer, a prompt at a time where positions are pooled."""
    if how == "last":
        return sae.encode(residual[:, -1]).cpu()
    rows = [pooled(sae.encode(row[None]).cpu(), own[None], how) for row, own in zip(residual, roles, strict=True)]
    return torch.cat(rows)
