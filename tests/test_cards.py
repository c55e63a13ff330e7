"""The template of a judge, read off its model card: right shapes are found, what is broken is said in a line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusalscope.evals import cards

FIELDS = ("behavior", "generation")
TEXT = "Asked: {behavior}\nSaid: {generation}\nIn a {{cup}}? [/INST]"
ASSIGNED = (
    f'PROMPT = {{"description": "a tea judge", "prompt": \'\'\'{TEXT}\'\'\', "other": "{{context}} {{behavior}}"}}'
)


def block(code: str, info: str = "[python]", fence: str = "```") -> str:
    return f"# Tea\nwords\n\n{fence}{info}\n{code}\n{fence}\n\nmore words\n"


def read(tmp_path: Path, card: str) -> cards.Template:
    (tmp_path / "README.md").write_text(card, "utf-8")
    return cards.from_card(tmp_path / "README.md", FIELDS, name="a/judge")


RIGHT = {
    "as published": block(ASSIGNED),
    "python": block(ASSIGNED, "python"),
    "py": block(ASSIGNED, " py "),
    "spelled out": block(ASSIGNED, "{.python}"),
    "no language": block(ASSIGNED, ""),
    "tildes": block(ASSIGNED, "python", "~~~"),
    "longer fence": block(ASSIGNED, "python", "````"),
    "windows": block(ASSIGNED).replace("\n", "\r\n"),
    "plain string": block(f'x = """{TEXT}"""'),
    "pieces": block('x = ("Asked: {behavior}\\n" "Said: {generation}\\n"\n"In a {{cup}}? [/INST]")'),
    "twice the same": block(ASSIGNED) + block(f"again = '''{TEXT}'''"),
    "among other blocks": block("pip install tea", "bash") + block("def (", "python") + block(ASSIGNED),
    "beside its use": block(ASSIGNED) + block("print(PROMPT['prompt'].format(behavior='b', generation='g'))", "python"),
    "beside an f-string": block(f"{ASSIGNED}\ny = f'{{behavior}} and {{generation}}'"),
    "beside odd escapes": block(f"{ASSIGNED}\ny = '\\d'"),
}


@pytest.mark.parametrize("card", RIGHT.values(), ids=RIGHT)
def test_the_one_text_with_the_fields_is_found(tmp_path, card):
    template = read(tmp_path, card)
    filled = template.fill({"behavior": "B", "generation": "G"})
    assert template.text == TEXT
    assert filled == TEXT.format(behavior="B", generation="G")


BROKEN = {
    "nothing": ("", "has no fenced block of Python"),
    "no fence": (ASSIGNED, "has no fenced block of Python"),
    "open fence": (f"```python\n{ASSIGNED}\n", "has no fenced block of Python"),
    "another language": (block(ASSIGNED, "json"), "has no fenced block of Python"),
    "no Python": (block("PROMPT = {'a':", "python"), "has no fenced block of Python"),
    "null byte": (block("x = '\0'", "python"), "has no fenced block of Python"),
    "deep": (block("(" * 500, "python"), "has no fenced block of Python"),
    "no fields": (block("x = 'tea'"), "has no text with the fields {behavior} and {generation}:"),
    "one field": (block("x = '{behavior}'"), "has no text with the fields"),
    "stray field": (block("x = '{behavior} {generation} {tea}'"), "alone: there is also {tea}"),
    "format": (block("x = '{behavior!r} {generation:>9}'"), "has no text with the fields"),
    "lone brace": (block("x = '{behavior} {generation} }'"), "has no text with the fields"),
    "f-string": (block("x = f'{behavior} {generation}'"), "has no text with the fields"),
    "two": (block(f"{ASSIGNED}\ny = 'tea {{behavior}} {{generation}}'"), "has 2 different texts with the fields"),
}


@pytest.mark.parametrize(("card", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_card_is_said_to_be_in_one_line(tmp_path, card, told):
    with pytest.raises(ValueError, match="a/judge") as raised:
        read(tmp_path, card)
    message = str(raised.value)
    assert told in message
    assert "--judge-template" in message
    assert "\n" not in message


def test_a_judge_without_a_card_asks_for_a_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"a/judge has no model card .*\{behavior\} and \{generation\} by --judge-templ"
    ):
        cards.from_card(tmp_path / "README.md", FIELDS, name="a/judge")


def test_code_in_a_card_is_not_run(tmp_path):
    made = tmp_path / "made"
    code = f"open({str(made)!r}, 'w')\nPROMPT = '{{behavior}} {{generation}}'.replace('a', 'b')"
    assert read(tmp_path, block(code)).text == "{behavior} {generation}"
    assert not made.exists()


@given(st.text(), st.text())
def test_fields_are_filled_once_whatever_is_put_in(behavior, generation):
    template = cards.from_text(TEXT, FIELDS, name="text")
    filled = template.fill({"behavior": behavior, "generation": generation})
    assert filled == f"Asked: {behavior}\nSaid: {generation}\nIn a {{cup}}? [/INST]"


def test_what_is_put_in_is_not_read_again():
    template = cards.from_text("{behavior}|{generation}", FIELDS, name="text")
    assert (
        template.fill({"behavior": "{generation}", "generation": "{behavior} {0} {"}) == "{generation}|{behavior} {0} {"
    )


def test_a_file_holds_the_template_less_its_last_newline(tmp_path):
    (tmp_path / "t.txt").write_text(f"{TEXT}\n")
    assert cards.from_file(tmp_path / "t.txt", FIELDS) == cards.from_text(TEXT, FIELDS, name="")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{behavior}", r"its fields are \{behavior\}, not \{behavior\} and \{generation\}"),
        ("tea", "its fields are none, not"),
        ("{behavior} {generation} {tea}", r"\{behavior\} and \{generation\} and \{tea\}, not"),
        ("{behavior} {generation} {", "a brace stands alone"),
        (None, "cannot read --judge-template"),
    ],
)
def test_a_file_that_is_no_template_is_said_to_be_in_one_line(tmp_path, text, told):
    if text is not None:
        (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=told) as raised:
        cards.from_file(tmp_path / "t.txt", FIELDS)
    assert "\n" not in str(raised.value)
