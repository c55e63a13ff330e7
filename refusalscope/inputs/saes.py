"""Sparse autoencoders on the residual stream: one on the device, and at most the next one being read on the host.

SAELens reads the weights and encodes; everything an edit or an attribution needs (encoding, decoding, K-feature slices)
is offered here in residual units (`core/encoding.py`), whatever the family. Knows nothing of the model but its width.
"""

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.encoding import Normalisation, at_once, normalise
from refusalscope.core.types import SaeSlice
from refusalscope.inputs.releases import SaeSource, open_folder

FAMILIES = ("standard", "jumprelu", "gated", "topk")
"""By SAELens's names. Batch top-k and matryoshka SAEs are saved as jumprelu."""
PER_TOKEN: dict[str, Normalisation] = {"constant_norm_rescale": "constant_norm_rescale", "layer_norm": "layer_norm"}
IN_WEIGHTS = ("expected_average_only_in", "covariance_whitening")
"""Normalisations whose factor belongs into the weights: an SAE that still names one came without it."""
AFTER_LAYER = re.compile(r"blocks\.(\d+)\.hook_resid_post|(?:model\.|language_model\.){1,3}layers\.(\d+)(?:\.output)?")
"""How the residual stream after a layer is spelled, by TransformerLens and by Hugging Face."""


