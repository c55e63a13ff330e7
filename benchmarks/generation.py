"""Tokens per second of greedy answers: what edits cost while decoding, and what refilling gains.

    python benchmarks/generation.py --size small --json benchmarks/results/generation.json

Ways take turns on the same prompts, so that ratios hold on a busy machine. `full SAEs` is the naive way: at every layer
the whole SAE is in memory, encodes, and decodes with its error added back. A random model never ends an answer by
itself: all have the length that is asked for, and where lengths are to differ each prompt is made to end at its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import measuring
import synthetic
import torch
from measuring import bar, table
from synthetic import Shape
from torch import Tensor

from refusalscope.core.types import Direction, Feature, FeatureSet, SaeSlice
from refusalscope.inputs.chat import Batch, ChatModel, Edit, Edits, Tokens
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism.interventions import Intervention, RemoveDirection, ScaleFeatures, editor

CHOSEN, OWN = 20, 5
"""Features that are edited, spread over the layers; those of a prompt where each has a set of its own."""
FACTOR = -1.0
BARRED = ("20 features", "direction removed")
LEAST, OVER_FULL = 0.95, 3.0
"""Of unedited speed, at batches of 16 and more; times the speed of full SAEs."""
NEVER = -1
"""No token: nothing ends an answer but its limit."""
Seconds = Mapping[str, list[float]]


class Mixed(NamedTuple):
    """Many prompts whose answers end at lengths of their own."""

    prompts: int
    batch: int
    longest: int
    rounds: int


class Plan(NamedTuple):
    """The model, the answers, and how often they are timed."""

    shape: Shape
    tokens: int
    """Of every answer."""
    rounds: Mapping[int, int]
    """By batch size."""
    naive: int
    """Rounds with full SAEs."""
    mixed: Mixed


PLANS = {
    "toy": Plan(Shape(layers=3, width=64, features=1024, positions=12), 4, {1: 2, 4: 2}, 1, Mixed(12, 4, 8, 1)),
    "small": Plan(Shape(features=8192, positions=16), 8, {1: 8, 16: 10, 64: 10}, 2, Mixed(64, 16, 32, 2)),
    "full": Plan(Shape(features=8192, positions=64), 64, {1: 15, 16: 15, 64: 10}, 3, Mixed(256, 16, 128, 5)),
}


class Setup(NamedTuple):
    """A model, its SAEs whole in memory, what is edited and what that needs of them."""

    model: ChatModel
    whole: Mapping[int, Any]
    slices: Mapping[int, SaeSlice]
    direction: Direction
    features: FeatureSet


def main() -> None:
    options = measuring.parser(__doc__, tuple(PLANS)).parse_args()
    plan = PLANS[options.size]
    with TemporaryDirectory() as folder:
        made = setup(plan.shape, Path(folder), options.device)
    found = {size: speeds(made, plan, size, options.device) for size in plan.rounds}
    mixed = refilling(made, plan, options.device)
    measuring.finish("generation", options, result(plan, found, mixed))


def setup(shape: Shape, folder: Path, device: str) -> Setup:
    """A random model, a JumpReLU SAE for every layer, and of each the features that fire most often."""
    torch.manual_seed(0)
    model, layers = synthetic.llama(shape, device), range(shape.layers)
    residuals = model.run(synthetic.chats(model, 4, 64), keep=layers).residuals
    whole = {layer: synthetic.jump_relu(shape.features, residuals[layer], device) for layer in layers}
    for layer, sae in whole.items():
        sae.save_model(str(folder / f"layer_{layer}"))
    bank = SaeBank.from_folders({layer: folder / f"layer_{layer}" for layer in layers}, identity="speed", device=device)
    often = {layer: _often(sae, residuals[layer].to(device)) for layer, sae in whole.items()}
    chosen = sorted(Feature(n % shape.layers, often[n % shape.layers][n // shape.layers]) for n in range(CHOSEN))
    direction = Direction(torch.randn(shape.width), shape.layers // 2, torch.zeros(shape.layers), (0,), (), {})
    features = FeatureSet("chosen", tuple(chosen), (0.0,) * CHOSEN)
    return Setup(model, whole, bank.slices(features.by_layer()), direction, features)


def _often(sae: Any, residual: Tensor) -> list[int]:
    with torch.no_grad():
        return (sae.encode(residual) > 0).flatten(0, 1).sum(0).topk(CHOSEN).indices.tolist()


def arms(made: Setup, tokens: Tokens) -> dict[str, Edits]:
    """The edits that are timed, by name."""
    features = made.features.features
    sets = {}
    for row, name in enumerate(tokens.prompt_ids):
        own = sorted(features[(row + n) % CHOSEN] for n in range(OWN))
        sets[name] = FeatureSet("own", tuple(own), (0.0,) * OWN)
    wanted: dict[str, Intervention] = {
        BARRED[0]: ScaleFeatures(made.features, FACTOR),
        "5 of 20 per prompt": ScaleFeatures(sets, FACTOR),
        BARRED[1]: RemoveDirection(made.direction),
    }
    return {name: editor(one, layers=len(made.model.layers), slices=made.slices).edits for name, one in wanted.items()}


def full(made: Setup) -> Edits:
    """Everything encoded, the chosen features scaled, everything decoded and the error added back, at every layer."""

    def edit_for(sae: Any, wanted: list[int]) -> Edit:
        def edit(residual: Tensor, _batch: Batch) -> Tensor:
            active = sae.encode(residual)
            error = residual - sae.decode(active)
            active[..., wanted] *= FACTOR
            return sae.decode(active) + error

        return edit

    chosen = made.features.by_layer()
    return {layer: edit_for(sae, chosen.get(layer, [])) for layer, sae in made.whole.items()}


def speeds(made: Setup, plan: Plan, size: int, device: str) -> dict[str, Seconds]:
    """Seconds for a batch of `size` answers, way by way, in two races: ours against one another, and the naive way."""
    model, tokens = made.model, synthetic.chats(made.model, size, plan.shape.positions)
    model.end_tokens[:] = [NEVER]

    def ours(edits: Edits) -> Callable[[], Any]:
        return lambda: model.generate(tokens, edits=edits, max_new_tokens=plan.tokens)

    ways = {"unedited": ours({}), **{name: ours(edits) for name, edits in arms(made, tokens).items()}}
    theirs = {"transformers": lambda: transformers_answers(model, tokens, plan.tokens, NEVER)}
    return {
        "edits": measuring.interleaved({**ways, **theirs}, plan.rounds[size], device=device),
        "naive": measuring.interleaved(
            {BARRED[0]: ways[BARRED[0]], "full SAEs": ours(full(made))}, plan.naive, device=device
        ),
    }


def transformers_answers(model: ChatModel, tokens: Tokens, longest: int, end: int, *processors: Any) -> Tensor:
    """What transformers generates for one batch: prompts and answers."""
    from transformers import GenerationConfig, LogitsProcessorList

    return model.model.generate(
        input_ids=tokens.ids,
        attention_mask=tokens.mask.long(),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=end, pad_token_id=0),
        logits_processor=LogitsProcessorList(processors),
    )


def refilling(made: Setup, plan: Plan, device: str) -> Seconds:
    """Seconds for many prompts: refilled, batch by batch, and as transformers does it."""
    model, mixed = made.model, plan.mixed
    tokens, lengths = of_many_lengths(model, plan)
    end = int(model.tokenizer.eos_token_id)
    model.end_tokens[:] = [end]
    edits = {plan.shape.layers - 1: ending(model, dict(zip(tokens.prompt_ids, lengths, strict=True)), end)}
    starts = range(0, mixed.prompts, mixed.batch)
    parts = [(_part(tokens, at, mixed.batch), lengths[at : at + mixed.batch]) for at in starts]

    def refilled() -> Any:
        return model.generate(tokens, edits=edits, max_new_tokens=mixed.longest, batch_size=mixed.batch)

    def batches() -> Any:
        return [model.generate(part, edits=edits, max_new_tokens=mixed.longest) for part, _ in parts]

    def theirs() -> Any:
        return [transformers_answers(model, part, mixed.longest, end, EndAt(own, part, end)) for part, own in parts]

    if [answer.tokens for answer in refilled()] != lengths:
        raise RuntimeError("answers do not end where they are made to")
    return measuring.interleaved(
        {"refilled": refilled, "batch by batch": batches, "transformers": theirs}, mixed.rounds, device=device
    )


def of_many_lengths(model: ChatModel, plan: Plan) -> tuple[Tokens, list[int]]:
    """Left-padded prompts, and how long their answers are: most are short, and a few run into the limit."""
    mixed, positions = plan.mixed, plan.shape.positions
    generator = torch.Generator().manual_seed(2)
    padding = torch.randint(0, positions // 2, (mixed.prompts, 1), generator=generator)
    tokens = synthetic.chats(model, mixed.prompts, positions).to("cpu")
    roles = torch.where(torch.arange(positions) < padding, int(Role.PADDING), tokens.roles)
    lengths = 2 + (mixed.longest - 1) * torch.rand(mixed.prompts, generator=generator) ** 2
    return replace(tokens, roles=roles).to(model.device), lengths.long().tolist()


def _part(tokens: Tokens, start: int, size: int) -> Tokens:
    at = slice(start, start + size)
    inside = tokens.mask[at].any(0)
    return replace(
        tokens, prompt_ids=tokens.prompt_ids[at], ids=tokens.ids[at][:, inside], roles=tokens.roles[at][:, inside]
    )


def ending(model: ChatModel, lengths: Mapping[str, int], end: int) -> Edit:
    """An edit of the last layer after which each prompt's answer has the length given, its end token included."""
    vector = model.model.get_output_embeddings().weight[end]
    written: dict[str, int] = {}

    def edit(residual: Tensor, batch: Batch) -> Tensor:
        for name in batch.prompt_ids:
            # A prompt is read in one call, and then every token but the last in one of its own.
            written[name] = 1 if residual.shape[1] > 1 else written[name] + 1
        over = [written[name] >= lengths[name] for name in batch.prompt_ids]
        return torch.where(torch.tensor(over, device=residual.device)[:, None, None], vector, residual)

    return edit


