"""How many operations a case must do, counted from shapes, and how many a second the device's matrix products do."""

from functools import partial
from typing import Any, NamedTuple

import measuring
import torch
from torch import Tensor

from refusalscope.inputs.chat import ChatModel

PRODUCTS, MOVES = 10, 3


class Rates(NamedTuple):
    """Operations a second in bfloat16 and in float32, and bytes a second from the host to the device."""

    half: float
    single: float
    moving: float


class Operations(NamedTuple):
    """In bfloat16, which the model computes in, and in float32, which SAEs do."""

    half: float = 0.0
    single: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """How long they take at these rates."""
        return self.half / rates.half + self.single / rates.single


def rates(rows: int, device: str) -> Rates:
    """The best of several products of random square matrices, and of moves of as much pageable memory."""
    found = {kind: 2.0 * rows**3 / min(_products(rows, kind, device)) for kind in (torch.bfloat16, torch.float32)}
    here: Tensor = torch.zeros(rows, rows)
    moves = [measuring.timed(partial(here.to, device, copy=True), device=device) for _ in range(MOVES)]
    return Rates(found[torch.bfloat16], found[torch.float32], here.nbytes / min(moves))


def _products(rows: int, kind: torch.dtype, device: str) -> list[float]:
    one, other = (torch.randn(rows, rows, device=device, dtype=kind) for _ in range(2))
    return [measuring.timed(partial(torch.mm, one, other), device=device) for _ in range(PRODUCTS)]


def forward(model: ChatModel, prompts: int, positions: int, *, logits: int) -> float:
    """Two operations a weight and token, those of causal attention, and of the unembedding at `logits` positions."""
    read = _weights(model.layers) * positions + _head(model) * logits
    return 2.0 * prompts * read + _attention(model, prompts, positions)


def there_and_back(model: ChatModel, prompts: int, positions: int) -> float:
    """From the first layer's output to two logits a prompt, and the gradients of every layer's output; of no weight's.

    Back there are as many products as forwards, in attention twice as many. The last layer's MLP is gone through at the
    last position alone, and two tokens' logits are nothing beside the rest.
    """
    above = 1 - 1 / len(model.layers)
    inside = 2 * forward(model, prompts, positions, logits=0) + _attention(model, prompts, positions)
    spared = 2.0 * prompts * (positions - 1) * _weights(model.layers[-1].mlp)
    return inside * above - 2 * spared


def attribution(model: ChatModel, prompts: int, positions: int, *, nodes: int, features: int) -> Operations:
    """Two forward passes, and at every node one there and back; then each token's two encodings by so many features of
    every layer. Of the decoder only what moved is needed, which is nothing beside that.
    """
    half = 2 * forward(model, prompts, positions, logits=1) + nodes * there_and_back(model, prompts, positions)
    return Operations(half, 2 * 2.0 * prompts * positions * model.width * features * len(model.layers))


def answers(model: ChatModel, prompts: int, positions: int, tokens: int) -> Operations:
    """Answers of `tokens` tokens, of which the last is not read."""
    return Operations(forward(model, prompts, positions + tokens - 1, logits=tokens))


def _weights(part: Any) -> int:
    """Of the matrices in a module."""
    return sum(weight.numel() for weight in part.parameters() if weight.dim() > 1)


def _head(model: ChatModel) -> int:
    return model.model.get_output_embeddings().weight.numel()


def _attention(model: ChatModel, prompts: int, positions: int) -> float:
    """Scores, and their sums over values: of the lower triangle alone."""
    config: Any = model.model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * len(model.layers) * prompts * config.num_attention_heads * size * positions**2
