"""The published formulation of LA-IG, written plainly: what the factored attribution is checked and timed against.

At every node and layer the SAE encodes and decodes the current residual inside the graph, features and what they leave
of it are mixed with their patched values, and the gradient passes straight through (method 3a). All SAEs are in memory
at once and every tensor is prompts x positions x d_sae: that is the point.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.scores import Trace
from refusalscope.inputs.chat import Batch, ChatModel, Edit
from refusalscope.inputs.saes import LayerSae
from refusalscope.mechanism.attribution import Quadrature
from refusalscope.mechanism.effects import tokens_of


class Mixture(NamedTuple):
    """One layer's features, in residual units, and what they leave, clean or patched."""

    features: Float[Tensor, "prompt position d_sae"]
    rest: Float[Tensor, "prompt position d_model"]
    """`z - F W_dec`: the SAE's error and what it adds whatever its features."""


class _StraightThrough(torch.autograd.Function):
    """The mixture forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, mixture: Tensor) -> Tensor:
        return mixture.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def attribute(
    model: ChatModel, saes: Mapping[int, LayerSae], trace: Trace, rule: Quadrature
) -> dict[int, Float[Tensor, "prompt position d_sae"]]:
    """Layer -> `(f~ - f) * G . W_dec` of every feature at every position of the trace's batch, padding included.

    Clean and patched residuals, end points and the metric's tokens are the trace's; the gradients are taken anew.
    """
    clean = {layer: _mixture(sae, trace, "clean") for layer, sae in saes.items()}
    patched = {layer: _mixture(sae, trace, "patched") for layer, sae in saes.items()}
    total = {layer: torch.zeros_like(part.features) for layer, part in clean.items()}
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        for layer, part in _feature_gradients(model, saes, trace, patched, node).items():
            total[layer] += weight * part
    return {layer: (patched[layer].features - clean[layer].features) * total[layer] for layer in saes}


def _mixture(sae: LayerSae, trace: Trace, name: str) -> Mixture:
    row = trace.layers.index(sae.layer)
    features = sae.encode(getattr(trace, name)[row])
    end = trace.end if name == "patched" and trace.end is not None else getattr(trace, name)
    return Mixture(features, end[row].float().to(features) - features @ sae.decoder)


def _feature_gradients(
    model: ChatModel, saes: Mapping[int, LayerSae], trace: Trace, patched: Mapping[int, Mixture], node: float
) -> dict[int, Float[Tensor, "prompt position d_sae"]]:
    outputs: dict[int, Tensor] = {}

    def mix(sae: LayerSae) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            if not residual.requires_grad:
                residual = residual.requires_grad_(True)
            features = sae.encode(residual)
            rest = residual - features @ sae.decoder
            target = patched[sae.layer]
            mixed = ((1 - node) * features + node * target.features) @ sae.decoder
            mixed = mixed + (1 - node) * rest + node * target.rest
            passed = _StraightThrough.apply(residual, mixed.detach().to(residual))
            assert isinstance(passed, Tensor)
            outputs[sae.layer] = passed
            return passed

        return edit

    with torch.enable_grad():
        logits = model.run(tokens_of(trace), edits={layer: mix(sae) for layer, sae in saes.items()}, logits=1).logits
        rows = torch.arange(len(logits))
        chosen = [token.to(logits.device) for token in (trace.answer, trace.refusal)]
        metric = (logits[rows, -1, chosen[0]] - logits[rows, -1, chosen[1]]).sum()
        gradients = torch.autograd.grad(metric, list(outputs.values()))
    found = zip(outputs, gradients, strict=True)
    return {layer: part.float() @ saes[layer].decoder.T for layer, part in found}
