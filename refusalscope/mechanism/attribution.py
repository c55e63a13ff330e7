"""Which features carry refusal: integrated gradients from the clean run to the direction-removed run.

The SAE leaves the loop (method 3a): decoding is linear and the error term restores the rest, so mixing features and
error is mixing residuals, and a step is one forward and one backward of the bare model. Afterwards each layer's SAE is
opened once, for the difference of activations and the matching decoder rows. Knows nothing of feature sets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refusalscope.core.types import Attribution, Direction, Prompts
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Tokens
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import RemoveDirection, editor

Progress = Callable[[str, int, int], None]


class Quadrature(NamedTuple):
    """Nodes and weights on [0, 1]; weights sum to 1."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def gauss_legendre(count: int) -> Quadrature:
    """The `sound` rule: exact for polynomials of degree 2 count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return Quadrature(tuple(float(n) for n in (nodes + 1) / 2), tuple(float(w) for w in weights / 2))


class Metric(NamedTuple):
    """`logit[j] - logit[r]` at the last position of each prompt."""

    answer: Int[Tensor, "prompt"]
    """j: the likeliest token once the direction is removed."""
    refusal: Int[Tensor, "prompt"]
    """r: the clean run's likeliest refusal token."""
    clean: Float[Tensor, "prompt"]
    patched: Float[Tensor, "prompt"]
    flipped: Bool[Tensor, "prompt"]
    """False where j is itself a refusal token: removal did not change this prompt."""


@dataclass(frozen=True)
class Path:
    """One batch's clean and patched residuals and the mean gradient between them, layer -> tensor, on the CPU."""

    tokens: Tokens
    clean: Mapping[int, Float[Tensor, "prompt position d_model"]]
    patched: Mapping[int, Float[Tensor, "prompt position d_model"]]
    gradient: Mapping[int, Float[Tensor, "prompt position d_model"]]
    metric: Metric


class DirectionDoesNotMediate(ValueError):
    """Removing the direction leaves most prompts refused."""


def attribute(
    model: ChatModel,
    saes: SaeBank,
    prompts: Prompts,
    direction: Direction,
    *,
    candidates: Mapping[int, Sequence[int]] | None = None,
    rule: Quadrature | None = None,
    batch_size: int,
    progress: Progress = lambda *_: None,
) -> Attribution:
    """Attribute the metric of each prompt to SAE features: `(f~ - f) * (G . W_dec)` at every position.

    `candidates` maps layers to the features wanted (all layers of `saes` and all features if None); `rule` is the
    quadrature of the path, Gauss-Legendre with 5 nodes if None.
    Method: Marks et al. 2024 as corrected in docs/method.md.
    Raises DirectionDoesNotMediate when removal flips fewer than half of the prompts.
    """
    layers = tuple(saes.layers if candidates is None else sorted(candidates))
    paths = []
    for done, (_, tokens) in enumerate(batches := list(model.batches(prompts, batch_size))):
        progress("attribution: gradients", done, len(batches))
        paths.append(integrate(model, tokens, direction, layers=layers, rule=rule or gauss_legendre(5)))
    flipped = torch.cat([path.metric.flipped for path in paths])
    if len(prompts) and flipped.float().mean() < 0.5:
        raise DirectionDoesNotMediate(
            f"removing the direction flips the first token of only {int(flipped.sum())} of {len(prompts)} prompts: "
            "this direction does not mediate refusal here; try another --best-layer or check --refusal-token"
        )
    entries = []
    errors = torch.zeros(len(prompts), len(layers))
    for column, layer in enumerate(layers):
        progress("attribution: features", column, len(layers))
        sae, start = saes.layer(layer), 0
        for path in paths:
            rows = slice(start, start := start + len(path.tokens.prompt_ids))
            part = layer_entries(sae, path, None if candidates is None else candidates[layer])
            entries.append(part._replace(prompt=part.prompt + rows.start))
            errors[rows, column] = part.error
    return _assemble(prompts, paths, entries, errors, flipped)


def integrate(
    model: ChatModel, tokens: Tokens, direction: Direction, *, layers: Sequence[int], rule: Quadrature
) -> Path:
    """Clean run, patched run and the weighted mean gradient of the metric at every layer's output."""
    removal = editor(RemoveDirection(direction), layers=len(model.layers)).edits
    with torch.no_grad():
        clean = model.run(tokens, keep=layers, logits=1)
        patched = model.run(tokens, edits=removal, keep=layers, logits=1)
    metric = choose_metric(clean.logits[:, -1], patched.logits[:, -1], direction.refusal_tokens)
    gradient = {layer: torch.zeros_like(clean.residuals[layer], dtype=torch.float32) for layer in layers}
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        for layer, part in _gradient(model, tokens, patched.residuals, metric, node).items():
            gradient[layer] += weight * part
    return Path(tokens.to("cpu"), clean.residuals, patched.residuals, gradient, metric)


