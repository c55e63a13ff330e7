"""What really happens when features move: the metric of an attribution, measured instead of approximated.

`alone` and `in_random_order` are what attributions are held to (method 3b); `metric_under` says what any edit does.
Knows nothing of how gradients are taken.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refusalscope.core.scores import Trace
from refusalscope.core.types import Direction, Feature, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Edits, Given, Tokens
from refusalscope.inputs.template import Role
from refusalscope.mechanism.attribution import choose_metric
from refusalscope.mechanism.interventions import RemoveDirection, editor

Progress = Callable[[str, int, int], None]


class Delta(NamedTuple):
    """How one feature's activation differs between the patched and the clean run of a batch."""

    feature: Feature
    change: Float[Tensor, "prompt position"]
    """f~ - f, 0 at padding."""
    decoder: Float[Tensor, "d_model"]

    @property
    def residual(self) -> Float[Tensor, "prompt position d_model"]:
        """What the feature's own move adds to the residual stream."""
        return self.change[..., None] * self.decoder


class Logits(NamedTuple):
    """What an edit makes of a batch's first tokens."""

    metric: Float[Tensor, "prompt"]
    """`logit[j] - logit[r]` with the trace's own j and r."""
    first: tuple[int, ...]
    """The likeliest first tokens."""


class Contrast(NamedTuple):
    """A batch and the two first tokens that its metric compares (method 3)."""

    tokens: Tokens
    answer: Int[Tensor, "prompt"]
    """j: the likeliest first token once the direction is removed."""
    refusal: Int[Tensor, "prompt"]
    """r: the clean run's likeliest refusal token."""
    clean: Float[Tensor, "prompt"]
    """`logit[j] - logit[r]` of the clean run."""
    flipped: Bool[Tensor, "prompt"]
    """False where j refuses too: the metric of this prompt says nothing."""


def contrast(model: ChatModel, tokens: Tokens, direction: Direction) -> Contrast:
    """What the metric compares on a batch: a clean run and one without the direction, no gradient."""
    removal = editor(RemoveDirection(direction), layers=len(model.layers)).edits
    with torch.no_grad():
        clean, removed = (model.run(tokens, edits=edits, logits=1).logits[:, -1] for edits in ({}, removal))
    metric = choose_metric(clean, removed, direction.refusal_tokens)
    return Contrast(tokens, metric.answer, metric.refusal, metric.clean, metric.flipped)


def tokens_of(trace: Trace) -> Tokens:
    """The batch a trace was made of."""
    return Tokens(trace.prompt_ids, trace.ids, trace.roles)


def metric_under(model: ChatModel, trace: Trace | Contrast, edits: Edits, given: Given | None = None) -> Logits:
    """The metric and first tokens of a batch under edits.

    With what a layer is known to give unedited, nothing up to it is run, if the model can go on from there; edits below
    it, which then must change nothing, are left out. The testbed's seven categories took 18 s and so take 11.
    """
    tokens = trace.tokens if isinstance(trace, Contrast) else tokens_of(trace)
    if given is not None and model.resumable:
        edits = {layer: edit for layer, edit in edits.items() if layer >= given.layer}
    else:
        given = None
    logits = model.run(tokens, edits=edits, logits=1, given=given).logits[:, -1].cpu()
    rows = torch.arange(len(logits))
    return Logits(logits[rows, trace.answer] - logits[rows, trace.refusal], tuple(logits.argmax(-1).tolist()))


def deltas(trace: Trace, slices: Sequence[SaeSlice]) -> list[Delta]:
    """Every sliced feature's own move between the clean and the patched run, layer by layer."""
    inside = (trace.roles != Role.PADDING)[..., None]
    found = []
    for part in slices:
        row = trace.layers.index(part.layer)
        change = (part.encode(trace.patched[row]) - part.encode(trace.clean[row])) * inside
        for column, index in enumerate(part.features.tolist()):
            found.append(Delta(Feature(part.layer, index), change[..., column], part.decoder[column]))
    return found


def predicted(trace: Trace, moved: Sequence[Delta]) -> Float[Tensor, "feature prompt"]:
    """The attribution of each move, summed over positions, by the trace's gradients."""
    slopes = {delta.feature: trace.gradient[trace.layers.index(delta.feature.layer)] @ delta.decoder for delta in moved}
    return torch.stack([(delta.change * slopes[delta.feature]).sum(-1) for delta in moved])


def alone(
    model: ChatModel, trace: Trace, moved: Sequence[Delta], progress: Progress = lambda *_: None
) -> Float[Tensor, "feature prompt"]:
    """How much the metric changes when one feature alone is set to its patched value, all else answering."""
    effects = []
    for done, delta in enumerate(moved):
        progress("verify: one feature at a time", done, len(moved))
        edits = {delta.feature.layer: _plus(delta.residual)}
        effects.append(metric_under(model, trace, edits).metric - trace.metric_clean)
    return torch.stack(effects)


def in_random_order(
    model: ChatModel,
    trace: Trace,
    moved: Sequence[Delta],
    *,
    orders: int,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Float[Tensor, "feature prompt"]:
    """Mean marginal change of the metric when the features' own moves are added one by one in random order."""
    rng = np.random.default_rng(seed)
    total = torch.zeros(len(moved), len(trace.prompt_ids))
    for order in range(orders):
        progress("verify: features in random order", order, orders)
        sums: dict[int, Tensor] = {}
        before = trace.metric_clean
        for at in rng.permutation(len(moved)).tolist():
            layer = moved[at].feature.layer
            sums[layer] = sums.get(layer, torch.zeros(())) + moved[at].residual
            after = metric_under(model, trace, {layer: _plus(part) for layer, part in sums.items()}).metric
            total[at] += (after - before) / orders
            before = after
    return total


def _plus(addition: Float[Tensor, "prompt position d_model"]) -> Edit:
    def edit(residual: Tensor, batch: Batch) -> Tensor:
        return residual + addition.to(residual)

    return edit


def swap_layer(model: ChatModel, trace: Trace, layer: int) -> Float[Tensor, "prompt"]:
    """How much the metric changes when this layer's residuals alone become the patched run's."""
    row = trace.layers.index(layer)
    end = trace.patched if trace.end is None else trace.end

    def edit(residual: Tensor, batch: Batch) -> Tensor:
        return end[row].to(residual)

    return metric_under(model, trace, {layer: edit}).metric - trace.metric_clean
