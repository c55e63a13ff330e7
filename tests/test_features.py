"""Feature sets hold the best features by the stated rules: ties, signs, averages, controls; and behave as sets do."""

import math
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusalscope.core.scores import Attribution, Scores
from refusalscope.core.types import Feature, FeatureSet
from refusalscope.mechanism import features
from refusalscope.mechanism.attribution import attribute, sound, trace
from refusalscope.mechanism.features import LayerSurvey, by_cosine, choose, per_prompt, prompt_scores, random_like
from tests import tiny


def named(*pairs: tuple[int, int]) -> list[Feature]:
    return [Feature(*pair) for pair in pairs]


def scored(listed: list[Feature], values: torch.Tensor, method: str = "x") -> Scores:
    return Scores(method, tuple(f"p{i}" for i in range(len(values))), tuple(listed), values)


def test_ties_go_by_layer_and_index_and_only_positive_scores_count() -> None:
    listed = named((2, 1), (0, 7), (2, 0), (1, 3), (1, 4), (0, 0))
    row = [0.5, 0.5, 0.5, -0.9, 0.0, 0.75]
    chosen = choose(scored(listed, torch.tensor([row, row])), 3).features
    assert list(chosen.features) == named((0, 0), (0, 7), (2, 0))
    assert chosen.scores == (0.75, 0.5, 0.5)
    # Fewer than K is what there is: no feature of zero or negative score fills the set.
    assert len(choose(scored(listed, torch.tensor([row, row])), 20).features) == 4
    assert len(choose(scored(listed, -torch.ones(2, 6)), 20).features) == 0


def test_the_mean_over_prompts_decides() -> None:
    scores = torch.tensor([[3.0, 1.0, -2.0], [-3.5, 1.0, 4.0]])
    made = choose(scored(named((0, 0), (0, 1), (0, 2)), scores), 2)
    assert list(made.features.features) == named((0, 1), (0, 2))
    assert made.features.scores == (1, 1)
    assert made.chosen == (1, 0.5)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(1, 5))
def test_shares_are_shares_and_run_parallel(rows: list[list[int]], k: int) -> None:
    listed, scores = named((0, 0), (0, 1), (1, 0), (1, 1)), torch.tensor(rows).float()
    made = choose(scored(listed, scores), k, seed=1)
    assert made == choose(scored(listed, scores), k, seed=1)
    assert len(made.features) == len(made.chosen) == len(made.stability) <= k
    assert all(0 <= share <= 1 for share in (*made.chosen, *made.stability))
    if len(rows) == 1:
        assert set(made.chosen) | set(made.stability) <= {1.0}


def test_a_feature_of_every_prompt_is_stable_and_one_of_few_is_not() -> None:
    scores = torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 9.0]])
    made = choose(scored(named((0, 0), (0, 1)), scores), 2)
    assert dict(zip(map(str, made.features.features), made.chosen, strict=True)) == {"0/0": 1, "0/1": 0.1}
    stability = dict(zip(map(str, made.features.features), made.stability, strict=True))
    assert stability["0/0"] == 1
    # Nine tenths to the tenth of all resamples leave the one prompt out: 0.35.
    assert 0.5 < stability["0/1"] < 0.8


def test_local_sets_are_each_prompts_own() -> None:
    scores = torch.tensor([[3.0, 1.0, -2.0], [-3.5, 1.0, 4.0]])
    local = per_prompt(scored(named((0, 0), (0, 1), (0, 2)), scores), 1)
    assert {name: list(made.features) for name, made in local.items()} == {"p0": named((0, 0)), "p1": named((0, 2))}


def attribution(entries: list[tuple[int, int, int, int, float]], dropped: tuple[str, ...] = ()) -> Attribution:
    """Three prompts whose instruction and closing are 2, 4 and 2 tokens."""
    columns = list(zip(*entries, strict=True))
    whole = [torch.tensor(column, dtype=torch.long) for column in columns[:4]]
    return Attribution(
        ("a", "b", "c"),
        *whole,
        value=torch.tensor(columns[4]),
        scored=torch.tensor([2, 4, 2]),
        length=torch.tensor([5, 6, 4]),
        answer=torch.zeros(3).long(),
        refusal=torch.ones(3).long(),
        metric_clean=torch.zeros(3),
        metric_patched=torch.zeros(3),
        dropped=dropped,
    )


