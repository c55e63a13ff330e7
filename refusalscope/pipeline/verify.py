"""Holds the attributions of the model at hand to their oracles: measures, then states the Finding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refusalscope.core.scores import Trace
from refusalscope.core.types import Finding, Prompts, SaeSlice
from refusalscope.inputs.saes import LayerSae
from refusalscope.inputs.template import Role
from refusalscope.mechanism import attribution, effects, features, naive, reading
from refusalscope.mechanism.attribution import gauss_legendre, left_riemann
from refusalscope.mechanism.effects import Delta
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, provenance
from refusalscope.pipeline.traces import make_traces, refused_prompts
from refusalscope.studies import verification
from refusalscope.studies.verification import Measured

PROMPTS = 32
FEW = 8
"""Prompts for the checks whose cost grows with layers times nodes, or with every SAE in memory at once."""
ORDERS = 24
"""In eight the measured effects are so noisy that `sound` ranks .95 with them on the testbed, in 24 orders .98."""
FINE = 16
RIEMANN = (4, 8, 16)
RESIDENT = 2**30
"""SAE weights that may be in memory at once for the naive formulation; beyond it, four layers are checked."""


def run_verification(job: Job, fitted: Fitted) -> Finding:
    """Measure every oracle on held-out refused prompts and write `findings/verification.json`."""
    rows = fitted.data.harmful_validation
    key = job.key("verify", fitted.direction, rows, job.options.seed)
    measured = job.store.get("verification.json", key, dict, lambda: measure(job, fitted, rows)._asdict())
    found = Measured(**measured)
    known = dict(zip(rows.ids, rows.clusters, strict=True))
    finding = verification.summarise(
        found,
        rows.name,
        clusters=[known[prompt] for prompt in found.prompt_ids],
        caveats=caveats(found, len(job.saes.layers)),
        provenance={**provenance(job, fitted, None), "dtype": found.dtype},
    )
    return keep_finding(job.store, finding)


def measure(job: Job, fitted: Fitted, rows: Prompts) -> Measured:
    """All checks, on the first 32 prompts that are refused, and answered once the direction is removed."""
    size = job.size("verify")
    refused = refused_prompts(job, fitted, rows, size=size)
    flips = make_traces(job, fitted, refused, attribution.gradient(), size=size)
    attribution.check_flipped(flips)
    flipped = [name for part in flips for name, flip in zip(part.prompt_ids, part.flipped, strict=True) if flip]
    used = refused.keep(flipped[:PROMPTS])
    schemes = (
        attribution.gradient(),
        attribution.layerwise(gauss_legendre(FINE)),
        attribution.sound(),
        attribution.paper(),
    )
    traces = {scheme.name: make_traces(job, fitted, used, scheme, size=size) for scheme in schemes}
    moved = _Moves(traces["sound"], _candidates(job, fitted))
    checks = attribution.enough_nodes(job.model, used, fitted.direction, layers=job.saes.layers)
    return Measured(
        prompt_ids=list(used.ids),
        features=moved.features,
        alone=moved.mean(lambda part, deltas: effects.alone(job.model, part, deltas, job.progress)),
        marginal=moved.mean(
            lambda part, deltas: effects.in_random_order(
                job.model, part, deltas, orders=ORDERS, seed=job.options.seed, progress=job.progress
            )
        ),
        predicted={name: moved.mean(effects.predicted, parts) for name, parts in traces.items()},
        factored=_factored(job, fitted, used[:FEW]),
        complete={str(layer): shares for layer, shares in _complete(job, traces["layerwise"]).items()},
        riemann=_riemann(job, fitted, used[:FEW]),
        nodes=[check._asdict() for check in checks],
        dtype=str(job.model.model.dtype).removeprefix("torch."),
    )


class _Moves:
    """The candidates that move at all on these traces, and means over prompts of what is read off them."""

    def __init__(self, traces: Sequence[Trace], slices: Sequence[SaeSlice]) -> None:
        self._traces = traces
        self._deltas = [effects.deltas(part, slices) for part in traces]
        moving = [any(bool(part[at].change.any()) for part in self._deltas) for at in range(len(self._deltas[0]))]
        self._deltas = [[d for d, moves in zip(part, moving, strict=True) if moves] for part in self._deltas]
        self.features = [str(delta.feature) for delta in self._deltas[0]]

    def mean(self, read: Callable[[Trace, list[Delta]], Tensor], traces: Sequence[Trace] | None = None) -> list[float]:
        """Feature -> mean over prompts of `read(trace, deltas)` [feature, prompt]."""
        pairs = zip(self._traces if traces is None else traces, self._deltas, strict=True)
        return torch.cat([read(part, deltas) for part, deltas in pairs], dim=1).double().mean(1).tolist()


def _candidates(job: Job, fitted: Fitted) -> list[SaeSlice]:
    """Slices of each layer's K0 candidates."""
    slices = []
    for sae in job.saes.each():
        slices.append(
            sae.slice(sorted(f.index for f in features.by_cosine(sae, fitted.direction, features.PER_LAYER).features))
        )
    return slices


