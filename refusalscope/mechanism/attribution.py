"""Which features carry refusal: gradients on the way from the clean run to the direction-removed run.

The SAE leaves the loop (method 3a): decoding is linear and the error term restores the rest, so mixing features and
error is mixing residuals, and a step is one forward and one backward of the bare model. That gives a `Trace`, against
which each layer's SAE is read once (`reading.py`). Knows nothing of feature sets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refusalscope.core.scores import Attribution, Trace
from refusalscope.core.types import Direction, Prompts, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Given, Tokens
from refusalscope.inputs.saes import SaeBank
from refusalscope.mechanism.interventions import RemoveDirection, editor
from refusalscope.mechanism.reading import Entries, assemble, entries_of_each, layer_entries

Progress = Callable[[str, int, int], None]
NODES = 5
NODE_TOLERANCE = 0.02
MOST_NODES = 80


class Quadrature(NamedTuple):
    """Nodes and weights on [0, 1]; weights sum to 1."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def gauss_legendre(count: int) -> Quadrature:
    """The `sound` rule: exact for polynomials of degree 2 count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return Quadrature(tuple(float(n) for n in (nodes + 1) / 2), tuple(float(w) for w in weights / 2))


def left_riemann(count: int) -> Quadrature:
    """The published rule: nodes 0, 1/count, ... with equal weights; its error falls as 1/count."""
    return Quadrature(tuple(k / count for k in range(count)), (1 / count,) * count)


class Metric(NamedTuple):
    """`logit[j] - logit[r]` at the last position of each prompt."""

    answer: Int[Tensor, "prompt"]
    refusal: Int[Tensor, "prompt"]
    clean: Float[Tensor, "prompt"]
    patched: Float[Tensor, "prompt"]
    flipped: Bool[Tensor, "prompt"]


Ends = Mapping[int, Float[Tensor, "prompt position d_model"]]
"""Layer -> the residual at which its path ends, where the layer is."""
Gradients = Callable[[ChatModel, Tokens, Ends, Ends, Metric, int], dict[int, Tensor]]
"""(model, tokens, clean residuals, ends, metric, most rows at once) -> layer -> mean gradient, float32, in place."""


@dataclass(frozen=True)
class Scheme:
    """One way to attribute (method 3b)."""

    name: str
    gradients: Gradients
    ends_before_removal: bool = False
    """The published path ends at each layer's residual before that layer's own removal."""


def sound(nodes: int = NODES) -> Scheme:
    """All layers move at once along a path to the direction-removed run; Gauss-Legendre nodes."""
    return Scheme("sound", joint(gauss_legendre(nodes)))


def paper() -> Scheme:
    """The published choice: left Riemann sum over 10 nodes, ending before each layer's own removal."""
    return Scheme("paper", joint(left_riemann(10)), ends_before_removal=True)


def layerwise(rule: Quadrature) -> Scheme:
    """One layer moves at a time, the others answer: a true Jacobian, complete for every layer. The reference."""
    return Scheme("layerwise", one_layer_at_a_time(rule))


def gradient() -> Scheme:
    """One backward pass at the clean run: the cheap one, and the best for a single feature."""
    return Scheme("gradient", joint(left_riemann(1)))


class DirectionDoesNotMediate(ValueError):
    """Removing the direction leaves most prompts refused."""


def attribute(
    model: ChatModel,
    saes: SaeBank,
    prompts: Prompts,
    direction: Direction,
    *,
    candidates: Mapping[int, Sequence[int]] | None = None,
    scheme: Scheme | None = None,
    batch_size: int,
    progress: Progress = lambda *_: None,
) -> Attribution:
    """Attribute the metric of each prompt to SAE features: `(f~ - f) * (G . W_dec)` at every position.

    `candidates` maps layers to the features wanted, in memory that does not grow with the prompts; with None it is all
    layers of `saes` and all features, and every prompt's residuals are in memory. `scheme` is `sound()` if None.
    Method: Marks et al. 2024 as corrected in docs/method.md.
    Raises DirectionDoesNotMediate when removal flips fewer than half of the prompts.
    """
    layers = tuple(saes.layers if candidates is None else sorted(candidates))
    slices = {} if candidates is None else _slices(saes, candidates, progress)
    traces: list[Trace] = []
    found: dict[int, list[Entries]] = {layer: [] for layer in layers}
    for number, (_, tokens) in enumerate(model.batches(prompts, batch_size)):
        progress("attribution: gradients", number * batch_size, len(prompts))
        made = trace(
            *(model, tokens, direction),
            layers=layers,
            scheme=scheme or sound(),
            at_once=batch_size,
            offload=not slices,
        )
        for entries in entries_of_each(list(slices.values()), made):
            found[entries.layer].append(entries)
        # What is read already need not be kept: memory does not grow with the prompts.
        traces.append(made.bare() if slices else made)
    check_flipped(traces)
    for done, sae in enumerate(() if slices else saes.each(layers)):
        progress("attribution: features", done, len(layers))
        found[sae.layer] = layer_entries(sae, traces, None if candidates is None else candidates[sae.layer])
    return assemble(traces, [part for layer in layers for part in found[layer]])


