"""What a probe reads of a prompt: the residual stream and feature activations at one position, or pooled over several.

Stored as float16 with a power of two beside each row, so that no activation is out of range (some models' residuals
exceed 65504) and bfloat16 keeps every digit. Plain data on the CPU; a set of any size is many of these.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Int, Int32
from torch import Tensor

from refusalscope.core.types import Feature

LARGEST = 15
"""Rows are scaled to lie below 2 ** LARGEST, where float16 is finite and small numbers lose least."""
SMALLEST = -126
"""The least power of two that float32 holds with all its digits."""


class Half(NamedTuple):
    """Rows of numbers at half precision: `values * scale` is what they stand for."""

    values: Float16[Tensor, "*rows width"]
    scale: Float[Tensor, "*rows"]

    def restored(self) -> Float[Tensor, "*rows width"]:
        """The rows as float32."""
        return self.values.float() * self.scale[..., None]


@dataclass(frozen=True)
class Activations:
    """What some prompts show, in their order."""

    prompt_ids: tuple[str, ...]
    layers: tuple[int, ...]
    residual: Float16[Tensor, "prompt layer d_model"]
    residual_scale: Float[Tensor, "prompt layer"]
    features: tuple[Feature, ...]
    chosen: Float16[Tensor, "prompt feature"]
    """Activations of `features`, in residual units."""
    chosen_scale: Float[Tensor, "prompt"]
    layer: int
    """The layer whose SAE was read whole, of d_sae features."""
    starts: Int[Tensor, "bound"]
    """Where each prompt's active features begin in `index` and `value`, and where the last one's end, as in CSR."""
    index: Int32[Tensor, "entry"]
    value: Float16[Tensor, "entry"]
    value_scale: Float[Tensor, "prompt"]
    size: int
    """d_sae of that layer."""


def half(rows: Float[Tensor, "*rows width"]) -> Half:
    """Rows at half precision. Raises ValueError where a number is not finite."""
    if not bool(rows.isfinite().all()):
        raise ValueError("activations are not finite: load the model in bfloat16 or float32 (--dtype)")
    largest = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    # A power of two: dividing by it loses no digit. The largest number is below 2 ** exponent.
    exponent = (torch.frexp(largest).exponent - LARGEST).clamp(min=SMALLEST)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return Half((rows / scale[..., None]).half(), scale.float())
