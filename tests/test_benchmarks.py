"""Benchmarks run, what they find can be printed, and the page in docs/ is what the results beside them make of it.

Their toy sizes, in this process: what is found at these is no figure of anything.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MEASURED = ("attribution", "generation", "quadrature", "scaling")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def _made(folder: Path, name: str = "made", **ratios: float) -> Path:
    """A folder with a result of one ratio or more, a table, a curve, and a bar either way."""
    folder.mkdir(exist_ok=True)
    result = {
        "benchmark": name,
        "command": f"python benchmarks/{name}.py",
        "machine": {"processor": "one", "cores": 2, "threads": 1, "memory": "1 GiB", "system": "Linux"}
        | {"python": "3", "torch": "2", "transformers": "5"},
        "ratios": ratios,
        "bars": [
            {"claim": "quick", "found": 3.14159, "least": 3, "most": None, "met": True},
            {"claim": "small", "found": 200.4, "least": None, "most": 100.0, "met": False},
        ],
        "tables": [{"title": "Rows", "columns": ["name|s", "n"], "rows": [["a", 1.23456], ["b", None]], "note": "So."}],
        "curves": [{"title": "Up", "x": "n", "y": "s", "log": True, "series": {"a": [[1, 2.0], [2, 4.0], [4, 9.0]]}}],
    }
    (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize("name", MEASURED)
def test_a_benchmark_runs_and_its_result_is_printed(
    name: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--size", "toy", "--json", str(tmp_path / f"{name}.json")])
    script(name).main()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["benchmark"] == name
    assert found["ratios"] or found["bars"]
    document = script("document")
    prose = tmp_path / "prose.md.in"
    prose.write_text(f'{{{{ claims() }}}}\n{{{{ benchmark("{name}") }}}}\n')
    document.main(["--results", str(tmp_path), "--prose", str(prose), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert all(bar["claim"] in page for bar in found["bars"])
    assert all(table["title"] in page for table in found["tables"])
    assert len(list((tmp_path / "page").glob("*.svg"))) == len(found["curves"])


def test_the_page_says_what_is_met_what_is_not_and_what_was_never_measured(script: Any, tmp_path: Path) -> None:
    document = script("document")
    prose = '{{ claims() }}\n\n{{ benchmark("made") }}\n\n{{ benchmark("gpu") }}\n'
    page = document.rendered(document.read(_made(tmp_path / "results", speed=2.0)), prose, "figures")
    assert "| quick | at least 3 | 3.14 | met | `python benchmarks/made.py` |" in page
    assert "| small | at most 100 | 200 | **not met** | `python benchmarks/made.py` |" in page
    assert "| name\\|s | n |\n| --- | --: |\n| a | 1.23 |\n| b | – |" in page
    assert "![Up](figures/made-1.svg)" in page
    assert "there is no result of `benchmarks/gpu.py`" in page


def test_the_same_results_give_the_same_bytes(script: Any, tmp_path: Path) -> None:
    document = script("document")
    _made(tmp_path / "results", speed=2.0)
    prose = tmp_path / "prose.md.in"
    prose.write_text('{{ benchmark("made") }}')
    made = []
    for name in ("one", "two"):
        page = tmp_path / name / "page.md"
        document.main(["--results", str(tmp_path / "results"), "--prose", str(prose), "--page", str(page)])
        made.append({file.name: file.read_bytes() for file in (page, *(tmp_path / name / "page").iterdir())})
    assert set(made[0]) == {"page.md", "made-1.svg"}
    assert made[0] == made[1]


def test_a_figure_of_an_earlier_result_is_gone(script: Any, tmp_path: Path) -> None:
    document = script("document")
    prose = tmp_path / "prose.md.in"
    prose.write_text("nothing")
    for results in (_made(tmp_path / "results", speed=2.0), tmp_path / "none"):
        document.main(["--results", str(results), "--prose", str(prose), "--page", str(tmp_path / "page.md")])
    assert not list((tmp_path / "page").iterdir())


def test_the_committed_page_is_made_of_the_committed_results(script: Any) -> None:
    document = script("document")
    results = document.read(document.RESULTS)
    figures = document.PAGE.with_suffix("")
    assert document.PAGE.read_text() == document.rendered(results, document.PROSE.read_text(), figures.name)
    curves = {
        document.figure_name(stem, number): curve
        for stem, result in results.items()
        for number, curve in enumerate(result["curves"])
    }
    assert {file.name for file in figures.glob("*")} == set(curves)
    # By what is drawn, not by bytes: these belong to a version of matplotlib.
    assert all(document.mark(curve) in (figures / name).read_text() for name, curve in curves.items())


@pytest.mark.parametrize(
    ("ratio", "code", "said"),
    [(2.0, 0, "held  made: speed: 2, was 2"), (1.61, 0, "held"), (1.59, 1, "FELL  made: speed: 1.59, was 2")],
)
def test_a_ratio_may_fall_by_a_fifth(
    ratio: float, code: int, said: str, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed, new = _made(tmp_path / "old", speed=2.0, kept=3.0), _made(tmp_path / "new", speed=ratio, kept=3.0)
    with pytest.raises(SystemExit) as ended:
        script("check").main([str(new), "--committed", str(committed)])
    assert ended.value.code == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == "held  made: kept: 3, was 3"
    assert lines[1].startswith(said)


def test_ratios_that_are_new_or_gone_are_named(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed, new = _made(tmp_path / "old", was=2.0), _made(tmp_path / "new", now=1.0)
    _made(committed, "elsewhere", far=1.0)
    with pytest.raises(SystemExit) as ended:
        script("check").main([str(new), "--committed", str(committed)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines() == ["new   made: now: 1", "gone  made: was: was 2"]


def test_results_of_other_commands_are_not_compared(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed, new = _made(tmp_path / "old", speed=1.0), _made(tmp_path / "new", speed=1.0)
    file = new / "made.json"
    file.write_text(file.read_text().replace("benchmarks/made.py", "benchmarks/made.py --size toy"))
    for folder in (new, tmp_path / "empty"):
        with pytest.raises(SystemExit) as ended:
            script("check").main([str(folder), "--committed", str(committed)])
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
