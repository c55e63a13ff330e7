"""Whether `torch.compile` pays: decoding and attribution, compiled and as they are, and what compiling costs first.

    python benchmarks/compiling.py --size small

Compiled decoding is given every advantage: one length of prompts, so one graph for decoding, a static cache as long as
needed and no longer, no row that ends early. Against it stands `ChatModel.generate`. Edits remove a direction after
every layer: traced into the graph, or left between the graphs of single layers, where they can change without
compiling anew. Attribution is one forward and one backward with the gradient at every layer. Not part of `make bench`:
compiling alone takes minutes.
"""

import copy
import gc
import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import measuring
import synthetic
import torch
import torch._inductor.config
from measuring import table
from synthetic import Shape
from torch import Tensor
from transformers import StaticCache

from refusalscope.core.types import Direction
from refusalscope.inputs.chat import ChatModel, Edits, Tokens
from refusalscope.mechanism.interventions import RemoveDirection, editor
from refusalscope.testbed.shipped import ASSETS

PROMPTS, LONGEST = 100, 256
"""The run whose balance is drawn: so many prompts, so many tokens an answer."""
POSITIONS = 64


class Size(NamedTuple):
    """Models by name (None: the testbed's), prompts in a batch, tokens decoded, rounds."""

    models: Mapping[str, Shape | None]
    batches: tuple[int, ...]
    tokens: int
    rounds: int


SIZES = {
    "toy": Size({"2 layers of 64": Shape(layers=2, width=64)}, (2,), 4, 1),
    "small": Size({"testbed, 8 layers of 128": None, "6 layers of 512": Shape()}, (1, 16, 64), 32, 5),
}
COLUMNS = (
    *("model", "prompts", "what", "as it is, ms", "compiled, ms", "ratio", "compiling, s", "pays after"),
    "ratio of the run",
)


class Pair(NamedTuple):
    """The same work twice."""

    plain: Callable[[], Any]
    compiled: Callable[[], Any]


def main() -> None:
    options = measuring.parser(__doc__, list(SIZES)).parse_args()
    size = SIZES[options.size]
    # Layers compiled one by one share their code, and each is another case of it; and nothing may be there from before.
    with torch._dynamo.config.patch(recompile_limit=64), torch._inductor.config.patch(force_disable_caches=True):
        cases = [(name, shape, prompts) for name, shape in size.models.items() for prompts in size.batches]
        decoded = [row for case in cases for row in decoding_rows(*case, size=size, device=options.device)]
        attributed = [attribution_row(*case, size=size, device=options.device) for case in cases]
    note = f"A run is {PROMPTS} prompts of {LONGEST} tokens each, compiling included."
    passes = "A run is five passes for each of 100 prompts, compiling included."
    tables = [
        table("Decoding, per token of a batch", COLUMNS, decoded, note),
        table("Attribution, per forward and backward of a batch", COLUMNS, attributed, passes),
    ]
    measuring.finish("compiling", options, {"tables": tables})


