"""What is measured on a card: attribution, answers and a whole chain, in time, in operations and in memory.

Each case is a function of a `Rig`, in which a model lies loaded with its plan: the batch sizes that a run would choose,
and what it would expect to hold.
"""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import chain
import measuring
import operations
import real_shapes
import torch
from measuring import MEGABYTE
from operations import Operations, Rates
from real_shapes import Shape

from refusalscope.core.types import Direction, Feature, FeatureSet, Prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.footprint import Footprint
from refusalscope.inputs.loading import Placement, Skeleton
from refusalscope.inputs.saes import SaeBank
from refusalscope.mechanism import attribution, features
from refusalscope.pipeline import plan as planning
from refusalscope.pipeline.plan import Held, Plan, Stage, Work
from refusalscope.studies import benchmark

GIBIBYTE = 2**30
CANDIDATES, K = 10, 20
WARM = 4
"""Tokens an answer has at most where everything is only warmed up."""


class Load(NamedTuple):
    """How much is done."""

    models: tuple[str, ...]
    caps: tuple[int, ...]
    """GiB of the card that may be used; 0: all."""
    prompts: int
    positions: int
    answer: int
    chain: chain.Load
    rounds: int
    rows: int
    """Of the square matrices whose product is timed."""


class Rig(NamedTuple):
    """Everything loaded, nothing computed yet."""

    shape: Shape
    model: ChatModel
    saes: SaeBank
    prompts: Prompts
    direction: Direction
    plan: Plan
    load: Load
    device: str

    def size(self, stage: str) -> int:
        """Prompts in a batch, as a run would choose."""
        return min(self.plan.stages[stage].size, self.load.prompts)


class Case(NamedTuple):
    """What was found of one case; all but its name is empty where it failed, and `failed` says why."""

    name: str
    failed: str = ""
    batch: int = 0
    seconds: float = 0.0
    share: float = 0.0
    """Of its time: what its matrix products would take at the measured rates."""
    megabytes: float = 0.0
    """The most that was held: on a card of everything, on a CPU beyond the weights."""
    planned: float = 0.0
    tokens: int = 0
    """Of the answers."""
    stages: Mapping[str, float] = {}


def planned(shape: Shape, load: Load, device: str, cap: int) -> Plan:
    """The plan a run would go by; a cap counts as all that the card has."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    there = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else host
    return planning.make(
        # No file to be mapped holds these weights.
        Footprint(Skeleton(real_shapes.bare(shape, "meta"), torch.float32), Placement(device, "bfloat16")),
        Work(
            *(load.positions, load.positions, load.answer),
            train=load.prompts,
            validation=load.chain.validation,
            most=load.prompts,
            documents=False,
        ),
        name="random",
        device=device,
        free=Held(min(there, cap * GIBIBYTE) if cap else there, host),
        sae=real_shapes.outline(shape),
        read_ahead=False,
    )


def rigged(shape: Shape, load: Load, device: str, plan: Plan) -> Rig:
    model = real_shapes.chat_model(shape, device)
    prompts = real_shapes.prompts(shape, "harmful", load.prompts, load.positions)
    saes = real_shapes.bank(shape, model, prompts)
    return Rig(shape, model, saes, prompts, real_shapes.direction(shape, len(model.layers)), plan, load, device)


def candidates(rig: Rig, rates: Rates) -> Case:
    """Ten features a layer, from prompts to an attribution."""
    wanted, size = {layer: range(CANDIDATES) for layer in rig.saes.layers}, rig.size("features")

    def do() -> None:
        attribution.attribute(rig.model, rig.saes, rig.prompts, rig.direction, candidates=wanted, batch_size=size)

    return repeated(rig, rates, "candidates", do, count_of_attribution(rig, CANDIDATES), ("features",))


def all_features(rig: Rig, rates: Rates) -> Case:
    """Traces, then the scores of every feature, one layer's SAE after the other."""

    def do() -> None:
        traces = chain.traces(rig.model, rig.prompts, rig.direction, rig.saes, batch_size=rig.size("features"))
        for sae in rig.saes.each():
            features.layer_scores(sae, traces, k=K)

    count = count_of_attribution(rig, rig.shape.features)
    return repeated(rig, rates, "all features", do, count, ("features", "reading"))


