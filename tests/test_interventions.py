"""The laws of feature edits and direction edits (method 5)."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusalscope.core.encoding import normalise
from refusalscope.core.types import Feature, FeatureSet
from refusalscope.inputs.chat import Batch, ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import (
    AddDirection,
    HoldFeatures,
    Intervention,
    RemoveDirection,
    ScaleFeatures,
    SetFeatures,
    Together,
    editor,
    needed_features,
    record,
)
from tests import tiny

SET = FeatureSet("test", tuple(Feature(layer, index) for layer in (0, 2, 3) for index in (4, 40, 77)), (1.0,) * 9)
OTHER = FeatureSet("test", (Feature(1, 3), Feature(2, 40), Feature(2, 41)), (1.0,) * 3)


@pytest.fixture(scope="module", params=[("jumprelu", "none"), ("topk", "layer_norm")], ids="-".join)
def saes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SaeBank:
    family, normalise = request.param
    return tiny.bank(tmp_path_factory.mktemp("saes"), family=family, normalise=normalise)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> ChatModel:
    return tiny.chat_model(request.param)


def _logits(
    model: ChatModel, saes: SaeBank, intervention: Intervention | None, rows: slice = slice(None)
) -> torch.Tensor:
    made = editor(intervention, layers=4, slices=saes.slices(needed_features(intervention)))
    return model.run(model.tokens(tiny.prompts()[rows]), edits=made.edits, logits=1).logits[:, -1]


def test_scaling_by_one_changes_nothing(model: ChatModel, saes: SaeBank) -> None:
    assert torch.equal(_logits(model, saes, ScaleFeatures(SET, 1.0)), _logits(model, saes, None))


def test_scaling_changes_something_and_counts_it(model: ChatModel, saes: SaeBank) -> None:
    made = editor(ScaleFeatures(SET, -2.0), layers=4, slices=saes.slices(SET.by_layer()))
    tokens = model.tokens(tiny.prompts())
    edited = model.run(tokens, edits=made.edits, logits=1).logits[:, -1]
    assert not torch.allclose(edited, _logits(model, saes, None))
    assert 0 < made.changed <= 3 * int(tokens.mask.sum())


edits = {
    "layer": st.integers(0, 3),
    "chosen": st.sets(st.integers(0, 95), min_size=1, max_size=8),
    "number": st.floats(-4, 4),
}


@settings(max_examples=25)
@given(**edits)
def test_scaling_equals_decoding_edited_features_plus_error(
    saes: SaeBank, layer: int, chosen: set[int], number: float
) -> None:
    def scaled(features: torch.Tensor, _scale: torch.Tensor) -> torch.Tensor:
        return features * number

    _equals_decoding(saes, layer, chosen, scaled, lambda wanted: ScaleFeatures(wanted, number))


@settings(max_examples=25)
@given(**edits)
def test_setting_equals_decoding_the_constant_plus_error(
    saes: SaeBank, layer: int, chosen: set[int], number: float
) -> None:
    def constant(features: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (number * scale).expand_as(features)

    _equals_decoding(saes, layer, chosen, constant, lambda wanted: SetFeatures(wanted, number))


def _equals_decoding(
    saes: SaeBank,
    layer: int,
    chosen: set[int],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    intervention: Callable[[FeatureSet], Intervention],
) -> None:
    """The edit is the SAE's decoding of changed features plus its error on the unchanged ones."""
    residual = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(layer))
    sae = saes.layer(layer)
    features = sae.encode(residual)
    error = residual - sae.decode(features, residual)
    edited = features.clone()
    edited[..., sorted(chosen)] = change(features[..., sorted(chosen)], normalise(residual, sae.normalisation).scale)
    wanted = FeatureSet("test", tuple(Feature(layer, i) for i in sorted(chosen)), (1.0,) * len(chosen))
    made = editor(intervention(wanted), layers=4, slices=saes.slices(wanted.by_layer()))
    batch = Batch(("a", "b"), torch.full((2, 5), int(Role.INSTRUCTION)))
    torch.testing.assert_close(
        made.edits[layer](residual, batch), sae.decode(edited, residual) + error, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["remove", "affine", "add", "scale", "per prompt", "set", "together"])
