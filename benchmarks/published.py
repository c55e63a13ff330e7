"""Attribution as published, for its price: the SAE of every layer in the graph, at every step (method 3).

`attribute` encodes, mixes and decodes features at every layer and node, lets autograd go back through all of it, and
then hands each layer's gradient straight through by hooks, as the published code does. `careless` is whether it also
keeps what a first version keeps: gradients of all parameters, logits at all positions. The path ends after each layer's
own removal, not before it as published: the work is the same, and so are then the results.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.types import Direction
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Tokens
from refusalscope.inputs.saes import LayerSae
from refusalscope.mechanism.attribution import Metric, Quadrature, choose_metric
from refusalscope.mechanism.interventions import RemoveDirection, editor


class Features(NamedTuple):
    """What an SAE makes of one layer's residuals."""

    active: Float[Tensor, "prompt position d_sae"]
    error: Float[Tensor, "prompt position d_model"]


def attribute(
    model: ChatModel,
    saes: Mapping[int, LayerSae],
    tokens: Tokens,
    direction: Direction,
    rule: Quadrature,
    *,
    careless: bool,
) -> dict[int, Float[Tensor, "prompt position d_sae"]]:
    """Layer -> `(f~ - f) * dm/df`, averaged over the nodes, for every feature at every position."""
    for part in (model.model, *(sae.sae for sae in saes.values())):
        part.requires_grad_(careless)
    logits = tokens.ids.shape[1] if careless else 1
    with torch.no_grad():
        removal = editor(RemoveDirection(direction), layers=len(model.layers)).edits
        clean, first = _features(model, saes, tokens, {}, logits)
        patched, then = _features(model, saes, tokens, removal, logits)
        metric = choose_metric(first, then, direction.refusal_tokens)
    total = {layer: torch.zeros_like(part.active) for layer, part in clean.items()}
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        for layer, slope in _slopes(model, saes, tokens, patched, metric, node, logits).items():
            total[layer] += weight * slope
    return {layer: (patched[layer].active - clean[layer].active) * total[layer] for layer in saes}


def _features(
    model: ChatModel, saes: Mapping[int, LayerSae], tokens: Tokens, edits: Mapping[int, Edit], logits: int
) -> tuple[dict[int, Features], Tensor]:
    """Features and error of every layer under `edits`, and the last logits."""
    found: dict[int, Features] = {}

    def read(layer: int) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            residual = edits[layer](residual, batch) if layer in edits else residual
            if layer in saes:
                active = saes[layer].sae.encode(residual)
                found[layer] = Features(active, residual - saes[layer].sae.decode(active))
            return residual

        return edit

    run = model.run(tokens, edits={layer: read(layer) for layer in {*saes, *edits}}, logits=logits)
    return found, run.logits[:, -1]


def _slopes(
    model: ChatModel,
    saes: Mapping[int, LayerSae],
    tokens: Tokens,
    patched: Mapping[int, Features],
    metric: Metric,
    node: float,
    logits: int,
) -> dict[int, Tensor]:
    mixtures: dict[int, Tensor] = {}

    def mix(layer: int) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            residual = residual if residual.requires_grad else residual.requires_grad_(True)
            sae, target = saes[layer].sae, patched[layer]
            active = sae.encode(residual)
            error = residual - sae.decode(active)
            mixtures[layer] = (1 - node) * active + node * target.active
            mixtures[layer].retain_grad()
            output = sae.decode(mixtures[layer]) + (1 - node) * error + node * target.error
            passed: list[Tensor] = []
            output.register_hook(passed.append)
            residual.register_hook(lambda _: passed[0])
            return output

        return edit

    with torch.enable_grad():
        last = model.run(tokens, edits={layer: mix(layer) for layer in saes}, logits=logits).logits[:, -1]
        rows = torch.arange(len(last))
        total = (last[rows, metric.answer.to(last.device)] - last[rows, metric.refusal.to(last.device)]).sum()
        total.backward()
    return {layer: part.grad for layer, part in mixtures.items() if part.grad is not None}
