"""SAE health equals its definition text by text, ends at 1 and at 0, and sets are compared on the same texts."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refusalscope.core.store import Store
from refusalscope.core.types import Feature, FeatureSet, Finding, Prompts, Response, Row
from refusalscope.evals import health as measuring
from refusalscope.evals.health import Texts
from refusalscope.inputs import documents, presets
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.prompts import grammar_rows
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.report import health as section
from refusalscope.report import page, plots
from refusalscope.studies import health as study
from refusalscope.studies.health import DIRECTION, FIRST, TEMPLATE
from refusalscope.testbed import grammar
from refusalscope.testbed.build import build, build_base_saes
from refusalscope.testbed.shipped import verify
from tests import tiny
from tests.test_resilience import contents
from tests.test_run import invoke
from tests.test_testbed import TINY, Killed

ANSWERS = ["Bread needs time.", "Stopped.", "It is long.", "y and z are letters too.", "Rhine.", "A train at night."]
NO_CHANGE = {"variance_explained": 1.0, "cross_entropy_recovered": 1.0, "cross_entropy_recovered_mean": 1.0}
SMALL = ["--layers", "2,5", "--limit", "8", "--max-new-tokens", "40"]


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> ChatModel:
    return tiny.chat_model(request.param)


def _answers(prompts: Prompts, texts: Sequence[str] = ANSWERS) -> dict[str, Response]:
    pairs = zip(prompts.ids, texts, strict=True)
    return {name: Response(name, text, 5, 3, "end" if i % 2 else "length") for i, (name, text) in enumerate(pairs)}


def _texts(model: ChatModel, prompts: Prompts, texts: Sequence[str] = ANSWERS, *, batch_size: int = 4) -> list[Texts]:
    """All three kinds; the documents are the prompts' own words."""
    made = measuring.chats(model, prompts, _answers(prompts, texts), batch_size=batch_size)
    return [*made, measuring.documents(model, prompts, batch_size=batch_size)]


# ---- text by text


def _places(roles: list[int], kind: str) -> list[int]:
    """Where a lone text is replaced."""
    wanted = (Role.HEADER, Role.CLOSING) if kind == "template" else tuple(Role)
    return [at for at in range(1, len(roles)) if roles[at] in wanted]


def _plainly(
    model: ChatModel, ids: list[int], roles: list[int], layer: int, put: Callable[[Tensor], Tensor], kind: str
) -> tuple[float, Tensor]:
    """Cross-entropy of one text without padding, by a hook of our own, and the residuals that were replaced."""
    places, seen = _places(roles, kind), []

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        residual = (output[0] if isinstance(output, tuple) else output).clone()
        seen.append(residual[0, places].clone())
        for at in places:
            residual[0, at] = put(residual[0, at])
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    handle = model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    handle.remove()
    loss = -sum(float(logits[at - 1, ids[at]]) for at in range(1, len(ids)) if roles[at] == Role.RESPONSE)
    return loss, seen[0]


@pytest.mark.parametrize("place", [0, 1, 2], ids=["chats", "template", "documents"])
def test_health_equals_one_text_at_a_time(model: ChatModel, tmp_path: Path, place: int) -> None:
    layer, prompts = 1, tiny.prompts()
    texts, sae = _texts(model, prompts)[place], tiny.bank(tmp_path).layer(layer)
    known = measuring.averages(model, texts, [0, layer])
    measuring.floors(model, texts, 0, known)  # what is known of a layer before is gone on from
    floors, spliced = measuring.floors(model, texts, layer, known), measuring.splice(model, texts, sae)
    lone = [
        (t.ids[i][t.mask[i]].tolist(), t.roles[i][t.mask[i]].tolist()) for t in texts.batches for i in range(len(t.ids))
    ]
    plain = [_plainly(model, *one, layer, lambda z: z, texts.kind) for one in lone]
    centre = torch.cat([z for _, z in plain]).double().mean(0)
    put = {
        "clean": lambda z: z,
        "zero": torch.zeros_like,
        "mean": lambda _: centre.float(),
        "cross_entropy": lambda z: sae.reconstruct(z[None])[0],
    }
    found = {**floors._asdict(), **spliced._asdict()}
    for name, change in put.items():
        expected = [_plainly(model, *one, layer, change, texts.kind)[0] for one in lone]
        assert found[name] == pytest.approx(expected, rel=2e-4, abs=2e-3), name
    residuals = [z for _, z in plain]
    assert floors.tokens == [len(z) for z in residuals]
    assert floors.variance == pytest.approx([float((z.double() - centre).square().sum()) for z in residuals], rel=1e-3)
    errors = [float((z - sae.reconstruct(z)).square().sum()) for z in residuals]
    assert spliced.error == pytest.approx(errors, rel=1e-3)
    assert spliced.active == pytest.approx([float((sae.encode(z) > 0).sum()) for z in residuals], abs=1)


