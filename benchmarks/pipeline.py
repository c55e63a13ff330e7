"""Where a whole run spends its time, what starting costs, and what going on costs once all or half of it is made.

    python benchmarks/pipeline.py --size small --json benchmarks/results/pipeline.json

`run testbed` is a process of its own, clocked at the arrows of `pipeline/chains.py`; `small` does every study, `toy`
none, on four prompts a set, and `full` the testbed's whole grid. Then the same command again, with everything made; and
a run of the toy's size that is killed half-way and started again. Starting is held against importing torch, which is
most of it: the ratio of the two belongs to the program, the seconds to the machine. The way to the first pass is that
of the toy's run; the command again is also what a run takes of which everything is made.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import measuring
from clock import Clock, watch_first_pass
from measuring import bar, table

MOST = 180.0
"""Seconds of computing that a whole run of the testbed may take on two cores."""
TOY: dict[str, Any] = {
    "studies": ["none"],
    "limit": 4,
    "max_new_tokens": 4,
    "factors": [0.0],
    "values": [1.0],
    "methods": ["cosine+attribution"],
}
RUNS: dict[str, dict[str, Any]] = {"toy": TOY, "small": {}, "full": {"full": True}}
ROUNDS = {"toy": (1, 1), "small": (3, 1), "full": (11, 11)}
"""Of commands that start and end, and of those rounds how many have the command again, which takes half a minute."""
TIMES = "times.json"
PAGE = "testbed/report.html"
LISTED = 8
"""Packages named by what importing them takes."""


class Times(NamedTuple):
    """One command: seconds from its start to its end, to its first pass of the model (its end if none), and by part."""

    whole: float
    starting: float
    parts: Mapping[str, float]

    @property
    def computing(self) -> float:
        return self.whole - self.starting


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measuring.parser(__doc__, tuple(RUNS))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until-first-pass", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child is not None:
        return run_here(options.child, options.size, options.device, stop=options.until_first_pass)
    with TemporaryDirectory() as folder:
        return measuring.finish("pipeline", options, measure(Path(folder), options.size, options.device))


def measure(folder: Path, size: str, device: str) -> dict[str, Any]:
    """Every command in turn, each in a process of its own."""
    first = run(folder / "run", size, device)
    starts, again = starting(folder, size, device)
    whole = first if size == "toy" else run(folder / "whole", "toy", device)
    stopped = killed(folder, device, whole)
    seconds = {name: median(found) for name, found in starts.items()} | {"to the first pass": whole.starting}

    def over(name: str) -> float:
        return seconds["import torch"] / seconds[name]

    return {
        "ratios": {
            "import torch over `refusalscope --help`": over("--help"),
            "import torch over a run's way to its first pass": over("to the first pass"),
            # Over the run itself it would fall as soon as runs get faster.
            "import torch over a run of which everything is made": over("everything made"),
            "a run over one killed half-way and started again": stopped["whole"] / stopped["killed and again"],
        },
        "bars": bars(first, seconds["everything made"], over("--help"), size),
        "tables": [
            by_part(first, again),
            table("Going on", ["command", "seconds"], [[name, taken] for name, taken in stopped.items()]),
            table("Starting", ["command", "seconds"], [[name, taken] for name, taken in seconds.items()]),
            imports(folder, device),
        ],
    }


def bars(first: Times, again: float, helped: float, size: str) -> list[dict[str, Any]]:
    """What is promised of the whole run is promised of no other size."""
    whole = [
        bar("seconds that `run testbed` computes for, on two cores", first.computing, most=MOST),
        bar("the same command again, share of the first", again / first.whole, most=0.1),
    ]
    return [bar("import torch over `refusalscope --help`", helped, least=3.0), *(whole if size == "small" else [])]


def by_part(first: Times, again: Times) -> dict[str, Any]:
    """A run's seconds by part, in the order in which the parts were first done, beside those of the command again."""
    names = [*first.parts, *(name for name in again.parts if name not in first.parts)]
    rows = [
        [name, seconds := first.parts.get(name, 0.0), f"{seconds / first.whole:.0%}", again.parts.get(name, 0.0)]
        for name in names
    ]
    whole = ["whole command", first.whole, "100%", again.whole]
    note = f"{first.starting:.1f} s passed before the model's first pass, most of them imports."
    return table("`run testbed` by part", ["part", "seconds", "share", "again"], [*rows, whole], note)


