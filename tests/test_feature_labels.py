"""Labels from a server to the page: in the run folder, escaped, linked and counted, and never in the way of a run."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refusalscope.core.store import Store
from refusalscope.core.types import Feature, Finding
from refusalscope.inputs import neuronpedia as asking
from refusalscope.inputs import presets, releases
from refusalscope.pipeline import feature_labels
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options
from refusalscope.report import labels, page
from refusalscope.testbed import shipped
from tests.judge_server import free_port
from tests.neuronpedia_server import NAME, Neuronpedia, Said, feature, neuronpedia
from tests.sample_run import ATTACK, add_close_up, benchmark_rows, health_rows, make_run
from tests.test_report import Tree
from tests.test_run import invoke

SMALL: dict[str, Any] = {"model": "testbed", "limit": 3, "max_new_tokens": 2, "best_layer": 6, "batch_size": 64}
SMALL |= {"methods": ("cosine",), "k": 4, "layers": (6,), "sizes": (4,), "factors": (0.0,)}
WORDS = [*("--limit", "3", "--max-new-tokens", "2", "--best-layer", "6", "--batch-size", "64")]
WORDS += ["--method", "cosine", "--k", "4", "--layers", "6", "--sizes", "4", "--factor", "0"]
"""The same options on the command line."""
QUICK = asking.Limits(pause=0.0)
LINK = re.compile(r'<a href="(https://www\.neuronpedia\.org/[^"]*)" rel="noopener noreferrer">')


class Everything(dict[str, object]):
    """Neuronpedia where every second feature is explained, hostile words among them."""

    def get(self, key: str, default: object = None) -> object:
        index = int(key.split("/")[-1])
        return feature(index, f"says {key} {ATTACK}") if index % 2 else feature(index)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The testbed's SAEs of two layers, with a name at Neuronpedia in their configurations."""
    folder = tmp_path_factory.mktemp("saes")
    for layer in (5, 6):
        made = shutil.copytree(shipped.ASSETS / "saes" / f"layer_{layer}", folder / f"layer_{layer}")
        config = json.loads((made / "cfg.json").read_text())
        config["metadata"]["neuronpedia_id"] = NAME.format(layer=layer)
        (made / "cfg.json").write_text(json.dumps(config))
    return f"{folder}/layer_{{layer}}"


