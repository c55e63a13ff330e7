"""Labels of the features that a run's page shows, from Neuronpedia, into one artifact that the page reads.

Asked for last, when it is known which features there are; what is missing is asked for again by the next command.
"""

import re
from collections.abc import Iterator
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store, to_json
from refusalscope.core.types import Feature, Finding
from refusalscope.inputs import neuronpedia
from refusalscope.inputs.neuronpedia import LIMITS, Found, Limits
from refusalscope.inputs.presets import Target
from refusalscope.pipeline.job import Job

LABELS = "features/labels.json"
SWITCHED_OFF = "they were left out with --no-feature-labels"
LISTS = {"features/table.json": "rows", "graph/graph.json": "nodes", "categories/matrix.json": "features"}
"""Artifacts that list features, and under which name, in the order in which their labels are asked for."""
_METHOD = re.compile(r"(\d+)/(\d+)", re.ASCII)
"""A feature as the method of a finding's row."""


def keep_labels(job: Job, *, limits: Limits = LIMITS) -> None:
    """Write `features/labels.json` for the features that the folder's page shows; nothing where it shows none.

    Fails for no server and no network: a feature without a label has none, and the artifact says why.
    """
    features = list(dict.fromkeys(shown(job.store)))
    if not features:
        return
    names = names_of(job.target)
    features = [feature for feature in features if feature.layer in names]
    if job.options.no_feature_labels:
        found = Found({}, SWITCHED_OFF)
    else:
        found = neuronpedia.look_up(
            names,
            features,
            limits=limits,
            progress=lambda done, whole: job.progress("asking Neuronpedia for labels", done, whole),
        )
    made = described(names, features, found)
    job.store.keep(LABELS, fingerprint([job.target.identity, to_json(made).decode()]), made)


def described(names: dict[int, str], features: list[Feature], found: Found) -> dict[str, Any]:
    """The artifact: Neuronpedia's names of the SAEs by layer, the features asked for, and why some have no answer."""
    rows = [
        {"layer": one.layer, "index": one.index, "label": found.labels.get(one), "answered": one in found.labels}
        for one in sorted(features)
    ]
    return {
        "names": {str(layer): name for layer, name in sorted(names.items())},
        "features": rows,
        "reason": found.reason if features else "",
    }


def names_of(target: Target) -> dict[int, str]:
    """Layer -> Neuronpedia's name of its SAE: what the SAEs carry, else the preset's; empty where there is none."""
    pattern = target.neuronpedia or ""
    named = {layer: pattern.replace("{layer}", str(layer)) for layer in target.saes.names}
    return {layer: name for layer, name in (named | dict(target.saes.neuronpedia)).items() if neuronpedia.is_name(name)}


def shown(store: Store) -> Iterator[Feature]:
    """The features that the page of this folder names, those of the sets first; some more than once."""
    for path, name in LISTS.items():
        if path in store.paths(path.partition("/")[0], ".json"):
            for row in store.read(path, dict)[name]:
                yield Feature(int(row["layer"]), int(row["index"]))
    for path in store.paths("findings", ".json"):
        for row in store.read(path, Finding).rows:
            if match := _METHOD.fullmatch(row.method):
                yield Feature(int(match[1]), int(match[2]))
