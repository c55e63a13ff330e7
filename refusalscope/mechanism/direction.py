"""The refusal direction: difference of means at the last prompt position, its layer chosen on a validation split.

Method: Arditi et al. 2024, with the selection rule of docs/method.md: among layers below 0.8 L, little harm to harmless
prompts under removal, refusal induced by adding, then the lowest refusal score under removal.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from refusalscope.core.types import Direction, LayerScores, Prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism.interventions import AddDirection, Intervention, RemoveDirection, editor

KL_BOUND = 0.1
KL_RELAXED = 1.25
TIE = 0.1
DEPTH = 0.8
MINIMUM_TRAIN = 16
MINIMUM_VALIDATION = 8
CONFIRMING = 8

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class FitData:
    """The prompts a direction is fitted on and chosen by."""

    harmful_train: Prompts
    harmless_train: Prompts
    harmful_validation: Prompts
    harmless_validation: Prompts


class NoDirection(ValueError):
    """These prompts give no direction: too few are refused, or adding it induces refusal at no layer."""


class FirstTokens(NamedTuple):
    """The likeliest first token of each answer."""

    argmax: Int[Tensor, "prompt"]

    def counts(self) -> Counter[int]:
        return Counter(self.argmax.tolist())


def find(
    model: ChatModel,
    data: FitData,
    *,
    batch_size: int,
    is_refusal: Callable[[str], bool],
    refusal_tokens: Sequence[int] = (),
    best_layer: int | None = None,
    keep_unrefused: bool = False,
    published: bool = False,
    progress: Progress = lambda *_: None,
) -> Direction:
    """Find the direction. The three overrides are recorded as caveats.

    `published` filters as the published code does: harmful train prompts not at all, and of the harmless ones that are
    answered only the first as many as there are harmful ones.

    `is_refusal` tells a refusal by its text; it confirms the refusal tokens that are found. Raises NoDirection when no
    refusal token is found, fewer than 16 train or 8 validation prompts of a class survive the filter, or no layer
    qualifies; each names the override that helps.
    """
    caveats = _override_caveats(model, refusal_tokens, best_layer, keep_unrefused)
    first = {name: first_tokens(model, getattr(data, name), batch_size=batch_size) for name in data.__annotations__}
    tokens = tuple(refusal_tokens) or find_refusal_tokens(model, data, first, is_refusal)
    whole = data.__annotations__ if keep_unrefused else ("harmful_train",) if published else ()
    kept, counts = filter_prompts(data, first, tokens, whole=whole)
    if published:
        kept = replace(kept, harmless_train=kept.harmless_train[: len(kept.harmful_train)])
        counts["harmless_train_kept"] = len(kept.harmless_train)
    harmful = mean_last_residuals(model, kept.harmful_train, batch_size=batch_size)
    harmless = mean_last_residuals(model, kept.harmless_train, batch_size=batch_size)
    vectors = (harmful - harmless).float()
    layers = [best_layer] if best_layer is not None else list(range(ceil(DEPTH * len(model.layers))))
    plain = last_logits(model, kept.harmless_validation, batch_size=batch_size)
    scores, candidates = [], {}
    for done, layer in enumerate(layers):
        progress("direction: validating layers", done, len(layers))
        candidates[layer] = Direction(vectors[layer], layer, _offsets(harmless, vectors[layer]), tokens, (), counts)
        scores.append(score_layer(model, candidates[layer], kept, plain, batch_size=batch_size))
    chosen, notes = (best_layer, ()) if best_layer is not None else choose_layer(scores, counts)
    best = candidates[chosen]
    return Direction(best.vector, chosen, best.offsets, tokens, tuple(scores), counts, (*caveats, *notes))


def refusal_score(logits: Float[Tensor, "prompt vocabulary"], tokens: Sequence[int]) -> Float[Tensor, "prompt"]:
    """Log-odds that the first token is a refusal token: `log p - log(1 - p)`, without forming p."""
    refuses = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    refuses[list(tokens)] = True
    logits = logits.float()
    return logits[:, refuses].logsumexp(-1) - logits[:, ~refuses].logsumexp(-1)


def last_logits(
    model: ChatModel, prompts: Prompts, *, batch_size: int, intervention: Intervention | None = None
) -> Float[Tensor, "prompt vocabulary"]:
    """Next-token logits after each prompt, under an intervention on the direction, on the CPU."""
    rows = []
    for _, tokens in model.batches(prompts, batch_size):
        edits = editor(intervention, layers=len(model.layers)).edits
        rows.append(model.run(tokens, edits=edits, logits=1).logits[:, -1].cpu())
    return torch.cat(rows)


def first_tokens(model: ChatModel, prompts: Prompts, *, batch_size: int) -> FirstTokens:
    """The first greedy token of each answer, without generating."""
    found = [torch.empty(0, dtype=torch.long)]
    for _, tokens in model.batches(prompts, batch_size):
        found.append(model.run(tokens, logits=1).logits[:, -1].argmax(-1).cpu())
    return FirstTokens(torch.cat(found))


def find_refusal_tokens(
    model: ChatModel, data: FitData, first: Mapping[str, FirstTokens], is_refusal: Callable[[str], bool]
) -> tuple[int, ...]:
    """First tokens that set harmful train prompts apart and whose answers, by their text, mostly are refusals.

    The text is needed: a model that refuses nothing still opens its answers differently to different prompts.
    Raises NoDirection when there is none.
    """
    found = []
    for token in distinctive_first_tokens(first["harmful_train"], first["harmless_train"]):
        opened = (first["harmful_train"].argmax == token).tolist()
        ids = [p.id for p, fits in zip(data.harmful_train, opened, strict=True) if fits]
        answers = model.generate(model.tokens(data.harmful_train.keep(ids[:CONFIRMING])), max_new_tokens=24)
        if sum(is_refusal(answer.text) for answer in answers) > len(answers) / 2:
            found.append(token)
    if not found:
        raise NoDirection(
            f"none of the {len(data.harmful_train)} harmful train prompts is recognisably refused by {model.name}: no "
            "first token opens 5 % of these answers, a larger share than of answers to harmless prompts, and leads to "
            "refusals; name one with --refusal-token, and where nothing is refused also --keep-unrefused and "
            "--best-layer"
        )
    return tuple(found)


def distinctive_first_tokens(harmful: FirstTokens, harmless: FirstTokens) -> tuple[int, ...]:
    """Tokens that open at least 5 % of answers to harmful prompts, and a larger share than of answers to harmless."""
    opens_harmful, opens_harmless = harmful.counts(), harmless.counts()
    n_harmful, n_harmless = max(1, len(harmful.argmax)), max(1, len(harmless.argmax))
    share = {token: count / n_harmful for token, count in opens_harmful.items()}
    found = [t for t, part in share.items() if part >= 0.05 and part > opens_harmless[t] / n_harmless]
    return tuple(sorted(found, key=lambda token: (-share[token], token)))


def filter_prompts(
    data: FitData, first: Mapping[str, FirstTokens], tokens: Sequence[int], *, whole: Collection[str]
) -> tuple[FitData, dict[str, int]]:
    """Drop prompts whose first token contradicts their label; counts kept and dropped. Raises NoDirection.

    The parts of `data` named in `whole` are kept as they are.
    """
    kept, counts = {}, {}
    for name in data.__annotations__:
        prompts: Prompts = getattr(data, name)
        refused = torch.isin(first[name].argmax, torch.tensor(list(tokens)))
        fits = (refused if name.startswith("harmful") else ~refused).tolist()
        ids = [p.id for p, fit in zip(prompts, fits, strict=True) if fit or name in whole]
        kept[name] = prompts.keep(ids)
        counts |= {f"{name}_kept": len(ids), f"{name}_dropped": len(prompts) - len(ids)}
        needed = MINIMUM_TRAIN if name.endswith("train") else MINIMUM_VALIDATION
        if len(ids) < needed:
            raise NoDirection(_too_few(name, len(ids), len(prompts), needed))
    return FitData(**kept), counts


def _too_few(name: str, kept: int, given: int, needed: int) -> str:
    kind = name.replace("_", " ")
    if kept == given:
        return f"there are only {given} {kind} prompts ({needed} are needed): give more"
    return (
        f"only {kept} of {given} {kind} prompts are {'refused' if name.startswith('harmful') else 'answered'} by this "
        f"model ({needed} are needed): give more prompts, name its refusal token with --refusal-token, or keep them "
        "all with --keep-unrefused"
    )


def mean_last_residuals(model: ChatModel, prompts: Prompts, *, batch_size: int) -> Float64[Tensor, "layers d_model"]:
    """Mean residual after every layer at the last prompt position, accumulated in float64."""
    layers = range(len(model.layers))
    total = torch.zeros(len(layers), model.width, dtype=torch.float64)
    for _, tokens in model.batches(prompts, batch_size):
        residuals = model.run(tokens, keep=layers).residuals
        total += torch.stack([residuals[layer][:, -1].double().sum(0) for layer in layers])
    return total / len(prompts)


def score_layer(
    model: ChatModel, direction: Direction, data: FitData, plain: Float[Tensor, "prompt vocabulary"], *, batch_size: int
) -> LayerScores:
    """Validation scores of one candidate: removal (plain and affine) and addition.

    `plain` are the unedited next-token logits on the harmless validation prompts.
    """

    def logits(prompts: Prompts, intervention: Intervention) -> Tensor:
        return last_logits(model, prompts, batch_size=batch_size, intervention=intervention)

    kl, removed = [], []
    for affine in (False, True):
        removal = RemoveDirection(direction, affine=affine)
        kl.append(mean_kl(plain, logits(data.harmless_validation, removal)))
        removed.append(_mean_score(logits(data.harmful_validation, removal), direction))
    added = _mean_score(logits(data.harmless_validation, AddDirection(direction)), direction)
    return LayerScores(direction.layer, kl[0], removed[0], added, kl[1], removed[1])


def mean_kl(before: Float[Tensor, "prompt vocabulary"], after: Float[Tensor, "prompt vocabulary"]) -> float:
    """Mean KL(before || after) of the next-token distributions, in nats."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def choose_layer(scores: Sequence[LayerScores], counts: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """The layer and the caveats of choosing it. Raises NoDirection when adding induces refusal at no layer.

    `counts` are those of `filter_prompts`; the error names how many prompts the direction rests on.
    """
    inducing = [score for score in scores if score.added > 0]
    if not inducing:
        raise NoDirection(
            f"no layer qualifies: the direction from {counts['harmful_train_kept']} refused harmful and "
            f"{counts['harmless_train_kept']} answered harmless train prompts, added at any of the layers "
            f"{scores[0].layer} to {scores[-1].layer}, makes this model refuse harmless prompts at none; name one with "
            "--best-layer to go on regardless"
        )
    gentle = [score for score in inducing if score.kl <= KL_BOUND]
    notes: tuple[str, ...] = ()
    if not gentle:
        bound = KL_RELAXED * min(score.kl for score in inducing)
        gentle = [score for score in inducing if score.kl <= bound]
        notes = (
            f"No layer's removal keeps the KL on harmless prompts within {KL_BOUND}; "
            f"the bound was relaxed to {bound:.3f} nats (1.25 times the least).",
        )
    lowest = min(score.removed for score in gentle)
    tied = [score for score in gentle if score.removed <= lowest + TIE]
    return min(tied, key=lambda score: (score.kl, score.layer)).layer, notes


def _mean_score(logits: Float[Tensor, "prompt vocabulary"], direction: Direction) -> float:
    return float(refusal_score(logits, direction.refusal_tokens).double().mean())


def _offsets(harmless: Float64[Tensor, "layers d_model"], vector: Float[Tensor, "d_model"]) -> Float[Tensor, "layers"]:
    return (harmless @ (vector / vector.norm()).double()).float()


def _override_caveats(
    model: ChatModel, refusal_tokens: Sequence[int], best_layer: int | None, keep_unrefused: bool
) -> tuple[str, ...]:
    if best_layer is not None and not 0 <= best_layer < len(model.layers):
        raise ValueError(f"--best-layer {best_layer}: {model.name} has layers 0 to {len(model.layers) - 1}")
    notes = []
    if refusal_tokens:
        notes.append(f"The refusal tokens {model.decode(refusal_tokens)} were given, not found.")
    if best_layer is not None:
        notes.append(f"Layer {best_layer} was given, not chosen on validation prompts.")
    if keep_unrefused:
        notes.append("Prompts whose first token contradicts their label were kept.")
    return tuple(notes)
