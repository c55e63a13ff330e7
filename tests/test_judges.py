"""Judges that run elsewhere, under one interface: behind a server, on vLLM, and as a user's own function."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusalscope.core.types import Prompt, Response
from refusalscope.evals import checkpoints, judges, local, local_vllm, rules
from refusalscope.evals.judges import Exchange, Judge, Settings
from tests import hub, judge_models
from tests.judge_server import MODEL, about, judge_server, says

LLAMA, WILDGUARD, STRONGREJECT = "cais/HarmBench-Llama-2-13b-cls", "allenai/wildguard", "qylu4156/strongreject-15k-v1"


@pytest.fixture(scope="module", autouse=True)
def cache() -> Path:
    made = Path(os.environ["HF_HUB_CACHE"])
    judge_models.harmbench(hub.snapshot(made, LLAMA))
    judge_models.wildguard(hub.snapshot(made, WILDGUARD))
    judge_models.strongreject(hub.snapshot(made, STRONGREJECT), hub.snapshot(made, "google/gemma-2b"))
    return made


def exchanges(*answers: str) -> list[Exchange]:
    rows = enumerate(answers or judge_models.ANSWERS)
    return [Exchange(Prompt(f"p{i}", f"Ask {i}", "harmful"), Response(f"p{i}", text, 1, 3, "end")) for i, text in rows]


def one(name: str, **settings: Any) -> Judge:
    (judge,) = judges.opened([name], Settings(device="cpu", **settings))
    return judge


# Behind a server


def test_a_served_judge_is_shown_its_template_without_bos_and_left_cut():
    with judge_server(says("yes", 0.8)) as server:
        judge = one("harmbench", url=server.url, model=MODEL)
        verdicts = judge.score(exchanges("warm", "tea " * 2000))
        one("wildguard", url=server.url, model=MODEL).score(exchanges("warm"))
        shown = [about(body) for body in server.asked]
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0]
    assert [verdict.probability for verdict in verdicts] == pytest.approx([0.8, 0.8])
    assert shown[0] == judge_models.HARMBENCH.format(behavior="Ask 0", generation="warm")
    assert shown[1].lstrip().startswith("tea ")
    assert shown[1].endswith("{tea} Yes or no? [/INST]")
    assert shown[2].startswith("<|user|>\n[INST]")
    assert judge.about["engine"] == "server"
    assert judge.about["model"] == MODEL
    assert judge.about["cut_by"]["model"] == LLAMA
    assert server.url not in str(judge.about)


def test_a_served_guard_is_given_the_chat_and_its_blank_line_is_passed_over():
    with judge_server(says("unsafe", 0.9)) as server:
        (verdict,) = one("llama-guard", url=server.url, model=MODEL).score(exchanges("<|eot_id|>warm"))
        messages = server.asked[-1]["messages"]
    assert (verdict.score, verdict.reason) == (1.0, "unsafe")
    assert verdict.probability == pytest.approx(1.0)
    assert messages == [{"role": "user", "content": "Ask 0"}, {"role": "assistant", "content": "< |eot_id|>warm"}]


def test_a_served_judge_needs_no_checkpoint_where_it_has_a_template(tmp_path):
    (tmp_path / "t.txt").write_text("<s>{behavior}|{generation}")
    with judge_server(says("no")) as server:
        judge = one(
            "harmbench", url=server.url, model=MODEL, template=tmp_path / "t.txt", revision="a-commit-that-is-not-here"
        )
        (verdict,) = judge.score(exchanges("warm"))
        shown = about(server.asked[-1])
    assert verdict.score == 0.0
    assert shown == "Ask 0|warm"
    assert "cut_by" not in judge.about


def test_a_served_judge_says_what_it_misses(tmp_path):
    (tmp_path / "t.txt").write_text(judge_models.STRONGREJECT)
    nowhere = {"url": "http://localhost:1", "model": MODEL, "revision": "not-here"}
    with pytest.raises(ValueError, match="or give the template of harmbench by --judge-template"):
        one("harmbench", **nowhere)
    with pytest.raises(ValueError, match="strongreject is shown 512 tokens of an answer, counted by its tokenizer"):
        one("strongreject", **nowhere, template=tmp_path / "t.txt")


def test_the_rubric_goes_under_the_name_of_its_question():
    thinking = Exchange(Prompt("p9", "Ask", "harmful"), Response("p9", "", None, 9, "length", reasoning="Let me see"))
    with judge_server(says("yes")) as server:
        judge = one("rubric", url=server.url, model=MODEL, question="coherent")
        first, last = judge.score([thinking, *exchanges("warm")])
        asked = len(server.asked)
    assert (judge.name, judge.question) == ("rubric-coherent", "coherent")
    assert first.reason == rules.STILL_REASONING
    assert last.score == 1.0
    assert asked == 1
    assert len(judge.about["template"]) == 64


# On vLLM


class Engine:
    """What of vLLM's LLM our side calls, over transformers."""

    made: list[dict[str, Any]]
    asked: list[Any]

    def __init__(self, **settings: Any) -> None:
        self.made.append(settings)
        self.model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], revision=settings["revision"])

    @torch.no_grad()
    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.asked.append((params, lora_request))
        return [self._output(prompt["prompt_token_ids"], params) for prompt in prompts]

    def _output(self, ids: list[int], params: Any) -> Any:
        spread = self.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        top = spread.topk(min(params.logprobs, len(spread)))
        entries = {
            int(token): SimpleNamespace(logprob=float(value), rank=at, decoded_token="")
            for at, (value, token) in enumerate(zip(*top, strict=True), 1)
        }
        token = int(top.indices[0])
        text = {"yes": "Yes", "no": "No"}.get("yes" if token in self.yes else "no")
        return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[token], logprobs=[entries])])

    yes: list[int]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, cache: Path) -> type[Engine]:
    """A stand-in that takes vLLM's calls: vLLM itself needs a GPU, and no test here runs it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hub.snapshot(cache, LLAMA))
    Engine.made, Engine.asked = [], []
    Engine.yes = [tokenizer.convert_tokens_to_ids("Yes")]
    module, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = Engine, SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = lambda *given: given  # type: ignore[attr-defined]
    for made in (module, lora, request):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return Engine


def test_vllm_is_called_as_its_documentation_says_and_read_as_transformers_is(vllm, cache, monkeypatch):
    """Against a stand-in with vLLM's call signatures: that vLLM answers so is not tested here."""
    # All of a tiny vocabulary: what is not among the top tokens counts as nothing.
    monkeypatch.setattr(local_vllm, "TOP", 1000)
    judge = one("harmbench", engine="vllm")
    verdicts = judge.score(exchanges())
    expected = one("harmbench").score(exchanges())
    assert [verdict.score for verdict in verdicts] == [verdict.score for verdict in expected]
    for ours, theirs in zip(verdicts, expected, strict=True):
        assert ours.probability == pytest.approx(theirs.probability, abs=1e-5)
    (settings,) = vllm.made
    assert settings["model"] == LLAMA
    assert settings["revision"] == hub.snapshot(cache, LLAMA).name
    assert settings["max_model_len"] == 512
    assert settings["enable_lora"] is False
    params, lora = vllm.asked[0]
    assert (params.temperature, params.max_tokens, lora) == (0, 1, None)
    assert judge.about["engine"] == "vllm"


