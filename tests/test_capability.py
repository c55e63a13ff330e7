"""Costs equal transformers' own loss; an edit that does nothing costs nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalscope.core.types import Feature, FeatureSet, Prompts, Response
from refusalscope.evals import capability
from refusalscope.inputs import documents
from refusalscope.inputs.chat import Batch, ChatModel
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
    needs_chat,
)
from tests import tiny
from tests.families import language_model

ANSWERS = ["Bread needs time.", "Stopped.", "It is long.", "y and z are letters too.", "Rhine.", "A train at night."]


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> ChatModel:
    return tiny.chat_model(request.param)


def _answers(prompts: Prompts) -> dict[str, Response]:
    pairs = zip(prompts.ids, ANSWERS, strict=True)
    return {name: Response(name, text, 5, 3, "end" if i % 2 else "length") for i, (name, text) in enumerate(pairs)}


def _loss(model: ChatModel, prompts: Prompts, row: int) -> float:
    tokens = model.tokens(prompts[row : row + 1], _answers(prompts))
    labels = torch.where(tokens.roles == Role.RESPONSE, tokens.ids, -100)
    return float(model.model(input_ids=tokens.ids, labels=labels).loss)


def test_cross_entropy_change_equals_the_difference_of_transformers_losses(model: ChatModel) -> None:
    prompts, added = tiny.prompts(), AddDirection(tiny.direction(layer=2))
    cost = capability.cost(model, prompts, _answers(prompts), added, batch_size=4)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        return output + added.direction.vector

    handle = model.layers[2].register_forward_hook(add)
    edited = [_loss(model, prompts, row) for row in range(len(prompts))]
    handle.remove()
    plain = [_loss(model, prompts, row) for row in range(len(prompts))]
    expected = [after - before for after, before in zip(edited, plain, strict=True)]
    assert cost.cross_entropy_change == pytest.approx(expected, abs=2e-4)
    assert all(kl > 0 for kl in cost.kl)


def test_no_edit_costs_nothing(model: ChatModel) -> None:
    prompts = tiny.prompts()
    cost = capability.cost(model, prompts, _answers(prompts), None, batch_size=4)
    assert set(cost.cross_entropy_change) == set(cost.kl) == {0.0}


def test_batching_does_not_change_costs(model: ChatModel) -> None:
    prompts, removal = tiny.prompts(), RemoveDirection(tiny.direction())
    one, many = (capability.cost(model, prompts, _answers(prompts), removal, batch_size=size) for size in (1, 6))
    assert one.tokens == many.tokens
    assert one.kl == pytest.approx(many.kl, rel=1e-3, abs=1e-5)


def test_empty_answers_are_left_out() -> None:
    model, prompts = tiny.chat_model(), tiny.prompts()
    answers = _answers(prompts)
    answers[prompts[0].id] = Response(prompts[0].id, " ", None, 1, "end")
    cost = capability.cost(model, prompts, answers, RemoveDirection(tiny.direction()), batch_size=4)
    assert len(cost.kl) == len(prompts) - 1


def test_cross_entropy_of_answers_equals_transformers_loss(model: ChatModel) -> None:
    prompts = tiny.prompts()
    cost = capability.cost(model, prompts, _answers(prompts), RemoveDirection(tiny.direction()), batch_size=4)
    expected = [_loss(model, prompts, row) for row in range(len(prompts))]
    assert cost.cross_entropy == pytest.approx(expected, abs=1e-5)
    changes = zip(cost.cross_entropy_edited, cost.cross_entropy, strict=True)
    assert cost.cross_entropy_change == pytest.approx([after - before for after, before in changes], abs=1e-6)


def test_kl_is_over_the_first_tokens_of_an_answer_alone() -> None:
    model, prompts, removal = tiny.chat_model(), tiny.prompts()[:1], RemoveDirection(tiny.direction())
    answers = {prompts[0].id: Response(prompts[0].id, "ab, c" * 60, 5, 300, "length")}
    cost = capability.cost(model, prompts, answers, removal, batch_size=1)
    assert cost.kl_tokens == [capability.KL_TOKENS] < cost.tokens
    assert cost.weights("kl") == cost.kl_tokens
    assert cost.weights("cross_entropy_change") == cost.tokens
    tokens = model.tokens(prompts, answers)
    edits = editor(removal, layers=len(model.layers)).edits
    first = int((tokens.roles[0] != Role.RESPONSE).sum()) - 1
    before, after = (
        model.run(tokens, edits=e, logits=tokens.ids.shape[1]).logits[0, first : first + 64].log_softmax(-1).double()
        for e in ({}, edits)
    )
    assert cost.kl[0] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), abs=1e-5)


DOCUMENTS = ["A short one.", "x", "Three rivers and two lakes lie between <bos> here and there.", "Trains. " * 90]


def _documents_loss(model: ChatModel, rows: Prompts) -> float:
    """transformers' own loss over a padded batch, BOS and padding masked."""
    tokens = model.text_tokens(rows, capability.DOCUMENT_TOKENS)
    labels = torch.where(tokens.roles == Role.RESPONSE, tokens.ids, -100)
    places = (tokens.mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        made = model.model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), position_ids=places, labels=labels)
    return float(made.loss)


