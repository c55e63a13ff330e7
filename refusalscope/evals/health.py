"""How faithfully SAEs carry a model's residual stream: in its chats, on the template's tokens there, outside any chat.

Every figure is a pair of sums per text, so that totals, their intervals and paired differences between SAE sets come
from one table. What no SAE enters (cross-entropy unedited, and with the residual set to zero or to its mean) is
measured apart, once for all sets. The first token of a text, an outlier in every model, keeps its residual.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from refusalscope.core.encoding import at_once
from refusalscope.core.types import Prompts, Response
from refusalscope.evals.capability import DOCUMENT_TOKENS
from refusalscope.evals.likelihood import answer_batches, cross_entropies, scorable
from refusalscope.inputs.chat import Batch, ChatModel, Given, Tokens
from refusalscope.inputs.saes import LayerSae
from refusalscope.inputs.template import Role

Kind = Literal["chats", "template", "documents"]
"""Whole chats; the same chats, replaced at the template's own tokens alone; plain text outside any chat."""
RESAMPLES = 1000
"""Of prompts, for the reconstructed direction."""
Replace = Callable[
    [Float[Tensor, "token d_model"]], tuple[Float[Tensor, "token d_model"], Float[Tensor, "token figure"]]
]
"""Residuals -> what is put in their place, and figures of each token."""


class Clean:
    """The unedited residuals of texts after one layer at a time, in main memory: later layers are run on from there.

    With 8 layers, each replaced nine times, 13 s instead of 19.
    """

    def __init__(self, model: ChatModel, batches: Sequence[Tokens]) -> None:
        self._model, self._batches = model, batches
        self._layer = -1
        self._known: list[Tensor] = []

    def after(self, layer: int) -> Iterator[Given | None]:
        """What is known of each batch; nothing where the model cannot go on from a layer."""
        if self._model.resumable and layer != self._layer:
            before = self._given() if self._layer < layer else repeat(None)
            runs = (
                self._model.run(tokens, keep=[layer], given=given)
                for tokens, given in zip(self._batches, before, strict=False)
            )
            self._known = [run.residuals[layer] for run in runs]
            self._layer = layer
        return self._given()

    def _given(self) -> Iterator[Given | None]:
        if not self._known or not self._model.resumable:
            return repeat(None)
        devices = (tokens.ids.device for tokens in self._batches)
        return (Given(self._layer, z.to(device)) for z, device in zip(self._known, devices, strict=True))


class Texts(NamedTuple):
    """Texts of one kind, tokenised in batches."""

    kind: Kind
    batches: Sequence[Tokens]
    clean: Clean


class Averages(NamedTuple):
    """Of the unedited model on texts of one kind."""

    tokens: list[int]
    """Per text: how many tokens are replaced."""
    cross_entropy: list[float]
    """Per text: nats, summed over the tokens it is scored on."""
    mean: Mapping[int, Float64[Tensor, "d_model"]]
    """Layer -> mean residual over all these tokens."""


class Floors(NamedTuple):
    """Per text, what no SAE of a layer enters; cross-entropies are sums in nats."""

    tokens: list[int]
    variance: list[float]
    """Squared deviation from the token mean, summed over the tokens that are replaced."""
    clean: list[float]
    zero: list[float]
    """With 0 in the residual's place."""
    mean: list[float]
    """With the token mean in its place: the stricter floor."""


class Spliced(NamedTuple):
    """Per text, with an SAE's reconstruction in the residual's place."""

    error: list[float]
    """Squared error, summed over the tokens that are replaced."""
    active: list[float]
    """Active features, summed over them."""
    cross_entropy: list[float]


class Kept(NamedTuple):
    """What an SAE keeps of residuals."""

    variance_explained: float
    """About the token mean; at most 1, below 0 where the mean alone would be nearer."""
    l0: float
    """Active features per token."""


