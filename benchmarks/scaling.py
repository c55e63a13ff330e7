"""How time and memory of attribution grow with prompts, positions, layers, d_sae and quadrature steps.

    python benchmarks/scaling.py --size small --json benchmarks/results/scaling.json

One of the five moves at a time, the others stay. `candidates` is `attribute` with ten features a layer; `all features`
is what a run does: traces kept on disk, then each layer's SAE once. Each axis, either way, is a process of its own,
forked from one that has only imported. Its points are visited in turn and back, those of the axes that carry a bar at
least three times: what slows the machine for a while does so to all of them, and a median leaves it out.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from math import inf
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import measuring
import numpy as np
import synthetic
import torch
from measuring import bar, curve, table
from synthetic import Bench, Shape

from refusalscope.core.memory import give_back
from refusalscope.core.scores import Trace
from refusalscope.core.store import Store
from refusalscope.core.types import Prompt, Prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism import attribution, features

CANDIDATES, K = 10, 20
WAYS = ("candidates", "all features")
BARRED = ("prompts", "steps")
"""The axes that something is promised of."""
LINEAR, FLAT = 1.05, 0.05


class Point(NamedTuple):
    """What is attributed, in the names of the axes; `steps` are the nodes of the quadrature."""

    prompts: int
    positions: int
    layers: int
    d_sae: int
    steps: int


class Plan(NamedTuple):
    """Where everything stands that an axis does not move, the axes, and what never moves.

    Every point of an axis is visited so many times, where none are named once, and each time timed until `seconds` are
    over.
    """

    start: Point
    axes: Mapping[str, tuple[int, ...]]
    visits: Mapping[str, int]
    seconds: float
    width: int
    batch: int


class Found(NamedTuple):
    """One point of an axis, in medians over its visits, and the most MiB held at a time beyond what was loaded."""

    axis: str
    value: int
    way: str
    seconds: float
    resident: float
    """Of the process, as the system counts it."""
    tensors: float
    """Of torch's tensors alone, files read in place aside."""


class Growth(NamedTuple):
    """Along an axis: the exponent of time with its 95 % interval, and how much more its far end holds in tensors."""

    exponent: float
    low: float
    high: float
    memory: float