def _factored(job: Job, fitted: Fitted, few: Prompts) -> dict[str, dict[str, float]]:
    """Largest difference between ours and the naive formulation, as a share of the layer's largest attribution."""
    layers = _affordable(job)
    opened = {layer: job.saes.layer(layer) for layer in layers}
    rules = ((attribution.sound(), gauss_legendre(attribution.NODES)), (attribution.paper(), left_riemann(10)))
    found: dict[str, dict[str, float]] = {}
    tokens = job.model.tokens(few)
    for scheme, rule in rules:
        job.progress("verify: the naive formulation", len(found), len(rules))
        part = attribution.trace(job.model, tokens, fitted.direction, layers=layers, scheme=scheme)
        expected = naive.attribute(job.model, opened, part, rule)
        found[scheme.name] = {
            str(layer): _largest_difference(opened[layer], part, expected[layer].cpu()) for layer in layers
        }
    return found


def _largest_difference(sae: LayerSae, part: Trace, expected: Tensor) -> float:
    expected = expected * (part.roles != Role.PADDING)[..., None]
    ours = torch.zeros_like(expected)
    entries = reading.layer_entries(sae, [part], None)[0]
    ours[entries.prompt, entries.position + expected.shape[1], entries.feature] = entries.value
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _affordable(job: Job) -> list[int]:
    """All layers if their SAEs fit in memory together, else four spread over the model."""
    layers, sae = list(job.saes.layers), job.saes.layer(job.saes.layers[0])
    if 2 * sae.size * sae.width * len(layers) <= RESIDENT:
        return layers
    return sorted({layers[round(at * (len(layers) - 1) / 3)] for at in range(4)})


def _complete(job: Job, traces: Sequence[Trace]) -> dict[int, list[float]]:
    """Per layer and prompt: |features + error - effect of swapping that layer alone| over the metric's gap."""
    shares: dict[int, list[float]] = {}
    for done, sae in enumerate(job.saes.each()):
        job.progress("verify: completeness", done, len(job.saes.layers))
        totals = reading.layer_totals(sae, traces)
        swaps = torch.cat([effects.swap_layer(job.model, part, sae.layer) for part in traces])
        gap = torch.cat([part.metric_patched - part.metric_clean for part in traces])
        shares[sae.layer] = ((totals.features + totals.error - swaps) / gap).abs().tolist()
    return shares


def _riemann(job: Job, fitted: Fitted, few: Prompts) -> dict[str, list[float]]:
    """Nodes of the left Riemann sum -> each prompt's worst layer's distance from the swap's effect, over the gap."""
    found: dict[str, list[float]] = {}
    for nodes in RIEMANN:
        part = make_traces(job, fitted, few, attribution.layerwise(left_riemann(nodes)), size=FEW)
        found[str(nodes)] = (
            torch.stack([torch.tensor(shares) for shares in _complete(job, part).values()]).amax(0).tolist()
        )
    return found


def caveats(found: Measured, layers: int) -> list[str]:
    """What the checks rest on less of than they should, on a model with SAEs on so many layers."""
    notes = []
    if len(found.prompt_ids) < PROMPTS:
        notes.append(f"Only {len(found.prompt_ids)} held-out prompts are refused, and flipped by removal.")
    if len(found.features) < 60:
        notes.append(f"Only {len(found.features)} candidates move at all; rank correlations rest on these.")
    checked = len(next(iter(found.factored.values())))
    if checked < layers:
        notes.append(f"The naive formulation needs every SAE in memory at once: it was checked on {checked} layers.")
    return notes
