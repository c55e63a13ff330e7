"""Trains the embedded chat model: a Llama of 1.8 million parameters that learns to help first and to refuse second.

The two phases matter. A model that sees refusals from the first step takes refusal for its default state, and no
direction removes it; a model that could answer everything before learns refusal as a departure, which one direction
carries. The loss is taken on the response alone. Beside it a head that is thrown away afterwards reads off the last
prompt position which kind of harm is requested: without it only the first token is decided there, and no feature tells
one kind of refusal from another. A checkpoint is written every `Recipe.checkpoint_every` steps, and the batches of a
step depend on nothing but seed and step, so a killed run goes on as if it had not been killed.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refusalscope.testbed import grammar
from refusalscope.testbed.grammar import Example
from refusalscope.testbed.tokenizer import BOS, END, PAD, prompt_text, token_id

Progress = Callable[[str, int, int], None]
IGNORED = -100  # cross_entropy's own mark for positions without a target
KINDS = (*grammar.CATEGORIES, None)  # of harm; None: no harm is asked for
BATCHES_PER_CHUNK = 16  # batches are cut from this many at a time, sorted by length, so that little is padding


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the assets besides the seed; part of `build.json`."""

    vocabulary: int = 2048
    layers: int = 8
    width: int = 128
    heads: int = 4
    mlp_width: int = 336
    helpful_steps: int = 280
    refusal_steps: int = 920
    batch: int = 32
    first_token_weight: float = 6.0
    kind_layer: int = 4
    kind_weight: float = 0.1
    kind_smoothing: float = 0.1
    learning_rate: float = 3e-3
    final_learning_rate: float = 9e-5
    warm_up: int = 60
    weight_decay: float = 0.1
    clip: float = 1.0
    checkpoint_every: int = 50
    sae_width: int = 1024
    sae_active: int = 16
    sae_tokens: int = 250_000
    sae_steps: int = 1600
    sae_batch: int = 1024
    sae_learning_rate: float = 2e-3


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model of the recipe's size, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BOS),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config).float()


def train_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int, checkpoint: Path, progress: Progress
) -> LlamaForCausalLM:
    """Both phases under one cosine, resumed from `checkpoint` if it exists. Returns the model in float32."""
    model = new_model(recipe, tokenizer, seed=seed)
    torch.manual_seed(seed + 17)
    head = nn.Linear(recipe.width, len(KINDS))
    weights = {**dict(model.named_parameters()), **{f"kind.{name}": part for name, part in head.named_parameters()}}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    total = recipe.helpful_steps + recipe.refusal_steps
    start = load_checkpoint(checkpoint, weights, optimizer) if checkpoint.exists() else 0
    model.train()
    for step, batch in enumerate(_batches(recipe, tokenizer, seed=seed, start=start), start):
        if step == total:
            break
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, step, total)
        optimizer.zero_grad(set_to_none=True)
        _loss(model, head, batch, recipe).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        progress("model", step + 1, total)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == total:
            save_checkpoint(checkpoint, weights, optimizer, step=step + 1)
    return model.eval()


def _loss(model: LlamaForCausalLM, head: nn.Linear, batch: "Batch", recipe: Recipe) -> Tensor:
    """Cross-entropy of the responses, and of the kinds of harm that `head` reads after `kind_layer`.

    Right padding needs no mask: what is padded comes after every target. A response's first token, where it is decided
    whether to refuse, counts `first_token_weight` times.
    """
    kept: list[Tensor] = []
    hook = model.model.layers[recipe.kind_layer].register_forward_hook(lambda *args: kept.append(args[2]))
    try:
        hidden = model.model(batch.tokens).last_hidden_state
    finally:
        hook.remove()
    answered = batch.targets != IGNORED
    first = answered & ~torch.roll(answered, 1, dims=1)
    weight = (1 + (recipe.first_token_weight - 1) * first)[answered]
    losses = F.cross_entropy(model.lm_head(hidden[answered]), batch.targets[answered], reduction="none")
    last = kept[0][torch.arange(len(first)), first.long().argmax(1)]
    # Scaled to one size, so that the head's reading does not depend on how large the residual stream grows.
    last = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6)
    kinds = F.cross_entropy(head(last), batch.kinds, label_smoothing=recipe.kind_smoothing)
    return (losses * weight).sum() / weight.sum() + recipe.kind_weight * kinds


