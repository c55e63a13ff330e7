"""A guard comes back as it was, refuses what it does not belong to, and watches an answer as it would read it whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from refusalscope.cli import app
from refusalscope.core.types import Prompt, Prompts, Response, SaeSlice
from refusalscope.guard import Guard, watch
from refusalscope.guard.content import Content, ReadFeature, tensors_of
from refusalscope.inputs import presets
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import ChatStyle
from refusalscope.mechanism.activations import POOLINGS, Pooling
from refusalscope.testbed import grammar
from tests import tiny

TEXTS = [example.text for name in ("harmful", "harmless") for example in grammar.examples(name, split="test", count=6)]


@pytest.fixture(scope="module")
def model() -> ChatModel:
    found = presets.checkpoint("testbed")
    return ChatModel.load(found.model, name="testbed", identity=found.weights, device="cpu")


@pytest.fixture(scope="module")
def slices() -> dict[int, SaeSlice]:
    """The five features of two layers that are most active on a harmful prompt."""
    target = presets.resolve("testbed")
    bank, loaded = SaeBank.from_source(target.saes), ChatModel.load(target.model, name="t", identity="t", device="cpu")
    rows = Prompts("rows", tuple(Prompt(str(at), text, "harmful") for at, text in enumerate(TEXTS[:6])))
    found = loaded.run(loaded.tokens(rows), keep=(5, 6)).residuals
    most = {at: bank.layer(at).encode(found[at][:, -1]).mean(0).topk(5).indices.tolist() for at in (5, 6)}
    return bank.slices(most)


def content(slices: Mapping[int, SaeSlice], **more: Any) -> Content:
    features = [(layer, index) for layer, part in slices.items() for index in part.features.tolist()]
    made: dict[str, Any] = {
        "model": "testbed",
        "source": "testbed",
        "revision": None,
        "weights": presets.checkpoint("testbed").weights,
        "identity": "a run",
        "system": None,
        "thinking": "off",
        "template": None,
        "method": "features",
        "labels": "intent",
        "pooling": "last",
        "layer": None,
        "features": tuple(
            ReadFeature(layer=layer, index=index, weight=0.1 * (at + 1) * (-1) ** at, mean=1.0, label=f"no. {at}")
            for at, (layer, index) in enumerate(features)
        ),
        "normalisations": {layer: part.normalisation for layer, part in slices.items()},
        "active": {},
        "bias": 0.3,
        "temperature": 1.7,
        "threshold": 0.2,
        "false_positive_rate": 0.05,
        "negatives": 200,
    }
    return Content(**{**made, **more})


@pytest.fixture
def guard(model: ChatModel, slices: dict[int, SaeSlice]) -> Guard:
    return Guard(content(slices), tensors_of(slices), model)


def test_a_score_is_the_probes_and_reasons_are_what_moved_it(
    guard: Guard, model: ChatModel, slices: dict[int, SaeSlice]
) -> None:
    found = guard.score(TEXTS, batch_size=5)
    for text, one in zip(TEXTS, found, strict=True):
        tokens = model.tokens(Prompts("one", (Prompt("0", text, "harmful"),)))
        residuals = model.run(tokens, keep=slices).residuals
        active = torch.cat([part.encode(residuals[layer][0, -1]) for layer, part in slices.items()])
        weights = torch.tensor([feature.weight for feature in guard.content.features])
        logit = float((active @ weights + 0.3) / 1.7)
        assert one.probability == pytest.approx(1 / (1 + torch.tensor(-logit).exp().item()), abs=1e-5)
        assert one.flagged == (logit > 0.2)
        moved = ((active - 1.0) * weights / 1.7).tolist()
        largest = sorted(moved, key=abs, reverse=True)[:5]
        assert [reason.contribution for reason in one.reasons] == pytest.approx(largest, abs=1e-5)
        assert one.reasons[0].label == f"no. {moved.index(min(moved, key=lambda value: abs(value - largest[0])))}"


def test_a_saved_guard_reloads_to_the_same_scores_and_is_small(guard: Guard, model: ChatModel, tmp_path: Path) -> None:
    guard.save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 12_000
    again = Guard.load(tmp_path, model=model)
    assert again.score(TEXTS) == guard.score(TEXTS)
    assert Guard.load(tmp_path).score(TEXTS[:2]) == guard.score(TEXTS[:2])
    assert Guard.load(tmp_path, model="testbed").score(TEXTS[:2]) == guard.score(TEXTS[:2])
    assert list(again.stream(iter(TEXTS), batch_size=5)) == guard.score(TEXTS, batch_size=5)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def refused(folder: Path, **more: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is tested
        Guard.load(folder, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_model_is_refused(guard: Guard, model: ChatModel, tmp_path: Path) -> None:
    guard.save(tmp_path / "guard")
    assert "belongs to testbed" in refused(tmp_path / "guard", model=tiny.chat_model())
    folder = tmp_path / "other"
    tiny.chat_model().model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert "not to other" in refused(tmp_path / "guard", model=folder)
    styled = ChatModel(
        model.model, model.tokenizer, name="testbed", identity=model.identity, style=ChatStyle(system="Be brief.")
    )
    assert "another system prompt" in refused(tmp_path / "guard", model=styled)


@pytest.mark.parametrize("name", ["guard.json", "guard.safetensors"])
def test_what_was_altered_is_refused(name: str, guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path)
    written = (tmp_path / name).read_bytes()
    at = written.index(b'"threshold": 0.2') + 15 if name == "guard.json" else len(written) - 3
    (tmp_path / name).write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
    assert "altered or damaged" in refused(tmp_path)
    (tmp_path / name).write_bytes(written[: len(written) // 2])
    assert "damaged" in refused(tmp_path)
    (tmp_path / name).unlink()
    assert f"{name} is missing" in refused(tmp_path)


def test_a_newer_format_and_what_is_no_guard_are_refused(guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path)
    described = json.loads((tmp_path / "guard.json").read_text())
    (tmp_path / "guard.json").write_text(json.dumps({**described, "format": 2}))
    assert "format 2, and this refusalscope reads 1: upgrade" in refused(tmp_path)
    (tmp_path / "guard.json").write_text("[]")
    assert "no description of a guard" in refused(tmp_path)
    with pytest.raises(ValueError, match="holds no guard: `refusalscope probe` makes one"):
        Guard.from_run(tmp_path)


def test_a_guard_of_a_model_from_a_folder_asks_for_it(slices: dict[int, SaeSlice], tmp_path: Path) -> None:
    Guard(content(slices, source=None), tensors_of(slices)).save(tmp_path)
    with pytest.raises(ValueError, match=r"a model from a folder: name the folder \(--model\)"):
        Guard.load(tmp_path).score(["Hello there"])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        Guard.load(tmp_path, model="testbed").score(["Hello there", " "])


def dense(model: ChatModel) -> Guard:
    generator = torch.Generator().manual_seed(0)
    tensors = {"weights": torch.randn(model.width, generator=generator) / 9, "means": torch.zeros(model.width)}
    return Guard(content({}, layer=6, method="dense residual"), tensors, model)


def so_far(guard: Guard, prompt: Prompt, response: Response, count: int) -> float:
    """The score of a prompt with the first `count` tokens of its answer, read at once."""
    ids, roles = guard.model.template.encode(prompt.text)
    answer = guard.model.template.encode_response(response.text, None)[:count]
    assert len(answer) == count
    tokens = guard.model._padded((prompt.id,), [([*ids, *answer], [*roles, *[4] * count])], "off")
    return guard.score_tokens(tokens)[0].probability


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["features", "dense"])
def test_watching_equals_reading_the_text_so_far(
    pooling: Pooling, kind: str, model: ChatModel, slices: dict[int, SaeSlice]
) -> None:
    made = Guard(content(slices), tensors_of(slices), model) if kind == "features" else dense(model)
    guard = Guard(made.content.model_copy(update={"pooling": pooling}), made._tensors, model)
    rows = Prompts("rows", tuple(Prompt(str(at), text, "harmful") for at, text in enumerate(TEXTS[4:8])))
    watched = watch(guard, rows, max_new_tokens=24, batch_size=4)
    plain = model.generate(model.answer_tokens(rows), max_new_tokens=24)
    for row, one, unwatched in zip(rows, watched, plain, strict=True):
        assert one.response == unwatched
        # Nothing is read after the last token: it is never fed back.
        assert len(one.probabilities) == one.response.tokens
        for count in range(0, one.response.tokens - 1, 5):
            whole = so_far(guard, row, one.response, count)
            assert one.probabilities[count] == pytest.approx(whole, abs=2e-5)
        bound = float(torch.sigmoid(torch.tensor(guard.content.threshold)))
        assert one.flagged == (max(one.probabilities) > bound)
    assert [one.probabilities[0] for one in watched] == pytest.approx(
        [one.probability for one in guard.score(rows)], abs=1e-6
    )


def test_whoever_watches_may_stop_the_answer(guard: Guard) -> None:
    class Stop(Exception):
        pass

    steps: list[Mapping[str, float]] = []

    def on_score(found: Mapping[str, float]) -> None:
        steps.append(found)
        if len(steps) == 3:
            raise Stop

    before = guard.score(TEXTS[:2])
    with pytest.raises(Stop):
        watch(guard, TEXTS[:2], max_new_tokens=20, on_score=on_score)
    assert [set(step) for step in steps] == [{"0", "1"}] * 3
    assert guard.score(TEXTS[:2]) == before


def invoke(*words: str, stdin: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["guard", *words], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_lines_of_json_go_in_and_come_out_scored(guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path / "guard")
    rows = [{"id": 7, "text": TEXTS[0]}, TEXTS[1], {"prompt": TEXTS[2]}, {"instruction": TEXTS[3]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    code, out, _ = invoke("score", str(tmp_path / "guard"), str(file), "--batch-size", "3")
    assert code == 0
    scored = [json.loads(line) for line in out.splitlines()]
    assert [row["probability"] for row in scored] == [one.probability for one in guard.score(TEXTS[:4], batch_size=3)]
    assert (scored[0]["id"], scored[1]["text"], scored[2]["prompt"]) == (7, TEXTS[1], TEXTS[2])
    assert set(scored[0]["reasons"][0]) == {"feature", "label", "contribution"}
    code, piped, _ = invoke("score", str(tmp_path / "guard"), "-", "--batch-size", "3", stdin=file.read_text())
    assert (code, piped) == (0, out)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ('{"question": "x"}', "line 2: no prompt"),
        ('{"text": " "}', "line 2: no prompt"),
        (f'{{"text": "{"why " * 600}"}}', "line 2 is longer than the"),
    ],
)
def test_a_line_that_is_no_prompt_ends_with_its_number(line: str, says: str, guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path / "guard")
    given = json.dumps(TEXTS[0]) + "\n" + line + "\n"
    code, out, err = invoke("score", str(tmp_path / "guard"), "-", "--batch-size", "1", stdin=given)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert len(out.splitlines()) == 1


def test_commands_without_a_guard_end_with_one_line(tmp_path: Path) -> None:
    for words in (("score", str(tmp_path), "-"), ("save", str(tmp_path), str(tmp_path / "out"))):
        code, _, err = invoke(*words, stdin="")
        assert (code, len(err.splitlines())) == (2, 1)
    assert not (tmp_path / "out").exists()