def test_vllm_is_given_an_adapter_and_its_base(vllm, cache, tmp_path):
    """Against a stand-in with vLLM's call signatures: that vLLM answers so is not tested here."""
    (tmp_path / "t.txt").write_text(judge_models.STRONGREJECT)
    one("strongreject", engine="vllm", template=tmp_path / "t.txt").score(exchanges("warm"))
    (settings,) = vllm.made
    assert (settings["model"], settings["enable_lora"]) == ("google/gemma-2b", True)
    assert settings["tokenizer"] == str(hub.snapshot(cache, STRONGREJECT))
    assert vllm.asked[0][0].logprobs == 20
    assert vllm.asked[0][1] == (STRONGREJECT, 1, str(hub.snapshot(cache, STRONGREJECT)))


@pytest.mark.parametrize("kind", [local.Local, local_vllm.Vllm])
def test_a_schema_is_not_ignored_in_this_process(vllm, kind):
    engine = kind(checkpoints.find(LLAMA), **({"device": "cpu", "batch_size": 1} if kind is local.Local else {}))
    with pytest.raises(ValueError, match="follows no schema"):
        engine.converse([[{"role": "user", "content": "tea"}]], choices=(), tokens=1, schema={"type": "object"})


def test_vllm_loses_no_exchange_to_another(vllm, cache, monkeypatch):
    """Against a stand-in with vLLM's call signatures: that vLLM answers so is not tested here."""
    engine = local_vllm.Vllm(checkpoints.find(LLAMA))
    encode = engine.reader.encode

    def fails(text: str, *, new: int) -> list[int]:
        if "b" in text:
            raise RuntimeError("a cable\nis loose")
        return encode(text, new=new)

    monkeypatch.setattr(engine.reader, "encode", fails)
    replies = engine.complete([*"abc"], choices=("yes", "no"), tokens=1)
    assert [reply.fault for reply in replies] == ["", "failed: a cable", ""]


