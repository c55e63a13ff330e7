"""Measured effects are what plain edits of the residual stream give, and what attributions are held to."""

from pathlib import Path

import pytest
import torch

from refusalscope.core.scores import Trace
from refusalscope.core.types import Feature, FeatureSet
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.mechanism import attribution, effects, reading
from refusalscope.mechanism.attribution import gauss_legendre, layerwise, trace
from refusalscope.mechanism.interventions import ScaleFeatures, editor
from tests import tiny

WANTED = {0: [4, 40], 2: [8, 77], 3: [1]}


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SaeBank:
    return tiny.bank(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return tiny.chat_model()


@pytest.fixture(scope="module")
def traced(model: ChatModel) -> Trace:
    return trace(model, model.tokens(tiny.prompts()), tiny.direction(), layers=range(4), scheme=attribution.gradient())


def test_no_edit_gives_the_clean_metric(model: ChatModel, traced: Trace) -> None:
    torch.testing.assert_close(effects.metric_under(model, traced, {}).metric, traced.metric_clean)


def test_a_feature_alone_is_set_to_its_patched_value(model: ChatModel, saes: SaeBank, traced: Trace) -> None:
    slices = list(saes.slices(WANTED).values())
    moved = effects.deltas(traced, slices)
    assert [delta.feature for delta in moved] == [Feature(layer, i) for layer, some in WANTED.items() for i in some]
    found = effects.alone(model, traced, moved)
    for row, delta in enumerate(moved):
        part = next(part for part in slices if part.layer == delta.feature.layer).take([delta.feature.index])
        target = part.encode(traced.patched[delta.feature.layer])

        def edit(residual: torch.Tensor, _batch: object, part=part, target=target) -> torch.Tensor:
            return residual + (target - part.encode(residual)) @ part.decoder

        expected = effects.metric_under(model, traced, {delta.feature.layer: edit}).metric - traced.metric_clean
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_marginal_effects_add_up_to_the_effect_of_all_moves(model: ChatModel, saes: SaeBank, traced: Trace) -> None:
    moved = effects.deltas(traced, list(saes.slices(WANTED).values()))
    marginal = effects.in_random_order(model, traced, moved, orders=3, seed=1)
    together = {
        layer: (lambda sums: lambda z, _batch: z + sums)(
            torch.stack([d.residual for d in moved if d.feature.layer == layer]).sum(0)
        )
        for layer in WANTED
    }
    whole = effects.metric_under(model, traced, together).metric - traced.metric_clean
    torch.testing.assert_close(marginal.sum(0), whole, atol=1e-3, rtol=1e-3)
    assert whole.abs().max() > 0.01
    again = effects.in_random_order(model, traced, moved, orders=3, seed=1)
    assert torch.equal(marginal, again)


def test_a_prediction_is_the_attribution_summed_over_positions(model: ChatModel, saes: SaeBank, traced: Trace) -> None:
    moved = effects.deltas(traced, list(saes.slices(WANTED).values()))
    predicted = effects.predicted(traced, moved)
    entries = [
        part for layer, some in WANTED.items() for part in reading.layer_entries(saes.layer(layer), [traced], some)
    ]
    for row, delta in enumerate(moved):
        part = next(part for part in entries if part.layer == delta.feature.layer)
        own = part.feature == delta.feature.index
        expected = torch.zeros(len(tiny.TEXTS)).index_add_(0, part.prompt[own], part.value[own])
        torch.testing.assert_close(predicted[row], expected, atol=1e-5, rtol=1e-4)


def test_small_moves_are_predicted_by_the_gradient(model: ChatModel, saes: SaeBank, traced: Trace) -> None:
    moved = effects.deltas(traced, list(saes.slices(WANTED).values()))
    small = [delta._replace(change=1e-3 * delta.change) for delta in moved]
    measured, predicted = effects.alone(model, traced, small), effects.predicted(traced, small)
    torch.testing.assert_close(predicted, measured, atol=1e-4, rtol=0.05)


def test_swapping_a_layer_whole_carries_the_layers_above(model: ChatModel) -> None:
    """Everything later positions and layers know flows through the residuals of one layer."""
    tokens = model.tokens(tiny.prompts())
    scheme = layerwise(gauss_legendre(1))
    part = trace(model, tokens, tiny.direction(), layers=range(4), scheme=scheme)
    gap = part.metric_patched - part.metric_clean
    torch.testing.assert_close(effects.swap_layer(model, part, 3), gap, atol=1e-4, rtol=1e-4)


def test_scaling_a_feature_to_zero_is_what_an_intervention_does(
    model: ChatModel, saes: SaeBank, traced: Trace, tmp_path: Path
) -> None:
    chosen = FeatureSet("x", (Feature(2, 8), Feature(0, 4)), (1.0, 1.0))
    made = editor(ScaleFeatures(chosen, 0.0), layers=4, slices=saes.slices(chosen.by_layer()))
    logits = effects.metric_under(model, traced, made.edits)
    run = model.run(effects.tokens_of(traced), edits=made.edits, logits=1).logits[:, -1]
    rows = torch.arange(len(run))
    torch.testing.assert_close(logits.metric, run[rows, traced.answer] - run[rows, traced.refusal])
    assert logits.first == tuple(run.argmax(-1).tolist())
