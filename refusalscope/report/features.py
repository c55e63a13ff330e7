"""`features/details.json` as what the page shows: one entry a feature, with its strongest prompts in colour.

Reads the plain data of the artifact, names the file where it does not fit, and computes no statistic.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from refusalscope.report.tokens import Span, largest, spans

FILE = "features/details.json"


class Coloured(NamedTuple):
    """One prompt, its tokens coloured by the feature's activation."""

    id: str
    dataset: str
    label: str
    spans: list[Span]
    strongest: float


@dataclass(frozen=True)
class FeatureEntry:
    """One feature, as its page shows it."""

    layer: int
    index: int
    sets: Sequence[Mapping[str, Any]]
    promoted: Sequence[str]
    suppressed: Sequence[str]
    active: Mapping[str, float | None]
    harmful: list[Coloured]
    other: list[Coloured]
    top: float
    """The activation at which the colour is full."""
    alone: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return f"{self.layer}/{self.index}"

    @property
    def anchor(self) -> str:
        return anchor(self.layer, self.index)


def anchor(layer: int, index: int) -> str:
    """The id of a feature's page, as in `#feature-3-512`."""
    return f"feature-{layer}-{index}"


def by_layer(details: Mapping[str, Any]) -> dict[int, list[FeatureEntry]]:
    """Every feature of the artifact by layer, both ascending. Raises ValueError naming the file where it is damaged."""
    try:
        entries = sorted((_entry(item) for item in details["features"]), key=lambda entry: (entry.layer, entry.index))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{FILE} does not hold features as expected: {error!r}") from error
    return {layer: [entry for entry in entries if entry.layer == layer] for layer in {e.layer: None for e in entries}}


def _entry(item: Mapping[str, Any]) -> FeatureEntry:
    top = largest(value for prompt in item["strongest"] for value in prompt["activations"])
    drawn = [_coloured(prompt, top) for prompt in item["strongest"]]
    return FeatureEntry(
        int(item["layer"]),
        int(item["index"]),
        item["sets"],
        item["promoted"],
        item["suppressed"],
        item["active"],
        [prompt for prompt in drawn if prompt.label == "harmful"],
        [prompt for prompt in drawn if prompt.label != "harmful"],
        top,
        item["alone"],
    )


def _coloured(prompt: Mapping[str, Any], top: float) -> Coloured:
    drawn = spans(prompt["tokens"], prompt["activations"], prompt["roles"], top)
    return Coloured(prompt["id"], prompt["dataset"], prompt["label"], drawn, largest(prompt["activations"]))


def anchors(entries: Mapping[int, Iterable[FeatureEntry]]) -> set[str]:
    """The ids that a link may lead to."""
    return {entry.anchor for layer in entries.values() for entry in layer}
