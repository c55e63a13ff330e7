"""The laws of setting features back at closing tokens: own values change nothing, others land, answers are left."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from refusalscope.core.types import Feature, FeatureSet, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edits, Tokens
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism.restoring import (
    Closing,
    RandomDirections,
    Restoration,
    RestoreDirection,
    RestoreFeatures,
    editor,
    read_closing,
    read_distances,
)
from tests import tiny

SET = FeatureSet("test", tuple(Feature(layer, index) for layer in (0, 2, 3) for index in (4, 40, 77)), (1.0,) * 9)
UNIT = tiny.direction().unit
LAYERS = tuple(SET.by_layer())
KINDS = ["features", "direction", "random"]


@pytest.fixture(scope="module", params=[("jumprelu", "none"), ("topk", "layer_norm")], ids="-".join)
def slices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, SaeSlice]:
    family, normalise = request.param
    saes: SaeBank = tiny.bank(tmp_path_factory.mktemp("saes"), family=family, normalise=normalise)
    return saes.slices(SET.by_layer())


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> ChatModel:
    return tiny.chat_model(request.param)


def restoration(
    kind: str, values: dict[str, dict[int, Closing]], model: ChatModel, tokens: Tokens, slices: dict[int, SaeSlice]
) -> Restoration:
    features = RestoreFeatures(SET, values)
    apart = read_distances(model, tokens, features, slices)
    made = {
        "features": features,
        "direction": RestoreDirection(UNIT, LAYERS, values),
        "random": RandomDirections(apart, 3),
    }
    return made[kind]


def of_the_next(tokens: Tokens, found: dict[str, dict[int, Closing]]) -> dict[str, dict[int, Closing]]:
    """Every prompt's values are another's, raised so that none is what it was."""
    names = [*tokens.prompt_ids[1:], tokens.prompt_ids[0]]
    return {
        name: {layer: Closing(at.features + 0.5, at.projection + 0.5) for layer, at in found[other].items()}
        for name, other in zip(tokens.prompt_ids, names, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_own_values_change_nothing(model: ChatModel, slices: dict[int, SaeSlice], kind: str) -> None:
    tokens = model.tokens(tiny.prompts())
    values = read_closing(model, tokens, slices, UNIT)
    made = editor(restoration(kind, values, model, tokens, slices), slices=slices)
    assert torch.equal(model.run(tokens, edits=made.edits, logits=1).logits, model.run(tokens, logits=1).logits)
    assert made.changed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_closing_tokens_are_moved(model: ChatModel, slices: dict[int, SaeSlice], kind: str) -> None:
    tokens = model.tokens(tiny.prompts())
    values = of_the_next(tokens, read_closing(model, tokens, slices, UNIT))
    edits = {0: editor(restoration(kind, values, model, tokens, slices), slices=slices).edits[0]}
    clean, edited = (model.run(tokens, edits=used, keep=[0]).residuals[0] for used in ({}, edits))
    moved = (clean != edited).any(-1)
    assert torch.equal(moved, tokens.roles == Role.CLOSING)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_one_at_a_time(model: ChatModel, slices: dict[int, SaeSlice], kind: str) -> None:
    tokens = model.tokens(tiny.prompts())
    values = of_the_next(tokens, read_closing(model, tokens, slices, UNIT))
    made = editor(restoration(kind, values, model, tokens, slices), slices=slices)
    together = model.run(tokens, edits=made.edits, logits=1).logits[:, -1]
    for row in range(len(tiny.TEXTS)):
        alone = model.run(model.tokens(tiny.prompts()[row : row + 1]), edits=made.edits, logits=1).logits[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)


def test_an_answer_is_left_alone_and_nothing_stays_behind(model: ChatModel, slices: dict[int, SaeSlice]) -> None:
    tokens = model.tokens(tiny.prompts())
    clean = model.run(tokens, logits=1).logits
    values = of_the_next(tokens, read_closing(model, tokens, slices, UNIT))
    made = editor(RestoreFeatures(SET, values), slices=slices)
    model.generate(tokens, edits=made.edits, max_new_tokens=1)
    once = made.changed
    model.generate(tokens, edits=made.edits, max_new_tokens=4)
    assert made.changed == 2 * once > 0
    with pytest.raises(KeyError):
        model.run(replace(tokens, prompt_ids=("unheard of",) * len(tiny.TEXTS)), edits=made.edits)
    assert torch.equal(model.run(tokens, logits=1).logits, clean)


def orthogonal(width: int = 16) -> SaeSlice:
    """Features that do not overlap: each can be set without moving the others."""
    rows = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    zeros = torch.zeros(width)
    return SaeSlice(0, torch.arange(width), rows.T.contiguous(), zeros, zeros, rows)


def test_values_land_from_the_end() -> None:
    part, drawn = orthogonal(), torch.Generator().manual_seed(1)
    residual = torch.rand(2, 6, 16, generator=drawn) @ part.decoder
    roles = torch.full((2, 6), int(Role.INSTRUCTION))
    roles[0, -3:], roles[1, -2:] = int(Role.CLOSING), int(Role.CLOSING)
    batch = Batch(("a", "b"), roles)
    given = {
        name: {0: Closing(torch.rand(count, 16, generator=drawn), torch.rand(count, generator=drawn))}
        for name, count in (("a", 2), ("b", 4))
    }
    chosen = FeatureSet("test", (Feature(0, 3), Feature(0, 7)), (1.0, 1.0))
    wanted = RestoreFeatures(chosen, given)
    restored = editor(wanted, slices={0: part}).edits[0](residual, batch)
    found, before = part.encode(restored), part.encode(residual)
    for row, name in enumerate("ab"):
        last = given[name][0].features[-2:]
        torch.testing.assert_close(found[row, -2:][:, [3, 7]], last[:, [3, 7]], atol=1e-5, rtol=1e-5)
        others = [i for i in range(16) if i not in (3, 7)]
        torch.testing.assert_close(found[row][:, others], before[row][:, others], atol=1e-5, rtol=1e-5)
    assert torch.equal(restored[:, :-2], residual[:, :-2])
    unit = tiny.direction(width=16).unit
    along = editor(RestoreDirection(unit, (0,), given), slices={}).edits[0](residual, batch)
    torch.testing.assert_close(along[0, -2:] @ unit, given["a"][0].projection, atol=1e-5, rtol=1e-5)


def test_the_control_goes_as_far_as_the_restoration_went(model: ChatModel, slices: dict[int, SaeSlice]) -> None:
    tokens = model.tokens(tiny.prompts())
    wanted = RestoreFeatures(SET, of_the_next(tokens, read_closing(model, tokens, slices, UNIT)))
    gone = read_distances(model, tokens, wanted, slices)

    def moved(edits: Edits, layer: int) -> Float[Tensor, "prompt position d_model"]:
        """What the edit of a layer adds, those of the layers before it standing."""
        before = {at: edit for at, edit in edits.items() if at < layer}
        runs = (model.run(tokens, edits=used, keep=[layer]) for used in ({**before, layer: edits[layer]}, before))
        after, without = (run.residuals[layer] for run in runs)
        return after - without

    def of_seed(seed: int) -> Edits:
        return editor(RandomDirections(gone, seed), slices={}).edits

    restored, control = editor(wanted, slices=slices).edits, of_seed(0)
    for layer in LAYERS:
        far = torch.stack([gone[name][layer] for name in tokens.prompt_ids])
        for edits in (restored, control):
            found = moved(edits, layer)[:, -far.shape[1] :].norm(dim=-1)
            torch.testing.assert_close(found, far, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(moved(control, layer), moved(of_seed(1), layer))


def test_a_layer_without_its_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 needs that layer's SAE slice"):
        editor(RestoreFeatures(SET, {}), slices={})
