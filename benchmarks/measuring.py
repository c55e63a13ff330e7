"""What every benchmark needs: the machine in words, interleaved times, peak memory, a result as JSON.

A result is `{"benchmark", "command", "machine", "ratios", "bars", "tables", "curves"}`. `ratios` (name -> number, the
larger the better) are all that `check.py` compares; `bars`, `tables` and `curves` are what `document.py` prints, each
made here by the function of that name.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

MEGABYTE = 2**20


def parser(description: str | None, sizes: Sequence[str]) -> argparse.ArgumentParser:
    """`--size`, of which the second is what `make bench` runs, `--device` and `--json`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=sizes, default=sizes[1], help="how much is measured (default: %(default)s)")
    made.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    made.add_argument("--json", type=Path, help="write the result here instead of printing it")
    return made


def finish(name: str, options: argparse.Namespace, result: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a result, write or print it, and return it."""
    command = shlex.join(["python", f"benchmarks/{name}.py", "--size", options.size, "--device", options.device])
    empty = {"ratios": {}, "bars": [], "tables": [], "curves": []}
    whole = {"benchmark": name, "command": command, "machine": machine(options.device), **empty, **result}
    text = json.dumps(whole, indent=1) + "\n"
    if options.json is None:
        sys.stdout.write(text)
    else:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    return whole


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> dict[str, Any]:
    """Rows are printed as they are, numbers with three digits."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}


def bar(claim: str, found: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A number that is promised, and whether it is reached."""
    met = (least is None or found >= least) and (most is None or found <= most)
    return {"claim": claim, "found": found, "least": least, "most": most, "met": met}


def curve(
    title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = True
) -> dict[str, Any]:
    """Points by name, drawn as lines; both axes logarithmic if `log`."""
    return {"title": title, "x": x, "y": y, "log": log, "series": {k: [list(p) for p in v] for k, v in series.items()}}


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int, *, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way, `rounds` times in turn after one round to warm up; every second round in reverse order.

    What a busy machine does to one way it does to its neighbours, so that medians of their ratios hold.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            taken = timed(ways[name], device=device)
            if number:
                seconds[name].append(taken)
    return seconds


def timed(do: Callable[[], Any], *, device: str = "cpu") -> float:
    """Seconds until the device is done."""
    wait(device)
    start = time.perf_counter()
    do()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of one way's time over another's."""
    return median(a / b for a, b in zip(over, under, strict=True))


class Peak:
    """The most memory in use since a level, in MiB."""

    megabytes = 0.0


@contextmanager
def peak(device: str = "cpu") -> Iterator[Peak]:
    """Watch memory while the block runs: a card's allocator, or the process's anonymous memory, looked at every 2 ms.

    Mapped files are left out: what they fill can be let go.
    """
    found = Peak()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        yield found
        found.megabytes = (torch.cuda.max_memory_allocated(device) - level) / MEGABYTE
        return
    over = threading.Event()
    level = anonymous()

    def watch() -> None:
        while not over.wait(0.002):
            found.megabytes = max(found.megabytes, anonymous() - level)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found.megabytes = max(found.megabytes, anonymous() - level)


def anonymous() -> float:
    """This process's anonymous memory in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon: peak memory is measured on Linux")


def tensors(do: Callable[[], Any], mapped: Path) -> float:
    """The most MiB of tensors held at a time, beyond those that were there: counted by torch, the same on every run.

    The process holds more, and never twice the same: its heap keeps room that nothing fills. Files below `mapped` are
    not counted where they are read in place: torch takes each for a tensor of the file's size.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        do()
    files = {file.stat().st_size for file in mapped.rglob("*") if file.is_file()}
    found: Any = profiled.profiler
    moves = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(moves, key=lambda event: event.start_ns()):
        held += event.nbytes() if abs(event.nbytes()) not in files else 0
        most = max(most, held)
    return most / MEGABYTE


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers belong to."""
    import transformers

    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.startswith("cuda"):
        found |= {"card": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
