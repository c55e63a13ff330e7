"""What drives what: drops beside controls, edges beside effects, and a graph that reads back as it was written."""

import json
from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch

from refusalscope.core import stats
from refusalscope.core.types import Direction, Feature, FeatureSet, Finding, Prompts, layers_of
from refusalscope.inputs import categories
from refusalscope.mechanism import features
from refusalscope.mechanism.features import LayerSurvey
from refusalscope.pipeline import fit, graph, upstream
from refusalscope.pipeline.category_sets import CategorySets
from refusalscope.pipeline.figures import write_figures
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.sizes import WHOLE
from refusalscope.report import graph as words
from refusalscope.report import plots
from refusalscope.report.drawing import render
from refusalscope.report.network import GRAPH, WEAK, network
from refusalscope.studies import graph as study
from refusalscope.studies.graph import Drops, Edges
from tests.test_run import _bytes

OPTIONS = Options(limit=8, best_layer=6, nodes=6, factors=(-1.0,), keep_unrefused=True)
NAMES = ("Malware",)


def drops(category: str, left: float, control: float, *, draws: int = 4, n: int = 12) -> Drops:
    """A category whose features leave a share of the activity, and whose controls leave about another."""
    before = [10.0 + i for i in range(n)]
    arms = [{"kind": "specific", "draw": None, "factor": 0.0, "k": 3, "activity": [left * b for b in before]}]
    for draw in range(draws):
        after = [(control + 0.01 * draw) * b for b in before]
        arms.append({"kind": "uniform", "draw": draw, "factor": 0.0, "k": 3, "activity": after})
    arms = [arm | {"refusal": [0.5] * n} for arm in arms]
    ids = [f"{category}-{i}" for i in range(n)]
    return Drops(category, ids, [f"{category}-{i // 2}" for i in range(n)], ["1/2"], ["3/4"], before, [0.9] * n, arms)


def one(finding: Finding, dataset: str, method: str, metric: str, setting: str | None = None) -> float:
    row = finding.find(dataset, method, metric, setting)
    assert row is not None
    assert row.estimate is not None
    return row.estimate


def test_a_drop_is_a_share_of_all_activity_and_stands_beside_every_control() -> None:
    made = study.summarise([drops("a", 0.4, 0.9), drops("b", 0.6, 0.9)], None, caveats=(), provenance={})
    assert one(made, "a", "specific", "drop") == pytest.approx(0.6)
    assert one(made, "a", "uniform", "drop", "scale c=0 k=3 mean") == pytest.approx(0.085)
    assert one(made, "a", "uniform", "drop", "scale c=0 k=3 draw=3") == pytest.approx(0.07)
    assert one(made, "a", "uniform", "drop_difference") == pytest.approx(0.515)
    assert one(made, "a", "uniform", "drop_ratio") == pytest.approx(0.6 / 0.085)
    assert one(made, "a", "uniform", "drop_beyond_thrice") == pytest.approx(0.6 - 3 * 0.085)
    assert one(made, "a", "uniform", "draws_below") == 1
    assert one(made, study.ALL, "specific", "drop") == pytest.approx(0.5)
    held = [row for row in made.rows if row.p_holm is not None]
    assert {row.dataset for row in held} == {"a", "b"}
    assert len({row.family for row in held}) == 1
    assert sum("draw=" in row.setting for row in made.rows) == 8


def test_a_control_that_does_nothing_has_no_ratio() -> None:
    made = study.summarise([drops("a", 0.4, 1.0)], None, caveats=(), provenance={})
    row = made.find("a", "uniform", "drop_ratio")
    assert row is not None
    assert row.n == 0
    assert one(made, "a", "uniform", "drop_beyond_thrice") > 0.6


