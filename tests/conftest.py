"""Sets the ground before refusalscope is imported: shapes and types are checked at run time, and nothing leaves."""

import os
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# torch reads this when it is first imported. One count keeps the order of its sums the same on every machine, and one
# thread is as quick as two on models this small: cores are for further workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook("refusalscope", "beartype.beartype")

# A deadline would time the tests, and fail them where the machine is busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


LONGEST = ("test_notebook", "test_run", "test_verify", "test_probes", "test_whole_run", "test_fuzz")
"""Files of minutes. They are begun first, so that no worker is left waiting for the last of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_configure(config: pytest.Config) -> None:
    """Give the session caches of its own: huggingface_hub reads where its cache lies when it is first imported."""
    home = TemporaryDirectory(prefix="hub-")
    config.add_cleanup(home.cleanup)
    os.environ |= {"HF_HOME": home.name, "HF_HUB_CACHE": f"{home.name}/hub"}
    os.environ["REFUSALSCOPE_CACHE"] = f"{home.name}/refusalscope"