ENTRIES = [  # prompt, layer, position, feature, value
    (0, 3, -1, 8, 2.0),
    (0, 3, -2, 8, 4.0),
    (0, 3, -3, 8, 100.0),  # header: before the two tokens that count
    (0, 1, -3, 5, 100.0),
    (1, 3, -4, 8, 6.0),
    (1, 1, -1, 8, -2.0),
    (1, 3, -5, 8, 100.0),
    (2, 1, -1, 9, 7.0),
]


def test_scores_average_over_instruction_and_closing_alone() -> None:
    scores = prompt_scores(attribution(ENTRIES))
    assert scores.features == tuple(named((1, 8), (1, 9), (3, 8)))
    assert scores.values.tolist() == [[0, 0, 3], [-0.5, 0, 1.5], [0, 3.5, 0]]


def test_dropped_prompts_are_left_out() -> None:
    scores = prompt_scores(attribution(ENTRIES, dropped=("b",)))
    assert scores.prompt_ids == ("a", "c")
    assert scores.values.tolist() == [[0, 0, 3], [0, 3.5, 0]]


def test_scores_may_average_over_more_of_the_prompt() -> None:
    scores = prompt_scores(attribution(ENTRIES), last=torch.tensor([3, 5, 2]))
    assert scores.features == tuple(named((1, 5), (1, 8), (1, 9), (3, 8)))
    torch.testing.assert_close(scores.values[:, 3], torch.tensor([106 / 3, 106 / 5, 0]))


def test_cosine_is_signed(tmp_path: Path) -> None:
    direction = tiny.direction()
    sae = tiny.bank(tmp_path, layers=1).layer(0)
    expected = torch.cosine_similarity(sae.decoder, direction.unit[None], dim=1)
    sae.sae.W_dec.data[3] = -5 * direction.vector  # the largest in size, and the lowest of all
    sae.sae.W_dec.data[4] = 0.01 * direction.vector
    expected[3], expected[4] = -1, 1
    found = by_cosine(sae, direction, 10)
    assert [f.index for f in found.features] == expected.argsort(descending=True)[:10].tolist()
    torch.testing.assert_close(torch.tensor(found.scores), expected.sort(descending=True).values[:10])
    assert len(by_cosine(sae, direction, 1000)) == sae.size


def test_a_survey_finds_candidates_and_mean_activations(tmp_path: Path) -> None:
    model, saes, direction, prompts = tiny.chat_model(), tiny.bank(tmp_path), tiny.direction(), tiny.prompts()
    together = features.read_residuals(model, prompts, saes.layers, batch_size=4)
    singly = features.read_residuals(model, prompts, saes.layers, batch_size=1)
    assert torch.equal(together.prompt, singly.prompt)
    surveys = [features.survey(saes.layer(layer), together, direction, keep=12) for layer in saes.layers]
    again = [features.survey(saes.layer(layer), singly, direction, keep=12) for layer in saes.layers]
    for one, other in zip(surveys, again, strict=True):
        assert one.candidates == by_cosine(saes.layer(one.layer), direction, 12)
        torch.testing.assert_close(one.activation, other.activation, atol=1e-4, rtol=1e-4)
    assert {layer: len(found) for layer, found in features.candidates(surveys).items()} == dict.fromkeys(range(4), 10)
    best = features.cosine(surveys, 12)
    assert list(best.scores) == sorted((s for one in surveys for s in one.candidates.scores), reverse=True)[:12]


def test_all_features_score_as_the_sparse_attribution_says(tmp_path: Path) -> None:
    model, saes, direction, prompts = tiny.chat_model(), tiny.bank(tmp_path), tiny.direction(), tiny.prompts()
    traces = [
        trace(model, tokens, direction, layers=saes.layers, scheme=sound()) for _, tokens in model.batches(prompts, 4)
    ]
    sparse = prompt_scores(attribute(model, saes, prompts, direction, batch_size=4))
    dense = features.join([features.layer_scores(saes.layer(layer), traces, k=5) for layer in saes.layers])
    assert dense.prompt_ids == sparse.prompt_ids
    found = {feature: column for column, feature in enumerate(dense.features)}
    moving = [column for column in range(len(sparse.features)) if sparse.values[:, column].any()]
    columns = [found[sparse.features[column]] for column in moving]
    torch.testing.assert_close(dense.values[:, columns], sparse.values[:, moving], atol=1e-5, rtol=1e-4)
    assert choose(dense, 5).features.features == choose(sparse, 5).features.features


