"""What every kind of chat template becomes: roles, where answers stop, and reasoning kept apart from them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from refusalscope.core.types import Prompt, Prompts, Response, Responses
from refusalscope.evals import capability, rules
from refusalscope.inputs.chat import ChatModel, Tokens
from refusalscope.inputs.template import ChatStyle, ChatTemplate, Role, Thinking
from refusalscope.studies import benchmark
from tests import families, tiny
from tests.chat_templates import FAMILIES, PYTHIA, QUESTION, SYSTEM, Family

PROMPTS = Prompts("asked", (Prompt("p", QUESTION, "harmful"),))
REASONING = {
    "qwen3": ("<think>\nThe rivers: two", " or three?\n</think>\n\n"),
    "r1": ("Where do rivers", " run?\n</think>\n\n"),
    "harmony": (
        "<|channel|>analysis<|message|>Rivers",
        " run<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "gemma4": ("<|channel>thought\nThe rivers", " run.\n<channel|>"),
}
THOUGHTS = {
    "qwen3": "\nThe rivers: two or three?\n",
    "r1": "Where do rivers run?\n",
    "harmony": "Rivers run",
    "gemma4": "\nThe rivers run.\n",
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def texts(template: ChatTemplate, **mode: Any) -> dict[Role, str]:
    """What QUESTION becomes, by role."""
    ids, roles = template.encode(QUESTION, **mode)
    return {
        role: template.tokenizer.decode([token for token, r in zip(ids, roles, strict=True) if r == role])
        for role in (Role.HEADER, Role.INSTRUCTION, Role.CLOSING)
    }


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def says(
    name: str, said: str, *, thinking: Thinking = "off", asked: Thinking | None = None, ends: Sequence[str] = ()
) -> ChatModel:
    """A model of a family's template that writes `said` after QUESTION, special tokens in it as such."""
    family = FAMILIES[name]
    tokenizer, style = family.tokenizer(), ChatStyle(thinking=thinking)
    prompt = ChatTemplate(tokenizer, name, style).encode(QUESTION, thinking=asked or thinking).ids
    stops = tokenizer.convert_tokens_to_ids(list(ends or (family.eos,)))
    model = families.scripted(ids(tokenizer, said), after=len(prompt), ends=stops)
    return ChatModel(model, tokenizer, name=name, identity=name, style=style)


def answer(model: ChatModel, *, limit: int = 60) -> Response:
    return model.generate(model.answer_tokens(PROMPTS), max_new_tokens=limit)[0]


def written(tokens: Tokens) -> list[int]:
    return tokens.ids[0][tokens.roles[0] == Role.RESPONSE].tolist()


def test_roles_are_read_off_the_template(family: Family) -> None:
    made = ChatTemplate(family.tokenizer(), "made")
    assert texts(made) == {Role.HEADER: family.header, Role.INSTRUCTION: QUESTION, Role.CLOSING: family.closing}


def test_a_system_prompt_is_part_of_the_header(family: Family) -> None:
    made = ChatTemplate(family.tokenizer(), "made", ChatStyle(system=SYSTEM))
    assert texts(made) == {
        Role.HEADER: family.system_header,
        Role.INSTRUCTION: QUESTION,
        Role.CLOSING: family.closing,
    }
    assert made.about.get("system") == ("folded into the user turn" if family.folded else None)


def test_days_are_fixed_and_said_to_be(family: Family) -> None:
    made = ChatTemplate(family.tokenizer(), "made")
    assert made.about.get("date") == ("26 Jul 2024" if family.dated else None)


def test_a_system_prompt_cannot_open_a_turn(family: Family) -> None:
    with pytest.raises(ValueError, match=r"the system prompt holds '.+', a special token of made: leave it out"):
        ChatTemplate(family.tokenizer(), "made", ChatStyle(system=f"Be brief.{family.eos}"))


def test_an_empty_system_prompt_takes_the_place_of_the_templates_own() -> None:
    made = ChatTemplate(FAMILIES["qwen2.5"].tokenizer(), "made", ChatStyle(system=""))
    assert texts(made)[Role.HEADER] == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    gemma = ChatTemplate(FAMILIES["gemma"].tokenizer(), "made", ChatStyle(system=""))
    assert texts(gemma)[Role.HEADER] == FAMILIES["gemma"].header


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_at_the_templates_own_end_of_turn(name: str) -> None:
    family = FAMILIES[name]
    model = says(name, f"Elbe, Oder.{family.end} and on")
    made = answer(model)
    assert (made.text, made.finish) == ("Elbe, Oder.", "end")
    assert made.first_token == ids(model.tokenizer, "Elbe, Oder.")[0]


