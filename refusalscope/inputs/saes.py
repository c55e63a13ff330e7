"""Sparse autoencoders on the residual stream, one layer in memory at a time.

SAELens reads the weights; everything an edit or an attribution needs (encoding, K-column slices, decoder rows) is
offered here in residual units. Knows nothing of the model but its width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from refusalscope.core.types import SaeSlice

ELEMENTWISE = ("standard", "jumprelu")


class LayerSae:
    """The SAE of one layer: `encode` and `decode` are SAELens's own, `slice` is the part an edit needs."""

    def __init__(self, layer: int, sae: Any) -> None:
        self.layer = layer
        self.sae = sae.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def width(self) -> int:
        """d_model."""
        return int(self.sae.cfg.d_in)

    @property
    def size(self) -> int:
        """d_sae."""
        return int(self.sae.cfg.d_sae)

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_model"]:
        return self.sae.W_dec

    def encode(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        return self.sae.encode(residual.float().to(self.device))

    def decode(self, features: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        return self.sae.decode(features)

    def slice(self, features: Sequence[int]) -> SaeSlice:
        """Encoder columns, biases, thresholds and decoder rows of `features`, on the CPU, exact in float32."""
        index = torch.tensor(list(features), dtype=torch.long)
        encoder = self.sae.W_enc.cpu()[:, index].float()
        bias = self.sae.b_enc.cpu()[index].float()
        if self.sae.cfg.apply_b_dec_to_input:
            bias = bias - self.sae.b_dec.cpu().float() @ encoder
        threshold = self.sae.threshold.cpu()[index] if hasattr(self.sae, "threshold") else torch.zeros(len(index))
        return SaeSlice(self.layer, index, encoder, bias, threshold.float(), self.sae.W_dec.cpu()[index].float())


class SaeBank:
    """Which layers have an SAE and how to load it. Only the layer last asked for stays in memory."""

    def __init__(self, loaders: Mapping[int, Callable[[], Any]], *, identity: str) -> None:
        if not loaders:
            raise ValueError("no layer has an SAE")
        self.layers = tuple(sorted(loaders))
        self.identity = identity
        self._loaders = loaders
        self._open: LayerSae | None = None

    @classmethod
    def from_folders(cls, folders: Mapping[int, Path], *, identity: str, device: str = "cpu") -> "SaeBank":
        """A bank of SAELens folders (`cfg.json`, `sae_weights.safetensors`) by layer."""
        loaders = {layer: _folder_loader(folder, device) for layer, folder in folders.items()}
        return cls(loaders, identity=identity)

    def layer(self, layer: int) -> LayerSae:
        """The SAE of `layer`; the one asked for before is let go first."""
        if layer not in self._loaders:
            raise ValueError(f"layer {layer} has no SAE: SAEs exist for layers {list(self.layers)}")
        if self._open is None or self._open.layer != layer:
            self._open = None
            self._open = LayerSae(layer, _supported(self._loaders[layer](), layer))
        return self._open

    def check(self, width: int, name: str) -> None:
        """Raise ValueError unless the first layer's SAE fits a model of this width."""
        sae = self.layer(self.layers[0])
        if sae.width != width:
            raise ValueError(
                f"the SAE of layer {sae.layer} reads residuals of width {sae.width}, but {name} has width {width}: "
                "choose SAEs trained on this model"
            )

    def slices(self, features: Mapping[int, Sequence[int]]) -> dict[int, SaeSlice]:
        """Layer -> slice, opening one layer after the other."""
        return {layer: self.layer(layer).slice(indices) for layer, indices in sorted(features.items())}


def _folder_loader(folder: Path, device: str) -> Callable[[], Any]:
    def load() -> Any:
        from sae_lens import SAE

        try:
            # float32 whatever the file holds: a threshold rounded to bfloat16 moves features on and off.
            return SAE.load_from_disk(folder, device=device, dtype="float32")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"cannot load an SAE in SAELens's format from {folder}: {error}") from error

    return load


def _supported(sae: Any, layer: int) -> Any:
    family, scaling = sae.cfg.architecture(), sae.cfg.normalize_activations
    if family not in ELEMENTWISE:
        raise ValueError(f"the SAE of layer {layer} is of the family {family!r}: supported are {list(ELEMENTWISE)}")
    if scaling != "none":
        raise ValueError(f"the SAE of layer {layer} normalises activations ({scaling!r}): only 'none' is supported")
    return sae
