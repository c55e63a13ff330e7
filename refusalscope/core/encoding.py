"""How an SAE's encoder reads a residual: normalisation of each token, JumpReLU, the largest few.

An SAE that normalises decodes as `s(z) (f W_dec + b_dec) + mu(z)`. Everywhere else activations are in residual units,
`F = s(z) f`, so that `z = F W_dec + rest` whatever the normalisation (method 1); `s` and `mu` are computed here alone.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2048
"""Tokens encoded at a time, at most, where every feature's activation is computed."""
ACTIVATIONS = 2**24
"""Activations computed at a time, at most: 64 MiB in float32, of which several are held together."""
ACTIVATIONS_IN_CACHE = 2**21
"""The same on a CPU, where 8 MiB stay in its cache: encoding 512 tokens by 16,384 features took .15 s, not .21."""
LAYER_NORM_EPSILON = 1e-5


def at_once(size: int, device: torch.device | str) -> int:
    """How many tokens are encoded at a time by an SAE of `size` features on `device`."""
    most = ACTIVATIONS_IN_CACHE if torch.device(device).type == "cpu" else ACTIVATIONS
    return max(1, min(CHUNK, most // size))


Normalisation = Literal["none", "constant_norm_rescale", "layer_norm"]
"""What an SAE does to each token before it reads it, by SAELens's names."""


class Normalised(NamedTuple):
    """Residuals as the encoder reads them, float32, and what leads back."""

    inputs: Float[Tensor, "*batch d_model"]
    scale: Float[Tensor, "*batch 1"] | Float[Tensor, ""]
    """s: one unit of the SAE's own, in residual units; a single 1 where nothing is normalised."""
    centre: Float[Tensor, "*batch 1"] | Float[Tensor, ""]
    """mu; a single 0 likewise."""


def normalise(residual: Float[Tensor, "*batch d_model"], how: Normalisation) -> Normalised:
    """Each token as an SAE reads it, in SAELens's arithmetic (layer_norm: deviation with d_model - 1, epsilon 1e-5)."""
    residual = residual.float()
    # One number for all tokens: spread over them both took 4 of the 58 us of an edit of few tokens.
    zero = residual.new_zeros(())
    if how == "none":
        return Normalised(residual, residual.new_ones(()), zero)
    if how == "constant_norm_rescale":
        scale = residual.norm(dim=-1, keepdim=True) / residual.shape[-1] ** 0.5
        # Padding may be all zeros: SAELens makes it NaN, which would reach every token through attention.
        return Normalised(residual / scale.clamp(min=1e-30), scale, zero)
    centre = residual.mean(-1, keepdim=True)
    scale = (residual - centre).std(-1, keepdim=True)
    # SAELens divides by s + epsilon, but multiplies by s alone when it decodes.
    return Normalised((residual - centre) / (scale + LAYER_NORM_EPSILON), scale, centre)


def jump_relu(before: Float[Tensor, "*batch k"], threshold: Float[Tensor, "k"]) -> Float[Tensor, "*batch k"]:
    """What is above zero and above its threshold (Rajamanoharan et al. 2024)."""
    return torch.where(before > threshold.clamp(min=0), before, 0.0)


def among_largest(
    inputs: Float[Tensor, "*batch d_model"],
    encoder: Float[Tensor, "d_model d_sae"],
    bias: Float[Tensor, "d_sae"],
    features: Int[Tensor, "k"],
    active: int,
) -> Float[Tensor, "*batch k"]:
    """Pre-activations of `features` at tokens where they are among the `active` largest of all, else 0.

    A chunk of tokens at a time, so never more than `ACTIVATIONS` numbers are in memory.
    """
    parts = []
    for part in inputs.reshape(-1, inputs.shape[-1]).split(at_once(encoder.shape[1], inputs.device)):
        before = torch.addmm(bias, part, encoder)
        least = before.topk(active, sorted=False).values.amin(-1, keepdim=True)
        wanted = before[:, features]
        parts.append(wanted * (wanted >= least))
    return torch.cat(parts).view(*inputs.shape[:-1], len(features))