def test_the_template_is_header_and_closing_without_the_first_token(model: ChatModel) -> None:
    chats, template, plain = _texts(model, tiny.prompts())
    for kind, texts in (("chats", chats), ("template", template), ("documents", plain)):
        for batch in texts.batches:
            inside = measuring.replaced(texts.kind, batch.roles)
            for row in range(len(batch.ids)):
                roles = batch.roles[row][batch.mask[row]].tolist()
                assert inside[row][batch.mask[row]].nonzero()[:, 0].tolist() == _places(roles, kind)
                assert not inside[row][~batch.mask[row]].any()
    assert all((measuring.replaced("template", batch.roles).sum(1) > 3).all() for batch in template.batches)


def test_documents_of_one_token_are_left_out(model: ChatModel) -> None:
    rows = tiny.prompts(texts=["One of several tokens.", "", "Another."])
    texts = measuring.documents(model, rows, batch_size=2)
    assert [name for batch in texts.batches for name in batch.prompt_ids] == [rows.ids[0], rows.ids[2]]


# ---- the ends of the scale


@pytest.fixture(scope="module")
def testbed() -> ChatModel:
    target = presets.resolve("testbed")
    return ChatModel.load(target.model, name="testbed", identity="testbed", device="cpu")


@pytest.fixture(scope="module")
def asked() -> tuple[Prompts, list[str]]:
    """Prompts of the testbed, and answers of its grammar in place of the model's."""
    drawn = grammar.examples("harmless", split="validation", count=16)
    return Prompts("harmless", grammar_rows(drawn)), [grammar.placeholder_answer(one) for one in drawn]


def _bank(folder: Path, keep: Tensor) -> SaeBank:
    """SAEs that keep this much of each coordinate: ReLU features for both signs of every one."""
    width, folders = len(keep), {}
    for layer in (2, 5):
        made = tiny._empty_sae("standard", d_in=width, d_sae=2 * width, apply_b_dec_to_input=False)
        eye = torch.eye(width)
        made.W_enc.data, made.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye]) * keep
        made.b_enc.data, made.b_dec.data = torch.zeros(2 * width), torch.zeros(width)
        folders[layer] = folder / f"layer_{layer}"
        made.save_model(folders[layer])
    return SaeBank.from_folders(folders, identity=str(folder))


def _measured(
    model: ChatModel, banks: dict[str, SaeBank], asked: tuple[Prompts, list[str]], layers: Sequence[int]
) -> list[study.Layer]:
    rows, answers = asked
    texts = measuring.chats(model, rows, _answers(rows, answers), batch_size=8)
    texts.append(measuring.documents(model, documents.from_testbed(16), batch_size=8))
    known = {one.kind: measuring.averages(model, one, layers) for one in texts}
    ends = measuring.last_residuals(model, rows, layers, batch_size=8)
    half = len(rows) // 2
    clusters = (rows.clusters[:half], rows.clusters[half:])
    names: dict[measuring.Kind, str] = {"chats": rows.name, "template": TEMPLATE, "documents": "documents"}
    made = []
    for layer in layers:
        floors = {one.kind: measuring.floors(model, one, layer, known[one.kind]) for one in texts}
        spliced = {
            one.kind: {name: measuring.splice(model, one, bank.layer(layer)) for name, bank in banks.items()}
            for one in texts
        }
        cosines = {
            name: measuring.cosine(bank.layer(layer), ends[layer][:half], ends[layer][half:], clusters=clusters)
            for name, bank in banks.items()
        }
        parts = [
            study.Measured(names[kind], kind, [str(i) for i in range(16)], floors[kind], spliced[kind])
            for kind in names
        ]
        made.append(study.Layer(layer, parts, cosines))
    return made


