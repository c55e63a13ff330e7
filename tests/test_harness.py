"""lm-evaluation-harness on edited models: it is asked as the run asks, measures the edit, and leaves no trace.

The tasks are local files of the shapes of ARC and GSM8K; nothing is fetched.
"""

import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from refusalscope.core.store import Store, to_json
from refusalscope.core.types import Feature, FeatureSet, Finding, SaeSlice
from refusalscope.evals import harness
from refusalscope.inputs import documents
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import ChatStyle
from refusalscope.mechanism.interventions import (
    AddDirection,
    HoldFeatures,
    Intervention,
    RemoveDirection,
    ScaleFeatures,
    SetFeatures,
)
from refusalscope.pipeline import capability as measuring
from refusalscope.report.capability import cost_table
from refusalscope.studies import benchmark
from refusalscope.studies import capability as study
from refusalscope.testbed import shipped
from tests import chat_templates, harness_tasks, tiny
from tests.families import language_model
from tests.test_run import invoke

CHOICES, ANSWERS, GROUP = harness_tasks.CHOICES, harness_tasks.ANSWERS, harness_tasks.GROUP
SET = FeatureSet("test", tuple(Feature(3, index) for index in range(60)), (1.0,) * 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness_tasks.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tasks with a description, which the harness puts into a system message."""
    return harness_tasks.write(tmp_path_factory.mktemp("described"), description="Choose well.")


@pytest.fixture(scope="module")
def testbed() -> ChatModel:
    return ChatModel.load(shipped.ASSETS / "model", name="testbed", identity="testbed")


def _measure(model: ChatModel, folder: Path, name: str, edit: Intervention | None = None, **more: Any) -> dict:
    fewshot = more.pop("num_fewshot", None)
    (task,) = harness.load([name], include_path=folder, num_fewshot=fewshot)
    return harness.measure(model, task, edit, **{"batch_size": 3, "limit": 4, **more})


@contextmanager
def _requests(model: ChatModel) -> Iterator[list[list[int]]]:
    """The ids of every row the bare model is asked with, padding (id 0) taken off."""
    seen: list[list[int]] = []

    def watch(_module: Any, positional: Any, named: Any) -> None:
        ids = named["input_ids"] if "input_ids" in named else positional[0]
        if ids.shape[1] > 1:
            seen.extend([token for token in row if token != 0] for row in ids.tolist())

    handle = model.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _tokenizer(*, written: bool, added: bool) -> Any:
    """BOS written by the template, put first by the tokenizer, both or neither."""
    template = tiny.TEMPLATE if written else tiny.TEMPLATE.replace("{{ bos_token }}", "")
    made = tiny.tokenizer(template)
    if added:
        made.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return made


@pytest.mark.parametrize(("written", "added"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_request_opens_with_one_bos_where_chats_do(folder: Path, written: bool, added: bool) -> None:
    tokenizer = _tokenizer(written=written, added=added)
    model = ChatModel(language_model("llama"), tokenizer, name="tiny", identity="tiny")
    with _requests(model) as seen:
        for task in (CHOICES, ANSWERS):
            _measure(model, folder, task, limit=2)
    assert len(seen) >= 10
    for ids in seen:
        assert ids.count(1) == int(written or added)
        assert ids[0] == (1 if written or added else tokenizer.convert_tokens_to_ids("<start_of_turn>"))


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_questions_are_rendered_as_the_run_renders_them(folder: Path, system: str | None) -> None:
    model = ChatModel(
        language_model("llama"), tiny.tokenizer(), name="tiny", identity="tiny", style=ChatStyle(system=system)
    )
    with _requests(model) as seen:
        _measure(model, folder, ANSWERS, batch_size=1)
    rows = [json.loads(line) for line in (folder / f"{ANSWERS}_test.jsonl").read_text().splitlines()]
    assert sorted(seen) == sorted(model.template.encode(row["question"]).ids for row in rows[:4])


def test_a_description_is_folded_where_no_system_prompt_is_taken(testbed: ChatModel, described: Path) -> None:
    with _requests(testbed) as seen:
        _measure(testbed, described, CHOICES, num_fewshot=1)
    texts = [testbed.tokenizer.decode(ids) for ids in seen]
    opening = "<bos><start_of_turn>user\nChoose well.\n\nQuestion:"
    assert all(text.startswith(opening) and text.count("<start_of_turn>user") == 2 for text in texts)


def test_reasoning_is_skipped_in_choices_and_split_from_answers(folder: Path) -> None:
    from refusalscope.evals.harness_model import HarnessModel

    family = chat_templates.FAMILIES["qwen3"]
    style = ChatStyle(thinking="on")
    model = ChatModel(language_model("qwen2"), family.tokenizer(), name="qwen3", identity="q", style=style)
    skipped, begun = (
        model.template.render([{"role": "user", "content": "x"}], thinking=mode) for mode in ("off", "on")
    )
    with _requests(model) as seen:
        _measure(model, folder, CHOICES)
    closing = skipped.partition("x")[2].rstrip()
    assert all(closing in model.tokenizer.decode(ids) for ids in seen)
    with _requests(model) as seen:
        _measure(model, folder, ANSWERS)
    assert all(model.tokenizer.decode(ids).endswith(begun.partition("x")[2]) for ids in seen if len(ids) > 20)
    wrapped = HarnessModel(model, batch_size=1, stderr=sys.stderr)
    wrapped.thinking = "on"
    said = model.tokenizer("<think>\nlong\n</think>\n\nshort", add_special_tokens=False).input_ids
    assert wrapped.tok_decode([*said, model.end_of_turn, 7]) == "short"


def test_answers_are_those_the_run_itself_would_give(testbed: ChatModel, folder: Path) -> None:
    """Greedy although the task asks for sampling, ended by the model's own end of turn."""
    made = _measure(testbed, folder, ANSWERS, limit=6)
    rows = [json.loads(line) for line in (folder / f"{ANSWERS}_test.jsonl").read_text().splitlines()]
    prompts = tiny.prompts("asked", [row["question"] for row in rows[:6]])
    said = testbed.generate(testbed.tokens(prompts), max_new_tokens=48)
    assert [document["responses"] for document in made["documents"]] == [[answer.text] for answer in said]
    right = [float(row["object"] in answer.text) for row, answer in zip(rows, said, strict=False)]
    values = [document["values"] for document in made["documents"]]
    assert {tuple(value) for value in values} == {("exact_match:strict-match", "exact_match:flexible-extract")}
    assert all(value["exact_match:flexible-extract"][0] <= inside for value, inside in zip(values, right, strict=True))
    assert sum(value["exact_match:flexible-extract"][0] for value in values) >= 3


def _slices() -> dict[int, SaeSlice]:
    return SaeBank.from_folders({3: shipped.ASSETS / "saes/layer_3"}, identity="testbed").slices(SET.by_layer())


@pytest.fixture(scope="module")
def slices() -> dict[int, SaeSlice]:
    return _slices()


def _accuracy(measured: dict, metric: str) -> float:
    values = [document["values"][metric][0] for document in measured["documents"]]
    return sum(values) / len(values)


@pytest.mark.parametrize(("task", "metric"), [(GROUP, "acc"), (ANSWERS, "exact_match:flexible-extract")])
def test_an_edit_that_does_nothing_leaves_every_bit_and_another_costs_accuracy(
    testbed: ChatModel, slices: dict[int, SaeSlice], folder: Path, task: str, metric: str
) -> None:
    (loaded,) = harness.load([task], include_path=folder)
    plain, same, edited = (
        harness.measure(testbed, loaded, edit, slices=slices, batch_size=8)
        for edit in (None, ScaleFeatures(SET, 1.0), SetFeatures(SET, 20.0))
    )
    assert same == plain
    assert plain["changed"] == 0 < edited["changed"]
    assert [d["id"] for d in edited["documents"]] == [d["id"] for d in plain["documents"]]
    assert all(a["responses"] != b["responses"] for a, b in zip(edited["documents"], plain["documents"], strict=True))
    assert _accuracy(plain, metric) > 0.7 > 0.6 > _accuracy(edited, metric)
    assert all(not layer._forward_hooks for layer in testbed.layers)


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_batch_size_does_not_change_scores(folder: Path, family: str) -> None:
    model, edit = tiny.chat_model(family), RemoveDirection(tiny.direction())
    one, many = (_measure(model, folder, CHOICES, edit, batch_size=size)["documents"] for size in (1, 8))
    for first, second in zip(one, many, strict=True):
        assert first["responses"] == pytest.approx(second["responses"], abs=1e-4)


def test_a_group_is_scored_together_and_a_longer_limit_begins_with_a_shorter(folder: Path) -> None:
    model = tiny.chat_model()
    (group,) = harness.load([GROUP], include_path=folder)
    few, more = (harness.measure(model, group, None, batch_size=8, limit=limit)["documents"] for limit in (2, 3))
    assert [document["part"] for document in few] == [CHOICES] * 2 + [f"{CHOICES}_again"] * 2
    assert {document["id"] for document in few} < {document["id"] for document in more}


def test_a_group_that_weights_its_tasks_alike_is_its_tasks(tmp_path: Path) -> None:
    folder = harness_tasks.write(tmp_path / "tasks")
    text = (folder / f"{GROUP}.yaml").read_text()
    entry = "  - {metric: acc, weight_by_size: true}\n"
    assert entry in text
    (folder / f"{GROUP}.yaml").write_text(
        text.replace(entry, f"{entry}  - {{metric: acc_norm, weight_by_size: false}}\n")
    )
    assert [task.name for task in harness.load([GROUP], include_path=folder)] == [CHOICES, f"{CHOICES}_again"]


SHUFFLES = """
import json
import pathlib
import random

import datasets


def rows(**_):
    found = [json.loads(line) for line in pathlib.Path({file!r}).read_text().splitlines()]
    random.shuffle(found)
    return {{"train": datasets.Dataset.from_list(found), "test": datasets.Dataset.from_list(found)}}
"""


def test_what_a_task_draws_while_it_loads_does_not_depend_on_what_was_loaded_before(tmp_path: Path) -> None:
    folder = harness_tasks.write(tmp_path / "tasks", count=12)
    (folder / "shuffles.py").write_text(SHUFFLES.format(file=str(folder / f"{CHOICES}_test.jsonl")))
    for name in (CHOICES, f"{CHOICES}_again"):
        text = (folder / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(f"{text}custom_dataset: !function shuffles.rows\n")
    orders = []
    for names in ([CHOICES], [f"{CHOICES}_again", CHOICES]):
        task = harness.load(names, include_path=folder)[-1]
        orders.append([row["question"] for row in task.parts[CHOICES].eval_docs])
    assert orders[0] == orders[1]


def test_few_shot_examples_are_turns_of_their_own_and_the_same_every_time(folder: Path) -> None:
    model = tiny.chat_model()
    (task,) = harness.load([CHOICES], include_path=folder, num_fewshot=2)
    asked = []
    for _ in range(2):
        with _requests(model) as seen:
            harness.measure(model, task, None, batch_size=4, limit=2)
        asked.append(seen)
    turn = model.tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert asked[0] == asked[1]
    assert all(ids.count(turn) == 6 for ids in asked[0])


@pytest.mark.parametrize("task", [CHOICES, ANSWERS])
def test_requests_longer_than_the_context_keep_their_bos_and_are_counted(folder: Path, task: str) -> None:
    short = language_model("llama")
    short.config.max_position_embeddings = 100
    model = ChatModel(short, tiny.tokenizer(), name="short", identity="short")
    with _requests(model) as seen:
        made = _measure(model, folder, task, limit=2)
    assert made["shortened"] > 0
    assert all(ids[0] == 1 and len(ids) <= 100 for ids in seen)
    assert _measure(tiny.chat_model(), folder, task, limit=2)["shortened"] == 0


def test_the_harness_leaves_the_process_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.chat_model()
    model.tokenizer.pad_token = None

    def state() -> tuple[Any, ...]:
        # The runtime type checks draw from `random` themselves.
        seeds = np.random.get_state(legacy=False), torch.random.get_rng_state().tolist()
        tokenizer = model.tokenizer.pad_token, model.tokenizer.padding_side, len(model.tokenizer)
        return str(seeds), *tokenizer, logging.getLogger("lm_eval").level, logging.getLogger().handlers[:]

    before, _ = state(), capfd.readouterr()
    for task in (CHOICES, ANSWERS):
        _measure(model, folder, task, limit=2)
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_requests(folder: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    _measure(tiny.chat_model(), folder, CHOICES, progress=lambda *step: steps.append(step))
    assert {(what, total) for what, _, total in steps} == {("scoring", 16)}
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})


def test_edits_that_need_a_chat_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="held at what they were on a prompt"):
        _measure(tiny.chat_model(), folder, CHOICES, HoldFeatures(SET, {}))


