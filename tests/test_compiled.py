"""A model that `torch.compile` has been at is edited like any other, whenever that was and however it was done.

Compiled code keeps the hooks that it was compiled with, so an edit that came later would be left out without a word.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from refusalscope.inputs.chat import Batch, ChatModel, Edits, Tokens
from refusalscope.mechanism import attribution
from tests import tiny
from tests.families import language_model


def whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def only_forward(model: Any, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def layer_by_layer(model: Any, backend: Any) -> Any:
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend)
    return model


WAYS = (whole, in_place, only_forward, layer_by_layer)
Way = Callable[[Any, Any], Any]


class Graphs:
    """A backend that runs what it is given as it is, and counts how often."""

    compiled = 0
    runs = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.compiled += 1

        def run(*given: Any) -> Any:
            self.runs += 1
            return graph.forward(*given)

        return run


@pytest.fixture
def graphs() -> Graphs:
    torch.compiler.reset()
    return Graphs()


def wrapped(model: Any) -> ChatModel:
    return ChatModel(model, tiny.tokenizer(), name="tiny", identity="tiny")


def scaled(factor: float) -> Callable[[Tensor, Batch], Tensor]:
    return lambda residual, batch: factor * residual + 0.1


SMALL, LARGE = {1: scaled(0.5)}, {1: scaled(3.0), 3: scaled(-1.0)}


def ran(model: Any, tokens: Tokens) -> Any:
    """The model after the same call that `ChatModel.run` makes."""
    mask = tokens.mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(input_ids=tokens.ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    return model


def check(model: ChatModel, plain: ChatModel, tokens: Tokens) -> None:
    """Logits, residuals, answers and gradients are those of the plain model, edit after edit."""

    def shown(shown_by: ChatModel, edits: Edits | None) -> list[Tensor]:
        run = shown_by.run(tokens, edits=edits, keep=[0, 3], logits=1)
        return [run.logits, *run.residuals.values()]

    for edits in (None, SMALL, LARGE, None, SMALL):
        assert all(map(torch.equal, shown(model, edits), shown(plain, edits)))
        ours, theirs = (each.generate(tokens, edits=edits, max_new_tokens=2) for each in (model, plain))
        assert ours == theirs
    assert not torch.allclose(shown(model, SMALL)[0], shown(model, LARGE)[0], atol=0.1)
    ours, theirs = (
        attribution.trace(each, tokens, tiny.direction(), layers=range(4), scheme=attribution.gradient())
        for each in (model, plain)
    )
    assert torch.equal(ours.gradient, theirs.gradient)
    assert ours.gradient.abs().sum() > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_was_compiled_is_edited(way: Way, graphs: Graphs) -> None:
    plain = tiny.chat_model()
    tokens = plain.tokens(tiny.prompts())
    check(wrapped(way(language_model("llama"), graphs)), plain, tokens)
    later = tiny.chat_model()
    later.model = way(later.model, graphs)
    check(later, plain, tokens)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_has_run_its_compiled_code_is_edited(way: Way, graphs: Graphs) -> None:
    plain = tiny.chat_model()
    tokens = plain.tokens(tiny.prompts())
    model = ran(way(language_model("llama"), graphs), tokens)
    assert graphs.runs > 0, "nothing was compiled, so nothing is tested"
    check(wrapped(model), plain, tokens)


@pytest.mark.parametrize("way", [whole, in_place])
def test_who_calls_the_model_himself_has_the_edit_inside_and_compiled_code_outside(way: Way, graphs: Graphs) -> None:
    plain = tiny.chat_model()
    tokens = plain.tokens(tiny.prompts())
    model = ran(way(language_model("llama"), graphs), tokens)
    before = graphs.runs
    with torch.no_grad(), wrapped(model).edited(SMALL), plain.edited(SMALL):
        assert torch.equal(model(input_ids=tokens.ids).logits, plain.model(input_ids=tokens.ids).logits)
    assert graphs.runs == before
    ran(model, tokens)
    assert graphs.runs > before


def test_an_edit_that_fails_gives_compiled_code_back(graphs: Graphs) -> None:
    chat = wrapped(in_place(language_model("llama"), graphs))
    tokens = chat.tokens(tiny.prompts())

    def fail(_residual: Tensor, _batch: Batch) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        chat.run(tokens, edits={1: fail})
    ran(chat.model, tokens)
    assert graphs.runs > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_model_compiled_to_machine_code_is_edited(graphs: Graphs) -> None:
    plain = tiny.chat_model()
    tokens = plain.tokens(tiny.prompts())
    check(wrapped(ran(in_place(language_model("llama"), "inductor"), tokens)), plain, tokens)