def _slices(saes: SaeBank, candidates: Mapping[int, Sequence[int]], progress: Progress) -> dict[int, SaeSlice]:
    """The candidates' columns and rows, gathered once; none where features compete: a slice is a whole SAE then."""
    slices = {}
    for done, sae in enumerate(saes.each(sorted(candidates))):
        progress("attribution: candidates", done, len(candidates))
        slices[sae.layer] = sae.here(candidates[sae.layer])
        if slices[sae.layer].active is not None:
            return {}
    return slices


def trace(
    model: ChatModel,
    tokens: Tokens,
    direction: Direction,
    *,
    layers: Sequence[int],
    scheme: Scheme,
    at_once: int | None = None,
    offload: bool = True,
) -> Trace:
    """Clean run, direction-removed run and the gradients between them, for one batch; on the CPU if `offload`.

    Nodes of the path share a pass while they fit into `at_once` rows; one node a pass if None.
    """
    removal = editor(RemoveDirection(direction), layers=len(model.layers)).edits
    before: dict[int, Tensor] = {}

    def removed(layer: int) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            if scheme.ends_before_removal:
                before[layer] = residual.detach()
            return removal[layer](residual, batch)

        return edit

    with torch.no_grad():
        clean = model.run(tokens, keep=layers, logits=1, offload=False)
        edits = {layer: removed(layer) for layer in removal}
        patched = model.run(tokens, edits=edits, keep=layers, logits=1, offload=False)
    ends = {layer: before[layer] for layer in layers} if scheme.ends_before_removal else patched.residuals
    metric = choose_metric(clean.logits[:, -1], patched.logits[:, -1], direction.refusal_tokens)
    rows = at_once or len(tokens.prompt_ids)
    gradients = scheme.gradients(model, tokens, clean.residuals, ends, metric, rows)

    def stacked(parts: Mapping[int, Tensor]) -> Tensor:
        first = parts[layers[0]]
        # Each layer goes to its place at once: a copy of its own first would be as much again for the host to move.
        made = first.new_empty(len(layers), *first.shape, device="cpu" if offload else model.device)
        if made.device != first.device:
            # Pages that all cores have touched: 1.5 GB come off a card in .2 s, else in 1.2.
            made.zero_()
        for place, layer in zip(made, layers, strict=True):
            place.copy_(parts[layer])
        return made

    return Trace(
        prompt_ids=tokens.prompt_ids,
        ids=tokens.ids.cpu(),
        roles=tokens.roles.cpu(),
        layers=tuple(layers),
        clean=stacked(clean.residuals),
        patched=stacked(patched.residuals),
        end=stacked(ends) if scheme.ends_before_removal else None,
        gradient=stacked(gradients),
        answer=metric.answer,
        refusal=metric.refusal,
        metric_clean=metric.clean,
        metric_patched=metric.patched,
        flipped=metric.flipped,
    )


def choose_metric(
    clean: Float[Tensor, "prompt vocabulary"], patched: Float[Tensor, "prompt vocabulary"], refusal: Sequence[int]
) -> Metric:
    """r is the clean argmax if that refuses, else the likeliest refusal token; j is the patched argmax (method 3)."""
    allowed = torch.tensor(list(refusal), device=clean.device)
    r = allowed[clean[:, allowed].argmax(-1)]
    j = patched.argmax(-1)

    def value(logits: Tensor) -> Tensor:
        return (logits.gather(1, j[:, None]) - logits.gather(1, r[:, None]))[:, 0].cpu()

    return Metric(j.cpu(), r.cpu(), value(clean), value(patched), ~torch.isin(j, allowed).cpu())


def check_flipped(traces: Sequence[Trace]) -> None:
    """Raise DirectionDoesNotMediate unless removal flips at least half of the prompts."""
    flipped = torch.cat([part.flipped for part in traces])
    if len(flipped) and flipped.float().mean() < 0.5:
        raise DirectionDoesNotMediate(
            f"removing the direction flips the first token of only {int(flipped.sum())} of {len(flipped)} prompts: "
            "this direction does not mediate refusal here; try another --best-layer or check --refusal-token"
        )


def joint(rule: Quadrature) -> Gradients:
    """All layers mixed at once, every layer's gradient handed straight through."""

    def gradients(
        model: ChatModel, tokens: Tokens, clean: Ends, ends: Ends, metric: Metric, rows: int
    ) -> dict[int, Tensor]:
        return _mean_slopes(model, tokens, clean, ends, metric, rule, rows)

    return gradients


