"""How time and memory of attribution grow with prompts, positions, layers, d_sae and quadrature steps.

    python benchmarks/scaling.py --size small --json benchmarks/results/scaling.json

One of the five moves at a time, the others stay. `candidates` is `attribute` with ten features a layer; `all features`
is what a run does: traces kept on disk, then each layer's SAE once. Every point is a process of its own, forked from
one that has only imported, so that its peak is its own.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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
LINEAR, FLAT = 1.05, 0.05


class Point(NamedTuple):
    """What is attributed, in the names of the axes; `steps` are the nodes of the quadrature."""

    prompts: int
    positions: int
    layers: int
    d_sae: int
    steps: int


class Plan(NamedTuple):
    """The point that every axis passes through, the axes, and what never moves.

    Every point is visited so many times, and each time timed until `seconds` are over.
    """

    start: Point
    axes: Mapping[str, tuple[int, ...]]
    visits: int
    seconds: float
    width: int
    batch: int


class Found(NamedTuple):
    """One visit to one point of an axis, and the most MiB held at a time beyond what was loaded."""

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
TOY = {"prompts": (2, 4), "steps": (1, 2)}
SIZES = {
    "toy": Plan(Point(2, 12, 2, 128, 1), TOY, visits=1, seconds=0, width=64, batch=2),
    "small": Plan(Point(64, 16, 4, 2048, 5), AXES, visits=1, seconds=1, width=128, batch=32),
    "full": Plan(Point(64, 32, 6, 4096, 5), AXES, visits=3, seconds=1, width=256, batch=32),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser(__doc__, tuple(SIZES)).parse_args(argv)
    plan = SIZES[options.size]
    stops = [(plan, axis, value, way) for axis, values in plan.axes.items() for value, way in product(values, WAYS)]
    stops = [stop for turn in range(plan.visits) for stop in stops[:: -1 if turn % 2 else 1]]
    # The toy size is there for the tests, which need no peaks.
    found = list(map(visit, stops) if options.size == "toy" else apart(stops))
    return measuring.finish("scaling", options, result(plan, found))


def apart(stops: Sequence[tuple[Plan, str, int, str]]) -> Iterator[Found]:
    """Each stop in a process of its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["sae_lens", "transformers.models.llama.modeling_llama", "refusalscope"])
    with ProcessPoolExecutor(1, context, torch.set_flush_denormal, (True,), max_tasks_per_child=1) as processes:
        yield from processes.map(visit, stops)


def visit(stop: tuple[Plan, str, int, str]) -> Found:
    """Measure a point of an axis, the axis aside as at the start."""
    plan, axis, value, way = stop
    point = plan.start._replace(**{axis: value})
    with TemporaryDirectory() as folder:
        bench = synthetic.load(Shape(point.layers, plan.width, point.d_sae, 1, point.positions), Path(folder))
        prompts = worded(bench.model, point.prompts, point.positions)
        do = {"candidates": candidates, "all features": all_features}[way]

        def run(rows: Prompts) -> Callable[[], None]:
            return lambda: do(bench, rows, attribution.sound(point.steps), plan.batch, Path(folder))

        # Whatever is set up once, by the first forward, backward or read, is no part of what grows.
        run(prompts[: plan.batch])()
        return Found(axis, value, way, *measured(run(prompts), plan.seconds, Path(folder)))


def measured(run: Callable[[], None], enough: float, folder: Path) -> tuple[float, float, float]:
    """Median seconds, the peak in MiB of the first of the runs timed, and that of tensors in a run of its own."""
    gc.collect()
    give_back()
    seconds = []
    with measuring.peak() as peak:
        seconds.append(measuring.timed(run))
    while sum(seconds) < enough:
        seconds.append(measuring.timed(run))
    return median(seconds), peak.megabytes, measuring.tensors(run, folder)


def candidates(bench: Bench, prompts: Prompts, scheme: attribution.Scheme, batch: int, _folder: Path) -> None:
    listed = dict.fromkeys(bench.saes.layers, range(CANDIDATES))
    attribution.attribute(
        *(bench.model, bench.saes, prompts, bench.direction), candidates=listed, scheme=scheme, batch_size=batch
    )


def all_features(bench: Bench, prompts: Prompts, scheme: attribution.Scheme, batch: int, folder: Path) -> None:
    store, layers = Store(folder / "run"), bench.saes.layers
    paths = []
    for number, (_, tokens) in enumerate(bench.model.batches(prompts, batch)):
        paths.append(f"traces/{number:04d}")
        store.put(paths[-1], "", attribution.trace(bench.model, tokens, bench.direction, layers=layers, scheme=scheme))
    traces = [store.read(path, Trace) for path in paths]
    features.join([features.layer_scores(sae, traces, k=K) for sae in bench.saes.each()])


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
        for axis, way in product(("prompts", "steps"), WAYS)
    ]
    claims += [
        bar(f"growth of memory, {span(plan, axis)}, {way}", growth[way, axis].memory, most=FLAT)
        for axis, way in product(("prompts", "steps"), WAYS)
    ]
    return {"bars": claims, "tables": [table_of(plan, growth, found)], "curves": curves(plan, found)}


def grown(found: Sequence[Found]) -> Growth:
    """A line through the logarithms, by least squares; its interval by Student's t. Memory as medians over visits."""
    from scipy import stats

    fitted: Any = stats.linregress(np.log([one.value for one in found]), np.log([one.seconds for one in found]))
    wide = float(stats.t.ppf(0.975, len(found) - 2) * fitted.stderr) if len(found) > 2 else inf
    held = medians(found, "tensors")
    memory = held[-1][1] / held[0][1] - 1 if held[0][1] else inf
    return Growth(float(fitted.slope), float(fitted.slope) - wide, float(fitted.slope) + wide, memory)


def medians(found: Sequence[Found], what: str) -> list[tuple[int, float]]:
    """(value, median over the visits), ascending."""
    values = sorted({one.value for one in found})
    return [(value, median(getattr(one, what) for one in found if one.value == value)) for value in values]


def span(plan: Plan, axis: str) -> str:
    values = plan.axes[axis]
    return f"{values[0]} to {values[-1]} {axis}"


def table_of(plan: Plan, growth: Mapping[tuple[str, str], Growth], found: Sequence[Found]) -> dict[str, Any]:
    rows = []
    for (way, axis), grew in growth.items():
        here = [one for one in found if (one.axis, one.way) == (axis, way)]
        resident, tensors = ([part for _, part in medians(here, what)] for what in ("resident", "tensors"))
        ends = [f"{part[0]:.1f} to {part[-1]:.1f}" for part in (tensors, resident)]
        interval = f"{grew.low:.2f} to {grew.high:.2f}"
        rows.append([span(plan, axis), way, f"{grew.exponent:.2f}", interval, *ends, f"{100 * grew.memory:+.1f} %"])
    start = ", ".join(f"{value} {axis}" for axis, value in plan.start._asdict().items())
    return table(
        "Growth along each axis",
        ["axis", "attributed", "exponent of time", "95 %", "MiB of tensors", "MiB resident", "growth in tensors"],
        rows,
        f"A random Llama of width {plan.width}, batches of {plan.batch}; what an axis does not move stands at {start}. "
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
            {way: medians([one for one in found if (one.axis, one.way) == (axis, way)], what) for way in WAYS},
        )
        for axis, (quantity, unit, what) in product(
            plan.axes, (("Time", "seconds", "seconds"), ("Memory", "MiB of tensors", "tensors"))
        )
    ]


if __name__ == "__main__":
    main()
