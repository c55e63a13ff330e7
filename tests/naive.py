"""The published formulation of LA-IG, written plainly: the oracle that the factored attribution is held to.

At every node and every layer the current residual is encoded and decoded inside the graph, feature and error
activations are mixed with their patched values, and the gradient passes straight through (method 3a).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refusalscope.inputs.chat import Tokens


class _StraightThrough(torch.autograd.Function):
    """Value of the mixture forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, mixture: Tensor) -> Tensor:
        return mixture.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def in_residual_units(sae: Any, residual: Tensor) -> Tensor:
    """SAELens's activations, times what its own decoding multiplies by, read off the state it keeps in between."""
    own = sae.encode(residual)
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        return (own / sae.x_norm_coeff).nan_to_num()  # padding is all zeros, which SAELens makes NaN
    return own * sae.ln_std if sae.cfg.normalize_activations == "layer_norm" else own


class Naive(NamedTuple):
    """Layer -> [prompt, position, d_sae]."""

    attribution: dict[int, Tensor]
    clean: dict[int, Tensor]
    patched: dict[int, Tensor]


def attribute(
    model: Any,
    layers: Mapping[int, Any],
    saes: Mapping[int, Any],
    tokens: Tokens,
    unit: Tensor,
    *,
    metric: tuple[Tensor, Tensor],
    nodes: Sequence[float],
    weights: Sequence[float],
    ends_after_removal: bool = True,
) -> Naive:
    """`layers` are the model's decoder layers, `saes` SAELens objects, `metric` the tokens (j, r) of each prompt.

    What features do not carry is `z - F W_dec`: the SAE's error, and what it adds whatever its features.
    Published (`ends_after_removal` False): features of the residual after the layer's removal, their error term taken
    from the residual before it.
    """
    inputs = {
        "input_ids": tokens.ids,
        "attention_mask": tokens.mask.long(),
        "position_ids": (tokens.mask.long().cumsum(1) - 1).clamp(min=0),
    }

    def forward(edit: Any) -> Tensor:
        def hooked(layer: int) -> Any:
            return lambda _module, _inputs, output: edit(layer, output)

        handles = [layers[layer].register_forward_hook(hooked(layer)) for layer in layers]
        try:
            return model(**inputs).logits[:, -1].float()
        finally:
            for handle in handles:
                handle.remove()

    def capture(removed: bool) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        before: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}

        def edit(layer: int, residual: Tensor) -> Tensor:
            before[layer] = residual
            after[layer] = residual - (residual @ unit)[..., None] * unit if removed else residual
            return after[layer]

        with torch.no_grad():
            forward(edit)
        return before, after

    clean_residual, _ = capture(False)
    before_removal, patched_residual = capture(True)
    end = patched_residual if ends_after_removal else before_removal
    clean = {layer: in_residual_units(saes[layer], clean_residual[layer]) for layer in saes}
    patched = {layer: in_residual_units(saes[layer], patched_residual[layer]) for layer in saes}
    patched_rest = {layer: end[layer] - patched[layer] @ saes[layer].W_dec for layer in saes}
    total = {layer: torch.zeros_like(clean_residual[layer]) for layer in saes}
    for node, weight in zip(nodes, weights, strict=True):
        outputs: dict[int, Tensor] = {}

        def mix(layer: int, residual: Tensor, node: float = node, outputs: dict[int, Tensor] = outputs) -> Tensor:
            if layer not in saes:
                return residual
            if not residual.requires_grad:
                residual = residual.requires_grad_(True)
            features = in_residual_units(saes[layer], residual)
            rest = residual - features @ saes[layer].W_dec
            mixed = ((1 - node) * features + node * patched[layer]) @ saes[layer].W_dec
            mixed = mixed + (1 - node) * rest + node * patched_rest[layer]
            outputs[layer] = _StraightThrough.apply(residual, mixed.detach())  # type: ignore[assignment]
            outputs[layer].retain_grad()
            return outputs[layer]

        with torch.enable_grad():
            logits = forward(mix)
            answer, refusal = metric
            rows = torch.arange(len(logits))
            (logits[rows, answer] - logits[rows, refusal]).sum().backward()
        for layer, output in outputs.items():
            assert output.grad is not None
            total[layer] += weight * output.grad
    attribution = {layer: (patched[layer] - clean[layer]) * (total[layer] @ saes[layer].W_dec.T) for layer in saes}
    return Naive(attribution, clean, patched)
