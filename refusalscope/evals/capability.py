"""What an edit costs: cross-entropy and KL on the model's own harmless answers, cross-entropy on documents.

Also what the SAEs lose by themselves.
All forward passes of a comparison see the same tokens; logits are computed at scored positions alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from refusalscope.core.encoding import CHUNK
from refusalscope.core.types import Prompts, Response, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Edits, Tokens
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import Intervention, check_everywhere, editor

Progress = Callable[[str, int, int], None]
KL_TOKENS = 64
"""Over how many tokens of an answer, from its first, KL is a mean."""
DOCUMENT_TOKENS = 256
"""Where documents are cut off."""


class Cost(NamedTuple):
    """Per prompt, means over the tokens of its answer; nats per token."""

    prompt_ids: list[str]
    tokens: list[int]
    cross_entropy: list[float]
    """Of the unedited model."""
    cross_entropy_edited: list[float]
    cross_entropy_change: list[float]
    """Edited minus unedited."""
    kl: list[float]
    """KL(unedited || edited) of the next-token distribution, over the first `kl_tokens` tokens."""
    kl_tokens: list[int]
    """At most `KL_TOKENS`."""

    def weights(self, metric: str) -> list[int]:
        """How many tokens each prompt's value of `metric` is the mean of."""
        return self.kl_tokens if metric == "kl" else self.tokens


class DocumentCost(NamedTuple):
    """Per document, means over its tokens but the first; nats per token."""

    document_ids: list[str]
    tokens: list[int]
    cross_entropy: list[float]
    changed: int = 0
    """Positions whose residual the edit really changed, summed over layers; of all documents together."""


class LayerHealth(NamedTuple):
    """How well one SAE carries the model's chats, chat by chat (method 6.6); weighted means give the totals."""

    layer: int
    variance_explained: list[float]
    """1 - squared error / variance about the token mean of all chats, BOS excluded."""
    variance: list[float]
    """Its weights: squared deviation from the token mean."""
    cross_entropy_recovered: list[float]
    """(zero - sae) / (zero - clean); zero = residual set to 0 at the spliced positions, BOS untouched in all three."""
    cross_entropy_gap: list[float]
    """Its weights: zero - clean, nats summed over answer tokens."""
    l0: list[float]
    """Mean number of active features per token."""
    tokens: list[int]
    """Its weights."""


Table = TypeVar("Table", Cost, DocumentCost)


def cost(
    model: ChatModel,
    prompts: Prompts,
    answers: Mapping[str, Response],
    intervention: Intervention | None,
    *,
    slices: Mapping[int, SaeSlice] | None = None,
    batch_size: int,
) -> Cost:
    """Cost of an intervention on answers the unedited model gave (`answers`, by prompt id).

    Prompts with an empty answer are left out, so the lists may be shorter than `prompts`.
    """
    made = Cost([], [], [], [], [], [], [])
    edits = editor(intervention, layers=len(model.layers), slices=slices).edits
    for tokens in _answered(model, prompts, answers, batch_size=batch_size):
        scored, targets, width = _targets(tokens)
        before = model.run(tokens, logits=width).logits.log_softmax(-1)
        after = model.run(tokens, edits=edits, logits=width).logits.log_softmax(-1)
        clean, edited = -_pick(before, targets), -_pick(after, targets)
        kl = (before.exp() * (before - after)).sum(-1)
        early = scored & (scored.long().cumsum(1) <= KL_TOKENS)
        made.prompt_ids.extend(tokens.prompt_ids)
        made.tokens.extend(scored.sum(1).tolist())
        made.cross_entropy.extend(_means(clean, scored))
        made.cross_entropy_edited.extend(_means(edited, scored))
        made.cross_entropy_change.extend(_means(edited - clean, scored))
        made.kl.extend(_means(kl, early))
        made.kl_tokens.extend(early.sum(1).tolist())
    return made


def document_cost(
    model: ChatModel,
    documents: Prompts,
    intervention: Intervention | None,
    *,
    slices: Mapping[int, SaeSlice] | None = None,
    batch_size: int,
) -> DocumentCost:
    """Cross-entropy of plain text, outside any chat, under an intervention at all its positions.

    Documents are cut off after `DOCUMENT_TOKENS` tokens, BOS included; those of a single token, on which nothing can be
    scored, are left out. Raises ValueError, one line, for an intervention that needs a chat's roles or prompts.
    """
    check_everywhere(intervention)
    made = DocumentCost([], [], [])
    editing = editor(intervention, layers=len(model.layers), slices=slices)
    usable = documents.keep(d.id for d in documents if len(model.template.encode_text(d.text)) > 1)
    for start in range(0, len(usable), batch_size):
        tokens = model.text_tokens(usable[start : start + batch_size], DOCUMENT_TOKENS).to(model.device)
        scored, targets, width = _targets(tokens)
        logits = model.run(tokens, edits=editing.edits, logits=width).logits.log_softmax(-1)
        made.document_ids.extend(tokens.prompt_ids)
        made.tokens.extend(scored.sum(1).tolist())
        made.cross_entropy.extend(_means(-_pick(logits, targets), scored))
    return made._replace(changed=editing.changed)


def joined(parts: Sequence[Table]) -> Table:
    """The cost on a data set from those on its batches, in order; counts of the whole batch are summed."""
    return type(parts[0])(*(_together(columns) for columns in zip(*parts, strict=True)))