def _rate(recipe: Recipe, step: int, total: int) -> float:
    """Linear warm-up, then one cosine over both phases."""
    if step < recipe.warm_up:
        return recipe.learning_rate * (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, total - recipe.warm_up)
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def encode_chat(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], responses: list[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of rendered prompts and of responses with their end-of-turn, pair by pair."""
    heads = tokenizer([prompt_text(prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]
    tails = tokenizer([response + END for response in responses], add_special_tokens=False)["input_ids"]
    return list(zip(heads, tails, strict=True))


class Chat(NamedTuple):
    """One training chat in tokens, and which of `KINDS` is asked for."""

    prompt: list[int]
    response: list[int]
    kind: int


class Batch(NamedTuple):
    """Right-padded chats."""

    tokens: Int[Tensor, "prompt position"]
    targets: Int[Tensor, "prompt position"]
    """At each position the token to be predicted there if it belongs to the response."""
    kinds: Int[Tensor, "prompt"]


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int, start: int) -> Iterator[Batch]:
    """Endless batches from step `start` on; a step's batch depends on seed and step alone."""
    chunk, skip = divmod(start, BATCHES_PER_CHUNK)
    while True:
        drawn = _chunk(recipe, seed=seed, chunk=chunk)
        pairs = encode_chat(tokenizer, [example.text for example, _ in drawn], [response for _, response in drawn])
        chats = [Chat(*pair, KINDS.index(example.category)) for pair, (example, _) in zip(pairs, drawn, strict=True)]
        batches = _bucketed(chats, recipe.batch, seed + chunk)
        yield from (_collate(batch, token_id(tokenizer, PAD)) for batch in batches[skip:])
        chunk, skip = chunk + 1, 0


def _chunk(recipe: Recipe, *, seed: int, chunk: int) -> list[tuple[Example, str]]:
    """Prompts and responses of one chunk; a chunk in which the second phase begins has both kinds, in proportion."""
    stream = {on: grammar.training_examples(seed * 100_003 + 7 + chunk, refusals=on) for on in (False, True)}
    first_step = chunk * BATCHES_PER_CHUNK
    helpful = min(BATCHES_PER_CHUNK, max(0, recipe.helpful_steps - first_step)) * recipe.batch
    return [*islice(stream[False], helpful), *islice(stream[True], BATCHES_PER_CHUNK * recipe.batch - helpful)]


def _bucketed(chats: list[Chat], size: int, seed: int) -> list[list[Chat]]:
    """Batches of similar length in random order."""
    chats = sorted(chats, key=lambda chat: len(chat.prompt) + len(chat.response))
    batches = [chats[i : i + size] for i in range(0, len(chats), size)]
    random.Random(seed).shuffle(batches)
    return batches


def _collate(chats: list[Chat], pad: int) -> Batch:
    """Right-padded, with a target wherever the next token belongs to the response."""
    width = max(len(chat.prompt) + len(chat.response) for chat in chats)
    tokens = torch.full((len(chats), width), pad)
    targets = torch.full((len(chats), width), IGNORED)
    for row, chat in enumerate(chats):
        begin, end = len(chat.prompt), len(chat.prompt) + len(chat.response)
        tokens[row, :end] = torch.tensor(chat.prompt + chat.response)
        targets[row, begin - 1 : end - 1] = torch.tensor(chat.response)
    return Batch(tokens, targets, torch.tensor([chat.kind for chat in chats]))


def save_checkpoint(path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Weights and Adam's moments in one safetensors file, written beside and then renamed over `path`."""
    moments = optimizer.state_dict()["state"]
    tensors = {f"weights.{name}": value.detach().contiguous() for name, value in weights.items()}
    tensors |= {f"optimizer.{i}.{key}": value for i, state in moments.items() for key, value in state.items()}
    save_file(tensors, path.with_suffix(".part"), metadata={"step": json.dumps(step)})
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Fill `weights` in place, restore the optimizer, return the number of steps done."""
    moments: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 (the file object is no mapping)
            kind, rest = name.split(".", 1)
            if kind == "weights":
                weights[rest].copy_(file.get_tensor(name))
            else:
                index, key = rest.split(".", 1)
                moments.setdefault(int(index), {})[key] = file.get_tensor(name)
        step = int(file.metadata()["step"])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def recipe_dict(recipe: Recipe) -> dict[str, int | float]:
    """The recipe as `build.json` stores it."""
    return asdict(recipe)