class Cosine(NamedTuple):
    """The direction in an SAE's reconstructions against the direction itself."""

    prompts: int
    cosine: float
    draws: list[float]
    """Of resampled clusters of prompts; the same clusters for every SAE."""


def chats(model: ChatModel, prompts: Prompts, answers: Mapping[str, Response], *, batch_size: int) -> list[Texts]:
    """Prompts with the model's own answers, as whole chats and for the template's tokens alone."""
    batches = list(answer_batches(model, prompts, answers, batch_size=batch_size))
    clean = Clean(model, batches)
    return [Texts("chats", batches, clean), Texts("template", batches, clean)]


def documents(model: ChatModel, rows: Prompts, *, batch_size: int) -> Texts:
    """Plain text, cut off after `capability.DOCUMENT_TOKENS` tokens; documents of a single token are left out."""
    usable = scorable(model, rows)
    parts = (usable[start : start + batch_size] for start in range(0, len(usable), batch_size))
    batches = [model.text_tokens(part, DOCUMENT_TOKENS).to(model.device) for part in parts]
    return Texts("documents", batches, Clean(model, batches))


def averages(model: ChatModel, texts: Texts, layers: Iterable[int]) -> Averages:
    """One pass over the texts, for all layers at once."""
    totals = {layer: torch.zeros(model.width, dtype=torch.float64) for layer in layers}
    tokens, found = [], []
    for batch in texts.batches:
        inside = replaced(texts.kind, batch.roles)
        tokens += inside.sum(1).tolist()
        edits = {layer: _adding(total, inside) for layer, total in totals.items()}
        found += cross_entropies(model, batch, edits).tolist()
    return Averages(tokens, found, {layer: total / max(1, sum(tokens)) for layer, total in totals.items()})