def count_of_attribution(rig: Rig, width: int) -> Operations:
    load = rig.load
    return operations.attribution(rig.model, load.prompts, load.positions, nodes=attribution.NODES, features=width)


def repeated(
    rig: Rig, rates: Rates, name: str, do: Callable[[], None], count: Operations, stages: Sequence[str]
) -> Case:
    """A case's median after once to warm up: kernels are chosen then, and memory is taken."""
    with measuring.peak(rig.device) as peak:
        seconds = median([measuring.timed(do, device=rig.device) for _ in range(1 + rig.load.rounds)][1:])
    share = count.seconds(rates) / seconds
    return Case(name, "", rig.size(stages[0]), seconds, share, most(rig, peak), most_planned(rig, stages))


def unedited(rig: Rig, rates: Rates) -> Case:
    return answered(rig, rates, "answers, unedited", None)


def edited(rig: Rig, rates: Rates) -> Case:
    """Twenty features, spread over the layers, silenced."""
    layers = rig.saes.layers
    spread = tuple(sorted(Feature(layers[at % len(layers)], at // len(layers)) for at in range(K)))
    return answered(rig, rates, "answers under feature edits", FeatureSet("random", spread, (1.0,) * K))


def answered(rig: Rig, rates: Rates, name: str, chosen: FeatureSet | None) -> Case:
    """Greedy answers, nearly all as long as they may be; once, after a few tokens to warm up."""
    arm = benchmark.BASE if chosen is None else benchmark.scale_arm(chosen, 0.0)
    slices = {} if chosen is None else rig.saes.slices(chosen.by_layer())
    rig.saes.let_go()

    def do(tokens: int) -> int:
        made = benchmark.answer(
            *(rig.model, rig.prompts, arm), slices=slices, batch_size=rig.size("answer"), max_new_tokens=tokens
        )
        return sum(row.tokens for row in made.rows)

    do(WARM)
    with measuring.peak(rig.device) as peak:
        start = time.perf_counter()
        tokens = do(rig.load.answer)
        measuring.wait(rig.device)
        seconds = time.perf_counter() - start
    prompts = rig.load.prompts
    share = operations.answers(rig.model, prompts, rig.load.positions, tokens // prompts).seconds(rates) / seconds
    held = (most(rig, peak), most_planned(rig, ("answer",)))
    return Case(name, "", rig.size("answer"), seconds, share, *held, tokens)


def whole_chain(rig: Rig, _rates: Rates) -> Case:
    """What a run does up to answers under a few edits and their costs; once."""
    sizes = {name: stage.size for name, stage in rig.plan.stages.items()}
    data = chain.ask(rig.load.chain, partial(real_shapes.prompts, rig.shape, positions=rig.load.positions))
    start = time.perf_counter()
    with measuring.peak(rig.device) as peak:
        stages = chain.run(rig.model, rig.saes, data, rig.load.chain, sizes=sizes, device=rig.device)
    seconds = time.perf_counter() - start
    held = (most(rig, peak), most_planned(rig, tuple(rig.plan.stages)))
    return Case("whole chain", "", 0, seconds, 0.0, *held, 0, stages)


CASES: Mapping[str, Callable[[Rig, Rates], Case]] = {
    "candidates": candidates,
    "all features": all_features,
    "answers, unedited": unedited,
    "answers under feature edits": edited,
    "whole chain": whole_chain,
}


def most(rig: Rig, peak: measuring.Peak) -> float:
    """The most MiB that were held."""
    on_card = rig.device.startswith("cuda")
    return torch.cuda.max_memory_allocated(rig.device) / MEGABYTE if on_card else peak.megabytes


def most_planned(rig: Rig, names: Sequence[str]) -> float:
    """The most MiB that the plan has for these stages on the device."""

    def at_work(stage: Stage) -> Held:
        return rig.plan.fixed.plus(stage.at(stage.size))

    held = [at_work(rig.plan.stages[name]) for name in names]
    return max(sum(side) if rig.plan.shared else side.device for side in held) / MEGABYTE


def clear(device: str) -> None:
    """Give a card's memory back: what is held by cycles, and what the allocator keeps."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
