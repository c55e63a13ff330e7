"""Methods are compared prompt by prompt, draws by their mean, and only where both answered the same prompts."""

from dataclasses import replace

import pytest

from refusalscope.core.types import FeatureSet, Finding, Prompt, Prompts, Response, Responses
from refusalscope.studies import benchmark

PROMPTS = Prompts("harmful", tuple(Prompt(str(i), f"prompt {i}", "harmful") for i in range(4)))
VALIDATION = Prompts("harmful-validation", PROMPTS.rows)


def answered(method: str, setting: str, refused: list[float], dataset: str = "harmful") -> Responses:
    rows = (
        Response(str(i), "text", 1, 3, "end", {"refused": float(value), "answered": 1.0 - value})
        for i, value in enumerate(refused)
    )
    return Responses(dataset, method, setting, tuple(rows), changed=1)


@pytest.fixture(scope="module")
def finding() -> Finding:
    responses = [
        answered("base", "", [1, 1, 1, 1]),
        answered("direction", "remove", [0, 0, 0, 0]),
        answered("cosine+attribution", "scale c=0 k=20", [0, 0, 0, 1]),
        answered("random", "scale c=0 k=20 draw=0", [1, 1, 1, 1]),
        answered("random", "scale c=0 k=20 draw=1", [1, 0, 1, 1]),
        answered("cosine", "scale c=-1 k=20", [0, 1, 0, 1]),
        answered("cosine", "scale c=0 k=5", [1, 1, 0, 1]),
        answered("cosine+attribution", "set v=2 k=20", [1, 1, 1, 1]),
        answered("cosine+attribution", "scale c=0 k=20", [0, 0, 0, 0], "harmful-validation"),
        answered("cosine+attribution", "scale c=-1 k=20", [0, 0, 0, 0], "harmful-validation"),
        answered("cosine", "scale c=0 k=20", [1, 1, 1, 1], "harmful-validation"),
    ]
    prompts = {"harmful": PROMPTS, "harmful-validation": VALIDATION}
    return benchmark.summarise(responses, prompts, [], cost_prompts="harmless", caveats=(), provenance={})


def test_the_first_set_is_compared_with_every_other_of_its_size(finding: Finding) -> None:
    found = {
        (row.dataset, row.method, row.setting): row.estimate
        for row in finding.rows
        if row.metric == "refused_difference"
    }
    assert found == {
        ("harmful", "cosine+attribution vs direction", "k=20"): 0.25,
        ("harmful", "cosine+attribution vs random", "k=20"): 0.25 - 0.875,
        ("harmful", "cosine+attribution vs cosine", "k=20"): -0.25,
        ("harmful", "cosine vs direction", "k=5"): 0.75,
    }


def test_a_difference_is_paired(finding: Finding) -> None:
    row = finding.find("harmful", "cosine+attribution vs cosine", "answered_difference")
    assert row is not None
    assert (row.n, row.estimate) == (4, 0.25)
    assert finding.find("harmful", "cosine+attribution vs cosine", "complied_difference") is None


def test_comparisons_are_corrected_within_their_family(finding: Finding) -> None:
    rows = [row for row in finding.rows if row.metric == "refused_difference" and row.setting == "k=20"]
    assert [row.p for row in rows] == pytest.approx([1.0, 0.25, 1.0])
    assert [row.p_holm for row in rows] == pytest.approx([1.0, 0.75, 1.0])
    (family,) = {row.family for row in rows}
    assert family == "refused: cosine+attribution against every other method on harmful, K* = 20"


def test_changes_against_base_are_one_family_of_edits_and_one_of_values(finding: Finding) -> None:
    families = {
        (row.method, row.setting): row.family.split(" against")[0]
        for row in finding.rows
        if (row.dataset, row.metric) == ("harmful", "refused_change")
    }
    assert families.pop(("cosine+attribution", "set v=2 k=20")) == "refused: every value set"
    for draw in (0, 1):
        assert families.pop(("random", f"scale c=0 k=20 draw={draw}")) == ""
    assert set(families.values()) == {"refused: every edit"}
    pooled = finding.find("harmful", "random", "refused_change", "scale c=0 k=20 mean")
    assert pooled is not None
    assert (pooled.n, pooled.p) == (8, 1.0)


def test_what_a_family_can_show_is_a_row_of_the_finding(finding: Finding) -> None:
    found = [row for row in finding.rows if row.dataset == "harmful" and row.metric.startswith("smallest_")]
    assert {(row.metric, row.setting, row.n) for row in found} == {
        ("smallest_change", "comparisons=5", 0),
        ("smallest_change", "set comparisons=1", 0),
        ("smallest_difference", "comparisons=1", 0),
        ("smallest_difference", "comparisons=3", 0),
    }
    responses = [
        answered("base", "", [1.0] * 9 + [0.0] * 11),
        answered("direction", "remove", [0.0] * 20),
        answered("cosine", "scale c=0 k=20", [0.0] * 20),
    ]
    rows = [Prompt(str(i), f"prompt {i}", "harmful", cluster=str(i)) for i in range(20)]
    alone, shared = Prompts("harmful", tuple(rows)), Prompts("harmful", tuple(replace(r, cluster="x") for r in rows))
    for prompts, expected in ((alone, (20, 0.35, "comparisons=2 discordant=7")), (shared, (0, None, "comparisons=2"))):
        made = benchmark.summarise(
            responses, {"harmful": prompts}, [], cost_prompts="harmless", caveats=(), provenance={}
        )
        row = made.find("harmful", "any", "smallest_change")
        assert row is not None
        assert (row.n, row.estimate, row.setting) == expected


def test_an_induction_names_its_value_and_size() -> None:
    arm = benchmark.set_arm(FeatureSet("cosine", (), ()), 2.5)
    assert (arm.method, arm.setting, arm.label) == ("cosine", "set v=2.5 k=0", "cosine set v=2.5 k=0")
