"""What a guard is on disk: two small files that vouch for each other, and say which model they belong to.

Safetensors for the slices of the features that are read, JSON for weights, threshold and description. The checksum
finds damage, not an enemy, who could write it anew. Knows nothing of running a model.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from refusalscope.core.encoding import Normalisation
from refusalscope.core.types import SaeSlice
from refusalscope.mechanism.activations import Pooling

FORMAT = 1
DESCRIPTION, TENSORS = "guard.json", "guard.safetensors"
READ = ("encoder", "bias", "threshold", "features")
"""Of a slice, what encoding needs: no decoder."""


class ReadFeature(BaseModel):
    """One feature that a guard reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    index: int
    weight: float
    """Logits per residual unit of its activation."""
    mean: float
    """Its activation over the prompts that the probe learned from: what a contribution is counted from."""
    label: str


class Content(BaseModel):
    """What a guard is and what it belongs to: all of it that is no tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    source: str | None
    """A preset or repository to load the model from; None where it came from a folder."""
    revision: str | None
    weights: str
    """The model's checksum: its commit, or a digest of its folder."""
    identity: str
    """What the run that made it called model and SAEs together."""
    system: str | None
    thinking: Literal["off", "on"]
    template: str | None
    """A chat template in place of the model's own."""
    method: str
    labels: str
    pooling: Pooling
    layer: int | None
    """Of a probe on the residual stream of one layer; None: it reads features."""
    features: tuple[ReadFeature, ...]
    normalisations: dict[int, Normalisation]
    active: dict[int, int]
    """Layer -> of a TopK SAE, how many features may be active at a token."""
    bias: float
    temperature: float
    """What divides the logits."""
    threshold: float
    """The calibrated logit above which a prompt is flagged."""
    false_positive_rate: float
    """Share of plain benign validation prompts that the threshold was set to flag at most."""
    negatives: int
    """How many these were."""

    @property
    def layers(self) -> list[int]:
        """The layers that are read, in the order of the features."""
        return [self.layer] if self.layer is not None else list(dict.fromkeys(one.layer for one in self.features))


def packed(content: Content, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The two files of a guard."""
    written = save_tensors({name: tensors[name].contiguous() for name in sorted(tensors)})
    body = content.model_dump(mode="json")
    described = {"format": FORMAT, "sha256": _checksum(body, written), "content": body}
    return {TENSORS: written, DESCRIPTION: (json.dumps(described, sort_keys=True, indent=1) + "\n").encode()}


def tensors_of(slices: Mapping[int, SaeSlice]) -> dict[str, Tensor]:
    """What a guard on features holds of their SAEs: all that encoding needs, no decoder."""
    return {f"layer_{layer}.{name}": getattr(part, name) for layer, part in slices.items() for name in READ}


def slices_of(content: Content, tensors: Mapping[str, Tensor]) -> dict[int, SaeSlice]:
    """The slices of a guard on features; without their decoder, which is all zeros."""
    made = {}
    for layer in content.layers if content.layer is None else ():
        own = {name: tensors[f"layer_{layer}.{name}"] for name in READ}
        made[layer] = SaeSlice(
            layer,
            **own,
            decoder=torch.zeros(len(own["features"]), own["encoder"].shape[0]),
            active=content.active.get(layer),
            normalisation=content.normalisations[layer],
        )
    return made


def _checksum(body: Any, tensors: bytes) -> str:
    plain = json.dumps(body, sort_keys=True).encode()
    return hashlib.sha256(plain + hashlib.sha256(tensors).digest()).hexdigest()


def opened(folder: Path) -> tuple[Content, dict[str, Tensor]]:
    """A saved guard. Raises ValueError, one line, when it is missing, altered, or of a newer format."""
    try:
        described, written = json.loads((folder / DESCRIPTION).read_bytes()), (folder / TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing: is {folder} a guard, as `refusalscope probe` saves it?"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: {error}") from error
    if not isinstance(described, dict) or not isinstance(described.get("format"), int):
        raise ValueError(f"{folder / DESCRIPTION} is no description of a guard")
    if described["format"] > FORMAT:
        raise ValueError(
            f"{folder} is a guard of format {described['format']}, and this refusalscope reads {FORMAT}: upgrade it"
        )
    if described.get("sha256") != _checksum(described.get("content"), written):
        raise ValueError(f"{folder} was altered or damaged since it was saved: its checksum does not agree")
    try:
        return Content.model_validate(described["content"]), load_tensors(written)
    except (ValidationError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a guard: {str(error).splitlines()[0]}") from error