@pytest.fixture(scope="module")
def made(saes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was offline."""
    folder = tmp_path_factory.mktemp("labels") / "demo"
    command(folder, saes)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with the network allowed and nothing asked yet."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(asking.CACHE, str(tmp_path / "cache"))
    return shutil.copytree(made, tmp_path / "demo")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Neuronpedia]:
    with neuronpedia(Everything()) as made:
        monkeypatch.setenv(asking.ADDRESS, made.url)
        yield made


def command(folder: Path, saes: str) -> str:
    """The page after a command, always the same one."""
    words = ("sweep", "testbed", "--saes", saes, "--name", folder.name, "--runs", str(folder.parent), *WORDS)
    code, _, err = invoke(*words)
    assert code == 0, err
    return (folder / "report.html").read_text()


def held(folder: Path, saes: str, limits: asking.Limits = QUICK, *, wanted: bool = True) -> dict[str, Any]:
    """The artifact after the step that makes it."""
    job = Job(Options(**SMALL, saes=saes, no_feature_labels=not wanted), folder)
    try:
        feature_labels.keep_labels(job, limits=limits)
    finally:
        job.store.claim.release()
    return job.store.read(labels.FILE, dict)


def test_a_run_without_a_network_says_so_once(made: Path) -> None:
    html = (made / "report.html").read_text()
    found = Store(made).read(labels.FILE, dict)
    assert len(found["features"]) == 4
    assert {row["label"] for row in found["features"]} == {None}
    count = len(found["features"])
    assert html.count(f"{count} of {count} features have no label: {asking.OFFLINE}.") == 1
    assert html.count('<small class="label">no label</small></th>') == 4


def test_labels_come_with_a_later_command_and_stay(folder: Path, saes: str, site: Neuronpedia) -> None:
    html = command(folder, saes)
    found = Store(folder).read(labels.FILE, dict)["features"]
    places = {f"{NAME.format(layer=row['layer'])}/{row['index']}": row for row in found}
    assert sorted(site.asked) == sorted(f"/api/feature/{place}" for place in places)
    assert all((row["label"] is not None) == row["index"] % 2 for row in found)
    assert any(row["label"] for row in found)
    tree = Tree(html)
    assert not tree.faults
    assert not tree.names() & {"script", "img"}
    for place, row in places.items():
        assert (f"says {place} &lt;script&gt;" in html) == (row["label"] is not None)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert command(folder, saes) == html
    assert page.write(Store(folder)) == html
    assert len(site.asked) == len(places)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {
        folder / "environment.json",
        folder / "manifest.json",
    }


def test_without_labels_none_are_asked_for(folder: Path, saes: str, site: Neuronpedia) -> None:
    found = held(folder, saes, wanted=False)
    assert (site.asked, found["reason"]) == ([], feature_labels.SWITCHED_OFF)
    assert {row["label"] for row in found["features"]} == {None}


@pytest.mark.parametrize("said", [Said(never=True), Said(500), Said(429)])
def test_whatever_the_server_does_the_page_says_why_and_the_next_command_asks_again(
    said: Said, folder: Path, saes: str, site: Neuronpedia
) -> None:
    site.script = lambda _path, before: said if before else None
    found = held(folder, saes, asking.Limits(answer=0.2, pause=0.0))
    assert found["reason"]
    assert found["reason"] in page.write(Store(folder))
    site.script = lambda _path, _before: None
    assert held(folder, saes)["reason"] == ""
    assert found["reason"] not in page.write(Store(folder))


def test_nobody_there_is_no_failed_run(folder: Path, saes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(asking.ADDRESS, f"http://127.0.0.1:{free_port()}")
    assert f"have no label: {asking.UNREACHABLE}." in command(folder, saes)


def test_the_testbed_has_no_labels_and_one_line_about_it(folder: Path, site: Neuronpedia) -> None:
    assert feature_labels.names_of(presets.resolve("testbed")) == {}
    store = Store(folder)
    store.put(labels.FILE, "", feature_labels.described({}, [], asking.Found({}, "")))
    html = page.write(store)
    assert 'class="label"' not in html[html.index("</style>") :]
    assert html.count("Neuronpedia") == 1


def test_every_feature_that_the_page_names_is_asked_for_the_sets_first(tmp_path: Path) -> None:
    benchmark = Finding("benchmark", "Does it?", benchmark_rows(), (), {})
    store = make_run(tmp_path / "run", benchmark, Finding("health", "Are they?", health_rows(), (), {}))
    row = health_rows()[0]
    store.put("findings/minimal.json", "", Finding("minimal", "?", (replace(row, method="3/335"),), (), {}))
    store.put("graph/graph.json", "", {"nodes": [{"layer": 1, "index": 9}, {"layer": 2, "index": 780}]})
    store.put("categories/matrix.json", "", {"features": [{"layer": 1, "index": 563}]})
    found = list(dict.fromkeys(feature_labels.shown(store)))
    assert found == [Feature(1, 9), Feature(2, 780), Feature(1, 563), Feature(3, 335)]


NAMES = {"1": "tiny-model/1-tiny-res", "2": "tiny-model/2-tiny-res"}


def labelled(*rows: tuple[int, str | None, bool], reason: str = "") -> dict[str, object]:
    features = [{"layer": 1, "index": index, "label": label, "answered": answered} for index, label, answered in rows]
    return {"names": NAMES, "features": features, "reason": reason}


@pytest.mark.parametrize(
    ("rows", "reason", "said"),
    [
        ([(9, "a", True)], "", []),
        ([(9, None, True)], "", ["1 of 1 features has no label: Neuronpedia has none for it."]),
        ([(9, None, False)], "away", ["1 of 1 features has no label: away."]),
        (
            [(9, "a", True), (10, None, True), (11, None, False), (12, None, False)],
            "away",
            ["3 of 4 features have no label: Neuronpedia has none for 1; away (2)."],
        ),
    ],
)
def test_the_page_says_how_many_have_no_label_and_why(
    rows: list[tuple[int, str | None, bool]], reason: str, said: list[str], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    store.put(labels.FILE, "", labelled(*rows, reason=reason))
    found = labels.read(store)
    assert [sentence for sentence in found.sentences if "no label" in sentence] == said
    assert any("mostly by a language model" in sentence for sentence in found.sentences) == bool(found.texts)


def test_labels_stand_wherever_a_feature_is_named(tmp_path: Path) -> None:
    benchmark = Finding("benchmark", "Does it?", benchmark_rows(), (), {})
    store = add_close_up(make_run(tmp_path / "run", benchmark, Finding("health", "?", health_rows(), (), {})))
    store.put(labels.FILE, "", labelled((9, f"words {ATTACK}", True), (10, None, True)))
    html = page.write(store)
    tree = Tree(html)
    assert not tree.faults
    assert not tree.names() & {"script", "img"}
    words = "words &lt;script&gt;"
    table = html[html.index('<h2 id="features">') : html.index('<h2 id="feature-pages">')]
    entry = html[html.index('id="feature-1-9"') : html.index('id="feature-1-10"')]
    other = html[html.index('id="feature-1-10"') : html.index('id="feature-1-11"')]
    view = html[html.index('id="why-0"') : html.index('id="why-1"')]
    assert f'<small class="label">{words}' in table
    assert words in entry
    assert f'<a href="{asking.SITE}/tiny-model/1-tiny-res/9" rel="noopener noreferrer">' in entry
    assert "<dt>Label</dt><dd>no label" in other
    assert f"“{words}" in view


@pytest.mark.parametrize(
    "damaged",
    [{}, {"names": [1]}, {"names": NAMES}, {**labelled(), "features": [{"layer": 7, "index": 1, "label": None}]}],
)
def test_a_damaged_artifact_is_named(damaged: dict[str, object], tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(labels.FILE, "", damaged)
    with pytest.raises(ValueError, match=re.escape(f"{labels.FILE} does not hold labels as expected")):
        labels.read(store)


def test_names_that_lead_elsewhere_are_no_links(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(labels.FILE, "", {**labelled((9, "a", True)), "names": {"1": '../"><script>'}})
    assert labels.read(store).pages == {}


def test_what_saelens_calls_the_saes_comes_before_the_preset() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    registry = get_pretrained_saes_directory()
    for name, preset in presets.presets().items():
        if "neuronpedia" in preset:
            names = releases.matching(registry[preset["sae_release"]].saes_map, preset["sae_id"])
            told = releases._told_by_registry(registry, preset["sae_release"], names)
            assert set(told) == set(names), name
            assert all(shown.startswith(preset["neuronpedia"].format(layer=at)) for at, shown in told.items()), name


def test_other_saes_than_the_presets_do_not_get_its_name(monkeypatch: pytest.MonkeyPatch, saes: str) -> None:
    assert feature_labels.names_of(presets.resolve("testbed", saes=saes)) == {
        layer: NAME.format(layer=layer) for layer in (5, 6)
    }
    assert feature_labels.names_of(presets.resolve("testbed", saes=saes, layers=[6])) == {6: NAME.format(layer=6)}
