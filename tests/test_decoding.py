"""The laws of decoding: an answer does not depend on the prompts beside it, on who left the batch, or on who joined."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalscope.core.types import Feature, FeatureSet, Prompts, Response, SaeSlice
from refusalscope.inputs import cache, replay
from refusalscope.inputs.chat import Batch, ChatModel, Edits
from refusalscope.mechanism.interventions import (
    Editor,
    Held,
    HoldFeatures,
    Intervention,
    RemoveDirection,
    ScaleFeatures,
    Together,
    editor,
    needed_features,
    record,
)
from tests import tiny

LIMIT = 20
PROMPTS = tiny.prompts(texts=[*tiny.TEXTS, "Why do trains leave? " * 6, "a b c", "Kill it now!", "who?"])
KINDS = ("direction", "features", "per prompt", "held")


def often_ending(family: str) -> ChatModel:
    """A model with so many end tokens that its answers are of all lengths."""
    model = tiny.chat_model(family)
    model.end_tokens.extend(range(4, 30))
    return model


@pytest.fixture(params=["gemma2", "llama"])
def model(request: pytest.FixtureRequest) -> ChatModel:
    return often_ending(request.param)


def answered(
    model: ChatModel, edits: Edits | None = None, *, size: int, prompts: Prompts = PROMPTS
) -> Sequence[Response]:
    return model.generate(model.tokens(prompts), edits=edits, max_new_tokens=LIMIT, batch_size=size)


def alone(model: ChatModel, edits: Edits | None = None) -> list[Response]:
    return [answered(model, edits, size=1, prompts=PROMPTS[row : row + 1])[0] for row in range(len(PROMPTS))]


@pytest.mark.parametrize("family", ["gemma2", "llama", "phi3", "neox", "gpt-oss", "qwen3-moe", "qwen3.5"])
def test_answers_are_those_of_transformers_one_at_a_time(family: str) -> None:
    model = often_ending(family)
    found = answered(model, size=3)
    for row, ours in enumerate(found):
        tokens = model.tokens(PROMPTS[row : row + 1])
        theirs = model.model.generate(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=model.end_tokens,
        )
        assert ours == model._response(PROMPTS.ids[row], theirs[0, tokens.ids.shape[1] :].tolist(), "off")
    assert {answer.finish for answer in found} == ({"length"} if family == "qwen3-moe" else {"end", "length"})


@pytest.mark.parametrize("kind", KINDS)
def test_edited_answers_do_not_depend_on_their_batch(model: ChatModel, tmp_path: Path, kind: str) -> None:
    slices = tiny.bank(tmp_path).slices({layer: [3, 7, 11, 20] for layer in (0, 1, 2)})
    wanted = intervention(model, slices, kind)
    single, together = (edited(wanted, slices) for _ in range(2))
    expected = alone(model, single.edits)
    assert answered(model, together.edits, size=3) == tuple(expected)
    assert together.changed == single.changed > 0
    assert expected != alone(model)
    assert answered(model, together.edits, size=4) == answered(model, together.edits, size=4) == tuple(expected)


def intervention(model: ChatModel, slices: dict[int, SaeSlice], kind: str) -> Intervention:
    features = [Feature(layer, index) for layer in (0, 1, 2) for index in (3, 7, 11, 20)]
    sets = {name: FeatureSet("own", tuple(features[row : row + 3]), (0.0,) * 3) for row, name in enumerate(PROMPTS.ids)}
    whole = FeatureSet("all", tuple(features), (0.0,) * len(features))
    match kind:
        case "direction":
            return RemoveDirection(tiny.direction(), affine=True)
        case "features":
            return ScaleFeatures(whole, -2.0)
        case "per prompt":
            return Together((ScaleFeatures(sets, -3.0), RemoveDirection(tiny.direction())))
        case _:
            held = record(model, PROMPTS, slices, batch_size=3)
            # Other values than there are, so that something changes.
            moved = {
                name: {layer: Held(part.values + 1, 2 * part.mean) for layer, part in own.items()}
                for name, own in held.items()
            }
            return HoldFeatures(whole, moved)


def edited(wanted: Intervention, slices: dict[int, SaeSlice]) -> Editor:
    return editor(wanted, layers=4, slices={layer: slices[layer] for layer in needed_features(wanted)})


def test_prompts_are_seen_once_and_then_a_token_at_a_time(model: ChatModel) -> None:
    seen: list[Batch] = []

    def watch(residual: torch.Tensor, batch: Batch) -> torch.Tensor:
        assert residual.shape[:2] == batch.roles.shape
        assert len(batch.prompt_ids) == len(residual) <= 3
        seen.append(batch)
        return residual

    found = answered(model, {1: watch}, size=3)
    tokens = model.tokens(PROMPTS)
    for row, answer in enumerate(found):
        name = PROMPTS.ids[row]
        own = [batch.roles[batch.prompt_ids.index(name)] for batch in seen if name in batch.prompt_ids]
        roles = torch.cat(own)
        expected = tokens.roles[row][tokens.mask[row]].tolist() + [4] * (answer.tokens - 1)
        assert roles[roles != 0].tolist() == expected


def test_the_cache_holds_no_more_than_a_batch_of_the_longest(model: ChatModel) -> None:
    prompts = Prompts("many", tuple(tiny.prompts(f"many-{n}")[n % len(tiny.TEXTS)] for n in range(40)))
    tokens = model.tokens(prompts)
    most = tokens.ids.shape[1] + LIMIT
    held: list[tuple[int, int, int]] = []

    def look(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        for layer in given["past_key_values"].layers:
            assert given["attention_mask"].shape[1] <= most
            if layer.keys is not None:
                held.append((*layer._buffers[0].shape[::2], given["attention_mask"].shape[1]))

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    answers = model.generate(tokens, max_new_tokens=LIMIT, batch_size=4)
    handle.remove()
    assert sum(answer.tokens for answer in answers) > 4 * most  # without dropping columns there would be more
    assert max(rows for rows, _, _ in held) <= 4
    assert max(columns for _, columns, _ in held) <= most + cache.ROOM


def test_a_row_that_broke_leaves_nothing_to_the_next(model: ChatModel) -> None:
    broken = PROMPTS.ids[::2]

    def spoil(residual: torch.Tensor, batch: Batch) -> torch.Tensor:
        rows = torch.tensor([name in broken for name in batch.prompt_ids])
        return torch.where(rows[:, None, None], torch.nan, residual)

    found = answered(model, {0: spoil}, size=3)
    assert found[1::2] == tuple(alone(model)[1::2])


def test_an_error_in_an_edit_leaves_nothing_behind(model: ChatModel) -> None:
    hooks = [len(layer._forward_hooks) for layer in model.layers]
    calls = []

    def fail(residual: torch.Tensor, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("on purpose")
        return residual

    with pytest.raises(RuntimeError, match="on purpose"):
        answered(model, {1: fail}, size=3)
    assert [len(layer._forward_hooks) for layer in model.layers] == hooks


def test_nothing_asked_is_nothing_answered() -> None:
    model = tiny.chat_model()
    assert answered(model, size=3, prompts=PROMPTS[:0]) == ()


@pytest.mark.parametrize(
    ("family", "window", "kind"),
    [
        *(("gemma2", 4096, kind) for kind in (None, *KINDS)),
        *(("llama", None, kind) for kind in (None, *KINDS)),
        # Not all columns lie in a short window, and linear attention keeps no keys.
        ("gemma2", 16, "per prompt"),
        ("qwen3.5", None, None),
    ],
)
def test_tokens_on_the_same_tensors_are_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, window: int | None, kind: str | None
) -> None:
    """As on a card, but that a call is made and not replayed: its tensors must stay where they are."""
    model = often_ending(family)
    if window is not None:
        model.model.config.sliding_window = window
    slices = tiny.bank(tmp_path).slices({layer: [3, 7, 11, 20] for layer in (0, 1, 2)})
    wanted = None if kind is None else intervention(model, slices, kind)
    plain, again = (edited(wanted, slices) if wanted else Editor({}) for _ in range(2))
    expected = answered(model, plain.edits, size=3)
    calls = recorded(monkeypatch, model)
    tokens = model.tokens(PROMPTS)
    found = model.generate(tokens, edits=again.edits, max_new_tokens=LIMIT, batch_size=3, recordable=True)
    assert found == tuple(expected)
    assert again.changed == plain.changed
    assert bool(calls) == (family != "qwen3.5" and window != 16)
    assert not calls or max(calls) > 3
    assert (kind is None) == (again.changed == 0)
    calls.clear()
    assert model.generate(tokens, edits=plain.edits or {0: lambda residual, _: residual}, max_new_tokens=3)
    assert not calls  # edits that may look at values on the host


def recorded(monkeypatch: pytest.MonkeyPatch, model: ChatModel) -> list[int]:
    """Make calls as on a card, and count them, by recording; every tensor of the cache must stay in its place."""
    calls: list[int] = []

    def record(call: Callable[[], None]) -> Callable[[], None]:
        calls.append(0)

        def again() -> None:
            calls[-1] += 1
            before = places[-1:] if calls[-1] > 1 else []
            places.clear()
            call()
            assert not before or before == places[-1:]

        return again

    places: list[tuple[int, ...]] = []

    def look(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        places.append(
            tuple(part.data_ptr() for layer in given["past_key_values"].layers for part in (layer.keys, layer.values))
            if all(getattr(layer, "keys", None) is not None for layer in given["past_key_values"].layers)
            else ()
        )

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    monkeypatch.setattr(replay, "recorder", lambda _: record)
    return calls