AXES = {
    "prompts": (64, 128, 256, 512, 1024),
    "positions": (16, 32, 64, 128),
    "layers": (2, 4, 8, 16),
    "d_sae": (1024, 2048, 4096, 8192, 16384),
    "steps": (1, 2, 4, 8, 16),
}
FEWER = {
    "prompts": (64, 160, 416, 1024),
    "positions": (16, 32, 64),
    "layers": (2, 4, 8),
    "d_sae": (1024, 4096, 16384),
    "steps": (1, 2, 4, 8, 16),
}
TOY = {"prompts": (2, 4), "steps": (1, 2)}
OFTEN: dict[str, int] = dict.fromkeys(BARRED, 3)
SIZES = {
    "toy": Plan(Point(2, 12, 2, 128, 1), TOY, {}, seconds=0, width=64, batch=2),
    "small": Plan(Point(64, 16, 4, 2048, 5), FEWER, OFTEN, seconds=0.3, width=128, batch=32),
    "full": Plan(Point(64, 32, 6, 4096, 5), AXES, dict.fromkeys(AXES, 3), seconds=1, width=256, batch=32),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser(__doc__, tuple(SIZES)).parse_args(argv)
    plan = SIZES[options.size]
    stops = [(plan, axis, way) for axis, way in product(plan.axes, WAYS)]
    # The toy size is there for the tests, which need no peaks.
    made = map(along, stops) if options.size == "toy" else apart(stops)
    return measuring.finish("scaling", options, result(plan, [one for found in made for one in found]))


def apart(stops: Sequence[tuple[Plan, str, str]]) -> Iterator[list[Found]]:
    """Each axis, either way, in a process of its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["sae_lens", "transformers.models.llama.modeling_llama", "refusalscope"])
    with ProcessPoolExecutor(1, context, torch.set_flush_denormal, (True,), max_tasks_per_child=1) as processes:
        yield from processes.map(along, stops)


def along(stop: tuple[Plan, str, str]) -> list[Found]:
    """Measure every point of an axis, the axis aside as at the start."""
    plan, axis, way = stop
    do = {"candidates": candidates, "all features": all_features}[way]
    with TemporaryDirectory() as folder:
        root, runs = Path(folder), {}
        load = cache(lambda shape: synthetic.load(shape, root / "-".join(map(str, shape))))
        for value in plan.axes[axis]:
            point = plan.start._replace(**{axis: value})
            bench = load(Shape(point.layers, plan.width, point.d_sae, 1, point.positions))
            prompts = worded(bench.model, point.prompts, point.positions)
            # A folder a point: what is written takes longer where much was written before.
            attribute = partial(do, bench, attribution.sound(point.steps), plan.batch, root / str(value))
            # Whatever is set up once, by the first forward, backward or read, is no part of what grows.
            attribute(prompts[: plan.batch])
            runs[value] = partial(attribute, prompts)
        visits = visited(runs, plan.visits.get(axis, 1), plan.seconds)
        found = []
        for value, run in runs.items():
            seconds, resident = (median(part) for part in zip(*visits[value], strict=True))
            found.append(Found(axis, value, way, seconds, resident, measuring.tensors(run, root)))
        return found


def visited(runs: Mapping[int, Callable[[], None]], turns: int, enough: float) -> dict[int, list[tuple[float, float]]]:
    """Median seconds and peak in MiB of every visit, each point's; every second turn goes back."""
    visits: dict[int, list[tuple[float, float]]] = {value: [] for value in runs}
    for turn in range(turns):
        for value in list(runs)[:: -1 if turn % 2 else 1]:
            gc.collect()
            give_back()
            seconds = []
            # All runs are watched, or none: watching only the first would slow those points that are run once.
            with measuring.peak() as peak:
                while not seconds or sum(seconds) < enough:
                    seconds.append(measuring.timed(runs[value]))
            visits[value].append((median(seconds), peak.megabytes))
    return visits


def candidates(bench: Bench, scheme: attribution.Scheme, batch: int, _folder: Path, prompts: Prompts) -> None:
    listed = dict.fromkeys(bench.saes.layers, range(CANDIDATES))
    attribution.attribute(
        *(bench.model, bench.saes, prompts, bench.direction), candidates=listed, scheme=scheme, batch_size=batch
    )


def all_features(bench: Bench, scheme: attribution.Scheme, batch: int, folder: Path, prompts: Prompts) -> None:
    store, layers = Store(folder), bench.saes.layers
    paths = []
    for number, (_, tokens) in enumerate(bench.model.batches(prompts, batch)):
        paths.append(f"traces/{number:04d}")
        store.put(paths[-1], "", attribution.trace(bench.model, tokens, bench.direction, layers=layers, scheme=scheme))
    traces = [store.read(path, Trace) for path in paths]
    scores = None
    for sae in bench.saes.each():
        scores = features.best(scores, features.layer_scores(sae, traces, k=K), K)


def worded(model: ChatModel, count: int, positions: int) -> Prompts:
    """Prompts of random words of the tokenizer's, each exactly `positions` tokens once the template is around it."""
    pieces = (model.tokenizer.decode([token]) for token in range(len(model.tokenizer)))
    words = [piece for piece in pieces if piece.startswith(" ") and piece[1:].isalpha()]
    around = len(model.template.encode(words[0]).ids) - 1
    draw = np.random.default_rng(0)
    texts = ("".join(draw.choice(words, positions - around)) for _ in range(count))
    made = Prompts("benchmark", tuple(Prompt(f"benchmark/{n}", text, "harmful") for n, text in enumerate(texts)))
    if any(model.template.length(prompt.text) != positions for prompt in made):
        raise ValueError(f"the tokenizer does not read its own words back as {positions} tokens")
    return made


def result(plan: Plan, found: Sequence[Found]) -> dict[str, Any]:
    growth = {
        (way, axis): grown([one for one in found if (one.axis, one.way) == (axis, way)])
        for way, axis in product(WAYS, plan.axes)
    }
    claims = [
        bar(f"exponent of time in {axis}, {way}", growth[way, axis].exponent, most=LINEAR)
        for axis, way in product(BARRED, WAYS)
    ]
    claims += [
        bar(f"growth of memory, {span(plan, axis)}, {way}", growth[way, axis].memory, most=FLAT)
        for axis, way in product(BARRED, WAYS)
    ]
    return {"bars": claims, "tables": [table_of(plan, growth, found)], "curves": curves(plan, found)}


def grown(found: Sequence[Found]) -> Growth:
    """A line through the logarithms, by least squares; its interval by Student's t."""
    from scipy import stats

    fitted: Any = stats.linregress(np.log([one.value for one in found]), np.log([one.seconds for one in found]))
    wide = float(stats.t.ppf(0.975, len(found) - 2) * fitted.stderr) if len(found) > 2 else inf
    memory = found[-1].tensors / found[0].tensors - 1 if found[0].tensors else inf
    return Growth(float(fitted.slope), float(fitted.slope) - wide, float(fitted.slope) + wide, memory)


def span(plan: Plan, axis: str) -> str:
    values = plan.axes[axis]
    return f"{values[0]} to {values[-1]} {axis}"


def table_of(plan: Plan, growth: Mapping[tuple[str, str], Growth], found: Sequence[Found]) -> dict[str, Any]:
    rows = []
    for (way, axis), grew in growth.items():
        here = [one for one in found if (one.axis, one.way) == (axis, way)]
        first, last = here[0], here[-1]
        ends = [f"{first.tensors:.1f} to {last.tensors:.1f}", f"{first.resident:.1f} to {last.resident:.1f}"]
        interval = f"{grew.low:.2f} to {grew.high:.2f}"
        rows.append([span(plan, axis), way, f"{grew.exponent:.2f}", interval, *ends, f"{100 * grew.memory:+.1f} %"])
    start = ", ".join(f"{value} {axis}" for axis, value in plan.start._asdict().items())
    often = ", ".join(f"{axis} {plan.visits.get(axis, 1)}" for axis in plan.axes)
    return table(
        "Growth along each axis",
        ["axis", "attributed", "exponent of time", "95 %", "MiB of tensors", "MiB resident", "growth in tensors"],
        rows,
        f"A random Llama of width {plan.width}, batches of {plan.batch}; what an axis does not move stands at {start}. "
        f"Times are medians over visits to each point in turn: {often}. "
        "An exponent of 1 is proportional, less is a fixed part beside it. MiB are peaks beyond what was loaded: of "
        "tensors, which torch counts to the byte, and of the process, whose heap makes them differ between runs by a "
        "tenth.",
    )


def curves(plan: Plan, found: Sequence[Found]) -> list[dict[str, Any]]:
    """Seconds and MiB of tensors, both ways, along each axis."""
    return [
        curve(
            f"{quantity} and {axis}",
            axis,
            unit,
            {
                way: [(one.value, getattr(one, what)) for one in found if (one.axis, one.way) == (axis, way)]
                for way in WAYS
            },
        )
        for axis, (quantity, unit, what) in product(
            plan.axes, (("Time", "seconds", "seconds"), ("Memory", "MiB of tensors", "tensors"))
        )
    ]


if __name__ == "__main__":
    main()
