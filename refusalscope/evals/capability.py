"""What an edit costs: cross-entropy and KL on the model's own harmless answers, cross-entropy on documents.

All forward passes of a comparison see the same tokens; logits are computed at scored positions alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from refusalscope.core.types import Prompts, Response, SaeSlice
from refusalscope.evals.likelihood import answer_batches, pick, scorable, targets
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism.interventions import Intervention, check_everywhere, editor

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
    for tokens in answer_batches(model, prompts, answers, batch_size=batch_size):
        scored, wanted, width = targets(tokens)
        before = model.run(tokens, logits=width).logits.log_softmax(-1)
        after = model.run(tokens, edits=edits, logits=width).logits.log_softmax(-1)
        clean, edited = -pick(before, wanted), -pick(after, wanted)
        # In place: of a vocabulary of 256k each further copy is 0.25 GB a prompt.
        after.sub_(before).mul_(before.exp_())
        kl = -after.sum(-1)
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
    usable = scorable(model, documents)
    for start in range(0, len(usable), batch_size):
        tokens = model.text_tokens(usable[start : start + batch_size], DOCUMENT_TOKENS).to(model.device)
        scored, wanted, width = targets(tokens)
        logits = model.run(tokens, edits=editing.edits, logits=width).logits.log_softmax(-1)
        made.document_ids.extend(tokens.prompt_ids)
        made.tokens.extend(scored.sum(1).tolist())
        made.cross_entropy.extend(_means(-pick(logits, wanted), scored))
    return made._replace(changed=editing.changed)


def joined(parts: Sequence[Table]) -> Table:
    """The cost on a data set from those on its batches, in order; counts of the whole batch are summed."""
    return type(parts[0])(*(_together(columns) for columns in zip(*parts, strict=True)))


def _together(columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], int):
        return sum(columns)
    return [item for column in columns for item in column]


def _means(values: Float[Tensor, "prompt kept"], scored: Bool[Tensor, "prompt kept"]) -> list[float]:
    """Each prompt's mean over its scored positions."""
    return [float(row[inside].double().mean()) for row, inside in zip(values, scored, strict=True)]