class LayerSae:
    """The SAE of one layer. Activations are in residual units: `z = F W_dec + rest`, a decoder row is what one adds."""

    def __init__(self, layer: int, sae: Any) -> None:
        self.layer = layer
        self.sae = sae.eval().requires_grad_(False)

    def let_go(self) -> None:
        """Free its memory, whoever still holds it: it cannot be used afterwards."""
        del self.sae

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

    @property
    def normalisation(self) -> Normalisation:
        """What happens to each token before it is encoded."""
        return PER_TOKEN.get(self.sae.cfg.normalize_activations, "none")

    @property
    def note(self) -> str:
        """What a reader must know of how this SAE is read; empty where there is nothing to say."""
        scaling = self.sae.cfg.normalize_activations
        if scaling not in IN_WEIGHTS:
            return ""
        return f"trained on activations normalised by {scaling!r}, but without that factor: read unscaled"

    def encode(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of every feature in residual units: SAELens's own, times s(z)."""
        residual = residual.to(self.device).float()
        own = self.sae.encode(residual)
        if self.normalisation == "none":
            return own
        scale = normalise(residual, self.normalisation).scale
        # SAELens makes a token of zeros NaN.
        return torch.where(scale > 0, own * scale, 0.0)

    def decode(
        self, features: Float[Tensor, "*batch d_sae"], residual: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """`F W_dec + s(z) b_dec + mu(z)`: what the SAE makes of features, with the normalisation of `residual`."""
        z = normalise(residual.to(self.device), self.normalisation)
        return features @ self.decoder + z.scale * self.sae.b_dec + z.centre

    def reconstruct(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the SAE makes of its input, a chunk of tokens at a time."""
        parts = residual.reshape(-1, residual.shape[-1]).split(at_once(self.size, self.device))
        return torch.cat([self.decode(self.encode(part), part) for part in parts]).view(residual.shape)

    def slice(self, features: Sequence[int]) -> SaeSlice:
        """What an edit of `features` needs, on the CPU, exact in float32."""
        return self.here(features).to(torch.device("cpu"))

    def here(self, features: Sequence[int] | None) -> SaeSlice:
        """The slice of `features` (of all without a copy if None), where the SAE is."""
        index = torch.arange(self.size) if features is None else torch.tensor(list(features), dtype=torch.long)
        index = index.to(self.device)
        active = int(self.sae.cfg.k) if self.sae.cfg.architecture() == "topk" else None
        rows = slice(None) if features is None else index
        # With TopK the other features decide whether one is active: all columns are held.
        encoder, bias, threshold = self._read(rows if active is None else slice(None))
        if self.sae.cfg.apply_b_dec_to_input:
            bias = bias - self.sae.b_dec @ encoder
        own = threshold[rows] if active is not None else threshold
        return SaeSlice(self.layer, index, encoder, bias, own, self.decoder[rows].detach(), active, self.normalisation)

    def _read(self, columns: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder, bias and threshold of these columns, the family aside."""
        encoder = self.sae.W_enc.detach()[:, columns]
        if self.sae.cfg.architecture() != "gated":
            bias = self.sae.b_enc.detach()[columns]
            found = getattr(self.sae, "threshold", None)
            return encoder, bias, torch.zeros_like(bias) if found is None else found.detach()[columns]
        # The gate is the sign of x W + b_gate, the size x W exp(r) + b_mag: one pre-activation, compared with another.
        gain, bias = self.sae.r_mag[columns].exp(), self.sae.b_mag.detach()[columns]
        return encoder * gain, bias, bias - self.sae.b_gate[columns] * gain


class SaeBank:
    """Which layers have an SAE and how to load it. Only the layer last asked for stays in memory.

    Loaders read onto the device they are given.
    """

    def __init__(
        self,
        loaders: Mapping[int, Callable[[str], Any]],
        *,
        identity: str,
        device: str = "cpu",
        read_ahead: bool = True,
    ) -> None:
        if not loaders:
            raise ValueError("no layer has an SAE")
        self.layers = tuple(sorted(loaders))
        self.identity = identity
        self.read_ahead = read_ahead
        """Whether `each` reads the next SAE while one is in use; it needs the host's memory for one more."""
        self._loaders = loaders
        self._device = device
        self._open: LayerSae | None = None

    @classmethod
    def from_folders(cls, folders: Mapping[int, Path], *, identity: str, device: str = "cpu") -> "SaeBank":
        """A bank of SAELens folders (`cfg.json`, `sae_weights.safetensors`) by layer."""
        loaders = {layer: partial(open_folder, folder) for layer, folder in folders.items()}
        return cls(loaders, identity=identity, device=device)

    @classmethod
    def from_source(cls, source: SaeSource, *, device: str = "cpu", read_ahead: bool = True) -> "SaeBank":
        """A bank of a release, a repository or folders (see `releases`)."""
        return cls(source.loaders, identity=source.identity, device=device, read_ahead=read_ahead)

    def layer(self, layer: int) -> LayerSae:
        """The SAE of `layer`; the one asked for before is let go first."""
        if layer not in self._loaders:
            raise ValueError(f"layer {layer} has no SAE: SAEs exist for layers {list(self.layers)}")
        if self._open is None or self._open.layer != layer:
            self._open = None
            self._open = LayerSae(layer, self._read(layer, self._device))
        return self._open

    def each(self, layers: Iterable[int] | None = None) -> Generator[LayerSae, None, None]:
        """The SAEs of `layers` in turn (of all if None), each usable until the next one is asked for.

        While one is used the next is read on the host, so that the device does not wait for the disk.
        """
        wanted = self.layers if layers is None else tuple(layers)
        with ThreadPoolExecutor(max_workers=1) as reader:
            for layer, following in zip_longest(wanted, wanted[1:]):
                sae = self.layer(layer)
                if following is None or following == layer:
                    yield sae
                    continue
                coming = reader.submit(self._read, following, "cpu") if self.read_ahead else None
                yield sae
                self._open = None
                sae.let_go()
                # What could not be read ahead is tried again in its turn: by then there is more memory, or it is told.
                if coming is not None and coming.exception() is None:
                    self._open = LayerSae(following, coming.result().to(self._device))
                coming = None

    def _read(self, layer: int, device: str) -> Any:
        return _prepared(self._loaders[layer](device), layer)

    def let_go(self) -> None:
        """Free the memory of the SAE that is open, for one of another bank."""
        self._open = None

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
        return {sae.layer: sae.slice(features[sae.layer]) for sae in self.each(sorted(features))}


def _prepared(sae: Any, layer: int) -> Any:
    """In float32, decoder norms folded; ValueError for what is no SAE on the residual stream after this layer."""
    family, reshaping, metadata = sae.cfg.architecture(), sae.cfg.reshape_activations, sae.cfg.metadata
    if family not in FAMILIES:
        raise ValueError(
            f"the SAE of layer {layer} is of the family {family!r}: supported are {', '.join(FAMILIES)} "
            "(batch top-k and matryoshka SAEs are saved as jumprelu)"
        )
    if reshaping != "none":
        raise ValueError(f"the SAE of layer {layer} reshapes activations ({reshaping!r}): only 'none' is supported")
    for hook in (metadata.hook_name, metadata.hf_hook_name):
        _check_hook(hook, layer)
    sae = sae.to(dtype=torch.float32)
    if family == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    return sae


def _check_hook(hook: str | None, layer: int) -> None:
    """Raise ValueError unless the name, if there is one, is that of the residual stream after `layer`."""
    if hook is None:
        return
    found = AFTER_LAYER.fullmatch(hook)
    if found is None:
        raise ValueError(
            f"the SAE of layer {layer} reads {hook!r}: supported is the residual stream after a layer "
            f"('blocks.{layer}.hook_resid_post' or 'model.layers.{layer}')"
        )
    if int(found[1] or found[2]) != layer:
        raise ValueError(
            f"the SAE given for layer {layer} reads {hook!r}, another layer: name the one that was trained on "
            f"layer {layer}"
        )