def run(runs: Path, size: str, device: str) -> Times:
    """One command from start to end."""
    runs.mkdir(exist_ok=True)
    start, clock = time.time(), time.perf_counter()
    subprocess.run(child(runs, size, device), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - clock
    found = json.loads((runs / TIMES).read_text())
    starting = whole if found["first pass"] is None else found["first pass"] - start
    inside = sum(found["parts"].values())
    return Times(whole, starting, {"starting and importing": whole - inside, **found["parts"]})


def killed(folder: Path, device: str, whole: Times) -> dict[str, float]:
    """Seconds of a run of the toy's size, of half of it and what was left, which must give the same page."""
    runs, half = folder / "killed", whole.starting + whole.computing / 2
    runs.mkdir()
    process = subprocess.Popen(child(runs, "toy", device), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=half)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    rest = run(runs, "toy", device).whole
    other = folder / ("whole" if (folder / "whole").is_dir() else "run")
    if (runs / PAGE).read_bytes() != (other / PAGE).read_bytes():
        raise SystemExit("a run that was killed and started again gives another page than one that was not")
    names = ("whole", "killed half-way", "again", "killed and again")
    return dict(zip(names, (whole.whole, half, rest, half + rest), strict=True))


def starting(folder: Path, size: str, device: str) -> tuple[dict[str, list[float]], Times]:
    """Seconds of commands that start and end, in turn, and the last run of which everything was made.

    Nothing is warmed up: a whole run has read all that these read.
    """
    python = [sys.executable, "-c"]
    commands = {
        "python": [*python, "pass"],
        "import refusalscope": [*python, "import refusalscope"],
        "--help": [sys.executable, "-m", "refusalscope", "--help"],
        "import torch": [*python, "import torch"],
    }
    rounds, most = ROUNDS[size]
    seconds: dict[str, list[float]] = defaultdict(list)
    again = []
    for number in range(rounds):
        for name, command in commands.items():
            do = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[name].append(measuring.timed(do))
        if number < most:
            again.append(run(folder / "run", size, device))
    return {**seconds, "everything made": [one.whole for one in again]}, again[-1]


def imports(folder: Path, device: str) -> dict[str, Any]:
    """What a run imports before its first pass: seconds by package, modules imported by it apart."""
    (folder / "imports").mkdir()
    python, *rest = child(folder / "imports", "toy", device)
    command = [python, "-X", "importtime", *rest, "--until-first-pass"]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    own: dict[str, float] = defaultdict(float)
    for microseconds, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE):
        own[module.partition(".")[0]] += int(microseconds) / 1e6
    largest = sorted(own, key=lambda name: -own[name])
    others = sum(own[name] for name in largest[LISTED:])
    rows = [[name, own[name]] for name in largest[:LISTED]]
    return table(
        "Imports of a run, by package",
        ["package", "seconds"],
        [*rows, [f"{len(largest) - LISTED} others", others]],
        "As `python -X importtime` counts them, each package without those that it imports.",
    )


def child(runs: Path, size: str, device: str) -> list[str]:
    """The command line of a process that runs `refusalscope run testbed` below `runs`, clocked."""
    return [sys.executable, __file__, "--child", str(runs), "--size", size, "--device", device]


def run_here(runs: Path, size: str, device: str, *, stop: bool) -> dict[str, Any]:
    """The command itself, by the function that the command line calls; with `stop` the process ends at its first pass.

    Returns what is written to `TIMES` as well.
    """
    from refusalscope import cli

    parts, clock = arrows(), Clock()
    watch_first_pass(clock, stop=stop)
    for name, (owner, attribute) in parts.items():
        setattr(owner, attribute, clock.around(name, getattr(owner, attribute)))
    given = {**RUNS[size], "model": "testbed", "device": device}
    cli.drive("run", given, folder=(None, runs), config=None, progress=lambda *_: None, judging={})
    found = {"first pass": clock.first_pass, "parts": clock.stop()}
    (runs / TIMES).write_text(json.dumps(found))
    return found


def arrows() -> dict[str, tuple[Any, str]]:
    """Part of a run -> where the function that does it is looked up."""
    from refusalscope.pipeline import (
        categories,
        category_sets,
        explain,
        fit,
        graph,
        health,
        jailbreaks,
        measure,
        minimal,
        probes,
        select,
        suffixes,
    )
    from refusalscope.pipeline.job import Job

    return {
        "reading the model": (Job, "load_model"),
        "direction": (fit, "fit"),
        "features": (select, "choose_features"),
        "answers": (measure, "run_benchmark"),
        "costs": (measure, "make_cost"),
        "health of the SAEs": (health, "run_health"),
        "attribution by layer": (measure, "run_attribution"),
        "explaining features": (explain, "explain_features"),
        "explaining prompts": (explain, "explain_prompts"),
        "features by category": (category_sets, "choose_category_sets"),
        "categories": (categories, "run_categories"),
        "graph": (graph, "run_graph"),
        "minimal sets": (minimal, "run_minimal"),
        "jailbreaks": (jailbreaks, "run_jailbreaks"),
        "suffixes": (suffixes, "run_suffixes"),
        "probes": (probes, "run_probes"),
        "page and figures": (measure, "write_report"),
    }


if __name__ == "__main__":
    main()
