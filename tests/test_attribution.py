"""The factored attribution equals the naive formulation; what it leaves out is counted."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from refusalscope.core.scores import Attribution
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism import attribution, effects, reading
from refusalscope.mechanism import naive as shipped
from refusalscope.mechanism.attribution import (
    Scheme,
    attribute,
    gauss_legendre,
    joint,
    layerwise,
    left_riemann,
    trace,
)
from tests import naive, tiny

NEAR = 1e-5
FINE = 16


def _dense(entries: Attribution, layer: int, shape: torch.Size) -> torch.Tensor:
    dense = torch.zeros(shape)
    here = entries.layer == layer
    position = entries.position[here].long() + shape[1]
    dense[entries.prompt[here].long(), position, entries.feature[here].long()] = entries.value[here]
    return dense


SCHEMES = {
    "sound": (attribution.sound(), gauss_legendre(5), True),
    "paper": (attribution.paper(), left_riemann(10), False),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("mode", ["candidates", "all features"])
def test_factored_equals_naive(family: str, mode: str, scheme: str, tmp_path: Path) -> None:
    model, saes, direction = tiny.chat_model(family), tiny.bank(tmp_path), tiny.direction()
    chosen, rule, ends_after = SCHEMES[scheme]
    prompts = tiny.prompts()
    wanted = None if mode == "all features" else {layer: [1, 5, 8, 17, 40, 63, 95] for layer in range(4)}
    ours = attribute(model, saes, prompts, direction, candidates=wanted, scheme=chosen, batch_size=len(prompts))
    tokens = model.tokens(prompts)
    opened = {layer: saes.layer(layer).sae for layer in saes.layers}
    oracle = naive.attribute(
        model.model,
        dict(enumerate(model.layers)),
        opened,
        tokens,
        direction.unit,
        metric=(ours.answer, ours.refusal),
        nodes=rule.nodes,
        weights=rule.weights,
        ends_after_removal=ends_after,
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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_shipped_naive_formulation_equals_ours(scheme: str, tmp_path: Path) -> None:
    model, saes, direction = tiny.chat_model(), tiny.bank(tmp_path), tiny.direction()
    chosen, rule, _ = SCHEMES[scheme]
    part = trace(model, model.tokens(tiny.prompts()), direction, layers=range(4), scheme=chosen)
    opened = {layer: saes.layer(layer) for layer in saes.layers}
    expected = shipped.attribute(model, opened, part, rule)
    for layer, sae in opened.items():
        entries = reading.layer_entries(sae, [part], None)[0]
        inside = expected[layer][entries.prompt, entries.position + part.ids.shape[1], entries.feature]
        torch.testing.assert_close(entries.value, inside, atol=1e-4 * float(expected[layer].abs().max()), rtol=0)


@pytest.mark.parametrize("scheme", [attribution.sound(), layerwise(left_riemann(3))], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("at_once", [12, 1000])
def test_nodes_that_share_a_pass_give_what_each_gives_alone(scheme: attribution.Scheme, at_once: int) -> None:
    model = tiny.chat_model("gemma2")
    tokens = model.tokens(tiny.prompts())
    alone, together = (
        trace(model, tokens, tiny.direction(), layers=range(4), scheme=scheme, at_once=rows) for rows in (None, at_once)
    )
    assert len(tokens.prompt_ids) == 6
    error = (alone.gradient - together.gradient)[:, tokens.mask].norm() / alone.gradient[:, tokens.mask].norm()
    assert error < 1e-5


def test_candidates_are_read_batch_by_batch_as_if_all_traces_were_kept(tmp_path: Path) -> None:
    model, saes, direction, prompts = tiny.chat_model(), tiny.bank(tmp_path), tiny.direction(), tiny.prompts()
    wanted = {layer: [0, 5, 9, 40] for layer in saes.layers}
    found = attribution.attribute(model, saes, prompts, direction, candidates=wanted, batch_size=4)
    traces = [
        trace(model, t, direction, layers=range(4), scheme=attribution.sound()) for _, t in model.batches(prompts, 4)
    ]
    entries = [e for layer in saes.layers for e in reading.layer_entries(saes.layer(layer), traces, wanted[layer])]
    kept = reading.assemble(traces, entries)
    assert found.prompt_ids == kept.prompt_ids
    assert len(found.value) > 10
    for name in ("prompt", "layer", "position", "feature", "scored", "length", "answer", "refusal"):
        assert torch.equal(getattr(found, name), getattr(kept, name)), name
    torch.testing.assert_close(found.value, kept.value, atol=1e-5, rtol=1e-4)


def test_the_papers_path_ends_before_each_layers_own_removal() -> None:
    model, direction = tiny.chat_model(), tiny.direction()
    tokens = model.tokens(tiny.prompts())
    sound, paper = (trace(model, tokens, direction, layers=range(4), scheme=s) for s, _, _ in SCHEMES.values())
    assert sound.end is None
    assert paper.end is not None
    assert torch.equal(sound.patched, paper.patched)
    excess = (paper.end @ direction.unit)[..., None] * direction.unit
    torch.testing.assert_close(paper.end - excess, paper.patched, atol=1e-4, rtol=1e-4)
    assert excess[:, tokens.mask].norm(dim=-1).max() > 0.1


def _float64_model() -> ChatModel:
    """A tiny Llama in float64 throughout: transformers computes its norms in float32 whatever the model's type."""
    model = tiny.chat_model(dtype=torch.float64)
    norms = [part for part in model.model.modules() if isinstance(part, LlamaRMSNorm)]
    assert norms
    for part in norms:

        def forward(z: torch.Tensor, norm: LlamaRMSNorm = part) -> torch.Tensor:
            return norm.weight * z * (z.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

        part.forward = forward  # type: ignore[method-assign]
    return model


def test_layerwise_gradients_equal_finite_differences() -> None:
    model, direction = _float64_model(), tiny.direction()
    tokens = model.tokens(tiny.prompts())
    part = trace(model, tokens, direction, layers=range(4), scheme=layerwise(gauss_legendre(1)))
    generator, step = torch.Generator().manual_seed(3), 1e-5

    def metric(layer: int, residual: torch.Tensor) -> torch.Tensor:
        return effects.metric_under(model, part, {layer: lambda _z, _batch: residual}).metric

    for layer in range(4):
        middle = (part.clean[layer] + part.patched[layer]) / 2
        for _ in range(5):
            way = torch.randn(middle.shape, generator=generator, dtype=torch.float64) * tokens.mask[..., None]
            measured = (metric(layer, middle + step * way) - metric(layer, middle - step * way)) / (2 * step)
            slope = (part.gradient[layer] * way).sum((1, 2))
            torch.testing.assert_close(slope, measured, atol=1e-5 * float(slope.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_layerwise_is_complete(family: str, tmp_path: Path) -> None:
    model, saes, direction = tiny.chat_model(family), tiny.bank(tmp_path), tiny.direction()
    part = trace(
        model, model.tokens(tiny.prompts()), direction, layers=range(4), scheme=layerwise(gauss_legendre(FINE))
    )
    gap = (part.metric_patched - part.metric_clean).abs()
    for layer in range(4):
        totals = reading.layer_totals(saes.layer(layer), [part])
        entries = reading.layer_entries(saes.layer(layer), [part], None)[0]
        listed = torch.zeros(len(gap)).index_add_(0, entries.prompt, entries.value)
        torch.testing.assert_close(listed, totals.features, atol=1e-3, rtol=1e-3)
        effect = effects.swap_layer(model, part, layer)
        assert ((totals.features + totals.error - effect).abs() <= 1e-3 * gap).all(), f"layer {layer}"


def test_left_riemann_converges_to_the_same_value_as_one_over_n() -> None:
    model, direction = tiny.chat_model(), tiny.direction()
    tokens = model.tokens(tiny.prompts())

    def total(rule: attribution.Quadrature) -> torch.Tensor:
        part = trace(model, tokens, direction, layers=[1], scheme=layerwise(rule))
        return (part.gradient * (part.patched - part.clean)).sum((0, 2, 3))

    exact = total(gauss_legendre(FINE))
    errors = [float((total(left_riemann(nodes)) - exact).abs().mean()) for nodes in (32, 64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert 1.7 <= coarse / fine <= 2.3, errors


def test_gradient_is_one_backward_at_the_clean_run() -> None:
    model, direction = tiny.chat_model(), tiny.direction()
    tokens = model.tokens(tiny.prompts())
    part = trace(model, tokens, direction, layers=range(4), scheme=attribution.gradient())
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        def edit(residual: torch.Tensor, _batch: object) -> torch.Tensor:
            kept[layer] = residual if residual.requires_grad else residual.requires_grad_(True)
            return kept[layer]

        return edit

    with torch.enable_grad():
        logits = model.run(tokens, edits={layer: keep(layer) for layer in range(4)}, logits=1).logits[:, -1]
        rows = torch.arange(len(logits))
        total = (logits[rows, part.answer] - logits[rows, part.refusal]).sum()
        expected = torch.autograd.grad(total, [kept[layer] for layer in range(4)])
    for layer in range(4):
        torch.testing.assert_close(part.gradient[layer], expected[layer])


def test_nodes_are_doubled_until_the_gradient_stands_still() -> None:
    model, direction, prompts = tiny.chat_model(), tiny.direction(), tiny.prompts()
    coarse = attribution.enough_nodes(
        model, prompts, direction, layers=range(4), rule=lambda n: Scheme("x", joint(left_riemann(n)))
    )
    assert [check.nodes for check in coarse] == [5 * 2**i for i in range(len(coarse))]
    assert all(check.change > attribution.NODE_TOLERANCE for check in coarse[:-1])
    assert coarse[-1].change <= attribution.NODE_TOLERANCE or coarse[-1].nodes == attribution.MOST_NODES
    assert attribution.enough_nodes(model, prompts, direction, layers=range(4))[-1].nodes <= coarse[-1].nodes


def test_candidates_are_the_columns_of_the_whole(tmp_path: Path) -> None:
    model, saes, direction, prompts = tiny.chat_model(), tiny.bank(tmp_path), tiny.direction(), tiny.prompts()
    whole = attribute(model, saes, prompts, direction, batch_size=3)
    some = attribute(model, saes, prompts, direction, candidates={2: [8, 40]}, batch_size=3)
    inside = (whole.layer == 2) & torch.isin(whole.feature, torch.tensor([8, 40]))
    assert len(some.value) == int(inside.sum()) > 0
    assert whole.length.tolist() == model.tokens(prompts).mask.sum(1).tolist()


def _near_threshold(model, sae, layer, tokens, direction) -> torch.Tensor:
    """Features whose clean or patched pre-activation is so near its threshold that rounding decides."""
    path = trace(model, tokens, direction, layers=[layer], scheme=attribution.gradient())
    near = torch.zeros(())
    for residual in (path.clean[0], path.patched[0]):
        before = (residual - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc
        near = near + ((before - sae.threshold).abs() < NEAR)
    return near > 0
