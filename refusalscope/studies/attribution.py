"""Where along the layers does attribution fall, and how much of it do the SAEs miss?"""

from collections.abc import Mapping
from typing import Any

from refusalscope.core import stats
from refusalscope.core.types import Finding, Row

QUESTION = "At which layers do features carry refusal, and how much does the SAEs' error term carry beside them?"
PARTS = ("features", "candidates", "error")


def summarise(totals: Mapping[str, Any], dataset: str, *, scheme: str, provenance: Mapping[str, Any]) -> Finding:
    """Mean over prompts of each layer's attribution, summed over positions: all features, candidates, error term.

    Layers are scored jointly: their scores do not sum to the metric's change, and none is a share of it.
    """
    rows = []
    for layer in totals["layers"]:
        for part in PARTS:
            estimate = stats.mean(layer[part], totals["clusters"])
            rows.append(Row(dataset, scheme, part, f"layer={layer['layer']}", *estimate))
    return Finding("attribution", QUESTION, tuple(rows), (), provenance)