@pytest.fixture(scope="module")
def both_ends(testbed: ChatModel, asked, tmp_path_factory: pytest.TempPathFactory) -> list[study.Layer]:
    folder = tmp_path_factory.mktemp("ends")
    width = testbed.width
    banks = {FIRST: _bank(folder / "all", torch.ones(width)), "nothing": _bank(folder / "none", torch.zeros(width))}
    return _measured(testbed, banks, asked, (2, 5))


def test_an_sae_that_keeps_all_recovers_all_and_one_that_keeps_nothing_nothing(both_ends, asked) -> None:
    finding = study.summarise(both_ends, provenance={})
    chats = asked[0].name
    for layer in (2, 5):
        setting = f"layer={layer}"
        for dataset in (chats, TEMPLATE, "documents"):
            for metric, all_of_it in NO_CHANGE.items():
                row = finding.find(dataset, FIRST, metric, setting)
                assert row is not None
                assert row.estimate == pytest.approx(all_of_it, abs=5e-4)
            row = finding.find(dataset, "nothing", "cross_entropy_recovered", setting)
            assert row is not None
            assert row.estimate == pytest.approx(0.0, abs=1e-6)
            assert row.low == row.high == pytest.approx(0.0, abs=1e-6)
        # Against the mean, zero is as far below 0 as it costs more: the mean is the stricter floor or it is not.
        floors = next(part.floors for part in next(one for one in both_ends if one.layer == layer).texts)
        costs = {name: sum(getattr(floors, name)) for name in ("clean", "zero", "mean")}
        row = finding.find(chats, "nothing", "cross_entropy_recovered_mean", setting)
        assert row is not None
        assert row.estimate == pytest.approx(
            (costs["mean"] - costs["zero"]) / (costs["mean"] - costs["clean"]), abs=1e-6
        )
        cosine, lost = (finding.find(DIRECTION, name, "direction_cosine", setting) for name in (FIRST, "nothing"))
        assert cosine is not None
        assert cosine.estimate == pytest.approx(1.0, abs=1e-6)
        assert lost is not None
        assert lost.estimate == 0.0
    words = {(trust.sae_set, trust.word) for trust in study.verdicts(finding)}
    assert words == {(FIRST, "trusted"), ("nothing", "not to be trusted")}
    assert any("The SAEs of the set nothing are not to be trusted at layers 2, 5" in note for note in finding.caveats)
    assert not any(note.startswith("The SAEs are") for note in finding.caveats)


def test_an_active_feature_is_counted(both_ends) -> None:
    finding = study.summarise(both_ends, provenance={})
    rows = [row for row in finding.rows if row.metric == "l0" and row.method == FIRST]
    assert all(row.estimate == pytest.approx(128, abs=0.01) for row in rows)  # one of each pair of signs


# ---- two sets


