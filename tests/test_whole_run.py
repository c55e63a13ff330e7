"""One command, every study: a chapter for each, the same bytes twice, what cannot be done left out with its reason."""

import re
import shutil
from pathlib import Path

import pytest

from refusalscope.core.store import Store
from refusalscope.core.types import Finding
from refusalscope.pipeline import whole as studies
from refusalscope.pipeline.options import STUDIES, Options
from refusalscope.pipeline.sizes import SMALL, WHOLE, sizes_of_run
from tests.test_run import invoke

TINY = [
    *(
        "--limit",
        "12",
        "--layers",
        "4-6",
        "--k",
        "8",
        "--max-new-tokens",
        "8",
        "--best-layer",
        "6",
        "--batch-size",
        "64",
    ),
    *("--factor", "0", "--method", "cosine+attribution", "--category", "Malware", "--category", "Privacy Violation"),
]
DONE = ("categories", "graph", "minimal", "jailbreaks", "suffixes")
"""Findings that so few prompts are enough for; probes need more."""
EVERY = [word for study in DONE if study != "graph" for word in ("--study", study)]


def run(runs: Path, *more: str) -> tuple[int, str, str]:
    return invoke("run", "testbed", "--name", "demo", "--runs", str(runs), *TINY, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def begun(runs: Path) -> dict[str, bytes]:
    """What the folder held before any study but the benchmark was done."""
    assert run(runs, "--study", "none")[0] == 0
    folder = runs / "demo"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(runs: Path, begun: dict[str, bytes]) -> Path:
    assert "report.html" in begun
    code, out, err = run(runs, *EVERY)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == str(runs / "demo" / "report.html")
    return runs / "demo"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "demo")


def test_every_study_has_its_finding_and_its_chapter(whole: Path) -> None:
    store = Store(whole)
    found = {path.removeprefix("findings/").removesuffix(".json") for path in store.paths("findings", ".json")}
    assert found == {"benchmark", "health", "attribution", *DONE}
    page = (whole / "report.html").read_text()
    chapters = re.findall(r'<h2 id="([^"]+)">', page)
    assert set(DONE) <= set(chapters)
    assert {"results", "cost", "direction", "layers", "features", "why", "examples", "health"} <= set(chapters)
    for study in found:
        assert len(store.read(f"findings/{study}.json", Finding).question) > 20
    nav = page[page.index("<nav") : page.index("</nav>")]
    assert sorted(re.findall(r'href="#([^"]+)"', nav)) == sorted(chapters)


def test_the_first_page_answers_before_anything_else(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    first = page[page.index("<h1>") : page.index("<nav")]
    assert re.findall(r'<h2 id="[^"]+">([^<]+)</h2>', first) == [
        *("What refuses here", "What it costs to edit", "Which attacks pass, and why", "How well the guard sees them"),
    ]
    assert "Without any edit the model refuses" in first
    assert "Of the attacks on requests that are refused when put plainly" in first
    assert "<table" not in first


def test_a_small_run_says_that_it_is(whole: Path) -> None:
    for study in set(DONE) - {"suffixes"}:
        first = Store(whole).read(f"findings/{study}.json", Finding).caveats[0]
        assert first.startswith(f"A small run of the study {study}: "), study
        assert "measures the whole" in first


def test_the_same_command_again_changes_no_byte(whole: Path) -> None:
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    assert run(whole.parent, *EVERY)[0] == 0
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


def test_a_verb_of_its_own_measures_the_whole_anew(copy: Path) -> None:
    small = Store(copy).read("findings/minimal.json", Finding)
    code, _, err = invoke("minimal", "testbed", "--name", "demo", "--runs", str(copy.parent), *without_categories())
    assert code == 0, err
    large = Store(copy).read("findings/minimal.json", Finding)
    assert not [note for note in large.caveats if "small run" in note]
    for finding, draws in ((small, SMALL.woken_draws), (large, WHOLE.woken_draws)):
        drawn = {row.setting for row in finding.rows if row.method == "random for own set" and " draw=" in row.setting}
        assert len(drawn) == draws


def without_categories() -> list[str]:
    return TINY[: TINY.index("--category")]


def test_a_study_without_data_is_left_out_and_said_to_be(copy: Path) -> None:
    empty = copy.parent / "suffixes.csv"
    empty.write_text("goal,response\nHow?,nothing\n")
    code, out, err = run(copy.parent, "--study", "suffixes", "--suffixes", str(empty))
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("The study of suffixes was left out: ")
    assert "holds no goal with a suffix" in err
    assert err.strip() in Store(copy).read("run.json", dict)["notices"]
    page = (copy / "report.html").read_text()
    assert "The study of suffixes was left out: suffixes.csv holds no goal with a suffix" in page
    assert out.splitlines()[-1] == str(copy / "report.html")
    assert run(copy.parent, "--study", "suffixes")[2] == ""
    assert "was left out" not in (copy / "report.html").read_text()


def test_a_file_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for option in ("--suffixes", "--pairs", "--category-prompts"):
        code, _, err = run(tmp_path / "runs", option, str(tmp_path / "none.csv"))
        assert (code, err.count("\n")) == (2, 1)
        assert f"{option} {tmp_path / 'none.csv'}: there is no such file" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--study", "everything"], "--study 'everything': choose among categories, minimal"),
        (["--study", "none", "--study", "minimal"], "none and nothing else"),
        (["--study", "minimal", "--protocol", "paper"], "leave out --study"),
    ],
)
def test_what_no_run_can_do_is_one_clear_line(words: list[str], message: str, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "runs", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_options_say_which_studies_and_how_large() -> None:
    assert Options().wanted_studies == STUDIES
    assert Options(studies=("suffixes", "categories")).wanted_studies == ("categories", "suffixes")
    assert Options(studies=("none",)).wanted_studies == Options(protocol="paper").wanted_studies == ()
    assert {study.asked_by for study in studies.STUDIES.values()} <= set(STUDIES)
    assert sizes_of_run(Options()) == SMALL
    assert sizes_of_run(Options(full=True)) == sizes_of_run(Options(model="google/gemma-2-2b-it")) == WHOLE
    assert not [note for study in studies.STUDIES for note in WHOLE.caveats(study, Options())]
    assert SMALL.caveats("suffixes", Options(limit=9)) == ()


def test_a_folder_begun_without_studies_is_completed(begun: dict[str, bytes], whole: Path) -> None:
    assert not [path for path in begun if Path(path).stem in DONE and path.startswith("findings")]
    assert b"Attacks that disguise a request were not measured in this run." in begun["report.html"]
    assert b'id="minimal"' not in begun["report.html"]
    for path in ("findings/benchmark.json", "direction.safetensors", "features/table.json", "options.toml"):
        assert (whole / path).read_bytes() == begun[path]
