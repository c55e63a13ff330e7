"""SAEs read against traces: what single features, all of them, and the error term carry of each prompt's metric.

One layer's SAE at a time, a chunk of tokens at a time. Knows nothing of how the traces' gradients were taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from refusalscope.core.encoding import at_once
from refusalscope.core.scores import Attribution, Trace
from refusalscope.core.types import SaeSlice
from refusalscope.inputs.chat import scored
from refusalscope.inputs.saes import LayerSae
from refusalscope.inputs.template import Role


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
    part = sae if features is None else sae.here(features)
    index = torch.arange(sae.size) if isinstance(part, LayerSae) else part.features.cpu()
    made = []
    for batch in traces:
        inside = batch.roles != Role.PADDING
        ways = (at_layer(batch, name, sae)[inside] for name in ("clean", "patched", "gradient"))
        token, column, value = _moves(part, *ways)
        prompt, position = (axis[token] for axis in inside.nonzero(as_tuple=True))
        made.append(Entries(sae.layer, prompt, position - inside.shape[1], index[column], value))
    return made


def _moves(
    part: LayerSae | SaeSlice,
    clean: Float[Tensor, "token d_model"],
    patched: Float[Tensor, "token d_model"],
    slope: Float[Tensor, "token d_model"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, column and attribution of every activation that moved, on the CPU; a chunk of tokens at a time."""
    found = []
    for inside in torch.arange(len(clean)).split(at_once(len(part.decoder))):
        delta = part.encode(patched[inside]) - part.encode(clean[inside])
        token, column = delta.nonzero(as_tuple=True)
        value = (delta * (slope[inside] @ part.decoder.T))[token, column]
        found.append((inside[token.cpu()], column.cpu(), value.cpu()))
    tokens, columns, values = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(columns), torch.cat(values)


class LayerTotals(NamedTuple):
    """What all features of a layer, and the SAE's error term, carry of each prompt's metric: sums over positions."""

    layer: int
    features: Float[Tensor, "prompt"]
    error: Float[Tensor, "prompt"]


def layer_totals(sae: LayerSae, traces: Sequence[Trace]) -> LayerTotals:
    """`G . ((F~ - F) W_dec)`, and `G` times the rest of the residual's way: that of the SAE's error term.

    What a token's own normalisation adds back beside its features (`s b_dec + mu`) moves with the rest.
    """
    features, errors = [], []
    for batch in traces:
        inside = batch.roles != Role.PADDING
        clean, patched, slope = (at_layer(batch, name, sae)[inside] for name in ("clean", "patched", "gradient"))
        end = patched if batch.end is None else at_layer(batch, "end", sae)[inside]
        decoded = torch.cat(
            [
                (sae.encode(patched[part]) - sae.encode(clean[part])) @ sae.decoder
                for part in torch.arange(len(clean)).split(at_once(sae.size))
            ]
        )
        prompt = inside.nonzero(as_tuple=True)[0]
        for sums, change in ((features, decoded), (errors, end - clean - decoded)):
            sums.append(torch.zeros(len(inside)).index_add_(0, prompt, (slope * change).sum(-1).cpu()))
    return LayerTotals(sae.layer, torch.cat(features), torch.cat(errors))


def at_layer(batch: Trace, name: str, sae: LayerSae) -> Float[Tensor, "prompt position d_model"]:
    """One tensor of a trace at the SAE's layer, float32, where the SAE is."""
    return getattr(batch, name)[batch.layers.index(sae.layer)].float().to(sae.device)


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
