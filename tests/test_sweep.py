"""A sweep answers validation prompts alone, resumes cell by cell, and what it chooses is what a run then uses."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from refusalscope.core import stats
from refusalscope.core.store import Store
from refusalscope.core.types import Direction, FeatureSet, Finding, Prompt, Prompts, Responses
from refusalscope.inputs import prompts
from refusalscope.pipeline import options as run_options
from refusalscope.report import plots, strength
from refusalscope.report.drawing import render
from refusalscope.studies import sweep
from refusalscope.studies.sweep import Candidate
from tests.sample_run import rate
from tests.test_run import _bytes, invoke

SMALL = ["--limit", "16", "--max-new-tokens", "12", "--best-layer", "6", "--sizes", "4,8", "--value", "6"]
SMALL += ["--factor", "0", "--factor", "-1"]
CLUSTERS = [str(i) for i in range(100)]


def shares(wanted: int, n: int = 100) -> list[float]:
    return [float(i < wanted) for i in range(n)]


def candidate(c: float, wanted: int, kl: float, k: int = 20) -> Candidate:
    return Candidate(f"scale c={c:g} k={k}", shares(wanted), kl, (k, abs(1 - c)))


PROTOTYPE = [candidate(0, 88, 0.02), candidate(-1, 98, 0.05), candidate(-3, 64, 0.4)]


def test_an_interior_best_is_chosen() -> None:
    found = sweep.choose(PROTOTYPE, shares(5), CLUSTERS)
    assert found == ("scale c=-1 k=20", "scale c=-1 k=20", ("scale c=-1 k=20",))


def test_of_what_is_not_discernibly_worse_the_cheapest_is_chosen() -> None:
    found = sweep.choose([candidate(0, 96, 0.02), *PROTOTYPE[1:]], shares(5), CLUSTERS)
    assert found == ("scale c=0 k=20", "scale c=-1 k=20", ("scale c=0 k=20", "scale c=-1 k=20"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (candidate(-1, 98, 0.05, k=10), candidate(-1, 98, 0.05, k=20)),
        (candidate(0, 98, 0.05), candidate(-2, 98, 0.05)),
        (candidate(0, 97, 0.05), candidate(-2, 98, 0.05)),
    ],
)
def test_ties_go_to_the_mildest(one: Candidate, other: Candidate) -> None:
    for pair in ([one, other], [other, one]):
        found = sweep.choose(pair, shares(5), CLUSTERS)
        assert found is not None
        assert found.setting == one.setting


def test_what_does_nothing_or_was_not_scored_is_not_chosen() -> None:
    unscored = Candidate("scale c=-9 k=20", [float("nan")] * 100, 0.0, (20, 10.0))
    assert sweep.choose([candidate(0.5, 7, 0.001), unscored], shares(5), CLUSTERS) is None
    found = sweep.choose([*PROTOTYPE, candidate(0.5, 7, 0.001), unscored], shares(5), CLUSTERS)
    assert found is not None
    assert found.setting == "scale c=-1 k=20"


def test_the_front_holds_what_no_other_beats() -> None:
    points = {"a": (0.9, 0.1), "b": (0.8, 0.2), "c": (0.95, 0.3), "d": (0.9, 0.05), "e": (0.95, 0.4), "f": (0.1, 0.05)}
    assert sweep.pareto(points) == ["d", "c"]


def test_more_validation_prompts_leave_what_is_fitted_on_as_it_was() -> None:
    def made(name: str, *texts: str) -> Prompts:
        return Prompts(name, tuple(Prompt(text, text, "harmful") for text in texts))

    fitting = {name: made(name, f"{name} 1") for name in prompts.FITTING}
    sets = prompts.PromptSets(fitting, {"harmful": made("harmful", "judged")})
    more = {name: made(name, f"{name} 1", "judged", "Harmful-train  1", f"{name} 2") for name in prompts.FITTING}
    wide = prompts.widened(sets, more)
    assert wide.fitting == fitting
    assert set(wide.validation) == {"harmful-validation", "harmless-validation"}
    assert wide.validation["harmful-validation"].ids == ("harmful-validation 1", "harmful-validation 2")
    fewer = prompts.without(wide, {"harmful-validation": ["harmful-validation 2"]}, why="too long")
    assert fewer.validation["harmful-validation"].ids == ("harmful-validation 1",)
    assert fewer.notes == ("1 of 2 harmful-validation prompts are too long: left out.",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "--sizes", "4-x"], "--sizes '4-x': write sizes as 9, or 3,7, or 3-7"),
        (["sweep", "--sizes", "9-4"], "--sizes '9-4': write sizes as 9, or 3,7, or 3-7"),
        (["sweep", "--sizes", "1-99999999999"], "--sizes '1-99999999999': write sizes as 9, or 3,7, or 3-7"),
        (["sweep", "--sizes", "0"], "--sizes: Input should be greater than or equal to 1"),
        (["sweep", "--full"], "--full is the grid of `run`: a sweep has its own"),
        (["sweep", "--protocol", "paper"], "a sweep leaves these untouched"),
        (["run", "--config", "mine.toml"], "--sizes (in mine.toml) is an option of `sweep` alone"),
    ],
)
def test_what_a_sweep_does_not_take(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("sizes = [3]\n")
    code, _, err = invoke(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not Path("runs").exists()


def test_only_a_sweep_has_sizes() -> None:
    assert run_options.make({}, None, defaults=run_options.SWEEP).sizes == (10, 20, 30, 40, 50)
    assert run_options.make({}, None).sizes is None
    assert invoke("run", "--choose")[0] == 2
    swept = run_options.make({"methods": ["random", "cosine", "attribution"]}, None, defaults=run_options.SWEEP)
    assert (swept.wanted_methods, swept.set_sizes) == (("cosine",), (20, 50))


def _sweep(runs: Path, *more: str) -> Path:
    code, out, err = invoke("sweep", "testbed", "--runs", str(runs), *SMALL, *more)
    assert code == 0, err
    assert out.splitlines()[-1] == str(runs / "testbed-sweep" / "report.html")
    return runs / "testbed-sweep"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _sweep(tmp_path_factory.mktemp("sweep"), "--choose")


def test_every_cell_has_its_rates_and_costs(swept: Path) -> None:
    finding = Store(swept).read("findings/sweep.json", Finding)
    settings = {f"scale c={c} k={k}" for c in ("0", "-1") for k in (4, 8)} | {"set v=6 k=20"}
    cells = strength.by_setting(finding)
    assert set(cells) == settings
    for rows in cells.values():
        assert {"refused", "answered", "coherent", "refused_change", "cross_entropy_change", "kl"} <= set(rows)
    assert {row.dataset for row in finding.rows} == {"harmful-validation", "harmless-validation"}
    assert cells["scale c=-1 k=8"]["refused"].n == 16
    page = (swept / "report.html").read_text()
    assert "How strong should the edit be?" in page
    assert "refusalscope sweep testbed" in page
    assert page.count("<svg") == 3


def test_the_test_prompts_stay_untouched(swept: Path) -> None:
    answered = {
        path.parent.name for folder in ("answers", "responses", "costs") for path in swept.glob(f"{folder}/*/*")
    }
    assert answered == {"harmful-validation", "harmless-validation"}
    held = Store(swept).read("prompts/harmful.jsonl", Prompts)
    for path in Store(swept).paths("responses", ".jsonl"):
        assert not {row.prompt_id for row in Store(swept).read(path, Responses).rows} & set(held.ids)


def test_a_finished_sweep_changes_nothing_and_lost_cells_are_made_again(swept: Path) -> None:
    before = _bytes(swept)
    times = {file: file.stat().st_mtime_ns for file in swept.rglob("*") if file.is_file()}
    _sweep(swept.parent, "--choose")
    assert {file: file.stat().st_mtime_ns for file in swept.rglob("*") if file.is_file()} == times
    (swept / "costs" / "harmless-validation" / "cosine+attribution scale c=-1 k=4.json").unlink()
    (swept / "answers" / "harmless-validation" / "cosine+attribution set v=6 k=20.jsonl").write_bytes(b"{")
    _sweep(swept.parent, "--choose")
    assert _bytes(swept) == before


def test_a_run_uses_exactly_the_chosen_cell(swept: Path, tmp_path: Path) -> None:
    chosen = (swept / "chosen.toml").read_text()
    told = tomllib.loads(chosen)
    setting = Store(swept).read("findings/sweep.json", Finding).provenance["chosen"]["scale"]["setting"]
    assert setting == f"scale c={told['factors'][0]:g} k={told['k']}"
    assert told["methods"] == ["cosine+attribution", "random"]
    assert (told["limit"], told["best_layer"], "sizes" in told) == (16, 6, False)
    assert chosen.startswith("# Most harmful-validation prompts are answered coherently at ")
    config = ["--config", str(swept / "chosen.toml"), "--runs", str(tmp_path)]
    code, _, err = invoke("features", *config)
    assert code == 0, err
    run, was = Store(tmp_path / "testbed"), Store(swept)
    largest = was.read("features/cosine+attribution-k8.json", FeatureSet)
    assert run.read("features/cosine+attribution.json", FeatureSet) == largest.top(told["k"])
    assert run.read("direction.safetensors", Direction).scores == was.read("direction.safetensors", Direction).scores


@pytest.fixture
def drawn() -> Finding:
    rows = [rate("harmful-validation", "base", metric, "", 0.1) for metric in ("refused", "answered", "coherent")]
    for c, answered in ((0, 0.6), (-1, 0.98), (-3, 0.64)):
        for k in (10, 20):
            setting = f"scale c={c} k={k}"
            for metric, share in (("refused", 0.02), ("answered", answered), ("coherent", 0.9)):
                coverage = 0.5 if (c, k) == (-3, 20) else 1.0
                rows.append(rate("harmful-validation", "cosine", metric, setting, share, width=0.02, coverage=coverage))
            costs = [rate("harmless-validation", "cosine", m, setting, 0.1 - c, width=0.05) for m in sweep.COSTS]
            rows += costs
    for value in (1, 2):
        shares = [rate("harmless-validation", "cosine", m, f"set v={value} k=20", 0.4) for m in ("refused", "coherent")]
        rows += shares
    near = ("scale c=-1 k=10", "scale c=-1 k=20")
    found = {"scale": {"setting": near[0], "best": near[1], "near": near}}
    return Finding("sweep", "How strong?", tuple(rows), (), {"chosen": found})


def test_the_figures_show_every_cell_and_flag_what_is_thin(drawn: Finding) -> None:
    made = plots.plots(drawn)
    assert list(made) == ["sweep-grid", "sweep-pareto", "sweep-induced"]
    svg = render(made["sweep-grid"].figure, "svg").decode()
    assert len(re.findall(r">98<", svg)) == 2
    assert "pattern" in svg  # the hatching of cells that rest on few prompts
    thick = replace(drawn, rows=tuple(replace(row, coverage=1.0) for row in drawn.rows))
    assert "pattern" not in render(plots.plots(thick)["sweep-grid"].figure, "svg").decode()
    assert "<image" not in svg


def test_the_words_say_where_the_best_lies_and_what_was_chosen(drawn: Finding) -> None:
    first, second, third = strength.sentences(drawn)
    assert "at c = −1, k = 20: 98.0%" in first
    assert first.endswith("; at the edge of what was tried in set size.")
    assert second.startswith("Chosen is c = −1, k = 10, the cheapest by KL divergence of the 2 strengths, of 6 tried,")
    assert third.startswith("No value tried makes the model refuse")
    larger = [replace(row, setting=row.setting.replace("k=20", "k=30")) for row in drawn.rows if "k=20" in row.setting]
    assert strength.sentences(replace(drawn, rows=(*drawn.rows, *larger)))[0].endswith("; inside what was tried.")


def test_what_is_not_known_has_no_colour_of_the_scale(drawn: Finding) -> None:
    unknown = [
        replace(row, n=0, estimate=None, low=None, high=None, coverage=0.0) if row.metric == "refused" else row
        for row in drawn.rows
    ]
    svg = render(plots.plots(replace(drawn, rows=tuple(unknown)))["sweep-grid"].figure, "svg").decode()
    assert "#cccccc" in svg
    assert "#cccccc" not in render(plots.plots(drawn)["sweep-grid"].figure, "svg").decode()


def test_the_rule_is_said_to_tell_apart_what_it_does() -> None:
    for n in (100, 150):
        fewest = sweep._fewest_discordant(n)
        assert fewest is not None
        lows = [stats.paired_difference([1.0] * d + [0.0] * (n - d), [0.0] * n).low for d in (fewest - 1, fewest)]
        assert (lows[0] or 0) <= 0 < (lows[1] or 0)
    assert sweep._fewest_discordant(2) is None