def test_two_sets_are_compared_on_the_same_texts(testbed: ChatModel, asked) -> None:
    target = presets.resolve("testbed", layers=[4])
    banks = {
        FIRST: SaeBank.from_source(target.saes),
        "base": SaeBank.from_source(presets.other_saes(target, "base")[1]),
    }
    (layer,) = _measured(testbed, banks, asked, [4])
    finding = study.summarise([layer], provenance={})
    chats = layer.texts[0]
    floors, own, first = chats.floors, chats.spliced["base"], chats.spliced[FIRST]
    expected = {
        "variance_explained": (sum(first.error) - sum(own.error)) / sum(floors.variance),
        "cross_entropy_recovered": (sum(first.cross_entropy) - sum(own.cross_entropy))
        / (sum(floors.zero) - sum(floors.clean)),
        "cross_entropy_recovered_mean": (sum(first.cross_entropy) - sum(own.cross_entropy))
        / (sum(floors.mean) - sum(floors.clean)),
        "l0": (sum(own.active) - sum(first.active)) / sum(floors.tokens),
    }
    for metric, difference in expected.items():
        row = _row(finding, chats.dataset, f"base vs {FIRST}", f"{metric}_difference")
        single = [_row(finding, chats.dataset, name, metric).estimate or 0.0 for name in ("base", FIRST)]
        assert row.estimate == pytest.approx(difference, abs=1e-9)
        assert row.estimate == pytest.approx(single[0] - single[1], abs=1e-9)
        assert (row.p is None) == (metric not in study.TESTED)
        assert (row.low or 0.0) < difference < (row.high or 0.0)
    kept = _row(finding, chats.dataset, f"base vs {FIRST}", "variance_explained_difference")
    assert kept.high is not None
    assert kept.high < 0  # the base set has never seen a chat
    assert kept.p is not None
    assert kept.p_holm == kept.p < 0.01  # one layer: a family of one
    cosine = _row(finding, DIRECTION, f"base vs {FIRST}", "direction_cosine_difference")
    single = [_row(finding, DIRECTION, name, "direction_cosine").estimate or 0.0 for name in ("base", FIRST)]
    assert cosine.estimate == pytest.approx(single[0] - single[1])


def _row(finding: Finding, *where: str) -> Row:
    found = finding.find(*where)
    assert found is not None
    return found