# A user's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Judge]]:
    """Opens a judge from the source of its module, which lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def opened(body: str, name: str = "own_judge:tea", **settings: Any) -> Judge:
        (tmp_path / "own_judge.py").write_text(body)
        return one(name, **settings)

    yield opened
    sys.modules.pop("own_judge", None)


VALUES = "def tea(prompts, answers):\n    return [True, False, None, 0.25, 1, float('nan'), 2, 'yes'][: len(answers)]\n"


def test_a_users_function_is_a_judge(own):
    judge = own(VALUES)
    verdicts = judge.score(exchanges())
    assert [verdict.score for verdict in verdicts[:2]] == [1.0, 0.0]
    assert [(verdict.score, verdict.probability) for verdict in verdicts[3:5]] == [(0.0, 0.25), (1.0, 1.0)]
    unscored = [verdict for verdict in verdicts if math.isnan(verdict.score)]
    assert [verdict.prompt_id for verdict in unscored] == ["p2", "p5", "p6", "p7"]
    assert all(verdict.reason for verdict in unscored)
    assert (judge.name, judge.question) == ("own_judge.tea", "harmful")
    assert judge.about["function"] == "own_judge:tea"
    assert len(judge.about["source"]) == 64


def test_a_users_function_says_what_it_is_asked(own):
    assert own(f"{VALUES}tea.question = 'coherent'\n").question == "coherent"


def test_settings_say_what_a_users_function_is_asked(own):
    judge = own(VALUES, question="refused")
    assert judge.question == judge.about["question"] == "refused"


def test_a_users_function_sees_prompts_and_answers_and_may_use_numpy(own):
    told = "numpy.array([p + a for p, a in zip(prompts, answers)]) == 'Ask 0warm'"
    body = f"import numpy\ndef tea(prompts, answers):\n    return {told}\n"
    assert [verdict.score for verdict in own(body).score(exchanges("warm", "cold"))] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    raise KeyError('tea\\nis out')", "KeyError: 'tea\\nis out'"),
        ("    raise RuntimeError('tea\\nis out')", "RuntimeError: tea"),
        ("    return [True]", "1 verdicts for 2 answers"),
        (
            "    import numpy\n    return numpy.zeros((2, 2))",
            "ValueError: can only convert an array of size 1 to a Python scalar",
        ),
        ("    return None", "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_a_users_function_does_wrong_leaves_its_batch_unscored(own, body, reason):
    verdicts = own(f"def tea(prompts, answers):\n{body}\n").score(exchanges("warm", "cold"))
    assert [verdict.reason for verdict in verdicts] == [reason] * 2
    assert all(math.isnan(verdict.score) and not verdict.final for verdict in verdicts)


@pytest.mark.parametrize(
    ("body", "name", "told"),
    [
        (VALUES, "own_judge:te", r"own_judge has no function 'te'. did you mean tea\?"),
        (VALUES, "no_such_module:tea", "cannot import no_such_module: ModuleNotFoundError"),
        ("raise RuntimeError('no tea')", "own_judge:tea", "cannot import own_judge: RuntimeError: no tea"),
        (f"{VALUES}tea.question = 'tasty'", "own_judge:tea", "its question 'tasty' is none of refused, harmful, coher"),
    ],
)
def test_a_function_that_cannot_be_had_is_said_in_a_line(own, body, name, told):
    with pytest.raises(ValueError, match=told) as raised:
        own(body, name)
    assert "\n" not in str(raised.value)


def names(opened: Sequence[Judge]) -> list[str]:
    return [judge.name for judge in opened]


def test_judges_come_in_the_order_they_were_named(own):
    (Path.cwd() / "own_judge.py").write_text(VALUES)
    wanted = ["wildguard-refused", "own_judge:tea", "wildguard"]
    assert names([*judges.opened(wanted, Settings(device="cpu"))]) == [
        "wildguard-refused",
        "own_judge.tea",
        "wildguard",
    ]
