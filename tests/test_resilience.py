"""A run that is killed, stopped, starved of disk or memory, or started twice ends well, and ends the same.

The processes are real, and so are the faults: signals, limits and permissions of the system.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from refusalscope.__main__ import LAST_WORDS
from refusalscope.core.disk import Claim
from refusalscope.core.store import MANIFEST, Store
from refusalscope.core.types import Prompts
from refusalscope.pipeline import options as run_options
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options
from tests import processes, tiny
from tests.processes import Ended, Running

SMALL = ["--study", "none", "--limit", "8", "--factor", "0", "--max-new-tokens", "12", "--k", "5"]
STOPPED = f"{LAST_WORDS}\n"


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


@pytest.mark.slow
def test_the_whole_demo_killed_at_ten_moments(tmp_path: Path) -> None:
    whole, killed = (words(tmp_path / name, "--seed", "0") for name in ("whole", "killed"))
    assert processes.run(whole, tmp_path / "said").code == 0
    for moment in kills(2 * len(contents(tmp_path / "whole" / "demo")), seed=1):
        assert processes.run(killed, tmp_path / "said", moment).code == -signal.SIGKILL
    assert processes.run(killed, tmp_path / "said").code == 0
    assert contents(tmp_path / "killed" / "demo") == contents(tmp_path / "whole" / "demo")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_leaves_its_folder(number: int, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    running = Running(words(tmp_path), tmp_path / "said").until((demo / "direction.safetensors").is_file)
    in_use = f"error: {demo} is in use by another process: wait until that has ended\n"
    assert complaint(processes.run(words(tmp_path), tmp_path / "second")) == in_use
    assert complaint(processes.run(["report", str(demo)], tmp_path / "second")) == in_use
    assert running.send(number).end() == (128 + number, "", STOPPED)
    assert not list(demo.rglob(".*"))
    Claim(demo).take()


def test_a_call_into_c_is_ended_too(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    running = Running([], tmp_path / "said", partial(processes.deaf, begun)).until(begun.is_file)
    assert running.send(signal.SIGTERM).end() == (143, "", STOPPED)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="no /proc tells what a process has loaded")
def test_an_import_is_ended_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refusalscope", *words(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            pass
        process.send_signal(signal.SIGINT)
        assert (*process.communicate(), process.returncode) == ("", STOPPED, 130)


def test_a_write_that_fails_names_its_file_and_the_run_goes_on_once_there_is_room(whole: Path, copy: Path) -> None:
    page = copy / "report.html"
    limit = partial(processes.no_file_above, page.stat().st_size - 1)
    page.unlink()
    line = complaint(processes.run(words(copy.parent), copy.parent / "said", limit))
    assert line == f"error: {page}: {os.strerror(errno.EFBIG)}\n"
    assert not list(copy.rglob(".*"))
    assert processes.run(words(copy.parent), copy.parent / "said").code == 0
    assert contents(copy) == contents(whole)


def test_a_full_disk_is_named(copy: Path) -> None:
    (copy / "report.html").unlink()
    ended = processes.run(["report", str(copy)], copy.parent / "said", partial(processes.full_disk, copy))
    if ended.code == 77:
        pytest.skip("this system lets us make no disk of our own")
    assert complaint(ended) == f"error: {copy / 'report.html'}: {os.strerror(errno.ENOSPC)}\n"


def test_a_folder_that_cannot_be_written(whole: Path, copy: Path) -> None:
    (copy / "report.html").unlink()
    copy.chmod(0o555)
    line = complaint(processes.run(words(copy.parent), copy.parent / "said", processes.no_rights))
    assert line == f"error: {copy / 'report.html'}: {os.strerror(errno.EACCES)}\n"
    copy.chmod(0o755)
    assert processes.run(words(copy.parent), copy.parent / "said").code == 0
    assert contents(copy) == contents(whole)


def test_runs_cannot_begin_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    line = complaint(processes.run(words(tmp_path / "runs"), tmp_path / "said", processes.no_rights))
    assert line == f"error: {tmp_path / 'runs' / 'demo'}: {os.strerror(errno.EACCES)}\n"


# ---- batches, and memory


def job(folder: Path, *, batch_size: int = 8) -> Job:
    return Job(Options(batch_size=batch_size, limit=8, max_new_tokens=4), folder)


def count(made: Job, stage: str, calls: list[tuple[str, int]], *, room: int = 99, path: str = "") -> dict[str, list]:
    """An artifact of six prompts in which a batch of more than `room` asks for more memory than there is."""

    def make(batch: Prompts) -> dict[str, list]:
        calls.append((stage, len(batch)))
        if len(batch) > room:
            torch.empty(2**60)
        return {"ids": list(batch.ids)}

    rows = tiny.prompts()
    return made.in_batches(
        stage,
        path or f"{stage}.json",
        key=made.key(stage, rows),
        rows=rows,
        kind=dict,
        make=make,
        join=lambda parts: {"ids": [prompt for part in parts for prompt in part["ids"]]},
    )


def test_a_stage_that_runs_out_of_memory_is_made_in_smaller_batches(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    def chain(made: Job) -> dict[str, list]:
        count(made, "early", calls)
        count(made, "late", calls, path="late/small.json", room=5)
        return count(made, "late", calls, room=2)

    folder = tmp_path / "demo"
    made = job(folder, batch_size=5)
    assert made.run(chain)["ids"] == list(tiny.prompts().ids)
    assert calls == [
        *[("early", 5), ("early", 1), ("late", 5), ("late", 1), ("late", 5)],  # the last of which is too much
        *[("late", 2)] * 6,  # both artifacts of the stage, and nothing of the one before
    ]
    recorded = run_options.recorded(folder, made.options)
    assert recorded == {"batch_size": 5, "chat": {}, "batch_sizes": {"late": 2}}
    assert not list(folder.rglob("*.parts"))
    made.close()
    again = job(folder, batch_size=5)
    again.run(chain)
    assert (len(calls), again.store.made) == (11, [])


def test_one_prompt_that_does_not_fit_in_memory_ends_the_run(tmp_path: Path) -> None:
    made = job(tmp_path / "demo")
    with pytest.raises(ValueError, match=r"out of memory in the stage 'answer' with one prompt per batch: leave out"):
        made.run(lambda made: count(made, "answer", [], room=0))
    assert made.derived["batch_sizes"] == {"answer": 1}


def little_memory(more: int) -> None:
    """Address space for `more` bytes, of which threads and the C library's heap keep none that nothing fills.

    As they are, a thread takes 72 MB with its heap, and a batch that failed leaves up to 300 MB which no file is mapped
    to again, or nothing, by what happens to lie above it.
    """
    libc = ctypes.CDLL(None)
    most_arenas, mapped_above = -8, -3  # `mallopt` names these M_ARENA_MAX and M_MMAP_THRESHOLD.
    assert libc.mallopt(most_arenas, 1) == libc.mallopt(mapped_above, 2**17) == 1
    torch.set_num_threads(1)
    os.environ["RAYON_NUM_THREADS"] = "1"
    processes.no_memory_above(more)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the heap of this C library cannot be held")
def test_a_batch_too_large_for_the_memory_there_is_ends_in_smaller_ones(tmp_path: Path) -> None:
    # Up to the end of their stage gradients of 128 prompts at once take 320 MB, of 64 190 MB.
    given = words(tmp_path, "--study", "none", "--limit", "128", "--batch-size", "128", "--factor", "0")
    ended = processes.run(given, tmp_path / "said", partial(little_memory, 250_000_000))
    assert ended.code == 0, ended
    assert "out of memory in the stage 'features': 64 prompts at once from then on\n" in ended.err
    recorded = run_options.read_toml(tmp_path / "demo" / run_options.RUN_FILE)["derived"]
    assert recorded["batch_size"] == 128
    assert recorded["batch_sizes"]["features"] <= 64


def test_a_killed_stage_makes_one_batch_again_and_leaves_no_parts(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    count(job(tmp_path / "whole", batch_size=2), "answer", calls)
    halfway = job(tmp_path / "demo", batch_size=2)
    with pytest.raises(RuntimeError):
        count(halfway, "answer", calls[:0], room=0)
    rows, key = tiny.prompts(), halfway.key("answer", tiny.prompts())
    halfway.parts("answer", "answer.json", key=key, rows=rows[:4], kind=dict, make=lambda part: {"ids": [*part.ids]})
    halfway.close()
    calls.clear()
    resumed = job(tmp_path / "demo", batch_size=2)
    assert count(resumed, "answer", calls)["ids"] == list(rows.ids)
    assert calls == [("answer", 2)]
    for name in ("answer.json", MANIFEST):
        assert (tmp_path / "demo" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {file.name for file in (tmp_path / "demo").iterdir()} == {
        *("answer.json", MANIFEST, "options.toml", "too_long.json")
    }


def test_parts_left_by_a_kill_after_the_whole_was_written_are_dropped(tmp_path: Path) -> None:
    made = job(tmp_path / "demo", batch_size=2)
    count(made, "answer", [])
    before = (tmp_path / "demo" / MANIFEST).read_bytes()
    made.store.put("answer.json.parts/0000", "key", {"ids": []})
    count(made, "answer", [])
    assert (tmp_path / "demo" / MANIFEST).read_bytes() == before
    assert Store(tmp_path / "demo").paths("answer.json.parts", "") == []


def test_an_empty_set_is_one_empty_batch(tmp_path: Path) -> None:
    made = job(tmp_path / "demo")
    paths = made.parts("x", "x", key="", rows=tiny.prompts()[:0], kind=dict, make=lambda rows: {"ids": [*rows.ids]})
    assert [made.store.read(path, dict) for path in paths] == [{"ids": []}]


# ---- prompts that the context cannot hold


def test_prompts_too_long_for_the_context_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    texts = {"harmful": ["Tell me how to pick a lock.", "why " * 600], "harmless": ["no " * 600]}
    rows = [{"instruction": text, "label": label} for label, group in texts.items() for text in group]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(prompts=file, columns={"label": "label"}, max_new_tokens=4)
    made = Job(options, tmp_path / "demo")
    assert {name: len(part) for name, part in made.sets.evaluation.items()} == {"mine": 1}
    assert made.sets.notes == (
        "1 of 2 mine prompts are longer than 508 tokens: left out.",
        "1 of 1 mine-harmless prompts are longer than 508 tokens: left out.",
    )
    made.begin()
    made.close()
    resumed = Job(options, tmp_path / "demo")
    assert resumed.sets == made.sets
    assert "model" not in vars(resumed)
    resumed.close()
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="no prompt is left to answer: 1 of 1 mine prompts are longer than 448 tokens"):
        _ = Job(Options(prompts=file), tmp_path / "other").sets
    with pytest.raises(ValueError, match="--max-new-tokens 512 leaves no room for a prompt: testbed has a context of"):
        _ = Job(Options(max_new_tokens=512), tmp_path / "other").sets
    assert not (tmp_path / "other").exists()
