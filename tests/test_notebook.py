"""The notebooks are their sources, and run from top to bottom as they are committed."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from refusalscope.core.store import Store
from refusalscope.core.types import Finding
from refusalscope.studies.health import verdicts
from refusalscope.studies.probes import ATTACKS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
FIGURES = {
    "benchmark": 5,  # refused, answered, did what was asked, cost, induced
    "cat_harm": 9,  # overlap, shares, transfer, own; drops, graph; sizes, features, woken
    "probes": 4,  # who tells what, what is flagged, reliability, learning curves
    "sae_transfer": 1,  # both sets, by kind of text
    "wildjailbreak": 8,  # drops, families, features, telling, restored; curve, words, one goal
}


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_every_notebook_is_known() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_is_what_make_notebook_builds_and_keeps_no_output(name: str) -> None:
    built = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert cells(built) == cells(jupytext.read(NOTEBOOKS / f"{name}.py")), "run make notebook"
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they run, one after the other: what one has fitted the next reads, as it would for a user."""
    return tmp_path_factory.mktemp("notebooks")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel is a process of its own: it finds the package, and leaves nothing in anybody's home.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(folder / "jupyter"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name]


def test_the_benchmark_runs_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("benchmark", folder, monkeypatch)
    made = folder / "runs" / "testbed-30"
    assert (made / "report.html").is_file()
    finding = Store(made).read("findings/benchmark.json", Finding)
    shares = {row.method: row.estimate for row in finding.rows if (row.dataset, row.metric) == ("harmful", "refused")}
    assert shares["base"] is not None
    assert shares["cosine+attribution"] is not None
    assert shares["base"] - shares["cosine+attribution"] > 0.8


@pytest.mark.parametrize(
    ("name", "studies"),
    [("cat_harm", ("categories", "graph", "minimal")), ("wildjailbreak", ("jailbreaks", "suffixes"))],
)
def test_the_studies_run_from_top_to_bottom(
    name: str, studies: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(name, folder, monkeypatch)
    made = folder / "runs" / "testbed-studies"
    assert (made / "report.html").is_file()
    for study in studies:
        assert any(row.n for row in Store(made).read(f"findings/{study}.json", Finding).rows)


def test_two_sets_of_saes_are_compared_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("sae_transfer", folder, monkeypatch)
    made = folder / "runs" / "testbed-health"
    assert (made / "report.html").is_file()
    words = {(trust.sae_set, trust.word) for trust in verdicts(Store(made).read("findings/health.json", Finding))}
    assert words == {("sae", "trusted"), ("base", "not to be trusted")}


def test_probes_and_a_guard_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("probes", folder, monkeypatch)
    made = folder / "runs" / "testbed-probes"
    assert (made / "report.html").is_file()
    finding = Store(made).read("findings/probes.json", Finding)
    guard = finding.find(" vs ".join(ATTACKS), str(finding.provenance["guard"]), "auroc", "intent")
    assert guard is not None
    assert guard.estimate is not None
    assert guard.estimate > 0.85
