"""The notebook is its source, and runs from top to bottom as it is committed."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from refusalscope.core.store import Store
from refusalscope.core.types import Finding

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "notebooks" / "benchmark.py"
BUILT = SOURCE.with_suffix(".ipynb")
FIGURES = 5  # refused, answered, did what was asked, cost, induced


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebook_is_what_make_notebook_builds_and_keeps_no_output() -> None:
    built = nbformat.read(BUILT, as_version=4)
    assert cells(built) == cells(jupytext.read(SOURCE)), "run make notebook"
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel is a process of its own: it finds the package, and leaves nothing in anybody's home.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(BUILT, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES
    folder = tmp_path / "runs" / "testbed-30"
    assert (folder / "report.html").is_file()
    finding = Store(folder).read("findings/benchmark.json", Finding)
    shares = {row.method: row.estimate for row in finding.rows if (row.dataset, row.metric) == ("harmful", "refused")}
    assert shares["base"] is not None
    assert shares["cosine+attribution"] is not None
    assert shares["base"] - shares["cosine+attribution"] > 0.8