def one_layer_at_a_time(rule: Quadrature) -> Gradients:
    """Each layer on its own path from its clean residual to its end, all layers above it answering."""

    def gradients(
        model: ChatModel, tokens: Tokens, clean: Ends, ends: Ends, metric: Metric, rows: int
    ) -> dict[int, Tensor]:
        found = {}
        for layer, end in ends.items():
            found |= _mean_slopes(model, tokens, clean, {layer: end}, metric, rule, rows)
        return found

    return gradients


def _mean_slopes(
    model: ChatModel,
    tokens: Tokens,
    clean: Ends,
    ends: Ends,
    metric: Metric,
    rule: Quadrature,
    rows: int,
) -> dict[int, Tensor]:
    """The rule's mean of d metric / d output of every layer that moves to its end, float32, where the layer is.

    Several nodes share a pass while their rows do not exceed `rows`: for one prompt of 16 tokens .11 s instead of .22
    (width 512, 6 layers, two cores), for 8 prompts of 64 no difference.
    """
    # Nothing below the lowest layer that moves is run again: a 22nd of all work with 6 layers moved at once.
    start = Given(min(ends), clean[min(ends)]) if model.resumable else None
    total = {layer: torch.zeros_like(end, dtype=torch.float32) for layer, end in ends.items()}
    prompts = max(1, len(tokens.prompt_ids))
    size = max(1, rows // prompts)
    path = torch.tensor([rule.nodes, rule.weights], dtype=torch.float64)
    for nodes, weights in path.split(size, dim=1):
        for layer, part in _slopes(model, tokens, start, ends, nodes, metric):
            for weight, one in zip(weights.tolist(), part.unflatten(0, (len(nodes), prompts)), strict=True):
                total[layer].add_(one, alpha=weight)
    return total


class _StraightThrough(torch.autograd.Function):
    """`z + node (end - z)`, a node for each group of rows: the mixture forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, end: Tensor, nodes: Sequence[float]) -> Tensor:
        mixed = [
            torch.lerp(z, end.to(z.dtype), node) for z, node in zip(residual.chunk(len(nodes)), nodes, strict=True)
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0], None, None


def _slopes(
    model: ChatModel,
    tokens: Tokens,
    start: Given | None,
    ends: Ends,
    nodes: Float[Tensor, "node"],
    metric: Metric,
) -> list[tuple[int, Float[Tensor, "node_prompt position d_model"]]]:
    """d metric / d output of each layer mixed with its end, in one forward and one backward for all `nodes`."""
    outputs: dict[int, Tensor] = {}
    count = len(nodes)

    def mix(layer: int) -> Edit:
        def edit(residual: Tensor, batch: Batch) -> Tensor:
            mixed = _StraightThrough.apply(residual, ends[layer], nodes.tolist())
            outputs[layer] = mixed if mixed.requires_grad else mixed.requires_grad_(True)
            return outputs[layer]

        return edit

    with torch.enable_grad():
        edits = {layer: mix(layer) for layer in ends}
        given = None if start is None else start.repeated(count)
        compared = torch.stack([metric.answer, metric.refusal], 1)
        vocabulary, places = compared.unique(return_inverse=True)
        # At all other positions the last layer's gradient is zero: with 6 layers of width 512 a seventh less to do. The
        # logits of two tokens a prompt instead of 32,000 save 18 ms of 260 a pass.
        run = model.run(
            tokens.repeated(count),
            edits=edits,
            logits=1,
            given=given,
            only_last=model.resumable,
            vocabulary=vocabulary,
        )
        logits = run.logits[:, -1]
        chosen = places.repeat(count, 1).to(logits.device)
        answer, refusal = logits.gather(1, chosen).unbind(1)
        gradients = torch.autograd.grad((answer - refusal).sum(), list(outputs.values()))
    return list(zip(outputs, gradients, strict=True))


class NodeCheck(NamedTuple):
    """How far the mean gradient still moves when the nodes are doubled."""

    nodes: int
    change: float
    """Norm of the difference over the norm at twice the nodes."""


def enough_nodes(
    model: ChatModel,
    prompts: Prompts,
    direction: Direction,
    *,
    layers: Sequence[int],
    rule: Callable[[int], Scheme] = sound,
) -> list[NodeCheck]:
    """Doubles the nodes from 5 while doing so moves the gradient of four prompts by more than 2 %, at most to 80.

    Returns every count tried; the last one is the one to use, and its change may still exceed 2 % at 80.
    """
    tokens = model.tokens(prompts[:4])

    def slopes(nodes: int) -> Tensor:
        found = trace(model, tokens, direction, layers=layers, scheme=rule(nodes))
        return found.gradient[:, tokens.mask]

    tried: list[NodeCheck] = []
    nodes, here = NODES, slopes(NODES)
    while True:
        finer = slopes(2 * nodes)
        tried.append(NodeCheck(nodes, float((here - finer).norm() / finer.norm().clamp(min=1e-30))))
        if tried[-1].change <= NODE_TOLERANCE or nodes >= MOST_NODES:
            return tried
        nodes, here = 2 * nodes, finer
