"""The laws of feature edits and direction edits (method 5)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusalscope.core.types import Feature, FeatureSet
from refusalscope.inputs.chat import Batch, ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import (
    AddDirection,
    Intervention,
    RemoveDirection,
    ScaleFeatures,
    editor,
    needed_features,
)
from tests import tiny

SET = FeatureSet("test", tuple(Feature(layer, index) for layer in (0, 2, 3) for index in (4, 40, 77)), (1.0,) * 9)
OTHER = FeatureSet("test", (Feature(1, 3), Feature(2, 40), Feature(2, 41)), (1.0,) * 3)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SaeBank:
    return tiny.bank(tmp_path_factory.mktemp("saes"))


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


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(-4, 4), layer=st.integers(0, 3), chosen=st.sets(st.integers(0, 95), min_size=1, max_size=8))
def test_scaling_equals_decoding_edited_features_plus_error(
    saes: SaeBank, factor: float, layer: int, chosen: set[int]
) -> None:
    residual = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(layer))
    sae = saes.layer(layer)
    features = sae.encode(residual)
    error = residual - sae.decode(features)
    edited = features.clone()
    edited[..., sorted(chosen)] *= factor
    expected = sae.decode(edited) + error
    wanted = FeatureSet("test", tuple(Feature(layer, i) for i in sorted(chosen)), (1.0,) * len(chosen))
    made = editor(ScaleFeatures(wanted, factor), layers=4, slices=saes.slices(wanted.by_layer()))
    batch = Batch(("a", "b"), torch.full((2, 5), int(Role.INSTRUCTION)))
    torch.testing.assert_close(made.edits[layer](residual, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["remove", "affine", "add", "scale", "per prompt"])
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