@pytest.mark.parametrize("end", ["<eos>", "<end_of_turn>"])
def test_generation_stops_at_each_of_two_ends_and_renders_the_templates_own(end: str) -> None:
    model = says("gemma", f"Elbe.{end} and on", ends=("<eos>", "<end_of_turn>"))
    made = answer(model)
    assert (made.text, made.finish) == ("Elbe.", "end")
    rendered = written(model.tokens(PROMPTS, {"p": made}))
    assert model.tokenizer.decode(rendered) == "Elbe.<end_of_turn>"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_finished_answer_is_closed_as_the_template_closes_it(name: str) -> None:
    model = says(name, "x")
    finished = Response("p", "Elbe.", 5, 3, "end")
    cut_off = replace(finished, finish="length")
    assert model.tokenizer.decode(written(model.tokens(PROMPTS, {"p": finished}))) == f"Elbe.{FAMILIES[name].end}"
    assert model.tokenizer.decode(written(model.tokens(PROMPTS, {"p": cut_off}))) == "Elbe."


def test_without_reasoning_answers_are_asked_for_as_prompts_are(family: Family) -> None:
    model = ChatModel(families.language_model("llama"), family.tokenizer(), name="made", identity="made")
    assert model.answer_tokens(PROMPTS).ids.tolist() == model.tokens(PROMPTS).ids.tolist()
    assert model.template.about.get("thinking") == ("off" if family.template in _reasoning() else None)


def _reasoning() -> list[str | None]:
    return [FAMILIES[name].template for name in REASONING]


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_is_left_to_the_model_where_it_is_wanted(name: str) -> None:
    made = ChatTemplate(FAMILIES[name].tokenizer(), name, ChatStyle(thinking="on"))
    left = {
        "gemma4": "<|turn>model\n",
        "qwen3": "<|im_start|>assistant\n",
        "r1": "<|Assistant|><think>\n",
        "harmony": "<|start|>assistant",
    }
    assert texts(made, thinking="on")[Role.CLOSING].endswith(left[name])
    assert texts(made)[Role.CLOSING] == FAMILIES[name].closing
    assert made.about["thinking"] == "on"


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_is_kept_apart_and_rendered_again(name: str) -> None:
    end = FAMILIES[name].end
    said = "".join(REASONING[name]) + f"Elbe, Oder.{end}"
    model = says(name, said, thinking="on")
    made = answer(model)
    assert (made.reasoning, made.text, made.finish) == (THOUGHTS[name], "Elbe, Oder.", "end")
    assert made.first_token == ids(model.tokenizer, "Elbe")[0]
    assert made.tokens == len(ids(model.tokenizer, said))
    again = model.answer_tokens(PROMPTS, {"p": made})
    assert written(again) == ids(model.tokenizer, said)
    assert model.tokenizer.decode(written(model.tokens(PROMPTS, {"p": made}))) == f"Elbe, Oder.{end}"


@pytest.mark.parametrize("name", REASONING)
def test_an_answer_cut_off_keeps_its_reasoning(name: str) -> None:
    said = "".join(REASONING[name]) + "Elbe"
    model = says(name, said, thinking="on")
    made = answer(model, limit=len(ids(model.tokenizer, said)))
    assert (made.reasoning, made.text, made.finish) == (THOUGHTS[name], "Elbe", "length")
    assert written(model.answer_tokens(PROMPTS, {"p": made})) == ids(model.tokenizer, said)


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_that_never_ends_is_no_answer_and_unscored(name: str) -> None:
    said = REASONING[name][0]
    model = says(name, said + " and on", thinking="on")
    made = answer(model, limit=len(ids(model.tokenizer, said)))
    assert (made.text, made.first_token, made.finish) == ("", None, "length")
    assert made.reasoning != ""
    assert THOUGHTS[name].startswith(made.reasoning)
    assert written(model.answer_tokens(PROMPTS, {"p": made})) == ids(model.tokenizer, said)
    (row,) = rules.judge(PROMPTS, Responses("asked", "base", "", (made,)), refusal_tokens=[5], cut_off_counts=True).rows
    assert all(math.isnan(score) for score in row.scores.values())
    assert set(row.reasons.values()) == {"no answer: still reasoning at the limit"}
    assert set(row.scores) == {*rules.OUTCOMES, "coherent", "refused_first_token", "reasoning_refused"}


def test_costs_are_read_on_what_was_generated_reasoning_included() -> None:
    said = "".join(REASONING["r1"]) + "Elbe.<|finish|>"
    model = says("r1", said, thinking="on")
    answered = benchmark.answer(model, PROMPTS, benchmark.BASE, slices={}, batch_size=1, max_new_tokens=60)
    (row,) = answered.rows
    assert (row.reasoning, row.text, row.tokens) == (THOUGHTS["r1"], "Elbe.", len(ids(model.tokenizer, said)))
    cost = capability.cost(model, PROMPTS, {"p": row}, None, batch_size=1)
    assert (cost.tokens, cost.kl) == ([row.tokens], [0.0])