def test_a_ratio_of_totals_has_the_interval_of_its_clusters() -> None:
    rng = np.random.default_rng(0)
    below = rng.uniform(1, 2, 40)
    found = study.ratio(3 * below + rng.normal(0, 0.3, 40), below, [str(i // 2) for i in range(40)])
    assert found.low is not None
    assert found.high is not None
    assert found.low < 3 < found.high
    assert found.high - found.low < 0.4


def test_the_correlation_over_edges_is_spearmans_and_resamples_nodes() -> None:
    rng = np.random.default_rng(1)
    pairs = [(u, d) for u in range(8) for d in range(u + 1, 8)]
    x = rng.normal(size=len(pairs)).round(1)
    y = x + rng.normal(size=len(pairs))
    found = study.edge_correlation(x.tolist(), y.tolist(), pairs)
    assert found.estimate == pytest.approx(stats.rank_correlation(x.tolist(), y.tolist()).estimate)
    assert study.edge_correlation(x.tolist(), [1.0] * len(x), pairs) == stats.NOTHING


def test_edges_that_add_up_explain_all() -> None:
    nodes = (Feature(0, 1), Feature(1, 2), Feature(3, 4))
    weights = torch.zeros(5, 3, 3)
    weights[:, 0, 1], weights[:, 0, 2], weights[:, 1, 2] = -1.0, -2.0, 0.5
    activity = torch.full((5, 3), 4.0)
    made = Edges(
        nodes, tuple("abcde"), activity, activity + weights.sum(1), weights, weights, {0.0: weights}, {0.0: weights}
    )
    assert made.pairs(2) == [(0, 2), (1, 2)]
    found = study.summarise([], made, caveats=(), provenance={})
    assert one(found, "graph", "direct", "explained", "all nodes") == pytest.approx(1)
    assert one(found, "graph", "direct", "activity_change", "node=1/2") == pytest.approx(-0.25)
    assert one(found, "graph", "total", "edge_correlation", "c=0 span=1") == pytest.approx(1)
    still = made._replace(activity=activity * torch.tensor([1.0, 0.0, 1.0]))
    assert still.pairs(1) == [(0, 2)]
    assert "2 of 3 edges" in study.summarise([], still, caveats=(), provenance={}).caveats[1]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> CategorySets:
    """Sets of active features of the testbed, common ones above and below those of a category."""
    job = Job(OPTIONS, tmp_path_factory.mktemp("sets"))
    given = categories.from_testbed(count=8, names=NAMES)
    asked = Prompts("asked", tuple(row for rows in given.test.values() for row in rows))
    residuals = features.read_residuals(job.model, asked, range(1, 5), batch_size=16)
    empty, surveys = torch.ones(job.model.width), []
    for layer in range(1, 5):
        plain = Direction(empty, layer, torch.zeros(len(job.model.layers)), (0,), (), {})
        surveys.append(features.survey(job.saes.layer(layer), residuals, plain, keep=3))
    best = {s.layer: [Feature(s.layer, i) for i in s.activation.topk(4).indices.tolist()] for s in surveys}
    common = FeatureSet("common", (*best[3][:2], *best[4][:2], best[1][3]), (5.0, 4.0, 3.0, 2.0, 1.0))
    specific = {
        name: FeatureSet("specific", (best[1][at], best[2][at], best[4][3]), (3.0, 2.0, 1.0))
        for at, name in enumerate(NAMES)
    }
    whole = {
        name: FeatureSet("whole", (*common.features, *own.features), (*common.scores, *own.scores))
        for name, own in specific.items()
    }
    slices = job.saes.slices(layers_of(whole.values()))
    return CategorySets(given, whole, {}, common, specific, specific, surveys, slices, ())


class Ran:
    """A run of the study in a folder."""

    def __init__(self, folder: Path, sets: CategorySets) -> None:
        self.job = Job(OPTIONS, folder)
        self.fitted: Fitted = fit.fit(self.job)
        self.finding = graph.run_graph(self.job, self.fitted, sets)
        write_figures(self.job.store, ["svg"])
        self.job.finish()
        self.job.close()


@pytest.fixture(scope="module")
def run(sets: CategorySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    Ran(folder, sets)
    return folder


def test_every_category_has_its_drops_and_twenty_draws_of_every_control(run: Path) -> None:
    for name in NAMES:
        made = Drops.read(json.loads((run / f"graph/drops/{name.lower()}.json").read_text()))
        kinds = {(arm["kind"], arm["factor"]) for arm in made.arms}
        assert kinds == {
            (k, c) for k in ("specific", "uniform", "activity-matched", "other-candidates") for c in (0, -1)
        }
        assert len(made.of("uniform", 0.0)) == WHOLE.drive_draws
        assert len(made.ids) == len(made.before) == len(made.arms[0]["activity"]) == 8
        # What lies above all that drives, or below all that is driven, is not counted.
        assert len(made.scaled) == 2
        assert {int(name.split("/")[0]) for name in made.watched} == {3, 4}


def test_the_graph_reads_back_from_both_files(run: Path) -> None:
    data = json.loads((run / GRAPH).read_text())
    read = networkx.read_graphml(run / graph.GRAPHML)
    assert set(read.nodes) == {node["id"] for node in data["nodes"]}
    assert {node["kind"] for node in data["nodes"]} == {"common", "specific"}
    assert len(data["nodes"]) == 6
    for node in data["nodes"]:
        assert read.nodes[node["id"]]["layer"] == node["layer"]
        assert read.nodes[node["id"]]["promoted"] == ", ".join(node["promoted"])
        assert node["categories"]
    assert len(read.edges) == len(data["edges"]) > 3
    for edge in data["edges"]:
        found = read.edges[edge["source"], edge["target"]]
        assert {name: found[name] for name in found} == {n: v for n, v in edge.items() if n not in ("source", "target")}


def test_a_finished_study_loads_no_model_and_lost_parts_are_made_again(run: Path, sets: CategorySets) -> None:
    before = _bytes(run)
    again = Ran(run, sets)
    assert "model" not in vars(again.job)
    assert not again.job.store.made
    (run / "graph/drops/malware.json").unlink()
    (run / "graph/edges.safetensors").write_bytes(b"broken")
    (run / GRAPH).unlink()
    Ran(run, sets)
    assert _bytes(run) == before


def test_nodes_are_of_both_kinds_and_spread_over_layers(sets: CategorySets) -> None:
    nodes = graph.choose_nodes(sets, 6).features
    assert len(nodes) == 6
    assert sum(node in sets.common.features for node in nodes) == 3
    assert {node.layer for node in nodes} == {1, 2, 3, 4}
    assert len(graph.choose_nodes(sets, 99)) == len(
        {feature for whole in sets.whole.values() for feature in whole.features}
    )


def test_too_few_features_of_a_layer_are_taken_and_counted(sets: CategorySets, tmp_path: Path) -> None:
    few = [
        LayerSurvey(s.layer, s.candidates, torch.zeros_like(s.activation) if s.layer == 2 else s.activation)
        for s in sets.surveys
    ]
    plan, notes = upstream._plan(Job(OPTIONS, tmp_path), replace(sets, surveys=few), "Malware", 20)
    assert plan is not None
    assert any("uniform controls hold 1 of 2 features fewer" in note for note in notes)
    assert any("no activity-matched control, layer 2 has no active feature left" in note for note in notes)
    assert {len(chosen) for kind, _, chosen in plan.arms if kind == "uniform"} == {1}


def test_the_page_draws_what_the_finding_and_the_graph_say(run: Path) -> None:
    finding = study.summarise([drops("a", 0.4, 0.9), drops("b", 0.6, 0.9)], None, caveats=(), provenance={})
    assert list(plots.plots(finding)) == ["graph-drops-c0"]
    assert words.sentences(finding)[0].startswith("all categories: scaling a category’s own features (c = 0, k = 1)")
    assert list(words.tables(finding)) == ["drops"]
    assert (run / "figures" / "graph-drops-c-1.svg").is_file()
    data = json.loads((run / GRAPH).read_text())
    strongest = max(data["edges"], key=lambda edge: abs(edge["direct_share"]))
    strongest["direct_share"] = -2 * WEAK
    svg = render(network(data)["graph-network"].figure, "svg").decode()
    assert all(node["id"] in svg for node in data["nodes"])
    assert network(data | {"edges": [edge | {"direct_share": 0.0} for edge in data["edges"]]}) == {}
