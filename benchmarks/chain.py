"""A run's chain from prompts to costs, by the package's own functions, for a model and SAEs that lie in no folder.

What `pipeline/` does with a run folder between its stages is left out: traces stay in memory, nothing is written. The
direction's layer and refusal token are given, since random weights refuse nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import measuring

from refusalscope.core.scores import Trace
from refusalscope.core.types import Direction, FeatureSet, Label, Prompts, Responses, SaeSlice, layers_of
from refusalscope.evals import capability
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.mechanism import attribution, direction, features
from refusalscope.mechanism.direction import FitData
from refusalscope.mechanism.interventions import needed_features
from refusalscope.mechanism.reading import assemble, layer_entries, layer_totals
from refusalscope.studies import benchmark
from refusalscope.studies.benchmark import Arm

REFUSAL = 0
"""A token that opens no answer, so that removing the direction counts as flipping every prompt."""


class Load(NamedTuple):
    """Prompts of either label to fit on and to validate on, tokens an answer, features a set."""

    train: int
    validation: int
    answer: int
    features: int = 20


def ask(load: Load, make: Callable[[Label, int], Prompts]) -> FitData:
    """The prompts of a chain: those to validate on are the last of each label."""
    harmful, harmless = (make(label, load.train + load.validation) for label in ("harmful", "harmless"))
    train, rest = slice(load.train), slice(load.train, None)
    return FitData(harmful[train], harmless[train], harmful[rest], harmless[rest])


def run(
    model: ChatModel, saes: SaeBank, data: FitData, load: Load, *, sizes: Mapping[str, int], device: str
) -> dict[str, float]:
    """Direction, attribution, feature sets, answers under five arms and what two of them cost: seconds of each.

    `sizes` are the batch sizes of a plan's stages.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def clocked(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        measuring.wait(device)
        seconds[stage] = time.perf_counter() - start

    with clocked("direction"):
        found = direction.find(
            model,
            data,
            batch_size=sizes["direction"],
            is_refusal=lambda _: True,
            refusal_tokens=(REFUSAL,),
            best_layer=len(model.layers) // 2,
            keep_unrefused=True,
        )
    with clocked("choosing nodes"):
        attribution.enough_nodes(model, data.harmful_train, found, layers=saes.layers)
    with clocked("gradients"):
        traced = traces(model, data.harmful_train, found, saes, batch_size=sizes["features"])
    with clocked("reading SAEs"):
        sets = feature_sets(saes, traced, found, load.features)
    with clocked("slices"):
        slices = saes.slices(layers_of(sets))
    saes.let_go()
    del traced
    arms = [benchmark.BASE, benchmark.direction_arms(found)[0], *(benchmark.scale_arm(one, 0.0) for one in sets)]
    with clocked("answers"):
        answered = [answers(model, data.harmful_train, arm, slices, load, sizes) for arm in arms]
    with clocked("costs"):
        unedited = {row.prompt_id: row for row in answered[0].rows}
        for arm in arms[1:3]:
            capability.cost(
                *(model, data.harmful_train, unedited, arm.intervention),
                slices=needed(slices, arm),
                batch_size=sizes["cost"],
            )
    return seconds


def traces(model: ChatModel, prompts: Prompts, found: Direction, saes: SaeBank, *, batch_size: int) -> list[Trace]:
    """The traces of all prompts, by the scheme that a run goes by."""
    return [
        attribution.trace(model, tokens, found, layers=saes.layers, scheme=attribution.sound())
        for _, tokens in model.batches(prompts, batch_size)
    ]


def feature_sets(saes: SaeBank, traced: Sequence[Trace], found: Direction, k: int) -> list[FeatureSet]:
    """One pass over the SAEs, as `pipeline/select.py` reads them; three sets."""
    residuals = features.traced_residuals(traced)
    surveys, entries, scores = [], [], None
    for sae in saes.each():
        surveys.append(features.survey(sae, residuals, found, keep=max(features.PER_LAYER, k)))
        entries += layer_entries(sae, traced, features.candidates(surveys[-1:])[sae.layer])
        layer_totals(sae, traced)
        scores = features.best(scores, features.layer_scores(sae, traced, k=k), k)
    by_candidates = features.prompt_scores(assemble(traced, entries))
    chosen = [features.choose(one, k).features for one in (by_candidates, scores) if one is not None]
    return [*chosen, features.cosine(surveys, k)]


def answers(
    model: ChatModel, prompts: Prompts, arm: Arm, slices: Mapping[int, SaeSlice], load: Load, sizes: Mapping[str, int]
) -> Responses:
    return benchmark.answer(
        *(model, prompts, arm),
        slices=needed(slices, arm),
        batch_size=sizes["answer"],
        max_new_tokens=load.answer,
    )


def needed(slices: Mapping[int, SaeSlice], arm: Arm) -> dict[int, SaeSlice]:
    """What the arm's edit needs of them."""
    return {layer: slices[layer].take(wanted) for layer, wanted in needed_features(arm.intervention).items()}
