"""A run that is killed, stopped, starved of disk or memory, or started twice ends well, and ends the same.

The processes are real, and so are the faults: signals, limits and permissions of the system.
"""

import hashlib
import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from refusalscope.core.store import MANIFEST
from tests import processes
from tests.processes import Ended

SMALL = ["--limit", "8", "--factor", "0", "--max-new-tokens", "12", "--k", "5"]
STOPPED = "stopped: what is done is kept; the same command goes on from here\n"


def words(runs: Path, *options: str) -> list[str]:
    return ["run", "testbed", "--name", "demo", "--runs", str(runs), *(options or SMALL)]


def contents(folder: Path) -> dict[str, str]:
    """Every file's checksum, those of unfinished files too; times are left out."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "environment.json")
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("environment.json")
    return {**found, MANIFEST: json.dumps(manifest, sort_keys=True)}


def complaint(ended: Ended) -> str:
    """The one line of a process that ended for a fault of its surroundings."""
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended
    return ended.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing befell."""
    runs = tmp_path_factory.mktemp("whole")
    ended = processes.run(words(runs), runs / "said")
    assert ended.code == 0, ended
    return runs / "demo"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "demo")


def kills(writes: int, *, seed: int = 0) -> list[processes.Prepare]:
    """Ten moments: early, inside a write, and in between, so spread that every stage is hit and the run gets on."""
    draw = random.Random(seed)
    moments: list[processes.Prepare] = [partial(processes.die_after, draw.uniform(1, 2))]
    for _ in range(9):
        moments.append(partial(processes.die_at_write, draw.randint(1, writes // 5), draw.uniform(0, 0.2)))
    moments[5] = partial(processes.die_at_write, draw.randint(2, writes // 10))
    return moments


def test_a_run_killed_at_ten_moments_ends_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    strays = []
    for moment in kills(2 * len(contents(whole))):
        ended = processes.run(words(tmp_path), tmp_path / "said", moment)
        assert ended.code == -signal.SIGKILL, ended
        strays.append(len(list(tmp_path.rglob(".*.partial"))))
    assert any(strays)
    assert processes.run(words(tmp_path), tmp_path / "said").code == 0
    assert contents(tmp_path / "demo") == contents(whole)
