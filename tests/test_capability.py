"""Costs equal transformers' own loss; an edit that does nothing costs nothing; SAE health equals its definition."""

from pathlib import Path
from typing import Any

import pytest
import torch

from refusalscope.core.types import Prompts, Response
from refusalscope.evals import capability
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import AddDirection, RemoveDirection
from tests import tiny

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


def test_health_equals_its_definition(model: ChatModel, tmp_path: Path) -> None:
    prompts, saes = tiny.prompts(), tiny.bank(tmp_path)
    answers = _answers(prompts)
    measured = capability.health(model, saes, prompts, answers, batch_size=6)[1]
    tokens = model.tokens(prompts, answers)
    spliced = tokens.mask & (tokens.mask.cumsum(1) > 1)
    residual = model.run(tokens, keep=[1]).residuals[1]
    sae = saes.layer(1)
    kept = residual[spliced]
    explained = 1 - (kept - sae.reconstruct(kept)).square().sum() / (kept - kept.mean(0)).square().sum()
    weights = torch.tensor(measured.variance)
    total = float((torch.tensor(measured.variance_explained) * weights).sum() / weights.sum())
    assert total == pytest.approx(float(explained), abs=1e-4)

    def cross_entropy(replacement: torch.Tensor | None) -> float:
        edits = {} if replacement is None else {1: lambda z, _b: torch.where(spliced[..., None], replacement, z)}
        logits = model.run(tokens, edits=edits, logits=tokens.ids.shape[1]).logits[:, :-1].log_softmax(-1)
        picked = logits.gather(-1, tokens.ids[:, 1:, None])[..., 0]
        return float(-picked[tokens.roles[:, 1:] == Role.RESPONSE].sum())

    clean, zero = cross_entropy(None), cross_entropy(torch.zeros_like(residual))
    recovered = (zero - cross_entropy(sae.reconstruct(residual))) / (zero - clean)
    gaps = torch.tensor(measured.cross_entropy_gap)
    found = float((torch.tensor(measured.cross_entropy_recovered) * gaps).sum() / gaps.sum())
    assert found == pytest.approx(recovered, rel=1e-3, abs=1e-3)
    assert sum(measured.tokens) == int(spliced.sum())
