"""Methods are compared prompt by prompt, draws by their mean, and only where both answered the same prompts."""

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


def test_an_induction_names_its_value_and_size() -> None:
    arm = benchmark.set_arm(FeatureSet("cosine", (), ()), 2.5)
    assert (arm.method, arm.setting, arm.label) == ("cosine", "set v=2.5 k=0", "cosine set v=2.5 k=0")
