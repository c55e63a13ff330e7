"""Can these attributions be trusted on this model? What was measured against the oracles, as one Finding."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refusalscope.core import stats
from refusalscope.core.stats import Estimate
from refusalscope.core.types import Finding, Row

QUESTION = "Can these attributions be trusted here?"


class Measured(NamedTuple):
    """What the oracles gave; lists by scheme run parallel to `features`."""

    prompt_ids: list[str]
    features: list[str]
    """Layer/index of every candidate that moves at all."""
    alone: list[float]
    """Effect on the metric of setting that feature alone to its patched value, mean over prompts."""
    marginal: list[float]
    """Its mean marginal effect when moves are added in random order."""
    predicted: Mapping[str, list[float]]
    """Scheme -> the attribution of each feature, mean over prompts."""
    factored: Mapping[str, Mapping[str, float]]
    """Scheme -> layer -> largest difference from the naive formulation over the layer's largest attribution."""
    complete: Mapping[str, list[float]]
    """Layer -> each prompt's difference between sum of attributions and effect of the swap, as a share of its gap."""
    riemann: Mapping[str, list[float]]
    """Nodes -> each prompt's difference from 16 Gauss-Legendre nodes, largest over layers, as a share of its gap."""
    nodes: list[Mapping[str, float]]
    """The node counts tried and the change of the gradient when they are doubled."""
    dtype: str
    """The model's number type: rounding bounds how closely anything here can agree."""


def summarise(
    measured: Measured, dataset: str, *, clusters: Sequence[str], caveats: Sequence[str], provenance: Mapping[str, Any]
) -> Finding:
    """One row per check; where a bound holds for every prompt or entry, the row is the largest, without interval."""
    rows = [
        _row(dataset, scheme, "factored_error", f"layer={layer}", _exact(worst, len(measured.prompt_ids)))
        for scheme, layers in measured.factored.items()
        for layer, worst in layers.items()
    ]
    for layer, shares in measured.complete.items():
        rows.append(
            _row(
                dataset, "layerwise", "completeness_error", f"layer={layer} nodes=16", _exact(max(shares), len(shares))
            )
        )
    for nodes, shares in measured.riemann.items():
        known = clusters[: len(shares)]
        rows.append(_row(dataset, "layerwise", "riemann_error", f"nodes={nodes}", stats.mean(shares, known)))
    for check in measured.nodes:
        setting = f"nodes={check['nodes']:g}"
        rows.append(_row(dataset, "sound", "node_error", setting, _exact(check["change"], min(4, len(clusters)))))
    for scheme, values in measured.predicted.items():
        for metric, effect in (("alone_correlation", measured.alone), ("marginal_correlation", measured.marginal)):
            rows.append(_row(dataset, scheme, metric, "", stats.rank_correlation(values, effect)))
    return Finding("verification", QUESTION, tuple(rows), tuple(caveats), provenance)


def _exact(value: float, n: int) -> Estimate:
    return Estimate(n, value, value, value, 1.0)


def _row(dataset: str, method: str, metric: str, setting: str, estimate: Estimate) -> Row:
    return Row(dataset, method, metric, setting, *estimate)
