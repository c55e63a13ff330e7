"""Attributions on the embedded model are computed right, complete, and predict what interventions do."""

from pathlib import Path

import pytest

from refusalscope.core.store import Store
from refusalscope.core.types import Finding
from refusalscope.pipeline import verify
from refusalscope.studies import verification
from refusalscope.studies.verification import Measured
from tests.test_run import invoke

LAYERS = 8
MEASURED = Measured(
    prompt_ids=["a", "b", "c"],
    features=["0/1", "0/2", "1/3", "1/4"],
    alone=[1.0, 2.0, 3.0, 4.0],
    marginal=[4.0, 3.0, 2.0, 1.0],
    predicted={"sound": [0.1, 0.2, 0.3, 0.4]},
    factored={"sound": {"0": 1e-7}},
    complete={"0": [1e-4, 5e-3, 1e-5]},
    riemann={"4": [0.5, 0.1, 0.3]},
    nodes=[{"nodes": 5, "change": 0.1}, {"nodes": 10, "change": 0.01}],
    dtype="float32",
)


def _verify(runs: Path) -> Finding:
    code, out, err = invoke("verify", "testbed", "--runs", str(runs), "--name", "v")
    assert code == 0, err
    assert out.splitlines()[-1] == str(runs / "v" / "report.html")
    return Store(runs / "v").read("findings/verification.json", Finding)


def _estimates(finding: Finding, metric: str) -> dict[tuple[str, str], float]:
    rows = [row for row in finding.rows if row.metric == metric]
    return {(row.method, row.setting): row.estimate for row in rows if row.estimate is not None}


def test_attribution_predicts_intervention_and_every_check_is_on_the_page(tmp_path: Path) -> None:
    finding = _verify(tmp_path)
    assert finding.caveats == ()  # at least 60 candidates, and 32 held-out prompts
    _holds(finding)
    factored = _estimates(finding, "factored_error")
    assert set(factored) == {(scheme, f"layer={layer}") for scheme in ("sound", "paper") for layer in range(LAYERS)}
    assert max(factored.values()) <= 1e-4
    complete = _estimates(finding, "completeness_error")
    assert len(complete) == LAYERS
    assert max(complete.values()) <= 1e-3
    # The nodes are doubled until doubling them no longer matters, and no further.
    *coarser, last = _estimates(finding, "node_error").values()
    assert last <= 0.02 < min(coarser, default=1.0)
    riemann = _estimates(finding, "riemann_error")
    for coarse, fine in ((4, 8), (8, 16)):
        ratio = riemann["layerwise", f"nodes={coarse}"] / riemann["layerwise", f"nodes={fine}"]
        assert 1.7 <= ratio <= 2.4
    page = (tmp_path / "v" / "report.html").read_text()
    assert "Can these attributions be trusted here?" in page
    assert "refusalscope verify testbed" in page


def test_a_small_verification_says_how_little_it_rests_on() -> None:
    few = ("3 held-out prompts", "4 candidates", "checked on 1 layers")
    assert all(said in note for said, note in zip(few, verify.caveats(MEASURED, LAYERS), strict=True))


def _holds(finding: Finding) -> None:
    alone, marginal = (_estimates(finding, f"{name}_correlation") for name in ("alone", "marginal"))
    for scheme, least in (("gradient", 0.95), ("layerwise", 0.85), ("sound", 0.75)):
        assert alone[scheme, ""] >= least, scheme
    for scheme in ("sound", "paper"):
        assert marginal[scheme, ""] >= 0.95, scheme
        assert marginal[scheme, ""] > marginal["gradient", ""]


def test_a_finding_holds_the_worst_of_what_must_hold_everywhere() -> None:
    made = verification.summarise(MEASURED, "held-out", clusters=["a", "b", "c"], caveats=["x"], provenance={})
    assert _estimates(made, "completeness_error") == {("layerwise", "layer=0 nodes=16"): 5e-3}
    assert _estimates(made, "node_error") == {("sound", "nodes=5"): 0.1, ("sound", "nodes=10"): 0.01}
    assert _estimates(made, "alone_correlation")["sound", ""] == pytest.approx(1.0)
    assert _estimates(made, "marginal_correlation")["sound", ""] == pytest.approx(-1.0)
    assert _estimates(made, "riemann_error")["layerwise", "nodes=4"] == pytest.approx(0.3)