class EndAt:
    """The same for transformers."""

    def __init__(self, lengths: list[int], tokens: Tokens, end: int) -> None:
        self._last = torch.tensor(lengths, device=tokens.ids.device) + tokens.ids.shape[1] - 1
        self._end = end

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[ids.shape[1] >= self._last, self._end] = torch.inf
        return scores


def result(plan: Plan, found: Mapping[int, dict[str, Seconds]], mixed: Seconds) -> dict[str, Any]:
    """Ratios, promises and tables."""
    ratios: dict[str, float] = {}
    bars, rows = [], []
    for size, races in found.items():
        edits, naive = races["edits"], races["naive"]
        for name, seconds in edits.items():
            rows.append([f"{name}, batch {size}", size * plan.tokens / median(seconds)])
        rows.append([f"full SAEs, batch {size}", size * plan.tokens / median(naive["full SAEs"])])
        for name in [name for name in edits if name not in ("unedited", "transformers")]:
            ratios[f"{name}/unedited tokens/s, batch {size}"] = measuring.ratio(edits["unedited"], edits[name])
        ratios[f"unedited/transformers tokens/s, batch {size}"] = measuring.ratio(
            edits["transformers"], edits["unedited"]
        )
        over = ratios[f"{BARRED[0]}/full SAEs tokens/s, batch {size}"] = measuring.ratio(
            naive["full SAEs"], naive[BARRED[0]]
        )
        if size >= 16:
            for name in BARRED:
                ratio = ratios[f"{name}/unedited tokens/s, batch {size}"]
                bars.append(bar(f"{name}: tokens/s of unedited, batch {size}", ratio, least=LEAST))
            bars.append(bar(f"{BARRED[0]}: tokens/s of full SAEs, batch {size}", over, least=OVER_FULL))
    for other in ("batch by batch", "transformers"):
        ratios[f"refilled/{other} answers/s"] = measuring.ratio(mixed[other], mixed["refilled"])
    shape, many = plan.shape, plan.mixed
    about = f"width {shape.width}, {shape.layers} layers, d_sae {shape.features}"
    tables = [
        table(
            "Greedy answers",
            ["way", "tokens/s"],
            rows,
            f"{about}; {plan.tokens} tokens after {shape.positions}, reading the prompt included.",
        ),
        table(
            "Answers of many lengths",
            ["way", "answers/s"],
            [[name, many.prompts / median(seconds)] for name, seconds in mixed.items()],
            f"{many.prompts} answers of 2 to {many.longest} tokens, {many.batch} at once.",
        ),
    ]
    return {"ratios": ratios, "bars": bars, "tables": tables}


if __name__ == "__main__":
    main()