def floors(model: ChatModel, texts: Texts, layer: int, known: Averages) -> Floors:
    """Cross-entropy with nothing in the residual's place, and with its mean; `known` are the texts' averages."""
    centre = known.mean[layer].float()

    def nothing(residual: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(residual), residual.new_zeros(len(residual), 0)

    def average(residual: Tensor) -> tuple[Tensor, Tensor]:
        mean = centre.to(residual.device)
        return mean.expand_as(residual), (residual - mean).square().sum(1, keepdim=True)

    zero, _ = _replacing(model, texts, layer, nothing)
    mean, spread = _replacing(model, texts, layer, average)
    return Floors(known.tokens, spread[:, 0].tolist(), known.cross_entropy, zero.tolist(), mean.tolist())


def splice(model: ChatModel, texts: Texts, sae: LayerSae) -> Spliced:
    """Reconstruction and cross-entropy with `sae` in the residual's place."""

    def reconstruct(residual: Tensor) -> tuple[Tensor, Tensor]:
        parts = [_reconstructed(sae, part) for part in residual.split(at_once(sae.size, sae.device))]
        return torch.cat([new for new, _ in parts]), torch.cat([figures for _, figures in parts])

    found, figures = _replacing(model, texts, sae.layer, reconstruct)
    error, active = figures.T.tolist()
    return Spliced(error, active, found.tolist())


def kept(sae: LayerSae, residual: Float[Tensor, "token d_model"]) -> Kept:
    """What `sae` keeps of float32 residuals, without putting anything in their place."""
    figures = torch.cat(
        [_reconstructed(sae, part)[1] for part in residual.split(at_once(sae.size, sae.device))]
    ).double()
    spread = (residual - residual.mean(0)).double().square().sum()
    return Kept(float(1 - figures[:, 0].sum() / spread), float(figures[:, 1].mean()))


def replaced(kind: Kind, roles: Int[Tensor, "text position"]) -> Bool[Tensor, "text position"]:
    """Where the residual is replaced: nowhere in padding, and never at a text's first token."""
    inside = roles != Role.PADDING
    inside = inside & (inside.long().cumsum(1) > 1)
    return inside & ((roles == Role.HEADER) | (roles == Role.CLOSING)) if kind == "template" else inside


def last_residuals(
    model: ChatModel, prompts: Prompts, layers: Sequence[int], *, batch_size: int
) -> dict[int, Float[Tensor, "prompt d_model"]]:
    """Layer -> every prompt's residual at its last position, float32."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for _, tokens in model.batches(prompts, batch_size):
        for layer, residual in model.run(tokens, keep=layers).residuals.items():
            kept[layer].append(residual[:, -1].float())
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def cosine(
    sae: LayerSae,
    harmful: Float[Tensor, "prompt d_model"],
    harmless: Float[Tensor, "other d_model"],
    *,
    clusters: tuple[Sequence[str], Sequence[str]],
    seed: int = 0,
) -> Cosine:
    """The difference of mean residuals against the same difference of their reconstructions.

    `clusters` names those of the harmful and of the harmless prompts, which are resampled apart.
    """
    rng = np.random.default_rng(seed)
    ends = (harmful, harmless)
    weights = [_weights(names, rng) for names in clusters]
    before = [one.cpu().double().numpy() for one in ends]
    after = [sae.reconstruct(one).cpu().double().numpy() for one in ends]
    directions = [weights[0] @ side[0] - weights[1] @ side[1] for side in (before, after)]
    lengths = np.linalg.norm(directions, axis=-1).prod(0)
    products = (directions[0] * directions[1]).sum(1)
    # A reconstruction without any difference points nowhere: its cosine is 0.
    made = np.divide(products, lengths, out=np.zeros(len(products)), where=lengths > 0)
    return Cosine(len(harmful) + len(harmless), float(made[0]), made[1:].tolist())


def _weights(clusters: Sequence[str], rng: np.random.Generator) -> NDArray[np.float64]:
    """[1 + resample, prompt]: first every prompt alike, then by how often its cluster was drawn; rows sum to 1."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    size = int(index.max()) + 1
    drawn = rng.integers(size, size=(RESAMPLES, size))
    counts = np.stack([np.bincount(draw, minlength=size) for draw in drawn])
    chosen = np.concatenate([np.ones((1, len(index))), counts[:, index]])
    return chosen / chosen.sum(1, keepdims=True)


def _adding(total: Float64[Tensor, "d_model"], inside: Bool[Tensor, "text position"]) -> Callable[..., Tensor]:
    """An edit that changes nothing and adds what it sees to `total`."""

    def edit(residual: Tensor, _batch: Batch) -> Tensor:
        total.add_(residual[inside.to(residual.device)].cpu().double().sum(0))
        return residual

    return edit


def _replacing(
    model: ChatModel, texts: Texts, layer: int, replace: Replace
) -> tuple[Float64[Tensor, "text"], Float64[Tensor, "text figure"]]:
    """Cross-entropy of every text with a layer's residual replaced, and the figures summed over its tokens."""
    found, figures = [], []

    def edit(residual: Tensor, batch: Batch) -> Tensor:
        inside = replaced(texts.kind, batch.roles)
        new, measured = replace(residual[inside].float())
        rows = inside.nonzero()[:, 0].cpu()
        sums = torch.zeros(len(residual), measured.shape[1], dtype=torch.float64)
        figures.append(sums.index_add_(0, rows, measured.cpu().double()))
        changed = residual.clone()
        changed[inside] = new.to(changed)
        return changed

    for batch, given in zip(texts.batches, texts.clean.after(layer), strict=False):
        found.append(cross_entropies(model, batch, {layer: edit}, given))
    return torch.cat(found), torch.cat(figures)


def _reconstructed(sae: LayerSae, residual: Float[Tensor, "token d_model"]) -> tuple[Tensor, Tensor]:
    features = sae.encode(residual)
    new = sae.decode(features, residual).to(residual.device)
    figures = [(residual - new).square().sum(1), (features > 0).sum(1).to(residual)]
    return new, torch.stack(figures, dim=1)
