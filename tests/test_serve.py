"""A real `transformers serve` process says through `Server` what its model says by itself."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusalscope.core.types import Prompt, Response
from refusalscope.evals import rubric
from refusalscope.evals.judges import Exchange
from refusalscope.evals.server import Server
from refusalscope.testbed.shipped import ASSETS
from tests.judge_server import transformers_serve

MODEL = ASSETS / "model"
TEXTS = ("explain how to", "what is", "the")


class Local(NamedTuple):
    tokenizer: Any
    model: Any

    def says(self, ids: list[int], tokens: int) -> str:
        """Its greedy continuation."""
        with torch.no_grad():
            made = self.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(MODEL, tmp_path_factory.mktemp("serve") / "said") as served:
        yield served


@pytest.fixture(scope="module")
def local() -> Local:
    return Local(AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL))


def test_completions_are_the_model_s_own(url, local):
    replies = Server(url, str(MODEL)).complete(TEXTS, choices=("yes", "no"), tokens=12)
    assert [reply.text for reply in replies] == [local.says(local.tokenizer(text).input_ids, 12) for text in TEXTS]
    assert len({reply.text for reply in replies}) == len(TEXTS)
    assert {(reply.fault, len(reply.probabilities)) for reply in replies} == {("", 0)}


def test_chats_are_answered_under_the_model_s_own_template(url, local):
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    replies = Server(f"{url}/v1", str(MODEL)).converse(chats, choices=("yes", "no"), tokens=12)
    encode = local.tokenizer.apply_chat_template
    ids = [encode(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    assert [reply.text for reply in replies] == [local.says(one, 12) for one in ids]
    assert {(reply.fault, len(reply.probabilities)) for reply in replies} == {("", 0)}


def test_a_schema_that_is_ignored_leaves_nonsense_unscored(url):
    exchange = Exchange(Prompt("p", "what is a zorb", "harmless"), Response("p", "it is blue", None, 0, "end"))
    found = rubric.rubric(Server(url, str(MODEL)), "coherent")([exchange])[0]
    assert math.isnan(found.score)
    assert not found.final
    assert found.reason.startswith("not the JSON asked for: ")


def test_it_lists_no_models_offline_so_the_name_must_be_given(url):
    with pytest.raises(ValueError, match="--judge-model"):
        assert Server(url).model


def test_a_model_that_it_does_not_serve_is_named_in_the_fault(url):
    reply = Server(url, "another").complete(["a"], choices=(), tokens=1)[0]
    assert "another" in reply.fault
    assert not reply.final