def choose_metric(
    clean: Float[Tensor, "prompt vocabulary"], patched: Float[Tensor, "prompt vocabulary"], refusal: Sequence[int]
) -> Metric:
    """r is the clean argmax if that refuses, else the likeliest refusal token; j is the patched argmax (method 3)."""
    allowed = torch.tensor(list(refusal), device=clean.device)
    r = allowed[clean[:, allowed].argmax(-1)]
    j = patched.argmax(-1)

    def value(logits: Tensor) -> Tensor:
        return (logits.gather(1, j[:, None]) - logits.gather(1, r[:, None]))[:, 0].cpu()

    return Metric(j.cpu(), r.cpu(), value(clean), value(patched), ~torch.isin(j, allowed).cpu())


def _gradient(
    model: ChatModel, tokens: Tokens, patched: Mapping[int, Tensor], metric: Metric, node: float
) -> dict[int, Tensor]:
    """d metric / d output of each layer with every layer mixed: `out = z + (a (z~ - z)).detach()`, Jacobian one."""
    outputs: dict[int, Tensor] = {}

    def mix(layer: int) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            target = patched[layer].to(residual)
            mixed = residual + (node * (target - residual)).detach()
            outputs[layer] = mixed if mixed.requires_grad else mixed.requires_grad_(True)
            return outputs[layer]

        return edit

    with torch.enable_grad():
        logits = model.run(tokens, edits={layer: mix(layer) for layer in patched}, logits=1).logits[:, -1]
        rows = torch.arange(len(logits))
        total = (logits[rows, metric.answer.to(logits.device)] - logits[rows, metric.refusal.to(logits.device)]).sum()
        gradients = torch.autograd.grad(total, list(outputs.values()))
    return {layer: part.float().cpu() for layer, part in zip(outputs, gradients, strict=True)}


class Entries(NamedTuple):
    """The non-zero attributions of one layer in one batch."""

    prompt: Int[Tensor, "entry"]
    layer: int
    position: Int[Tensor, "entry"]
    feature: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]
    error: Float[Tensor, "prompt"]
    """Summed over positions."""


def layer_entries(sae: LayerSae, path: Path, features: Sequence[int] | None) -> Entries:
    """`(f~ - f) * (G . W_dec)` where the activation moved and the token is no padding.

    The error term is scored only when all features are: with candidates only their columns are read, and it is NaN.
    """
    mask = path.tokens.mask
    prompt, position = mask.nonzero(as_tuple=True)
    clean, patched, gradient = (
        part[sae.layer][mask].float().to(sae.device) for part in (path.clean, path.patched, path.gradient)
    )
    error = torch.full((len(mask),), float("nan"))
    if features is None:
        f_clean, f_patched = sae.encode(clean), sae.encode(patched)
        change = (patched - sae.decode(f_patched)) - (clean - sae.decode(f_clean))
        error = torch.zeros(len(mask)).index_add_(0, prompt, (gradient * change).sum(-1).cpu())
        index, delta, rows = torch.arange(sae.size), f_patched - f_clean, sae.decoder
    else:
        part = sae.slice(features).to(sae.device)
        index, delta, rows = part.features.cpu(), part.encode(patched) - part.encode(clean), part.decoder
    token, column = delta.nonzero(as_tuple=True)
    value = (delta * (gradient @ rows.T))[token, column].cpu()
    token, column = token.cpu(), column.cpu()
    return Entries(prompt[token], sae.layer, position[token] - mask.shape[1], index[column], value, error)


def _assemble(
    prompts: Prompts, paths: Sequence[Path], entries: Sequence[Entries], errors: Tensor, flipped: Tensor
) -> Attribution:
    scored = torch.cat(
        [((p.tokens.roles == Role.INSTRUCTION) | (p.tokens.roles == Role.CLOSING)).sum(1) for p in paths]
    )
    return Attribution(
        prompt_ids=prompts.ids,
        prompt=torch.cat([part.prompt for part in entries]).int(),
        layer=torch.cat([torch.full_like(part.prompt, part.layer) for part in entries]).int(),
        position=torch.cat([part.position for part in entries]).int(),
        feature=torch.cat([part.feature for part in entries]).int(),
        value=torch.cat([part.value for part in entries]),
        scored=scored,
        error=errors,
        metric_clean=torch.cat([path.metric.clean for path in paths]),
        metric_patched=torch.cat([path.metric.patched for path in paths]),
        dropped=tuple(p.id for p, kept in zip(prompts, flipped.tolist(), strict=True) if not kept),
    )
