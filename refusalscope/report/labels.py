"""Neuronpedia's labels as the page shows them: short texts of others, beside links that we build from ids.

Reads `features/labels.json` alone, and asks nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refusalscope.core.store import Store
from refusalscope.inputs import neuronpedia

FILE = "features/labels.json"
NONE = "no label"


@dataclass(frozen=True)
class Labels:
    """What is known of features, by their name (`3/512`)."""

    texts: Mapping[str, str] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)
    """Addresses at Neuronpedia, of every feature whose SAE is shown there."""
    sentences: Sequence[str] = ()
    """Where the labels come from, and which are missing for what reason."""

    @property
    def shown(self) -> bool:
        """Whether tables say of every feature what it is called: Neuronpedia shows these SAEs."""
        return bool(self.pages)

    def of(self, name: str) -> str:
        """A feature's label, or that there is none."""
        return self.texts.get(name, NONE)


def read(store: Store) -> Labels:
    """The labels of a run folder; none where it was not asked for any. Raises ValueError naming a damaged file."""
    if FILE not in store.paths("features", ".json"):
        return Labels()
    data = store.read(FILE, dict)
    try:
        return _labels(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{FILE} does not hold labels as expected: {error!r}") from error


def _labels(data: Mapping[str, Any]) -> Labels:
    names = {int(layer): str(name) for layer, name in data["names"].items()}
    if not names:
        return Labels(sentences=("Neuronpedia is not known to show these SAEs: no feature has a label.",))
    texts, pages, unanswered = {}, {}, 0
    for row in data["features"]:
        layer, index, label = int(row["layer"]), int(row["index"]), row["label"]
        if neuronpedia.is_name(names[layer]):
            pages[f"{layer}/{index}"] = neuronpedia.page(names[layer], index)
        if label is not None and (text := neuronpedia.plain(label)):
            texts[f"{layer}/{index}"] = text
        unanswered += not row["answered"]
    models = " and ".join(dict.fromkeys(name.partition("/")[0] for name in names.values()))
    sentences = [_source(models)] if texts else []
    if missing := len(data["features"]) - len(texts):
        sentences.append(_missing(missing, len(data["features"]), unanswered, str(data["reason"])))
    return Labels(texts, pages, tuple(sentences))


def _source(models: str) -> str:
    return (
        f"Labels are from Neuronpedia: written by others, mostly by a language model, about where these features fire "
        f"in {models} on texts collected there, not about this run. They are hints, not findings."
    )


def _missing(missing: int, whole: int, unanswered: int, reason: str) -> str:
    """Which have no label, and why: Neuronpedia has none, or was not heard."""
    said = f"{missing} of {whole} features {'has' if missing == 1 else 'have'} no label: "
    unexplained = missing - unanswered
    parts = [f"Neuronpedia has none for {'it' if missing == 1 else unexplained}"] if unexplained else []
    if unanswered:
        parts.append(f"{reason}{f' ({unanswered})' if unexplained else ''}")
    return said + "; ".join(parts) + "."
