"""The main job end to end on the embedded model: it resumes, repeats byte for byte, and stops cleanly on bad input."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refusalscope.cli import app
from refusalscope.core.store import Store
from refusalscope.core.types import FeatureSet, Finding, Prompts, Responses
from refusalscope.testbed import grammar, shipped
from tests.processes import without_plan

SMALL = ["--study", "none", "--limit", "8", "--factor", "-1", "--factor", "0", "--max-new-tokens", "40"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, without_plan(result.stderr)


def _run(runs: Path, *arguments: str) -> tuple[int, str, str]:
    return invoke("run", "testbed", "--runs", str(runs), *arguments)


def _bytes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "environment.json")
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("environment.json")
    return {**found, "manifest.json": json.dumps(manifest, sort_keys=True)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    code, out, _ = _run(runs, "--name", "demo", *SMALL)
    assert code == 0
    assert out.splitlines()[-1] == str(runs / "demo" / "report.html")
    return runs / "demo"


def test_a_run_shows_what_it_promises(finished: Path) -> None:
    store = Store(finished)
    finding = store.read("findings/benchmark.json", Finding)
    assert {row.dataset for row in finding.rows} == {"harmful", "harmless", "look-alike", "harmful-validation"}
    methods = {"base", "direction", "cosine", "cosine+attribution", "random"}
    compared = {f"cosine+attribution vs {other}" for other in ("direction", "cosine", "random")}
    assert {row.method for row in finding.rows} == methods | compared | {"any"}
    assert {row.metric for row in finding.rows if row.method in compared} == {
        f"{metric}_difference" for metric in ("refused", "answered", "complied")
    }
    assert len({row.setting for row in finding.rows if row.setting.startswith("set v=")}) == 6
    rates = ("refused", "answered", "incoherent", "coherent", "complied")
    for metric in (*rates, "refused_change", "cross_entropy_change", "kl"):
        assert any(row.metric == metric for row in finding.rows), metric
    kept = store.read("findings/health.json", Finding)
    assert len(kept.rows) == (3 * 4 + 1) * 8  # kinds of text times measures, and a cosine, at every layer
    told = store.read("health/bearing.json", dict)["sentences"]
    assert any(sentence.startswith("cosine+attribution: of 20 features, 20 in layers") for sentence in told)
    assert {row.metric for row in store.read("findings/attribution.json", Finding).rows} == {
        "features",
        "candidates",
        "error",
    }
    for name in ("report.html", "options.toml", "environment.json", "features/table.json", "direction.safetensors"):
        assert (finished / name).is_file(), name
    assert len(store.paths("figures", ".svg")) >= 2


def test_every_feature_and_some_prompts_are_explained(finished: Path) -> None:
    store = Store(finished)
    table = store.read("features/table.json", dict)["rows"]
    details = store.read("features/details.json", dict)["features"]
    assert {(row["layer"], row["index"]) for row in details} == {(row["layer"], row["index"]) for row in table}
    for row in details:
        for shown in row["strongest"]:
            assert len(shown["tokens"]) == len(shown["roles"]) == len(shown["activations"])
            assert max(shown["activations"]) > 0
        assert row["alone"]["n"] == 16
    whys = store.read("prompts/why.json", dict)["prompts"]
    assert {"harmful"} <= {why["dataset"] for why in whys}
    for why in whys:
        assert why["metric_clean"] < 0 < why["metric_removed"]
        outcomes = {tried["edit"]: tried["refused"] for tried in why["edits"]}
        assert (outcomes["no edit"], outcomes["direction removed"]) == (True, False)
        totals = [part["total"] for part in why["features"]]
        assert totals == sorted(totals, reverse=True)
        assert len(why["rest"]) == len(why["tokens"])


def test_outcomes_are_exclusive_and_exhaustive(finished: Path) -> None:
    store = Store(finished)
    for path in store.paths("responses", ".jsonl"):
        for row in store.read(path, Responses).rows:
            assert sum(row.scores[name] for name in ("refused", "answered", "incoherent")) == 1


def test_a_finished_run_resumes_without_changing_a_byte(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusalscope.inputs.chat import ChatModel

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr(ChatModel, "load", load)
    files = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    assert _run(finished.parent, "--name", "demo", *SMALL)[0] == 0
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == files


def test_the_same_command_twice_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    assert _run(tmp_path, "--name", "demo", *SMALL)[0] == 0
    assert _bytes(tmp_path / "demo") == _bytes(finished)


def test_what_is_missing_or_damaged_is_made_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "demo")
    (tmp_path / "demo" / "responses" / "harmful" / "base.jsonl").unlink()
    answers = tmp_path / "demo" / "answers" / "harmless" / "direction remove.jsonl"
    answers.write_bytes(answers.read_bytes()[:200])
    (tmp_path / "demo" / "features" / "random-1.json").unlink()
    assert _run(tmp_path, "--name", "demo", *SMALL)[0] == 0
    assert _bytes(tmp_path / "demo") == _bytes(finished)


def test_other_options_in_the_same_folder_are_refused(finished: Path) -> None:
    before = _bytes(finished)
    code, _, err = _run(finished.parent, "--name", "demo", *SMALL, "--k", "5")
    assert (code, err.count("\n")) == (2, 1)
    assert "k was 20, now 5" in err
    assert _bytes(finished) == before


def test_random_sets_avoid_what_they_are_compared_with(finished: Path) -> None:
    store = Store(finished)
    compared = {f for name in ("cosine", "cosine+attribution") for f in _features(store, name)}
    for draw in range(3):
        drawn = _features(store, f"random-{draw}")
        assert not drawn & compared
        assert sorted(f.layer for f in drawn) == sorted(f.layer for f in _features(store, "cosine+attribution"))


def _features(store: Store, name: str) -> set:
    return set(store.read(f"features/{name}.json", FeatureSet).features)


def test_evaluation_prompts_are_held_out_and_distinct() -> None:
    for dataset, wanted in (("harmful", 150), ("look-alike", 100)):
        for suffix in ("", "-unseen"):
            rows = grammar.examples(dataset + suffix, split="test", count=200)
            assert len({row.intent for row in rows}) >= wanted
            trained = {
                r.intent for s in ("train", "validation") for r in grammar.examples(dataset, split=s, count=10**6)
            }
            assert not {row.intent for row in rows} & trained


def _folder(path: Path, *, harmful: int = 60) -> Path:
    """A folder laid out as `refusal_direction`, with prompts no tiny grammar knows."""
    sizes = {"splits/harmful_train": harmful, "splits/harmful_val": 20, "splits/harmless_train": 60}
    sizes |= {"splits/harmless_val": 20, "splits/harmless_test": 12}
    sizes |= {f"processed/{name}": 12 for name in ("harmbench_test", "jailbreakbench", "advbench")}
    for name, count in sizes.items():
        rows = [{"instruction": f"What is number {i} of {name}?", "category": None} for i in range(count)]
        file = path / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    return path


def test_prompts_the_model_does_not_refuse_fall_back_to_its_own(tmp_path: Path) -> None:
    data = _folder(tmp_path / "refusal_direction")
    quick = ["--limit", "8", "--factor", "0", "--max-new-tokens", "12", "--method", "cosine+attribution", "--k", "5"]
    code, out, _ = _run(tmp_path, "--name", "real", "--study", "none", "--prompts", str(data), *quick)
    assert code == 0, out
    about = json.loads((tmp_path / "real" / "run.json").read_text())
    assert about["notices"][0].startswith("testbed refuses ")
    assert " of 8 harmbench_test prompts" in about["notices"][0]
    assert any("fitted on the model's own prompts" in notice for notice in about["notices"])
    page = (tmp_path / "real" / "report.html").read_text()
    assert page.index("testbed refuses ") < page.index("<table")


def test_without_another_source_too_few_prompts_end_the_run(tmp_path: Path) -> None:
    data = _folder(tmp_path / "refusal_direction")
    model = shutil.copytree(shipped.ASSETS / "model", tmp_path / "copy")
    saes = str(shipped.ASSETS / "saes" / "layer_{layer}")
    arguments = ["run", str(model), "--saes", saes, "--prompts", str(data), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert without_plan(result.stderr).count("\n") == 1
    assert "of the 60 harmful train prompts" in result.stderr or "of 60 harmful train prompts" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_truncated_asset_is_named_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(shipped.ASSETS, tmp_path / "assets")
    weights = copy / "saes" / "layer_3" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    whole = shipped.verify
    monkeypatch.setattr(shipped, "verify", lambda: whole(copy))
    code, _, err = _run(tmp_path / "runs")
    assert (code, err.count("\n")) == (2, 1)
    assert "layer_3" in err
    assert "sha256" in err
    assert not (tmp_path / "runs").exists()


def test_the_published_protocol_runs_on_one_set_and_says_so(tmp_path: Path) -> None:
    methods = ["--method", "attribution", "--method", "activation-difference", "--method", "cosine+attribution"]
    arguments = ["--name", "p", "--protocol", "paper", "--limit", "20", "--factor", "0", "--max-new-tokens", "8"]
    code, _, err = _run(tmp_path, *arguments, "--best-layer", "6", "--dataset", "harmful", *methods)
    assert code == 0, err
    store = Store(tmp_path / "p")
    about = store.read("run.json", dict)
    assert about["notices"][0].startswith("The published protocol was asked for")
    fitted, judged = (store.read(f"prompts/{name}.jsonl", Prompts) for name in ("harmful-train", "harmful"))
    assert fitted.rows == judged.rows
    assert {row.method for row in store.read("findings/attribution.json", Finding).rows} == {"paper"}
    for name in ("attribution", "activation-difference", "cosine+attribution"):
        assert len(store.read(f"features/{name}.json", FeatureSet)) == 20
    assert _run(tmp_path, "--name", "q", "--protocol", "paper", "--full")[0] == 2