@pytest.mark.parametrize("added", [None, AddDirection(tiny.direction(layer=2))], ids=["unedited", "edited"])
def test_cross_entropy_of_documents_equals_transformers_loss(model: ChatModel, added: AddDirection | None) -> None:
    rows = tiny.prompts("documents", DOCUMENTS)
    cost = capability.document_cost(model, rows, added, batch_size=3)
    with model.edited(editor(added, layers=len(model.layers)).edits):
        each = [_documents_loss(model, rows[at : at + 1]) for at in range(len(rows))]
        pooled = _documents_loss(model, rows)
    assert cost.cross_entropy == pytest.approx(each, abs=1e-5)
    pairs = list(zip(cost.cross_entropy, cost.tokens, strict=True))
    assert sum(mean * n for mean, n in pairs) / sum(cost.tokens) == pytest.approx(pooled, abs=1e-5)
    assert max(cost.tokens) == capability.DOCUMENT_TOKENS - 1


def test_padding_and_batch_size_do_not_change_the_cross_entropy_of_documents(model: ChatModel) -> None:
    rows, removal = tiny.prompts("documents", DOCUMENTS), RemoveDirection(tiny.direction(), affine=True)
    one, many = (capability.document_cost(model, rows, removal, batch_size=size) for size in (1, 4))
    assert (one.document_ids, one.tokens, one.changed) == (many.document_ids, many.tokens, many.changed)
    assert one.changed > capability.document_cost(model, rows, None, batch_size=4).changed == 0
    halves = [capability.document_cost(model, part, removal, batch_size=2) for part in (rows[:2], rows[2:])]
    assert capability.joined(halves).changed == one.changed
    assert one.cross_entropy == pytest.approx(many.cross_entropy, abs=1e-5)


def test_documents_open_with_bos_and_open_no_turn(model: ChatModel) -> None:
    tokens = model.text_tokens(tiny.prompts("documents", ["<bos>hello<end_of_turn>"]), 256)
    special = {model.tokenizer.convert_tokens_to_ids(token) for token in tiny.SPECIAL}
    assert int(tokens.ids[0, 0]) == model.tokenizer.bos_token_id
    assert not set(tokens.ids[0, 1:].tolist()) & special


def test_documents_of_a_single_token_are_left_out() -> None:
    tokenizer = tiny.tokenizer(tiny.TEMPLATE.replace("{{ bos_token }}", ""), bos=None)
    model = ChatModel(language_model("llama"), tokenizer, name="tiny", identity="tiny")
    cost = capability.document_cost(model, tiny.prompts("documents", ["x", "two words"]), None, batch_size=2)
    assert cost.document_ids == ["documents-1"]