def test_only_the_best_features_are_kept_and_no_prompts_own_best_is_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(features, "KEPT", 2)
    model, sae, direction = tiny.chat_model(), tiny.bank(tmp_path).layer(2), tiny.direction()
    traces = [trace(model, t, direction, layers=[2], scheme=sound()) for _, t in model.batches(tiny.prompts(), 4)]
    kept = features.layer_scores(sae, traces, k=1)
    monkeypatch.setattr(features, "KEPT", sae.size)
    every = features.layer_scores(sae, traces, k=1)
    best = every.values.mean(0).topk(2).indices.tolist() + every.values.argmax(1).tolist()
    assert set(kept.features) == {every.features[column] for column in best}
    assert len(kept.features) < len(every.features)
    columns = [every.features.index(feature) for feature in kept.features]
    torch.testing.assert_close(kept.values, every.values[:, columns], atol=1e-6, rtol=1e-5)


@given(st.integers(0, 2**20), st.integers(1, 4), st.booleans())
def test_nothing_that_could_be_chosen_is_lost_when_layers_are_put_together(seed: int, k: int, signed: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    parts = [
        scored(named(*((layer, index) for index in range(12))), torch.randn(5, 12, generator=made))
        for layer in (0, 3, 4)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "KEPT", 4)
        found = reduce(partial(features.best, k=k), parts)
    every = features.join(parts)
    assert len(found.features) < len(every.features)
    assert choose(found, k, signed=signed).features.features == choose(every, k, signed=signed).features.features
    assert [one.features for one in features.per_prompt(found, k).values()] == [
        one.features for one in features.per_prompt(every, k).values()
    ]
    columns = [every.features.index(feature) for feature in found.features]
    assert torch.equal(found.values, every.values[:, columns])


def test_largest_activations_are_those_of_every_token(tmp_path: Path) -> None:
    model, saes, prompts = tiny.chat_model(), tiny.bank(tmp_path), tiny.prompts()
    residuals = features.read_residuals(model, prompts, [2], batch_size=4)
    best = features.highest(saes.layer(2), residuals)
    for row in range(len(prompts)):
        expected = saes.layer(2).encode(residuals.layers[2][residuals.prompt == row]).amax(0)
        torch.testing.assert_close(best[row], expected)
    part = saes.layer(2).slice([5, 40])
    torch.testing.assert_close(features.highest(part, residuals), best[:, [5, 40]], atol=1e-5, rtol=1e-4)


def test_the_difference_of_means_decides_and_is_resampled_on_both_sides() -> None:
    listed = named((0, 0), (0, 1), (0, 2))
    harmful = scored(listed, torch.tensor([[4.0, 1.0, 9.0]] * 9 + [[4.0, 31.0, 9.0]]))
    harmless = scored(listed, torch.tensor([[1.0, 0.0, 9.0]] * 6))
    made = features.choose_difference(harmful, harmless, 2)
    assert made.features.features == tuple(named((0, 1), (0, 0)))
    assert made.features.scores == (4.0, 3.0)
    assert made.chosen == (1.0, 1.0)  # 1 - 0 is positive in every prompt, and only two features differ at all
    assert made.stability == (1.0, 1.0)


def test_signed_sets_are_filled_with_negative_scores() -> None:
    scores = scored(named((0, 0), (0, 1), (0, 2)), torch.tensor([[1.0, -2.0, -3.0]]))
    assert list(choose(scores, 3, signed=True).features.features) == named((0, 0), (0, 1), (0, 2))
    assert len(choose(scores, 3).features) == 1


def surveyed(*activations: list[float]) -> list[LayerSurvey]:
    return [LayerSurvey(i, FeatureSet("cosine", (), ()), torch.tensor(row)) for i, row in enumerate(activations)]


TARGET = FeatureSet("x", tuple(named((1, 0), (0, 2), (1, 5))), (3.0, 2.0, 1.0))
SURVEYS = surveyed([0.5] * 30, [0.1 * (i + 1) for i in range(20)] + [0.0] * 10)


@given(st.integers(0, 1000))
def test_a_control_matches_layers_and_avoids_what_is_excluded(seed: int) -> None:
    excluded = set(named((1, 1), (0, 3)))
    drawn = random_like(TARGET, SURVEYS, excluded, seed=seed)
    assert drawn == random_like(TARGET, SURVEYS, excluded, seed=seed)
    assert [f.layer for f in drawn.features] == [f.layer for f in TARGET.features]
    assert not set(drawn.features) & (excluded | set(TARGET.features))
    activation = [float(SURVEYS[f.layer].activation[f.index]) for f in drawn.features]
    assert all(value > 0 for value in activation)
    assert drawn.scores == tuple(activation)
    # The ten nearest free ones of layer 1, feature 0 (0.1) are 2, 3, 4 and 6 to 12.
    assert drawn.features[0].index in {2, 3, 4, *range(6, 13)}


def test_controls_differ_between_seeds() -> None:
    assert len({random_like(TARGET, SURVEYS, set(), seed=seed).features for seed in range(10)}) > 5


def test_a_layer_with_nothing_left_to_draw_is_named() -> None:
    both = FeatureSet("x", tuple(named((0, 0), (0, 1))), (1.0, 1.0))
    with pytest.raises(ValueError, match="layer 0 has no active feature left"):
        random_like(both, surveyed([1.0, 1.0, 1.0, 0.0]), set(), seed=0)
    with pytest.raises(ValueError, match="layer 0 has no active feature left"):
        random_like(both.top(1), surveyed([1.0, 1.0]), set(named((0, 1))), seed=0)


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12), st.integers(0, 14), st.booleans()
)
def test_the_best_are_those_of_a_whole_ranking_ties_by_name(values: list[float], k: int, signed: bool) -> None:
    listed = named(*((0, index) for index in range(len(values))))
    found = choose(scored(listed, torch.tensor([values])), k, signed=signed).features
    pairs = [pair for pair in zip(listed, values, strict=True) if pair[1] > 0 or signed]
    expected = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]
    assert list(zip(found.features, found.scores, strict=True)) == expected


some = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8, unique=True)


def ranked(name: str, pairs: list[tuple[int, int]]) -> FeatureSet:
    return FeatureSet(name, tuple(named(*pairs)), tuple(float(-i) for i in range(len(pairs))))


@given(some, some)
def test_sets_behave_as_sets_and_keep_their_order(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = ranked("a", left), ranked("b", right)
    both, rest = a & b, a - b
    assert set(both.features) == set(a.features) & set(b.features) == set((b & a).features)
    assert set(rest.features) == set(a.features) - set(b.features)
    assert sorted(both.features + rest.features) == sorted(a.features)
    for part in (both, rest):
        assert [(f, s) for f, s in zip(a.features, a.scores, strict=True) if f in part.features] == list(
            zip(part.features, part.scores, strict=True)
        )
    assert (a & a).features == a.features
    assert len(a - a) == 0


@given(some, st.integers(0, 10))
def test_top_and_layers_keep_the_rank(pairs: list[tuple[int, int]], k: int) -> None:
    ranking = ranked("a", pairs)
    assert ranking.top(k).features == ranking.features[:k]
    layers = ranking.by_layer()
    assert list(layers) == sorted(layers)
    assert all(layers[layer] == [i for at, i in pairs if at == layer] for layer in layers)
    assert sum(map(len, layers.values())) == len(pairs)


def test_a_set_holds_each_feature_once_with_one_score() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        FeatureSet("x", tuple(named((0, 1), (0, 1))), (1.0, 0.5))
    with pytest.raises(ValueError, match="2 features but 1 scores"):
        FeatureSet("x", tuple(named((0, 1), (0, 2))), (1.0,))


def test_the_parent_is_what_the_set_was_chosen_from() -> None:
    listed, scores = named((0, 0), (0, 1)), torch.ones(2, 2)
    parent = choose(scored(listed, scores), 1).features.parent
    assert parent == choose(scored(listed, scores, "y"), 2).features.parent
    assert parent != choose(scored(listed, 2 * scores), 1).features.parent
    assert parent != choose(scored(listed[::-1], scores), 1).features.parent
    assert math.isfinite(int(parent, 16))
