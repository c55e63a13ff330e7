"""Which tokens of a text a model is scored on, and how likely it finds them.

Shared by whoever measures cross-entropy; knows nothing of edits.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from refusalscope.core.types import Prompts, Response
from refusalscope.inputs.chat import ChatModel, Edits, Given, Tokens
from refusalscope.inputs.template import Role


def answered(prompts: Prompts, answers: Mapping[str, Response]) -> Prompts:
    """The prompts whose answer (by prompt id) says anything."""
    return prompts.keep(p.id for p in prompts if answers[p.id].text.strip())


def scorable(model: ChatModel, documents: Prompts) -> Prompts:
    """The documents of more than one token: on a single one nothing can be scored."""
    return documents.keep(d.id for d in documents if len(model.template.encode_text(d.text)) > 1)


def answer_batches(
    model: ChatModel, prompts: Prompts, answers: Mapping[str, Response], *, batch_size: int
) -> Iterator[Tokens]:
    """Prompts with their answers, those without one left out."""
    usable = answered(prompts, answers)
    for start in range(0, len(usable), batch_size):
        yield model.answer_tokens(usable[start : start + batch_size], answers).to(model.device)


def targets(tokens: Tokens) -> tuple[Bool[Tensor, "prompt kept"], Int[Tensor, "prompt kept"], int]:
    """Which of the last positions predict an answer token, that token, and how many last positions these are."""
    answer = tokens.roles == Role.RESPONSE
    width = int(answer.sum(1).max()) + 1
    following = torch.zeros_like(tokens.ids)
    following[:, :-1] = tokens.ids[:, 1:]
    predicts = torch.zeros_like(answer)
    predicts[:, :-1] = answer[:, 1:]
    return predicts[:, -width:], following[:, -width:], width


def pick(log_probabilities: Float[Tensor, "prompt kept vocabulary"], wanted: Tensor) -> Float[Tensor, "prompt kept"]:
    """The log-probability of the wanted token at every position."""
    return log_probabilities.gather(-1, wanted[..., None])[..., 0]


def cross_entropies(
    model: ChatModel, tokens: Tokens, edits: Edits, given: Given | None = None
) -> Float64[Tensor, "prompt"]:
    """Each text's cross-entropy in nats, summed over the tokens it is scored on, from the layer `given` on."""
    scored, wanted, width = targets(tokens)
    logits = model.run(tokens, edits=edits, logits=width, given=given).logits.log_softmax(-1)
    return -(pick(logits, wanted).cpu().double() * scored.cpu()).sum(1)