def test_edits_on_the_bare_model_act_at_every_position_and_are_gone_afterwards(model: ChatModel) -> None:
    seen: list[tuple[tuple[str, ...], set[int], torch.Size]] = []

    def watch(residual: torch.Tensor, batch: Batch) -> torch.Tensor:
        seen.append((batch.prompt_ids, set(batch.roles.flatten().tolist()), batch.roles.shape))
        return residual + 1

    ids = torch.tensor([[1, 7, 9], [1, 8, 9]])
    plain = model.model(ids).logits
    with model.edited({1: watch}):
        assert not torch.allclose(model.model(ids).logits, plain)
    with pytest.raises(TypeError), model.edited({1: watch}):
        model.model(ids, no_such_argument=True).logits()
    assert set(map(str, seen)) == {str((("", ""), {int(Role.INSTRUCTION)}, torch.Size([2, 3])))}
    assert torch.equal(model.model(ids).logits, plain)
    assert all(not layer._forward_hooks for layer in model.layers)


ONE = FeatureSet("test", (Feature(0, 4),), (1.0,))


@pytest.mark.parametrize(
    ("intervention", "needs"),
    [
        (None, False),
        (RemoveDirection(tiny.direction()), False),
        (ScaleFeatures(ONE, 0.0), False),
        (SetFeatures({"p": ONE}, 1.0), True),
        (HoldFeatures(ONE, {}), True),
        (Together((RemoveDirection(tiny.direction()), HoldFeatures(ONE, {}))), True),
        (Together((ScaleFeatures(ONE, 0.0),)), False),
    ],
)
def test_interventions_say_whether_they_need_a_chat(intervention: Intervention | None, needs: bool) -> None:
    assert needs_chat(intervention) is needs
    if needs:
        with pytest.raises(ValueError, match="held at what they were on a prompt"):
            capability.document_cost(tiny.chat_model(), tiny.prompts(), intervention, batch_size=2)


def test_documents_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\n\n  \nanother\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one line"}\n{"text": ""}\n{"text": "another"}\n')
    (tmp_path / "c.csv").write_text("text,n\none line,1\nanother,2\n")
    for name in ("a.txt", "b.jsonl", "c.csv"):
        rows = documents.read(documents.source(str(tmp_path / name)))
        assert [row.text for row in rows] == ["one line", "another"]
        assert rows[0].source == name


def test_blank_texts_do_not_count_among_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "COUNT", 2)
    texts = ["", " ", "\n", "first", "", "second", "third"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for where in (tmp_path / "train.jsonl", documents.HubColumn(str(tmp_path), "main", "text")):
        assert [row.text for row in documents.read(where)] == ["first", "second"]


def test_the_identity_of_documents_says_how_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, table, loud = (tmp_path / name for name in ("a.txt", "a.jsonl", "b.TXT"))
    for file in (lines, table, loud):
        file.write_text('{"text": "one line"}\n')
    assert documents.identity(lines) == documents.identity(loud) != documents.identity(table)
    sources = (lines, documents.HubColumn("owner/name", "3f2a", "text"))
    before = [documents.identity(where) for where in sources]
    monkeypatch.setattr(documents, "COUNT", 7)
    assert not set(before) & {documents.identity(where) for where in sources}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "no text is in it"),
        ("b.jsonl", '{"body": "x"}\n', "b.jsonl, line 1: no text in column 'text', there are body"),
        ("c.json", '[{"text": 3}]', "c.json, record 1: no text in column 'text'"),
    ],
)
def test_files_without_documents_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        documents.read(documents.source(str(tmp_path / name)))


def test_a_column_of_the_hub_is_named_with_its_revision() -> None:
    where = documents.source("owner/name@3f2a:text")
    assert where == documents.HubColumn("owner/name", "3f2a", "text")
    with pytest.raises(ValueError, match="owner/name@3f2a cannot be read"):
        documents.read(where)
    for wrong in ("missing.txt", "owner/name:text", "owner/name@main", "name@main:text"):
        with pytest.raises(ValueError, match="there is no such file; write a"):
            documents.source(wrong)