def test_batched_equals_one_at_a_time(model: ChatModel, saes: SaeBank, kind: str) -> None:
    intervention = _intervention(kind)
    together = _logits(model, saes, intervention)
    for row in range(len(tiny.TEXTS)):
        alone = _logits(model, saes, intervention, slice(row, row + 1))
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def _intervention(kind: str) -> Intervention:
    direction = tiny.direction()
    per_prompt = {prompt.id: (SET if i % 2 else OTHER) for i, prompt in enumerate(tiny.prompts())}
    return {
        "remove": RemoveDirection(direction),
        "affine": RemoveDirection(direction, affine=True),
        "add": AddDirection(direction),
        "scale": ScaleFeatures(SET, -1.0),
        "per prompt": ScaleFeatures(per_prompt, -1.0),
        "set": SetFeatures(SET, 1.5),
        "together": Together((SetFeatures(OTHER, 1.5), RemoveDirection(direction), ScaleFeatures(SET, -1.0))),
    }[kind]


def test_per_prompt_sets_edit_each_row_as_its_own_set_would(model: ChatModel, saes: SaeBank) -> None:
    mixed = _logits(model, saes, _intervention("per prompt"))
    for chosen, rows in ((OTHER, slice(0, None, 2)), (SET, slice(1, None, 2))):
        alone = _logits(model, saes, ScaleFeatures(chosen, -1.0))
        torch.testing.assert_close(mixed[rows], alone[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("affine", [False, True])
def test_removal_leaves_the_neutral_projection_at_every_layer(model: ChatModel, affine: bool) -> None:
    direction = tiny.direction()
    made = editor(RemoveDirection(direction, affine=affine), layers=4)
    tokens = model.tokens(tiny.prompts())
    for layer, residual in model.run(tokens, edits=made.edits, keep=range(4)).residuals.items():
        neutral = direction.offsets[layer] if affine else torch.zeros(())
        left = residual[tokens.mask] @ direction.unit - neutral
        assert left.abs().max() <= 1e-4 * residual.norm(dim=-1).max()


def test_adding_moves_its_own_layer_by_the_vector(model: ChatModel) -> None:
    direction, tokens = tiny.direction(layer=2), model.tokens(tiny.prompts())
    plain = model.run(tokens, keep=[1, 2]).residuals
    added = model.run(tokens, keep=[1, 2], edits=editor(AddDirection(direction), layers=4).edits).residuals
    assert torch.equal(plain[1], added[1])
    torch.testing.assert_close(added[2] - plain[2], direction.vector.expand_as(plain[2]), atol=1e-4, rtol=1e-4)


def test_an_edit_of_silent_features_reports_no_change(model: ChatModel, saes: SaeBank) -> None:
    parts = saes.slices(SET.by_layer())
    for part in parts.values():
        part.threshold.fill_(1e9)
    made = editor(ScaleFeatures(SET, -3.0), layers=4, slices=parts)
    tokens = model.tokens(tiny.prompts())
    assert torch.equal(model.run(tokens, edits=made.edits, logits=1).logits[:, -1], _logits(model, saes, None))
    assert made.changed == 0


def test_padding_is_never_counted(model: ChatModel) -> None:
    made = editor(AddDirection(tiny.direction()), layers=4)
    tokens = model.tokens(tiny.prompts())
    model.run(tokens, edits=made.edits)
    assert made.changed == int(tokens.mask.sum())


def test_edits_act_on_generated_tokens_too(model: ChatModel, saes: SaeBank) -> None:
    made = editor(RemoveDirection(tiny.direction()), layers=4)
    tokens = model.tokens(tiny.prompts())
    answers = model.generate(tokens, edits=made.edits, max_new_tokens=6)
    # The last token of an answer is never fed back, so each answer adds one position less than it has tokens.
    generated = sum(answer.tokens - 1 for answer in answers)
    assert made.changed == 4 * (int(tokens.mask.sum()) + generated)


def test_a_missing_slice_is_named(saes: SaeBank) -> None:
    with pytest.raises(ValueError, match="layer 0"):
        editor(ScaleFeatures(SET, 0.0), layers=4, slices={})
    with pytest.raises(ValueError, match=r"does not hold features \[4, 77\]"):
        editor(ScaleFeatures(SET, 0.0), layers=4, slices=saes.slices({0: [40], 2: [40], 3: [40]}))


def test_bfloat16_edits_keep_untouched_positions_bit_identical(saes: SaeBank) -> None:
    model = tiny.chat_model("llama", dtype=torch.bfloat16)
    parts = saes.slices(SET.by_layer())
    for part in parts.values():
        part.threshold.fill_(1e9)
    tokens = model.tokens(tiny.prompts())
    edits = editor(ScaleFeatures(SET, -3.0), layers=4, slices=parts).edits
    assert torch.equal(model.run(tokens, edits=edits, logits=1).logits, model.run(tokens, logits=1).logits)


def _held(model: ChatModel, saes: SaeBank, features: FeatureSet, *, batch_size: int = 4) -> HoldFeatures:
    slices = saes.slices(needed_features(ScaleFeatures(features, 1.0)))
    return HoldFeatures(features, record(model, tiny.prompts(), slices, batch_size=batch_size))


def test_holding_what_is_there_changes_nothing(model: ChatModel, saes: SaeBank) -> None:
    held = _logits(model, saes, _held(model, saes, SET))
    torch.testing.assert_close(held, _logits(model, saes, None), atol=1e-4, rtol=1e-4)


def test_held_features_take_their_unedited_values_under_another_edit(model: ChatModel, saes: SaeBank) -> None:
    """Where scaling below moves features above, holding those puts the difference back, and only that."""
    below = FeatureSet("test", tuple(Feature(0, index) for index in range(60)), (1.0,) * 60)
    above = FeatureSet("test", tuple(Feature(2, index) for index in (4, 40, 77)), (1.0,) * 3)
    scaled, tokens = ScaleFeatures(below, -2.0), model.tokens(tiny.prompts())
    part = saes.slices({2: [4, 40, 77]})[2]

    def residuals(intervention: Intervention | None) -> torch.Tensor:
        made = editor(intervention, layers=4, slices=saes.slices(needed_features(intervention)))
        return model.run(tokens, edits=made.edits, keep=[2]).residuals[2][tokens.mask]

    plain, free = part.encode(residuals(None)), part.encode(residuals(scaled))
    assert (free - plain).abs().max() > 0.1
    expected = residuals(scaled) + (plain - free) @ part.decoder
    held = residuals(Together((scaled, _held(model, saes, above))))
    torch.testing.assert_close(held, expected, atol=1e-4, rtol=1e-4)


def test_holding_acts_on_the_answer_by_the_mean_or_not_at_all(model: ChatModel, saes: SaeBank) -> None:
    held, tokens = _held(model, saes, SET), model.tokens(tiny.prompts())
    parts = saes.slices(needed_features(held))
    rows = Batch(tokens.prompt_ids, torch.full((len(tiny.TEXTS), 1), int(Role.RESPONSE)))
    residual = torch.randn(len(tiny.TEXTS), 1, 32, generator=torch.Generator().manual_seed(1))
    for layer, part in parts.items():
        wanted = part.take(needed_features(held)[layer])
        mean = torch.stack([held.held[name][layer].mean for name in tokens.prompt_ids])
        expected = residual + ((mean[:, None] - wanted.encode(residual)) @ wanted.decoder)
        edit = editor(held, layers=4, slices=parts).edits[layer]
        torch.testing.assert_close(edit(residual, rows), expected, atol=1e-5, rtol=1e-5)
        free = editor(HoldFeatures(SET, held.held, "free"), layers=4, slices=parts).edits[layer]
        assert torch.equal(free(residual, rows), residual)


def test_what_is_held_does_not_depend_on_the_batch(model: ChatModel, saes: SaeBank) -> None:
    together, alone = _held(model, saes, SET), _held(model, saes, SET, batch_size=1)
    for name, layers in together.held.items():
        for layer, held in layers.items():
            torch.testing.assert_close(held.values, alone.held[name][layer].values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(held.mean, alone.held[name][layer].mean, atol=1e-4, rtol=1e-4)


def test_interventions_together_act_in_turn_and_count_together(model: ChatModel, saes: SaeBank) -> None:
    direction, tokens = tiny.direction(layer=2), model.tokens(tiny.prompts())
    both = Together((AddDirection(direction), ScaleFeatures(SET, 0.0)))
    made = editor(both, layers=4, slices=saes.slices(SET.by_layer()))
    residual = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    batch = Batch(("a", "b"), torch.full((2, 5), int(Role.INSTRUCTION)))
    scale = editor(ScaleFeatures(SET, 0.0), layers=4, slices=saes.slices(SET.by_layer())).edits[2]
    assert torch.equal(made.edits[2](residual, batch), scale(residual + direction.vector, batch))
    model.run(tokens, edits=made.edits)
    assert made.changed >= 10 + int(tokens.mask.sum())
    nested = editor(Together((Together((both,)),)), layers=4, slices=saes.slices(SET.by_layer()))
    assert torch.equal(nested.edits[2](residual, batch), made.edits[2](residual, batch))
    assert nested.changed >= 10
