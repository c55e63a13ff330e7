"""The factored attribution equals the naive formulation; what it leaves out is counted."""

from pathlib import Path

import pytest
import torch

from refusalscope.mechanism import attribution
from refusalscope.mechanism.attribution import attribute, gauss_legendre, integrate
from tests import naive, tiny

NEAR = 1e-5


def _dense(entries: attribution.Attribution, layer: int, shape: torch.Size) -> torch.Tensor:
    dense = torch.zeros(shape)
    here = entries.layer == layer
    position = entries.position[here].long() + shape[1]
    dense[entries.prompt[here].long(), position, entries.feature[here].long()] = entries.value[here]
    return dense


@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("mode", ["candidates", "all features"])
def test_factored_equals_naive(family: str, mode: str, tmp_path: Path) -> None:
    model, saes, direction, rule = tiny.chat_model(family), tiny.bank(tmp_path), tiny.direction(), gauss_legendre(5)
    prompts = tiny.prompts()
    wanted = None if mode == "all features" else {layer: [1, 5, 8, 17, 40, 63, 95] for layer in range(4)}
    ours = attribute(model, saes, prompts, direction, candidates=wanted, rule=rule, batch_size=len(prompts))
    tokens = model.tokens(prompts)
    metric = integrate(model, tokens, direction, layers=[0], rule=rule).metric
    opened = {layer: saes.layer(layer).sae for layer in saes.layers}
    oracle = naive.attribute(
        model.model,
        dict(enumerate(model.layers)),
        opened,
        tokens,
        direction.unit,
        metric=(metric.answer, metric.refusal),
        nodes=rule.nodes,
        weights=rule.weights,
    )
    exempt = compared = 0
    for layer, expected in oracle.attribution.items():
        expected = expected.detach() * tokens.mask[..., None]
        keep = torch.ones(expected.shape[-1], dtype=torch.bool)
        if wanted is not None:
            keep = torch.isin(torch.arange(expected.shape[-1]), torch.tensor(wanted[layer]))
        near = _near_threshold(model, opened[layer], layer, tokens, direction)
        compared_here = keep & ~near & tokens.mask[..., None]
        difference = ((_dense(ours, layer, expected.shape) - expected) * compared_here).abs().max()
        assert difference <= 1e-4 * expected.abs().max(), f"layer {layer}"
        assert expected[compared_here].abs().max() > 0
        exempt += int((near & keep & tokens.mask[..., None]).sum())
        compared += int(compared_here.sum())
    assert exempt <= compared * 1e-3, f"{exempt} of {compared} features lie within {NEAR} of their threshold"


def _near_threshold(model, sae, layer, tokens, direction) -> torch.Tensor:
    """Features whose clean or patched pre-activation is so near its threshold that rounding decides."""
    path = integrate(model, tokens, direction, layers=[layer], rule=gauss_legendre(1))
    near = torch.zeros(())
    for residual in (path.clean[layer], path.patched[layer]):
        before = (residual - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc
        near = near + ((before - sae.threshold).abs() < NEAR)
    return near > 0
