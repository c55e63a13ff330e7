"""Doctor passes the testbed on every line; every fault is told on its own line, and on no other.

Faults are real: templates, SAE folders and checkpoints that are made here. What rests on a fault is not checked.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from refusalscope import cli
from refusalscope.core.types import Feature, FeatureSet
from refusalscope.inputs import presets
from refusalscope.pipeline import doctor, measure, pace, patient, workload
from refusalscope.pipeline.doctor import BOS, DIRECTION, IDENTITY, KEPT, MEMORY, ROLES, SAES, TEMPLATE, TOKENS
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.patient import FAILED, NOT_CHECKED, OK, WARNING, Patient, Verdict
from refusalscope.pipeline.select import Chosen
from refusalscope.testbed import shipped
from tests import tiny

LINES = list(doctor.CHECKS)
QUICK: dict[str, Any] = {"batch_size": 8, "best_layer": 6, "studies": ("none",)}
"""Fewer answers to measure a pace on, one layer to validate."""
OWN = (shipped.ASSETS / "model" / "chat_template.jinja").read_text("utf-8")
LABELLED = "instruction,label\n" + "".join(
    f"{label} question number {i},{label}\n" for label in ("harmful", "harmless") for i in range(48)
)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pace that is measured once and on few tokens: nothing here looks at how good it is."""
    monkeypatch.setattr(pace, "STEPS", (4,))
    monkeypatch.setattr(pace, "TRIES", 1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAEs of another width, and of random weights."""
    root = tmp_path_factory.mktemp("doctor")
    tiny.save_saes(root / "foreign", layers=8, width=64, size=96)
    tiny.save_saes(root / "untrained", layers=8, width=128, size=256)
    return root


def seen(**options: Any) -> dict[str, Verdict]:
    return {verdict.line: verdict for verdict in doctor.examine(Options(**{**QUICK, **options}))}


def words(found: dict[str, Verdict]) -> dict[str, str]:
    return {line: verdict.word for line, verdict in found.items()}


def all_ok(**but: str) -> dict[str, str]:
    """What every line says: ok, but for those named by their place in the module."""
    return dict.fromkeys(LINES, OK) | {getattr(doctor, name): word for name, word in but.items()}


def told(*said: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["doctor", *said], catch_exceptions=False)
    return done.exit_code, done.output


def test_the_testbed_passes_every_line_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = told("testbed", "--batch-size", "16")
    assert code == 0, text
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    assert [re.split(r"  +|: ", line)[:2] for line in heads] == [[OK, line] for line in LINES]
    assert "<start_of_turn>user" in text
    assert len(re.findall(r"^ +layer +\d  variance explained  0\.\d{3}", text, re.MULTILINE)) == 8
    assert re.search(r"expected time: about \d+ min for the whole `run`", text)
    assert list(tmp_path.iterdir()) == []


EACH = "{{ bos_token }}{% for m in messages %}"
TEMPLATES = {
    "shows nothing": EACH + "hello{% endfor %}",
    "shows it twice": EACH + "{{ m.content }} {{ m.content }}{% endfor %}",
    "cannot be rendered": EACH,
    "changes with the text": EACH + "{% if ' ' in m.content %}!{% endif %}{{ m.content }}{% endfor %}",
    "alters the text": EACH + "{{ m.content | replace(' ', '_') }}{% endfor %}",
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_broken_template(fault: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATES[fault])
    found = seen(chat_template=file)
    rest = dict.fromkeys(("BOS", "ROLES", "IDENTITY", "TOKENS", "KEPT", "DIRECTION", "TIME"), NOT_CHECKED)
    # A template whose frame is whole can be planned with, whatever it makes of the text inside.
    planned = OK if "text" in fault else NOT_CHECKED
    assert words(found) == all_ok(MEMORY=planned, TEMPLATE=FAILED, **rest)
    assert "the chat template of testbed" in found[TEMPLATE].detail
    assert (found[MEMORY].detail == f"cannot be planned: {found[TEMPLATE].detail}") == (planned == NOT_CHECKED)
    assert all(found[line].detail.endswith(TEMPLATE) for line in LINES[2:] if found[line].word == NOT_CHECKED)


def test_two_bos_tokens(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}" + OWN)
    rest = dict.fromkeys(("MEMORY", "ROLES", "IDENTITY", "TOKENS", "KEPT", "DIRECTION", "TIME"), NOT_CHECKED)
    found = seen(chat_template=file)
    assert words(found) == all_ok(BOS=FAILED, **rest)
    assert "gives 2 BOS tokens, not one" in found[BOS].detail
    code, text = told("testbed", "--chat-template", str(file))
    assert code == 1
    assert f"\n{NOT_CHECKED} {ROLES}: rests on what failed above: {BOS}\n" in text


def test_saes_of_another_width(places: Path) -> None:
    found = seen(saes=f"{places}/foreign/layer_{{layer}}")
    assert words(found) == all_ok(MEMORY=NOT_CHECKED, SAES=FAILED, KEPT=NOT_CHECKED)
    assert "the SAE of layer 0 reads residuals of width 64, but testbed has width 128" in found[SAES].detail
    assert len(found[SAES].more) == 7
    assert found[IDENTITY].detail.endswith("SAE edits not checked at layers 0-7")


def test_untrained_saes(places: Path) -> None:
    pattern = f"{places}/untrained/layer_{{layer}}"
    found = seen(saes=pattern)
    assert words(found) == all_ok(KEPT=FAILED)
    assert "SAEs of layers 0-7 explain nothing, in chats or outside" in found[KEPT].detail
    assert len(found[KEPT].more) == 8


def test_saes_trained_outside_chats_are_warned_of() -> None:
    pattern = f"{shipped.ASSETS}/saes-base/layer_{{layer}}"
    code, text = told("testbed", "--saes", pattern, "--batch-size", "8", "--best-layer", "6", "--study", "none")
    assert code == 0, text
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    found = {line: word for word, line in (re.split(r"  +|: ", head)[:2] for head in heads)}
    assert found == all_ok(KEPT=WARNING)
    assert "below 0.7 at layers 0-7; outside any chat they keep enough" in text


def test_saes_that_name_the_base_model(tmp_path: Path) -> None:
    shutil.copytree(shipped.ASSETS / "model", tmp_path / "testbed-it")
    (tmp_path / "mine.csv").write_text(LABELLED)
    options = Options(
        model=str(tmp_path / "testbed-it"),
        saes=f"{shipped.ASSETS}/saes/layer_{{layer}}",
        prompts=tmp_path / "mine.csv",
        columns={"label": "label"},
        layers=(0, 3),
        batch_size=8,
    )
    found = Patient(Job(options, doctor.NOWHERE))
    assert doctor.check_saes(found).word == OK
    verdict = doctor.check_reconstruction(found)
    assert verdict.word == WARNING
    assert verdict.detail.endswith("; trained on refusalscope/testbed, by what they say of themselves")
    assert Patient(Job(Options(), doctor.NOWHERE), found.opened).trained_elsewhere() == []


@pytest.mark.parametrize(
    ("layer", "hook", "fault"),
    [
        (1, "blocks.1.hook_resid_pre", "reads 'blocks.1.hook_resid_pre'"),
        (1, "blocks.0.hook_resid_post", "reads 'blocks.0.hook_resid_post', another layer"),
        (9, None, "there is an SAE for layer 9, but testbed has layers 0 to 7"),
    ],
)
def test_saes_of_another_site(layer: int, hook: str | None, fault: str, places: Path, tmp_path: Path) -> None:
    for name, source in (("layer_0", "layer_0"), (f"layer_{layer}", "layer_1")):
        shutil.copytree(places / "untrained" / source, tmp_path / name)
    if hook is not None:
        config = json.loads((file := tmp_path / f"layer_{layer}" / "cfg.json").read_text())
        config["metadata"]["hook_name"] = hook
        file.write_text(json.dumps(config))
    job = Job(Options(saes=f"{tmp_path}/layer_{{layer}}"), doctor.NOWHERE)
    verdict = doctor.check_saes(Patient(job))
    assert (verdict.word, verdict.line) == (FAILED, SAES)
    assert fault in verdict.detail
    assert "(1 of 2 layers at fault)" in verdict.detail


def test_random_weights_need_the_overrides(tmp_path: Path) -> None:
    tiny.language_model("llama").save_pretrained(tmp_path / "random")
    tiny.tokenizer().save_pretrained(tmp_path / "random")
    tiny.save_saes(tmp_path / "saes", layers=4)
    (tmp_path / "mine.csv").write_text(LABELLED)
    options: dict[str, Any] = {
        "model": str(tmp_path / "random"),
        "saes": f"{tmp_path}/saes/layer_{{layer}}",
        "prompts": tmp_path / "mine.csv",
        "columns": {"label": "label"},
        "max_new_tokens": 8,
        "best_layer": None,
    }
    found = seen(**options)
    assert words(found) == all_ok(TOKENS=FAILED, KEPT=FAILED, DIRECTION=NOT_CHECKED)
    flags = ("--refusal-token", "--keep-unrefused", "--best-layer")
    assert all(flag in found[TOKENS].detail for flag in flags)
    found = seen(**options | {"refusal_token": ("K",), "keep_unrefused": True, "best_layer": 1})
    assert words(found) == all_ok(KEPT=FAILED, DIRECTION=WARNING)
    assert "layer 1 given" in found[DIRECTION].detail


def test_a_refusal_token_that_opens_no_refusal() -> None:
    verdict = doctor.check_tokens(Patient(Job(Options(refusal_token=("?",), batch_size=64), doctor.NOWHERE)))
    assert (verdict.word, verdict.line) == (FAILED, TOKENS)
    assert "'?' given: opens the answers to 0 of " in verdict.detail


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["tesbed"], "unknown model 'tesbed': did you mean testbed?"),
        (["--device", "tpu"], "--device: Input should be"),
        (["--layers", "6-9"], "has SAEs for layers [0, 1, 2, 3, 4, 5, 6, 7]"),
        (["--refusal-token", "two words", "--batch-size", "8"], "--refusal-token 'two words' is "),
    ],
)
def test_what_cannot_be_tried_is_bad_input(said: list[str], message: str) -> None:
    code, text = told(*said)
    assert code == 2
    assert f"error: {message}" in text or message in text.splitlines()[-1]


def test_prompts_to_fit_on_are_needed(tmp_path: Path) -> None:
    shutil.copytree(shipped.ASSETS / "model", tmp_path / "mine")
    (tmp_path / "few.csv").write_text("instruction\nHow do I bake bread?\n")
    code, text = told(
        str(tmp_path / "mine"),
        "--saes",
        f"{shipped.ASSETS}/saes/layer_{{layer}}",
        "--prompts",
        str(tmp_path / "few.csv"),
    )
    assert code == 2
    assert "few.csv holds no train split" in text


def test_running_out_of_memory_fails_the_line_it_happens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(_: Patient) -> Verdict:
        raise MemoryError

    def modest(_: Patient) -> Verdict:
        return Verdict(OK, "modest", "done")

    checks = {
        "greedy": doctor.Check(greedy),
        "later": doctor.Check(modest, ("greedy",)),
        "modest": doctor.Check(modest),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    found = list(doctor.verdicts(Patient(Job(Options(), doctor.NOWHERE))))
    assert [verdict.word for verdict in found] == [FAILED, NOT_CHECKED, OK]
    assert "--batch-size" in found[0].detail
    assert found[1].detail.endswith("greedy")


def test_doctor_has_no_run_folder() -> None:
    assert told("testbed", "--name", "mine")[0] == 2


@pytest.mark.parametrize("options", [{}, {"full": True}, {"limit": 40, "methods": ("cosine", "random")}])
def test_the_answers_of_a_benchmark_are_counted_as_they_are_asked_for(options: dict[str, Any]) -> None:
    job = Job(Options(**options), doctor.NOWHERE)
    names = [
        job.options.set_name(name, k)
        for k in job.options.set_sizes
        for method in job.options.wanted_methods
        for name in ([f"random-{draw}" for draw in range(job.options.random_draws)] if method == "random" else [method])
    ]
    sets = {name: FeatureSet(name.partition("-")[0], (Feature(0, 0),), (1.0,)) for name in names}
    fixed = [name for name in names if not name.startswith("random-")]
    arms = measure.arms(tiny.direction(), sets, dict.fromkeys(fixed, 0.0))
    asked = [len(job.given.evaluation[name]) for _, name in measure._grid(arms, job.given.evaluation)]
    values = measure.inductions(job, Chosen(sets, {}, dict.fromkeys(fixed, 1.0), ()))
    held = len(job.given.fitting["harmful-validation"])
    expected = [
        *asked,
        *[held] * (1 + len(fixed) * len(job.factors)),
        *[len(job.given.evaluation["harmless"])] * len(values),
    ]
    work = next(one for one in workload.counted(job, 8) if one.name == "benchmark")
    assert sorted(work.answers) == sorted(expected)


def test_work_takes_longer_the_more_there_is_of_it() -> None:
    measured = workload.Pace(token=0.001, step=0.1, row=0.01, sae=2.0, encoded=0.0, prompt=30.0, batch=10, answer=None)
    asked = workload.Work("asked", answers=(10, 25), tokens=50, statistics=0.0)
    # Four batches of fifty steps, and the rows' own time; every prompt is read once.
    assert asked.seconds(measured) == pytest.approx(50 * (4 * 0.1 + 35 * 0.01) + 35 * 30 * 0.001)
    assert asked.seconds(measured._replace(answer=20)) == pytest.approx(20 * (4 * 0.1 + 35 * 0.01) + 35 * 30 * 0.001)
    assert workload.Work("read", saes=3, statistics=1.0).seconds(measured) == pytest.approx(7)
    assert workload.Work("read", prompts=2, chats=1, gradients=1, tokens=70, statistics=0.0).seconds(
        measured
    ) == pytest.approx((2 + workload.BACKWARD) * 0.03 + 0.1)


def test_layers_are_listed_in_runs() -> None:
    assert patient.listed([5, 3, 4, 9]) == "3-5, 9"
    assert patient.listed([]) == ""


def test_presets_of_base_saes_are_known_by_name() -> None:
    """What the two names have in common is how a base model's SAEs are recognised."""
    preset = presets.presets()["gemma-2-2b"]
    assert preset["model"].split("/")[-1].removesuffix(patient.TUNED[0]) == "gemma-2-2b"
