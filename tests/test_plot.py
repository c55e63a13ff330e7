"""Figures as files: every format of every figure, the same bytes whenever they are drawn, nothing drawn twice."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refusalscope.cli import app
from refusalscope.core.store import Store
from refusalscope.core.types import Finding
from refusalscope.report import drawing, plots
from tests.sample_run import benchmark_rows, health_rows, make_run

MAGIC = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
ROWS = {"benchmark": benchmark_rows()[:1], "health": health_rows()}
PROVENANCE = {"model": "tiny", "direction": "00ff", "features": {}, "versions": {}}


def plot(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output and standard error of `refusalscope plot`."""
    result = CliRunner().invoke(app, ["plot", str(folder), *arguments])
    return result.exit_code, result.stdout.splitlines(), result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    findings = (Finding(name, "?", rows, (), PROVENANCE) for name, rows in ROWS.items())
    return make_run(tmp_path / "run", *findings).root


def test_every_figure_is_written_in_every_format_and_nothing_twice(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    code, lines, _ = plot(run)
    assert code == 0
    names = [name for study, rows in ROWS.items() for name in plots.plots(Finding(study, "", rows, (), {}))]
    assert lines == [str(run / "figures" / f"{name}.{form}") for name in names for form in MAGIC]
    for line in lines:
        assert Path(line).read_bytes().startswith(MAGIC[Path(line).suffix[1:]])
    made = contents(run)
    assert plot(run)[1] == lines
    assert contents(run) == made
    assert plot(tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == made


def test_a_pdf_embeds_its_letters_as_outlines_and_names_no_moment(run: Path) -> None:
    assert plot(run, "--format", "pdf")[0] == 0
    pdf = (run / "figures" / "benchmark-refused.pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"/CreationDate" not in pdf
    assert not Store(run).paths("figures", ".svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "gif"), "error: figures cannot be written as 'gif': choose from svg, png, pdf\n"),
        ((), "holds no finding that is drawn: is it a finished run?\n"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, lines, said = plot(tmp_path / "nowhere", *arguments)
    assert (code, lines, said.count("\n")) == (2, [], 1)
    assert said.endswith(message)
    assert not (tmp_path / "nowhere").exists()


def test_a_figure_is_drawn_anew_when_the_drawing_has_changed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plot(run, "--format", "svg")[0] == 0
    before = contents(run / "figures")
    monkeypatch.setitem(drawing.STYLE, "font.size", 12)
    assert plot(run, "--format", "svg")[0] == 0
    assert {name for name, svg in contents(run / "figures").items() if svg != before[name]} == set(before)
