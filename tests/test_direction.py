"""The direction is the difference of means, its layer follows the rule, and every way to fail says what helps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusalscope.core.types import LayerScores, Prompts
from refusalscope.mechanism import direction
from refusalscope.mechanism.direction import FirstTokens, FitData, NoDirection, choose_layer, refusal_score
from tests import tiny


def _scores(layer: int, *, kl: float, removed: float, added: float) -> LayerScores:
    return LayerScores(layer, kl, removed, added, 0.0, 0.0)


COUNTS = {"harmful_train_kept": 30, "harmless_train_kept": 40}


def _data(count: int = 20) -> FitData:
    def named(name: str, start: int) -> Prompts:
        texts = [f"{name} {start + i} {tiny.TEXTS[i % len(tiny.TEXTS)]}" for i in range(count)]
        return tiny.prompts(name, texts)

    return FitData(*(named(name, i) for i, name in enumerate(FitData.__annotations__)))


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=12), st.sets(st.integers(0, 1), min_size=1))
def test_refusal_score_is_the_log_odds_of_a_refusal_token(logits: list[float], tokens: set[int]) -> None:
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)[sorted(tokens)].sum()
    expected = float(p.log() - (1 - p).log())
    found = float(refusal_score(torch.tensor([logits]), sorted(tokens))[0])
    if math.isfinite(expected) and abs(expected) < 12:
        assert found == pytest.approx(expected, abs=1e-3)


def test_the_lowest_removed_score_wins_and_ties_go_to_the_lower_kl() -> None:
    scores = [
        _scores(0, kl=0.01, removed=3.0, added=1.0),
        _scores(1, kl=0.09, removed=-5.00, added=1.0),
        _scores(2, kl=0.02, removed=-4.95, added=1.0),
        _scores(3, kl=0.20, removed=-9.0, added=1.0),
        _scores(4, kl=0.01, removed=-9.0, added=-1.0),
    ]
    assert choose_layer(scores, COUNTS) == (2, ())


def test_the_kl_bound_is_relaxed_with_a_caveat_when_no_layer_meets_it() -> None:
    scores = [
        _scores(0, kl=0.20, removed=-1.0, added=1.0),
        _scores(1, kl=0.24, removed=-3.0, added=1.0),
        _scores(2, kl=0.26, removed=-9.0, added=1.0),
        _scores(3, kl=0.01, removed=-9.0, added=-1.0),
    ]
    layer, notes = choose_layer(scores, COUNTS)
    assert layer == 1
    assert "relaxed to 0.250" in notes[0]


def test_no_layer_that_induces_refusal_names_the_override() -> None:
    with pytest.raises(NoDirection, match=r"30 refused harmful and 40 answered harmless.*--best-layer"):
        choose_layer([_scores(0, kl=0.0, removed=-9.0, added=-0.1)], COUNTS)


def test_means_are_the_difference_of_last_position_residuals() -> None:
    model, data = tiny.chat_model(), _data()
    found = direction.find(
        model, data, batch_size=7, is_refusal=bool, refusal_tokens=[5], best_layer=2, keep_unrefused=True
    )
    means = []
    for prompts in (data.harmful_train, data.harmless_train):
        rows = [model.run(model.tokens(prompts[i : i + 1]), keep=[2]).residuals[2][0, -1] for i in range(len(prompts))]
        means.append(torch.stack(rows).double().mean(0))
    torch.testing.assert_close(found.vector, (means[0] - means[1]).float(), atol=1e-4, rtol=1e-4)
    assert float(found.offsets[2]) == pytest.approx(float(means[1].float() @ found.unit), abs=1e-3)
    assert len(found.caveats) == 3
    assert [score.layer for score in found.scores] == [2]


def test_validation_scores_equal_a_plain_computation() -> None:
    model, data = tiny.chat_model("gemma2"), _data()
    found = direction.find(
        model, data, batch_size=64, is_refusal=bool, refusal_tokens=[5], best_layer=1, keep_unrefused=True
    )
    tokens = model.tokens(data.harmless_validation)
    u = found.unit

    def project(residual: torch.Tensor, _batch: object) -> torch.Tensor:
        return residual - (residual @ u)[..., None] * u

    plain = model.run(tokens, logits=1).logits[:, -1].log_softmax(-1)
    removed = model.run(tokens, edits=dict.fromkeys(range(4), project), logits=1).logits[:, -1].log_softmax(-1)
    kl = (plain.exp() * (plain - removed)).sum(-1).mean()
    assert found.scores[0].kl == pytest.approx(float(kl), rel=1e-3)


def test_prompts_that_contradict_their_label_are_dropped_and_counted() -> None:
    data = _data()
    first = {name: FirstTokens(torch.tensor([5] * 18 + [6] * 2)) for name in FitData.__annotations__}
    for name in ("harmless_train", "harmless_validation"):
        first[name] = FirstTokens(torch.tensor([6] * 17 + [5] * 3))
    kept, counts = direction.filter_prompts(data, first, [5], whole=())
    assert kept.harmful_train.ids == data.harmful_train.ids[:18]
    assert kept.harmless_validation.ids == data.harmless_validation.ids[:17]
    assert (counts["harmless_train_kept"], counts["harmless_train_dropped"]) == (17, 3)


def test_too_few_refused_prompts_say_how_many() -> None:
    data = _data()
    first = {name: FirstTokens(torch.tensor([5] * 3 + [6] * 17)) for name in FitData.__annotations__}
    with pytest.raises(NoDirection, match=r"only 3 of 20 harmful train prompts are refused.*--keep-unrefused"):
        direction.filter_prompts(data, first, [5], whole=())


def test_a_token_must_be_distinctive_and_lead_to_refusals() -> None:
    harmful, harmless = FirstTokens(torch.tensor([5] * 15 + [6] * 5)), FirstTokens(torch.tensor([5] * 9 + [6] * 11))
    assert direction.distinctive_first_tokens(harmful, harmless) == (5,)
    assert direction.distinctive_first_tokens(harmful, harmful) == ()
    model, data = tiny.chat_model(), _data()
    first = dict.fromkeys(FitData.__annotations__, harmless) | {"harmful_train": harmful}
    assert direction.find_refusal_tokens(model, data, first, lambda text: True) == (5,)
    with pytest.raises(NoDirection, match="recognisably refused"):
        direction.find_refusal_tokens(model, data, first, lambda text: False)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="layers 0 to 3"):
        direction.find(tiny.chat_model(), _data(), batch_size=8, is_refusal=bool, best_layer=11)


def test_batch_size_does_not_change_the_direction() -> None:
    model, data = tiny.chat_model("qwen2"), _data()

    def vector(batch_size: int) -> torch.Tensor:
        return direction.find(
            model,
            data,
            batch_size=batch_size,
            is_refusal=bool,
            refusal_tokens=[5],
            best_layer=1,
            keep_unrefused=True,
        ).vector

    torch.testing.assert_close(vector(3), vector(20), atol=1e-4, rtol=1e-4)


def test_parts_kept_whole_are_not_filtered() -> None:
    data = _data()
    first = {name: FirstTokens(torch.tensor([5] * 12 + [6] * 8)) for name in FitData.__annotations__}
    first["harmless_train"] = FirstTokens(torch.tensor([6] * 20))
    kept, counts = direction.filter_prompts(data, first, [5], whole=("harmful_train",))
    assert kept.harmful_train == data.harmful_train
    assert counts["harmful_train_dropped"] == 0
    assert counts["harmful_validation_dropped"] == 8