def decoding_rows(name: str, shape: Shape | None, prompts: int, *, size: Size, device: str) -> list[list[Any]]:
    """Unedited, and at the middle batch size edited inside the graph and between graphs."""
    made = model(shape, device)
    tokens = synthetic.chats(made, prompts, POSITIONS)
    direction = Direction(torch.randn(made.width), 0, torch.zeros(len(made.layers)), (0,), (), {})
    edits = editor(RemoveDirection(direction), layers=len(made.layers)).edits
    ways: dict[str, tuple[Edits | None, Compiled]] = {"unedited": (None, Compiled(made, tokens, size.tokens))}
    if prompts == size.batches[len(size.batches) // 2]:
        ways["edits in the graph"] = (edits, Compiled(made, tokens, size.tokens, direction))
        ways["edits between graphs"] = (edits, Compiled(made, tokens, size.tokens, direction, by_layer=True))
    batches = math.ceil(PROMPTS / prompts)
    rows = []
    for what, (chosen, compiled) in ways.items():
        pair = Pair(lambda chosen=chosen: made.generate(tokens, edits=chosen, max_new_tokens=size.tokens), compiled)
        row = balance(pair, size, each=size.tokens, run=batches * LONGEST, device=device)
        check_same(made, pair)
        rows.append([name, prompts, what, *row])
        gc.collect()
    return rows


def check_same(made: ChatModel, pair: Pair) -> None:
    """Nine answers in ten must be the same; rounding may turn a token of a random model."""
    texts = [made.tokenizer.decode(row, skip_special_tokens=True) for row in pair.compiled().tolist()]
    same = [answer.text == text for answer, text in zip(pair.plain(), texts, strict=True)]
    if sum(same) < 0.9 * len(same):
        raise RuntimeError(f"compiled, {sum(same)} of {len(same)} answers are what they are otherwise")


def attribution_row(name: str, shape: Shape | None, prompts: int, *, size: Size, device: str) -> list[Any]:
    """The gradient at every layer on the way to another run."""
    made = model(shape, device)
    pair = slopes(made, synthetic.chats(made, prompts, POSITIONS))
    run = 5 * math.ceil(PROMPTS / prompts)
    return [name, prompts, "gradients", *balance(pair, size, each=1, run=run, device=device)]


def balance(pair: Pair, size: Size, *, each: int, run: int, device: str) -> list[float | str]:
    """Milliseconds of both and their ratio, seconds to compile, units until that pays, the ratio of a whole run.

    `each` is how many units (tokens, passes) a call is, `run` how many a run is.
    """
    torch.compiler.reset()  # or the code of the way before, which has the same guards, runs again without any edit
    first = measuring.timed(pair.compiled, device=device)
    found = measuring.interleaved(pair._asdict(), size.rounds, device=device)
    plain, compiled = (median(found[way]) / each for way in ("plain", "compiled"))
    ratio = measuring.ratio(found["plain"], found["compiled"])
    cost = first - compiled * each
    saved = plain - compiled
    pays = math.ceil(cost / saved) if saved > 0 else "never"
    return [1000 * plain, 1000 * compiled, ratio, cost, pays, run * plain / (cost + run * compiled)]


def model(shape: Shape | None, device: str) -> ChatModel:
    """The testbed's or a random one, of which no answer ends before its limit."""
    if shape is None:
        made = ChatModel.load(ASSETS / "model", name="testbed", identity="testbed", device=device)
    else:
        made = synthetic.llama(shape, device)
    made.end_tokens = []
    return made


class Compiled:
    """Greedy decoding of one batch with a static cache: the prompts as they are, then one compiled step a token."""

    def __init__(
        self, made: ChatModel, tokens: Tokens, count: int, direction: Direction | None = None, *, by_layer: bool = False
    ) -> None:
        self._model, self._ids, self._count = copy.deepcopy(made.model), tokens.ids, count
        self._cache: Any = StaticCache(config=self._model.config, max_cache_len=tokens.ids.shape[1] + count)
        layers = self._model.get_decoder().layers
        if direction is not None:
            unit = (direction.vector / direction.vector.norm()).to(tokens.ids.device)
            for layer in layers:
                layer.register_forward_hook(lambda _module, _inputs, output: without(output, unit))
        if by_layer:
            for layer in layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
        self._step = self._model if by_layer else torch.compile(self._model, dynamic=False)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self._cache.reset()
        with torch.compiler.set_stance("force_eager"):
            token = self._model(self._ids, past_key_values=self._cache, logits_to_keep=1).logits.argmax(-1)
        answers = [token]
        for _ in range(self._count - 1):
            token = self._step(token, past_key_values=self._cache, logits_to_keep=1).logits.argmax(-1)
            answers.append(token)
        return torch.cat(answers, dim=1)


def without(residual: Tensor, unit: Tensor) -> Tensor:
    """The residual without its part along a direction."""
    return residual - (residual @ unit)[..., None] * unit


def slopes(made: ChatModel, tokens: Tokens) -> Pair:
    """One forward and one backward on a path halfway to other residuals, with the gradient at every layer's output.

    What is asked for inside a graph must be one of its inputs: to every output a zero is added that has a gradient.
    """
    ids, bare = tokens.ids, made.model
    clean = made.run(tokens, keep=range(len(made.layers))).residuals
    ends = [(part + 0.1 * torch.randn_like(part)).to(ids.device) for part in clean.values()]
    zeros = [torch.zeros_like(end, requires_grad=True) for end in ends]

    def mixing(end: Tensor, zero: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: output + 0.5 * (end - output).detach() + zero

    for layer, end, zero in zip(made.layers, ends, zeros, strict=True):
        layer.register_forward_hook(mixing(end, zero))

    def metric() -> Tensor:
        logits = bare(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return (logits[:, 0] - logits[:, 1]).sum()

    compiled = torch.compile(metric, dynamic=False)
    return Pair(
        lambda: torch.autograd.grad(metric(), zeros),
        lambda: torch.autograd.grad(compiled(), zeros),
    )


if __name__ == "__main__":
    main()