def test_a_reasoning_model_may_answer_at_once() -> None:
    model = says("qwen3", "Elbe.<|im_end|>", thinking="on")
    made = answer(model)
    assert (made.reasoning, made.text) == ("", "Elbe.")
    assert model.tokenizer.decode(written(model.answer_tokens(PROMPTS, {"p": made}))) == "Elbe.<|im_end|>"
    final = says("harmony", "<|channel|>final<|message|>Elbe.<|return|>", thinking="on")
    made = answer(final)
    assert (made.reasoning, made.text) == ("", "Elbe.")
    assert final.tokenizer.decode(written(final.answer_tokens(PROMPTS, {"p": made}))) == (
        "<|channel|>final<|message|>Elbe.<|return|>"
    )


def test_prompts_read_for_their_first_token_skip_reasoning_also_when_it_is_on() -> None:
    model = says("r1", "Elbe.<|finish|>", thinking="on", asked="off")
    (made,) = model.generate(model.tokens(PROMPTS), max_new_tokens=9)
    assert (made.reasoning, made.text) == ("", "Elbe.")
    assert made.first_token == ids(model.tokenizer, "Elbe.")[0]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(REASONING)))
def test_reasoning_is_not_to_be_had_of_a_template_that_knows_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template of {name} knows no reasoning: turn thinking off"):
        ChatTemplate(FAMILIES[name].tokenizer(), name, ChatStyle(thinking="on"))


def test_a_switch_may_act_on_the_header_alone() -> None:
    switched = "{{ '<think> if needed' if enable_thinking else 'at once' }} " + PYTHIA
    made = ChatTemplate(tiny.tokenizer(switched), "switched", ChatStyle(thinking="on"))
    assert texts(made)[Role.HEADER] == "at once Asked: "
    assert texts(made, thinking="on")[Role.HEADER] == "<think> if needed Asked: "
    said = ids(made.tokenizer, "<think>Rivers?</think>Elbe.")
    reasoning, answer = made.split(said)
    assert (reasoning, made.tokenizer.decode(answer)) == ("Rivers?", "Elbe.")
    before = made.encode_reasoning(Response("p", "Elbe.", answer[0], len(said), "length", reasoning=reasoning))
    assert made.tokenizer.decode(before + answer) == "<think>Rivers?</think>Elbe."


def test_a_template_that_only_takes_reasoning_out_of_past_answers_knows_none() -> None:
    family = FAMILIES["qwen3"]
    instruct = (family.template or "").replace("enable_thinking is defined and enable_thinking is false", "false")
    made = ChatTemplate(family._replace(template=instruct).tokenizer(), "instruct")
    assert texts(made)[Role.CLOSING] == "<|im_end|>\n<|im_start|>assistant\n"
    assert made.about == {}


def test_a_base_model_takes_a_template_of_the_users() -> None:
    tokenizer = tiny.tokenizer(None, special=("<pad>", "<|endoftext|>"), bos="<|endoftext|>", eos="<|endoftext|>")
    made = ChatTemplate(tokenizer, "pythia", ChatStyle(template=PYTHIA, system=SYSTEM))
    assert texts(made) == {
        Role.HEADER: f"Told: {SYSTEM}\nAsked: ",
        Role.INSTRUCTION: QUESTION,
        Role.CLOSING: "\nTold:",
    }
    assert made.about["template"] == "given, in place of the tokenizer's own"
    assert made.end_of_turn is None


def test_a_token_that_is_bos_and_end_of_turn_may_end_turns() -> None:
    family = FAMILIES["olmo2"]
    shown = "{{ bos_token }}example{{ eos_token }}{{ messages[0].content }}\n"
    tokenizer = family._replace(template=shown).tokenizer()
    assert ChatTemplate(tokenizer, "two").encode("hello").ids.count(tokenizer.bos_token_id) == 2
    doubled = family._replace(template="{{ bos_token }}{{ bos_token }}{{ messages[0].content }}\n").tokenizer()
    with pytest.raises(ValueError, match="gives 2 BOS tokens, not one"):
        ChatTemplate(doubled, "two").encode("hello")


def test_a_template_that_cannot_be_rendered_is_named() -> None:
    with pytest.raises(ValueError, match="the chat template of bad cannot be rendered: "):
        ChatTemplate(tiny.tokenizer(), "bad", ChatStyle(template="{% for %}"))