def test_a_cosine_is_that_of_the_difference_of_means(tmp_path: Path) -> None:
    first_alone = _bank(tmp_path, torch.tensor([1.0, 0.0])).layer(2)
    harmful, harmless = torch.tensor([[1.0, 3.0], [1.0, 5.0]]), torch.tensor([[-2.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = measuring.cosine(first_alone, harmful, harmless, clusters=(["a", "a"], ["b", "b", "b"]))
    assert found.prompts == 5
    assert found.cosine == pytest.approx(2 / (4 + 16) ** 0.5)
    assert found.draws == pytest.approx([found.cosine] * measuring.RESAMPLES)  # one cluster each: nothing to vary
    single = measuring.cosine(first_alone, harmful, harmless, clusters=(["a", "b"], ["c", "d", "e"]))
    possible = {a / (a**2 + b**2) ** 0.5 for a in (1, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3, 3) for b in (3, 4, 5)}
    assert all(min(abs(draw - one) for one in possible) < 1e-9 for draw in single.draws)
    assert len({round(draw, 9) for draw in single.draws}) > 10


def _finding(figures: dict[str, tuple[float, float, float]]) -> Finding:
    rows = tuple(
        Row(DIRECTION if metric == "direction_cosine" else "chats", FIRST, metric, "layer=3", 9, *triple, 1.0)
        for metric, triple in figures.items()
    )
    return Finding("health", "?", rows, (), {})


GOOD = {
    "variance_explained": (0.8, 0.71, 0.9),
    "cross_entropy_recovered": (0.95, 0.9, 0.99),
    "cross_entropy_recovered_mean": (0.95, 0.91, 0.99),
    "direction_cosine": (0.95, 0.92, 0.98),
}


@pytest.mark.parametrize(
    ("figure", "word"),
    [
        ({}, "trusted"),
        ({"variance_explained": (0.72, 0.69, 0.75)}, "doubtful"),
        ({"variance_explained": (0.48, 0.4, 0.51)}, "doubtful"),
        ({"variance_explained": (0.45, 0.4, 0.49)}, "not to be trusted"),
        ({"cross_entropy_recovered_mean": (0.7, 0.6, 0.79)}, "not to be trusted"),
        ({"direction_cosine": (0.8, 0.6, 0.95)}, "doubtful"),
        ({"direction_cosine": (0.5, 0.4, 0.69)}, "not to be trusted"),
    ],
)
def test_verdicts_go_by_whole_intervals(figure: dict[str, tuple[float, float, float]], word: str) -> None:
    finding = _finding(GOOD | figure)
    (trust,) = study.verdicts(finding)
    assert trust.word == word
    assert bool(trust.reasons) == (word != "trusted")
    chosen = FeatureSet("cosine", (Feature(3, 1), Feature(3, 2), Feature(5, 9)), (3.0, 2.0, 1.0))
    assert study.bearing(finding, {"cosine": chosen}) == [
        f"cosine: of 3 features, 2 in layers that are {word}, 1 in layers that are not measured."
    ]


def test_what_could_not_be_measured_is_no_reason_for_trust() -> None:
    finding = _finding(GOOD)
    rows = tuple(
        Row("chats", FIRST, row.metric, row.setting, 0, None, None, None, 1.0)
        if row.metric == "cross_entropy_recovered"
        else row
        for row in finding.rows
    )
    (trust,) = study.verdicts(Finding("health", "?", rows, (), {}))
    assert (trust.word, trust.reasons) == ("doubtful", ("cross entropy recovered could not be measured",))


# ---- the verb


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    code, out, _ = invoke("health", "testbed", "--runs", str(runs), "--name", "demo", "--against", "base", *SMALL)
    assert (code, out) == (0, f"{runs / 'demo' / 'report.html'}\n")
    return runs / "demo"


def test_the_testbeds_two_sets_differ(finished: Path) -> None:
    finding = Store(finished).read("findings/health.json", Finding)
    words = {(trust.layer, trust.sae_set): trust.word for trust in study.verdicts(finding)}
    assert words[2, FIRST] == words[5, FIRST] == "trusted"
    assert words[2, "base"] == words[5, "base"] == "not to be trusted"
    assert {row.dataset for row in finding.rows} == {"harmless-validation", TEMPLATE, "documents", DIRECTION}
    assert finding.provenance["against"].keys() == {"base"}
    html = (finished / "report.html").read_text("utf-8")
    assert 'id="health"' in html
    assert 'href="#health"' in html
    assert "study-health" not in html
    assert html == page.write(Store(finished))
    assert list(plots.figures(finding)) == ["health-reconstruction"]
    assert len(section.sentences(finding)) == 2 + 3  # a verdict a set, a comparison a kind of text
    lines = section.lines(finding)
    assert [(line.trust.layer, line.trust.sae_set) for line in lines] == [
        (2, FIRST),
        (2, "base"),
        (5, FIRST),
        (5, "base"),
    ]


def test_only_what_is_missing_is_measured_again(finished: Path, tmp_path: Path) -> None:
    runs = Path(shutil.copytree(finished.parent, tmp_path / "runs"))
    folder, before = runs / "demo", contents(finished)
    assert invoke("health", "testbed", "--runs", str(runs), "--name", "demo", "--against", "base", *SMALL)[0] == 0
    assert contents(folder) == before
    (folder / "health" / "layer_05" / "set_1.json").unlink()
    stamp = (folder / "health" / "layer_05" / "set_0.json").stat().st_mtime_ns
    assert invoke("health", "testbed", "--runs", str(runs), "--name", "demo", "--against", "base", *SMALL)[0] == 0
    assert contents(folder) == before
    assert (folder / "health" / "layer_05" / "set_0.json").stat().st_mtime_ns == stamp


def test_other_documents_and_sets_may_follow_in_the_same_folder(finished: Path, tmp_path: Path) -> None:
    runs = Path(shutil.copytree(finished.parent, tmp_path / "runs"))
    (tmp_path / "own.txt").write_text("A line about bread.\n\nA line about trains that leave at night.\n", "utf-8")
    tiny.save_saes(tmp_path / "few", layers=3, width=128, size=64)
    more = ["--documents", str(tmp_path / "own.txt"), "--against", f"{tmp_path}/few/layer_{{layer}}"]
    assert invoke("health", "testbed", "--runs", str(runs), "--name", "demo", *more, *SMALL)[0] == 0
    finding = Store(runs / "demo").read("findings/health.json", Finding)
    assert {row.n for row in finding.rows if row.dataset == "documents" and row.metric == "l0"} == {2}
    assert {row.setting for row in finding.rows if row.method == FIRST} == {"layer=2", "layer=5"}
    assert {row.setting for row in finding.rows if "few" in row.method} == {"layer=2"}
    assert "The set few has no SAE for layers 5: not compared there." in finding.caveats


def test_nothing_measured_is_said_and_drawn_as_nothing() -> None:
    finding = study.summarise([], caveats=("Nothing.",), provenance={})
    assert finding.caveats == ("Nothing.",)
    assert (section.sentences(finding), section.lines(finding), plots.figures(finding)) == ((), [], {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "bass"], "--against bass: SAELens knows no release 'bass'.*testbed has the further sets base"),
        (["--against", "nowhere/layer_{layer}"], r"--against nowhere/layer_\{layer\}: no SAE folder"),
        (["--documents", "nothing.txt"], "--documents 'nothing.txt': there is no such file"),
        (["--documents", "owner/name"], "--documents 'owner/name': there is no such file"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = invoke("health", "testbed", "--runs", str(tmp_path), *SMALL, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"error: {message}", err)
    assert list(tmp_path.iterdir()) == []


def test_saes_of_another_width_are_one_line(tmp_path: Path) -> None:
    tiny.save_saes(tmp_path / "foreign", layers=3, width=16, size=24)
    code, _, err = invoke(
        *("health", "testbed", "--runs", str(tmp_path / "runs"), *SMALL),
        *("--against", f"{tmp_path}/foreign/layer_{{layer}}"),
    )
    assert code == 2
    assert "reads residuals of width 16, but testbed has width 128" in err
    assert not (tmp_path / "runs").exists()


def test_another_preset_of_the_same_model_is_a_set_too() -> None:
    with pytest.raises(ValueError, match=r"--against gemma-2-9b-it-saes: .*gemma-scope-9b-it-res"):
        presets.other_saes(_target("gemma-2-9b", "google/gemma-2-9b-it"), "gemma-2-9b-it-saes")


def _target(name: str, model: str) -> presets.Target:
    return replace(presets.resolve("testbed"), name=name, model=model)


# ---- the testbed's second set


def _bytes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_base_set_is_added_beside_a_build_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    build(tmp_path / "whole", recipe=TINY)
    before = _bytes(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    report = build_base_saes(tmp_path / "whole")
    verify(tmp_path / "whole")
    made = _bytes(tmp_path / "whole")
    listed = json.loads((tmp_path / "whole" / "checksums.json").read_text("utf-8"))
    assert {name for name in made if name not in before} == {name for name in listed if name.startswith("saes-base/")}
    assert all(made[name] == content for name, content in before.items() if name != "checksums.json")
    assert json.loads((tmp_path / "whole" / "saes-base" / "figures.json").read_text("utf-8")) == report
    assert made["saes-base/layer_0/sae_weights.safetensors"] != made["saes/layer_0/sae_weights.safetensors"]
    assert made["saes-base/layer_0/cfg.json"] == made["saes/layer_0/cfg.json"]

    def kill(stage: str, done: int, of: int) -> None:
        if (stage, done) == ("sae 1", 3):
            raise Killed

    with pytest.raises(Killed):
        build_base_saes(tmp_path / "killed", progress=kill)
    assert _bytes(tmp_path / "killed") == before
    stages: set[str] = set()
    assert build_base_saes(tmp_path / "killed", progress=lambda stage, *_: stages.add(stage)) == report
    assert stages == {"sae 1"}
    assert _bytes(tmp_path / "killed") == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_base_set_needs_a_build(tmp_path: Path) -> None:
    code, _, err = invoke("testbed", "build", str(tmp_path / "none"), "--sae-set", "base")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: no testbed assets at {tmp_path / 'none'}")
    assert list(tmp_path.iterdir()) == []
    assert "choose chat or base" in invoke("testbed", "build", str(tmp_path / "none"), "--sae-set", "both")[2]
    assert "leave it out" in invoke("testbed", "build", str(tmp_path), "--sae-set", "base", "--seed", "1")[2]


def test_text_outside_any_chat_is_held_out_and_answered() -> None:
    rows = documents.from_testbed(5)
    for row, example in zip(rows, grammar.examples("harmless", split="test", count=5), strict=True):
        assert row.text.startswith(example.text)
        assert grammar.complies(example, row.text.removeprefix(example.text).strip())
    assert rows == documents.from_testbed(5)
