"""How the health of the SAEs bears on what else a run folder holds: which verdict the layers of its features have.

Reads artifacts alone, so it is up to date whatever was measured first.
"""

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.core.types import Feature, FeatureSet, Finding
from refusalscope.report.categories import MATRIX
from refusalscope.studies import health

FOUND, INDEX = "findings/health.json", "features/index.json"


def keep_bearing(store: Store) -> None:
    """Write what the health finding means for every feature set in the folder, where there is such a finding."""
    if FOUND not in store.paths("findings", ".json"):
        return
    told = health.bearing(store.read(FOUND, Finding), _sets(store))
    store.keep(health.BEARING, fingerprint(told), {"sentences": told})


def _sets(store: Store) -> dict[str, FeatureSet]:
    """The run's sets but its random controls, and the features common to all categories."""
    made = {}
    if INDEX in store.paths("features", ".json"):
        names = [name for name in store.read(INDEX, dict)["sets"] if not name.startswith("random-")]
        made = {name: store.read(f"features/{name}.json", FeatureSet) for name in names}
    if MATRIX in store.paths("categories", ".json"):
        rows = [row for row in store.read(MATRIX, dict)["features"] if row["role"] == "common"]
        common = tuple(Feature(row["layer"], row["index"]) for row in rows)
        made["common to all categories"] = FeatureSet("common", common, (0.0,) * len(common))
    return made
