"""Can these SAEs be trusted on this model's chats? Reconstruction per layer, one Finding."""

from collections.abc import Mapping, Sequence
from typing import Any

from refusalscope.core import stats
from refusalscope.core.types import Finding, Row
from refusalscope.evals.capability import LayerHealth

QUESTION = "How faithfully do these SAEs carry the residual stream of this model's own chats?"
TRUSTED = 0.8
"""Variance explained under which a layer is named in a caveat."""


def summarise(layers: Sequence[LayerHealth], dataset: str, *, provenance: Mapping[str, Any]) -> Finding:
    """One row per layer and measure: totals over all chats, with bootstrap intervals over chats."""
    rows, poor = [], []
    for layer in layers:
        measures = {
            "variance_explained": stats.mean(layer.variance_explained, weights=layer.variance),
            "cross_entropy_recovered": stats.mean(layer.cross_entropy_recovered, weights=layer.cross_entropy_gap),
            "l0": stats.mean(layer.l0, weights=layer.tokens),
        }
        rows += [Row(dataset, "sae", name, f"layer={layer.layer}", *value) for name, value in measures.items()]
        if (measures["variance_explained"].estimate or 0.0) < TRUSTED:
            poor.append(layer.layer)
    notes = [f"The SAEs of layers {poor} explain less than {TRUSTED:.0%} of the variance here."] if poor else []
    return Finding("health", QUESTION, tuple(rows), tuple(notes), provenance)