def _together(columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], int):
        return sum(columns)
    return [item for column in columns for item in column]


def health(
    model: ChatModel,
    saes: SaeBank,
    prompts: Prompts,
    answers: Mapping[str, Response],
    *,
    batch_size: int,
    progress: Progress = lambda *_: None,
) -> list[LayerHealth]:
    """Reconstruction quality of every SAE on chats: prompts with the model's own answers."""
    batches = list(_answered(model, prompts, answers, batch_size=batch_size))
    clean = _cross_entropies(model, batches, {})
    report = []
    for done, layer in enumerate(saes.layers):
        progress("SAE health", done, len(saes.layers))
        sae = saes.layer(layer)
        spliced = _cross_entropies(model, batches, {layer: _splice(sae.reconstruct)})
        zero = _cross_entropies(model, batches, {layer: _splice(torch.zeros_like)})
        quality = _reconstruction(model, sae, batches)
        recovered = (zero - spliced) / (zero - clean)
        report.append(
            LayerHealth(
                layer=layer,
                variance_explained=(1 - quality.error / quality.variance).tolist(),
                variance=quality.variance.tolist(),
                cross_entropy_recovered=recovered.tolist(),
                cross_entropy_gap=(zero - clean).tolist(),
                l0=(quality.active / quality.tokens).tolist(),
                tokens=quality.tokens.long().tolist(),
            )
        )
    return report


def _answered(
    model: ChatModel, prompts: Prompts, answers: Mapping[str, Response], *, batch_size: int
) -> Iterator[Tokens]:
    usable = prompts.keep(p.id for p in prompts if answers[p.id].text.strip())
    for start in range(0, len(usable), batch_size):
        yield model.answer_tokens(usable[start : start + batch_size], answers).to(model.device)


def _targets(tokens: Tokens) -> tuple[Bool[Tensor, "prompt kept"], Int[Tensor, "prompt kept"], int]:
    """Which of the last positions predict an answer token, that token, and how many last positions these are."""
    answer = tokens.roles == Role.RESPONSE
    width = int(answer.sum(1).max()) + 1
    following = torch.zeros_like(tokens.ids)
    following[:, :-1] = tokens.ids[:, 1:]
    predicts = torch.zeros_like(answer)
    predicts[:, :-1] = answer[:, 1:]
    return predicts[:, -width:], following[:, -width:], width


def _means(values: Float[Tensor, "prompt kept"], scored: Bool[Tensor, "prompt kept"]) -> list[float]:
    """Each prompt's mean over its scored positions."""
    return [float(row[inside].double().mean()) for row, inside in zip(values, scored, strict=True)]


def _pick(log_probabilities: Float[Tensor, "prompt kept vocabulary"], targets: Tensor) -> Float[Tensor, "prompt kept"]:
    return log_probabilities.gather(-1, targets[..., None])[..., 0]


def _cross_entropies(model: ChatModel, batches: Sequence[Tokens], edits: Edits) -> Float64[Tensor, "chat"]:
    """Each chat's cross-entropy, summed over the tokens of its answer."""
    totals = []
    for tokens in batches:
        scored, targets, width = _targets(tokens)
        logits = model.run(tokens, edits=edits, logits=width).logits.log_softmax(-1)
        totals.append(-(_pick(logits, targets).double() * scored).sum(1).cpu())
    return torch.cat(totals)


class _Quality(NamedTuple):
    """Sums per chat over its tokens, BOS excluded."""

    error: Float64[Tensor, "chat"]
    variance: Float64[Tensor, "chat"]
    active: Float64[Tensor, "chat"]
    tokens: Float64[Tensor, "chat"]


def _reconstruction(model: ChatModel, sae: LayerSae, batches: Sequence[Tokens]) -> _Quality:
    kept: list[Tensor] = []
    for tokens in batches:
        residual = model.run(tokens, keep=[sae.layer]).residuals[sae.layer].float()
        kept += [chat[inside] for chat, inside in zip(residual, _spliced(tokens.roles).cpu(), strict=True)]
    centre = torch.cat(kept).double().mean(0)
    sums = [torch.stack([_sums(sae, part, centre) for part in chat.split(CHUNK)]).sum(0) for chat in kept]
    return _Quality(*torch.stack(sums).unbind(1))


def _sums(
    sae: LayerSae, residual: Float[Tensor, "token d_model"], centre: Float64[Tensor, "d_model"]
) -> Float64[Tensor, "4"]:
    """Error, variance, active features and tokens of a part of a chat."""
    features = sae.encode(residual)
    error = (residual - sae.decode(features, residual).cpu()).double().square().sum()
    spread = (residual.double() - centre).square().sum()
    return torch.stack(
        [error, spread, (features > 0).sum().double().cpu(), torch.tensor(float(len(residual))).double()]
    )


def _spliced(roles: Int[Tensor, "prompt position"]) -> Bool[Tensor, "prompt position"]:
    """Every position but padding and the first token of each chat, whose residual is an outlier in every model."""
    inside = roles != Role.PADDING
    first = inside.long().cumsum(1) == 1
    return inside & ~first


def _splice(change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(residual: Tensor, batch: Batch) -> Tensor:
        chosen = _spliced(batch.roles)
        return torch.where(chosen[..., None], change(residual).to(residual), residual)

    return edit