def test_hooks_are_gone_when_a_task_fails(folder: Path) -> None:
    model = tiny.chat_model()

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _measure(model, folder, CHOICES, AddDirection(tiny.direction()), progress=fails)
    assert all(not layer._forward_hooks for layer in model.layers)


def _broken(folder: Path, old: str, new: str) -> Path:
    text = (folder / f"{ANSWERS}.yaml").read_text()
    assert old in text
    (folder / f"{ANSWERS}.yaml").write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_gen_toks: 48", "max_gen_toks: 4096", "asks for answers of 4096 tokens, but tiny-llama has a context of"),
        ("output_type: generate_until", "output_type: loglikelihood_rolling", "scores raw text, not answers to a chat"),
        ("objects_test.jsonl", "no_such.jsonl", "the task objects cannot be loaded"),
    ],
)
def test_tasks_that_cannot_run_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = _broken(harness_tasks.write(tmp_path / "tasks"), old, new)
    with pytest.raises(ValueError, match=message):
        _measure(tiny.chat_model(), folder, ANSWERS)


def test_a_missing_package_is_named_with_its_cure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'refusalscope[capability]'")):
        harness.load([CHOICES], include_path=folder)


def test_the_digest_of_a_folder_is_that_of_its_files(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert harness.digest(copy) == harness.digest(folder) != harness.digest(None) == ""
    (copy / f"{CHOICES}.yaml").write_text("task: other\n")
    assert harness.digest(copy) != harness.digest(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A small run of the testbed with its report, and what it costs under every method."""
    runs = tmp_path_factory.mktemp("runs")
    small = ["--limit", "3", "--factor", "0", "--max-new-tokens", "12", "--k", "5", "--value", "1", "--layers", "3"]
    small += ["--method", "cosine+attribution", "--method", "cosine"]
    assert invoke("benchmark", "testbed", "--runs", str(runs), "--name", "small", *small)[0] == 0
    (runs / "small" / "report.html").write_text("drawn before")
    (runs / "texts.txt").write_text("Rivers run to the sea.\nBread needs time, and so does a good soup.\n")
    code, out, err = _capability(runs / "small", folder, "--documents", str(runs / "texts.txt"))
    assert (code, out) == (0, f"{runs / 'small' / 'report.html'}\n"), err
    return runs / "small"


def _capability(run: Path, folder: Path, *more: str) -> tuple[int, str, str]:
    tasks = ["--tasks", f"{CHOICES},{ANSWERS}", "--include-path", str(folder), "--limit", "3"]
    return invoke("capability", str(run), *tasks, *more)


EDITS = {
    ("base", ""),
    ("direction", "remove"),
    ("direction", "remove-affine"),
    ("direction", "add"),
    ("cosine+attribution", "scale c=0 k=5"),
    ("cosine", "scale c=0 k=5"),
}


def test_local_tasks_and_costs_under_every_method(finished: Path) -> None:
    finding = Store(finished).read("findings/capability.json", Finding)
    exact = {
        f"exact_match{change}:{name}" for change in ("", "_change") for name in ("strict-match", "flexible-extract")
    }
    expected = {
        CHOICES: {"acc", "acc_norm", "acc_change", "acc_norm_change"},
        ANSWERS: exact,
        "documents": {"cross_entropy", "cross_entropy_change"},
        "harmless": {"cross_entropy", "cross_entropy_change", "kl", "refused", "refused_change"},
        "look-alike": {"refused", "refused_change"},
    }
    assert {row.dataset for row in finding.rows} == set(expected)
    for dataset, metrics in expected.items():
        rows = [row for row in finding.rows if row.dataset == dataset]
        edits = EDITS - {("direction", "add")} if dataset == "look-alike" else EDITS
        for metric in metrics:
            compared = metric.partition(":")[0].endswith("_change") or metric == "kl"
            found = {(row.method, row.setting) for row in rows if row.metric == metric and row.n}
            assert found == edits - ({("base", "")} if compared else set()), (dataset, metric)
    page = (finished / "report.html").read_text()
    assert 'id="capability"' in page
    assert "<b>capability</b>" not in page


def test_what_the_run_measured_itself_is_said_as_it_is(finished: Path) -> None:
    store = Store(finished)
    measured, capability = (store.read(f"findings/{name}.json", Finding) for name in ("benchmark", "capability"))
    for method, setting in EDITS - {("base", "")}:
        for metric in ("cross_entropy_change", "kl", "refused"):
            first, second = (found.find("harmless", method, metric, setting) for found in (measured, capability))
            assert first is not None
            assert second is not None
            assert second.estimate == pytest.approx(first.estimate, abs=1e-6)


def _copy(run: Path, folder: Path) -> Path:
    """Without its report, which would be drawn anew each time."""
    made = shutil.copytree(run, folder / run.name)
    (made / "report.html").unlink()
    return made


def test_a_second_time_nothing_is_measured_and_what_is_missing_is(finished: Path, folder: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    texts = ["--documents", str(finished.parent / "texts.txt")]
    assert _capability(run, folder, *texts)[0] == 0
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    gone, kept = run / f"capability/{ANSWERS}/direction add.json", run / f"capability/{ANSWERS}/base.json"
    gone.unlink()
    stood = kept.stat().st_mtime_ns
    assert _capability(run, folder, *texts)[0] == 0
    assert kept.stat().st_mtime_ns == stood
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_only_what_was_measured_alike_is_compared(finished: Path, folder: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    code, _, err = invoke(
        *("capability", str(run), "--tasks", CHOICES, "--include-path", str(folder), "--limit", "2"),
        *("--methods", "cosine,direction remove", "--batch-size", "2"),
    )
    assert code == 0, err
    rows = Store(run).read("findings/capability.json", Finding).rows
    again = {(row.method, row.setting) for row in rows if row.dataset == CHOICES}
    assert again == {("base", ""), ("direction", "remove"), ("cosine", "scale c=0 k=5")}
    assert {row.n for row in rows if row.dataset == CHOICES} == {2}
    assert {(row.method, row.setting) for row in rows if row.dataset == ANSWERS} == EDITS
    assert f'"capability {CHOICES}" = 2' in (run / "options.toml").read_text()


@pytest.mark.parametrize("by", ["version", "edit"])
def test_what_another_version_or_another_edit_made_is_left_out_and_named(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    run = _copy(finished, tmp_path)
    if by == "version":
        monkeypatch.setattr("refusalscope.pipeline.job.versions", lambda: {"refusalscope": "another"})
    else:
        store = Store(run)
        entries = store.read("manifest.json", dict)
        for path in (f"capability/{ANSWERS}", "costs/documents", "costs/harmless"):
            entries[f"{path}/cosine scale c=0 k=5.json"]["key"] = "of another set"
        entries["responses/look-alike/cosine scale c=0 k=5.jsonl"]["key"] = "of another set"
        (run / "manifest.json").write_bytes(to_json(entries))
    with closing(measuring.reopened(run)) as job:
        standing = measuring.read_standing(job)
        finding = measuring.summarise(job, standing, standing.arms)
    named = finding.caveats[-1]
    assert named.startswith("Left out, since other versions, edits or settings made them than are compared here: ")
    if by == "version":
        assert finding.rows == ()
        assert f"capability/{CHOICES}/base, " in named
        return
    cosine = {(row.dataset, row.metric) for row in finding.rows if row.method == "cosine"}
    metrics = {"acc", "acc_norm", "acc_change", "acc_norm_change"}
    assert cosine == {(CHOICES, one) for one in metrics} | {("harmless", "refused"), ("harmless", "refused_change")}
    assert {row.method for row in finding.rows if row.dataset == ANSWERS} >= {"base", "direction"}
    assert named.count("/cosine scale c=0 k=5") == 4


def test_edits_that_changed_nothing_are_named(finished: Path, folder: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    assert not [note for note in Store(run).read("findings/capability.json", Finding).caveats if "no position" in note]
    texts = documents.source(str(finished.parent / "texts.txt"))
    with closing(measuring.reopened(run)) as job:
        standing = measuring.read_standing(job)
        idle = benchmark.scale_arm(SET, 1.0)
        standing = standing._replace(arms=[benchmark.BASE, idle], chosen=replace(standing.chosen, slices=_slices()))
        tasks = harness.load([CHOICES], include_path=folder)
        wanted = measuring.Wanted((CHOICES,), limit=3, include_path=folder)
        measuring._measure_tasks(job, standing, standing.arms, wanted, tasks)
        measuring._measure_documents(job, standing, standing.arms, texts)
        caveats = measuring.summarise(job, standing, standing.arms).caveats
    names = [f"test scale c=1 k=60 on {name}" for name in (CHOICES, "documents")]
    assert f"These edits changed no position at all: {', '.join(names)}." in caveats


def test_inductions_are_measured_when_named(finished: Path, folder: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    tasks = ("--tasks", CHOICES, "--include-path", str(folder), "--limit", "3")
    code, _, err = invoke("capability", str(run), *tasks, "--methods", "cosine+attribution set v=1 k=5")
    assert code == 0, err
    rows = Store(run).read("findings/capability.json", Finding).rows
    named = {row.dataset for row in rows if (row.method, row.setting) == ("cosine+attribution", "set v=1 k=5")}
    assert named == {CHOICES, "harmless"}
    with closing(measuring.reopened(run)) as job:
        known = measuring.read_standing(job).arms
    for methods in (None, ["cosine+attribution"]):
        assert not [arm for arm in measuring.wanted_arms(known, methods) if arm.setting.startswith("set ")]


def test_memory_that_runs_out_in_one_task_leaves_the_others_as_they_are(
    finished: Path, folder: Path, tmp_path: Path
) -> None:
    run = _copy(finished, tmp_path)
    before = {file: file.read_bytes() for file in (run / "capability" / CHOICES).iterdir()}
    full = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")]

    def progress(step: str, *_: int) -> None:
        if step.startswith(f"{ANSWERS} under base") and full:
            raise full.pop()

    wanted = measuring.Wanted((CHOICES, ANSWERS), limit=3, include_path=folder, batch_size=4)
    with closing(measuring.reopened(run, progress)) as job:
        size, others = job.derived["batch_size"], job.derived.get("batch_sizes", {})
        job.resize(f"capability {CHOICES}", size)
        measuring.run_capability(job, replace(wanted, tasks=(ANSWERS,)))
        assert job.derived["batch_sizes"] == {**others, f"capability {CHOICES}": size, f"capability {ANSWERS}": 2}
        measuring.run_capability(job, replace(wanted, batch_size=None))
    assert {file: file.read_bytes() for file in (run / "capability" / CHOICES).iterdir()} == before
    rows = Store(run).read("findings/capability.json", Finding).rows
    assert {row.dataset for row in rows} >= {CHOICES, ANSWERS, "documents"}
    assert {(row.method, row.setting) for row in rows if row.dataset == CHOICES} == EDITS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nope"], "--methods 'nope': this run has base, direction, cosine+attribution"),
        (["--documents", "nope.txt"], "there is no such file"),
        (["--include-path", "nope", "--tasks", CHOICES], "is no folder"),
    ],
)
def test_bad_input_ends_with_one_line(finished: Path, arguments: list[str], message: str) -> None:
    code, out, err = invoke("capability", str(finished), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_run_that_has_not_come_so_far_is_told_what_to_do(finished: Path, tmp_path: Path) -> None:
    assert "is no run folder" in invoke("capability", str(tmp_path))[2]
    run = shutil.copytree(finished, tmp_path / "small")
    (run / "features" / "strengths.json").unlink()
    code, _, err = invoke("capability", str(run))
    assert (code, err.count("\n")) == (2, 1)
    assert "has no features/strengths.json yet: let `refusalscope benchmark`" in err


def test_a_sweep_is_told_to_run_its_choice_first(finished: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    options = (run / "options.toml").read_text()
    kept = [line for line in options.splitlines() if not line.startswith("k = ")]
    (run / "options.toml").write_text("\n".join(["sizes = [5]", *kept]))
    code, out, err = invoke("capability", str(run))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is a sweep, which answers no test prompts" in err


def _scored(parts: int, values: list[float | None]) -> dict[str, Any]:
    documents = [
        {"id": f"{part}/{at}", "part": f"part-{part}", "values": {"acc": [value], "several": [value, value]}}
        for part in range(parts)
        for at, value in enumerate(values)
    ]
    return {"task": "group", "documents": documents}


def test_documents_of_a_large_group_are_clustered_by_part() -> None:
    few, many = (study.of_task("base", "", _scored(parts, [1.0, 0.0]))[0] for parts in (9, 10))
    assert len(set(few.clusters)) == 18
    assert set(many.clusters) == {f"part-{part}" for part in range(10)}


def test_several_values_of_a_document_are_one_cluster_and_unscored_ones_lower_coverage() -> None:
    one, several = study.of_task("base", "", _scored(1, [1.0, 0.0, None, 1.0]))
    assert (len(one.values), len(several.values), len(set(several.clusters))) == (4, 8, 4)
    finding = study.summarise([one, several], caveats=(), provenance={})
    assert [(row.metric, row.n, row.coverage) for row in finding.rows] == [("acc", 3, 0.75), ("several", 6, 0.75)]


def test_changes_are_paired_by_document() -> None:
    base = study.Measure("task", "base", "", "acc", ["a", "b", "c"], [1.0, 1.0, 0.0], ["a", "b", "c"])
    edited = base._replace(method="cosine", ids=["c", "a"], values=[1.0, 0.0], clusters=["c", "a"])
    graded = edited._replace(dataset="graded", values=[0.5, 0.25])
    rows = study.summarise([base, base._replace(dataset="graded"), edited, graded], caveats=(), provenance={}).rows
    found = {(row.dataset, row.metric): row for row in rows if row.method == "cosine"}
    assert {row.metric for row in rows if row.p is not None and row.p_holm is not None} == {"acc_change"}
    assert (found["task", "acc_change"].n, found["task", "acc_change"].estimate) == (2, 0.0)
    assert found["graded", "acc_change"].estimate == pytest.approx(-0.125)


def test_random_draws_are_taken_together_with_what_they_share_as_clusters() -> None:
    base = study.Measure("task", "base", "", "acc", ["a", "b"], [1.0, 0.0], ["a", "b"])
    draws = [
        base._replace(method="random", setting=f"scale c=0 k=5 draw={draw}", values=[float(draw), 1.0])
        for draw in range(2)
    ]
    rows = study.summarise([base, *draws], caveats=(), provenance={}).rows
    pooled = {row.metric: row for row in rows if row.setting == "scale c=0 k=5 mean"}
    assert (pooled["acc"].n, pooled["acc"].estimate) == (4, 0.75)
    assert (pooled["acc_change"].n, pooled["acc_change"].estimate) == (4, 0.25)
    assert {line.setting for line in cost_table(Finding("capability", "", rows, (), {})).lines} == {
        "",
        "scale c=0 k=5 mean",
    }
