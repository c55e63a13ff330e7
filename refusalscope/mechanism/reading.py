"""SAEs read against traces: what single features, all of them, and the error term carry of each prompt's metric.

One layer's SAE at a time, a chunk of tokens at a time. Knows nothing of how the traces' gradients were taken.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refusalscope.core.encoding import at_once
from refusalscope.core.scores import Attribution, Trace
from refusalscope.core.types import SaeSlice
from refusalscope.inputs.chat import scored
from refusalscope.inputs.saes import LayerSae
from refusalscope.inputs.template import Role

FEW = 2**24
"""Positions times features that are read all at once: twice 64 MiB."""

# torch gives notice once per process that compressed rows are new; filters set later hold for one thread alone.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    torch.zeros(1, 1).to_sparse_csr()


class Entries(NamedTuple):
    """The non-zero attributions of one layer in one batch."""

    layer: int
    prompt: Int[Tensor, "entry"]
    """Row within the batch."""
    position: Int[Tensor, "entry"]
    feature: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]


def layer_entries(sae: LayerSae, traces: Sequence[Trace], features: Sequence[int] | None) -> list[Entries]:
    """`(f~ - f) * (G . W_dec)` of one layer, a batch each, where the activation moved and the token is no padding.

    With `features` only theirs are read.
    """
    part = sae.here(features)
    return [entries_of(part, batch) for batch in traces]


def entries_of(part: SaeSlice, batch: Trace) -> Entries:
    """The same of one batch, for the features of a slice."""
    inside = batch.roles != Role.PADDING
    moves = moved(part, batch, inside)
    prompt, position = (axis[moves.token] for axis in inside.nonzero(as_tuple=True))
    return Entries(part.layer, prompt, position - inside.shape[1], part.features.cpu()[moves.column], moves.value)


def entries_of_each(parts: Sequence[SaeSlice], batch: Trace) -> list[Entries]:
    """The same for several slices of a few features each.

    The host waits for the device a few times instead of eight times a layer: 10 ms instead of 50 on a card, 26 layers.
    """
    widest, inside = max((len(part.features) for part in parts), default=0), batch.roles != Role.PADDING
    if inside.numel() * widest * len(parts) > FEW or not parts:
        return [entries_of(part, batch) for part in parts]

    def as_wide(part: SaeSlice, columns: Tensor) -> Tensor:
        return nn.functional.pad(columns, (0, widest - len(part.features)))

    made = []
    for part in parts:
        clean, patched, slope = (at_layer(batch, name, part) for name in ("clean", "patched", "gradient"))
        change = part.encode(patched) - part.encode(clean)
        made.append(as_wide(part, torch.stack([change, change * (slope @ part.decoder.T)])))
    change, value = torch.stack(made, 1)
    kept = (change != 0) & inside.to(change.device)[..., None]
    owner, prompt, position, column = kept.nonzero(as_tuple=True)
    feature = torch.stack([as_wide(part, part.features) for part in parts]).to(owner.device)[owner, column]
    # In copies: a column of what `nonzero` made would keep all four of them in memory.
    columns = prompt.int(), (position - inside.shape[1]).int(), feature.int(), value[owner, prompt, position, column]
    counts = owner.bincount(minlength=len(parts)).tolist()
    shares = zip(*(axis.cpu().split(counts) for axis in columns), strict=True)
    return [Entries(part.layer, *share) for part, share in zip(parts, shares, strict=True)]


class Moves(NamedTuple):
    """Every activation that differs between the runs of a trace, on the CPU."""

    token: Int[Tensor, "move"]
    """Row among the tokens that were looked at."""
    column: Int[Tensor, "move"]
    """Column of the slice."""
    value: Float[Tensor, "move"]
    """`(f~ - f) (G . W_dec)`."""


def moved(part: SaeSlice, batch: Trace, inside: Bool[Tensor, "prompt position"]) -> Moves:
    """The moves of a slice's features at the tokens `inside`, a chunk of tokens at a time.

    Only the decoder rows of what moved are read: at 512 tokens of 16,384 features, 50 of them active, the product took
    2 ms, with all rows 60.
    """
    ways = (at_layer(batch, name, part)[inside] for name in ("clean", "patched", "gradient"))
    size, start, found = at_once(part.encoder.shape[1], part.decoder.device), 0, []
    for clean, patched, slope in zip(*(way.split(size) for way in ways), strict=True):
        change = (part.encode(patched) - part.encode(clean)).to_sparse_csr()
        along = torch.sparse.sampled_addmm(change, slope, part.decoder.T, beta=0.0)
        token = torch.arange(start, start + len(clean)).repeat_interleave(change.crow_indices().diff().cpu())
        found.append(Moves(token, change.col_indices().cpu(), (change.values() * along.values()).cpu()))
        start += len(clean)
    return Moves(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class LayerTotals(NamedTuple):
    """What all features of a layer, and the SAE's error term, carry of each prompt's metric: sums over positions."""

    layer: int
    features: Float[Tensor, "prompt"]
    error: Float[Tensor, "prompt"]


def layer_totals(sae: LayerSae, traces: Sequence[Trace]) -> LayerTotals:
    """All features' attributions together, and `G` times the rest of the residual's way: that of the SAE's error term.

    What a token's own normalisation adds back beside its features (`s b_dec + mu`) moves with the rest.
    """
    part = sae.here(None)
    features, errors = [], []
    for batch in traces:
        inside = batch.roles != Role.PADDING
        owners = inside.nonzero(as_tuple=True)[0]
        moves = moved(part, batch, inside)
        clean, slope = (at_layer(batch, name, part)[inside] for name in ("clean", "gradient"))
        end = at_layer(batch, "patched" if batch.end is None else "end", part)[inside]
        whole = torch.zeros(len(inside)).index_add_(0, owners, (slope * (end - clean)).sum(-1).cpu())
        features.append(torch.zeros(len(inside)).index_add_(0, owners[moves.token], moves.value))
        errors.append(whole - features[-1])
    return LayerTotals(sae.layer, torch.cat(features), torch.cat(errors))


def at_layer(batch: Trace, name: str, part: SaeSlice) -> Float[Tensor, "prompt position d_model"]:
    """One tensor of a trace at the slice's layer, float32, where the slice is."""
    return getattr(batch, name)[batch.layers.index(part.layer)].to(part.decoder.device).float()


def assemble(traces: Sequence[Trace], entries: Sequence[Entries]) -> Attribution:
    """The attribution of all prompts; `entries` hold, layer by layer, one `Entries` per trace, in their order."""
    starts = np.cumsum([0, *(len(part.prompt_ids) for part in traces)]).tolist()
    offsets = [starts[number % len(traces)] for number in range(len(entries))]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in traces])

    return Attribution(
        prompt_ids=(ids := tuple(name for part in traces for name in part.prompt_ids)),
        prompt=torch.cat([part.prompt + offset for part, offset in zip(entries, offsets, strict=True)]).int(),
        layer=torch.cat([torch.full_like(part.prompt, part.layer) for part in entries]).int(),
        position=torch.cat([part.position for part in entries]).int(),
        feature=torch.cat([part.feature for part in entries]).int(),
        value=torch.cat([part.value for part in entries]),
        scored=torch.cat([scored(part.roles).sum(1) for part in traces]),
        length=torch.cat([(part.roles != Role.PADDING).sum(1) for part in traces]),
        dropped=tuple(name for name, kept in zip(ids, joined("flipped").tolist(), strict=True) if not kept),
        answer=joined("answer"),
        refusal=joined("refusal"),
        metric_clean=joined("metric_clean"),
        metric_patched=joined("metric_patched"),
    )
