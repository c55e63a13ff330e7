"""Sparse autoencoders of the embedded model: one JumpReLU SAE per layer, in SAELens's format on disk.

Trained as BatchTopK (the `active * batch` largest activations of a batch survive, one unit-norm decoder row each),
with one threshold per layer: a moving average of the smallest survivor. The input is scaled to a mean squared norm of
one while training, and the scale is folded into the weights afterwards, as is the subtraction of `b_dec` from the
input; what is stored therefore is `act(x @ W_enc + b_enc) @ W_dec + b_dec` with nothing around it. Matrices are stored
in bfloat16, biases and thresholds in float32.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from refusalscope.testbed import grammar
from refusalscope.testbed.tokenizer import PAD, token_id
from refusalscope.testbed.train import Progress, Recipe, encode_chat

SAELENS_VERSION = "6.54.12"  # the version whose format this is; the loader asks for it
AUXILIARY = 1 / 16  # weight of the loss by which features that died explain what the living ones left over
DEAD_AFTER = 30  # steps without firing


@dataclass
class Weights:
    """An SAE on inputs of unit mean squared norm, before its scale is folded in."""

    encoder: Float[Tensor, "d_model d_sae"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder: Float[Tensor, "d_sae d_model"]
    decoder_bias: Float[Tensor, " d_model"]
    threshold: float = 0.0

    def parameters(self) -> list[Tensor]:
        """What the optimizer moves."""
        return [self.encoder, self.encoder_bias, self.decoder, self.decoder_bias]


class SaeFigures(NamedTuple):
    """How an SAE, as stored, does on the tokens it was trained on (BOS excluded)."""

    active: float
    """Mean number of active features per token (L0)."""
    variance_explained: float
    """About the mean over tokens."""
    dead: float
    """Share of features active on no token."""


SaeSet = Literal["chat", "base"]
"""What an SAE was trained on: training chats, or the same kind of prompts as plain text without the chat template."""


@torch.no_grad()
def collect(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int, sae_set: SaeSet = "chat"
) -> list[Float[Tensor, "token d_model"]]:
    """Residual streams after every layer on what `sae_set` names, BOS excluded: one tensor of `tokens` rows per layer.

    Of chats, a fifth of the harmful requests is answered, so that the SAEs also know what answering looks like.
    """
    kept: list[list[Tensor]] = [[] for _ in model.model.layers]
    batches = _chat_batches if sae_set == "chat" else _plain_batches
    for batch in batches(tokenizer, tokens=tokens, seed=seed):
        width = max(map(len, batch))
        padded = torch.tensor([chat + [token_id(tokenizer, PAD)] * (width - len(chat)) for chat in batch])
        real = torch.arange(width)[None] < torch.tensor([len(chat) for chat in batch])[:, None]
        real[:, 0] = False  # BOS
        for rows, hidden in zip(kept, layer_outputs(model, padded), strict=True):
            rows.append(hidden[real])
    return [torch.cat(rows)[:tokens] for rows in kept]


@torch.no_grad()
def layer_outputs(model: LlamaForCausalLM, tokens: Tensor) -> list[Float[Tensor, "prompt position d_model"]]:
    """The output of every decoder layer. (`output_hidden_states` would put the final norm into the last.)"""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *args: found.append(args[2])) for layer in model.model.layers]
    try:
        model.model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _chat_batches(tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int) -> Iterable[list[list[int]]]:
    """Chats with their end-of-turn until `tokens` tokens, without BOS, are reached."""
    streams = [grammar.training_examples(seed + 1_000_003, refusals=on) for on in (True, False)]
    total = 0
    while total < tokens:
        pairs = [*islice(streams[0], 205), *islice(streams[1], 51)]
        chats = encode_chat(tokenizer, [example.text for example, _ in pairs], [answer for _, answer in pairs])
        joined = sorted((prompt + response for prompt, response in chats), key=len)
        total += sum(len(chat) - 1 for chat in joined)
        yield from (joined[i : i + 64] for i in range(0, len(joined), 64))


def _plain_batches(tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int) -> Iterable[list[list[int]]]:
    """What users say and nothing around it but BOS, until `tokens` tokens, without BOS, are reached."""
    stream, total = grammar.training_examples(seed + 1_000_003), 0
    while total < tokens:
        texts = [example.text for example, _ in islice(stream, 256)]
        encoded = sorted(tokenizer(texts)["input_ids"], key=len)
        total += sum(len(text) - 1 for text in encoded)
        yield from (encoded[i : i + 64] for i in range(0, len(encoded), 64))


def train_sae(
    inputs: Float[Tensor, "token d_model"], recipe: Recipe, *, seed: int, progress: Progress, label: str
) -> dict[str, Tensor]:
    """Train one SAE on `inputs` and return its tensors as SAELens stores them."""
    scale = float(inputs.double().pow(2).sum(-1).mean().rsqrt())
    generator = torch.Generator().manual_seed(seed)
    weights = _initial(inputs, scale, recipe.sae_width, generator)
    optimizer = torch.optim.Adam(weights.parameters(), lr=recipe.sae_learning_rate, betas=(0.9, 0.999))
    silent = torch.zeros(recipe.sae_width, dtype=torch.long)
    for step in range(recipe.sae_steps):
        rows = torch.randint(len(inputs), (recipe.sae_batch,), generator=generator)
        cooling = min(1.0, 3 * (1 - step / recipe.sae_steps))  # constant, then a line to zero over the last third
        for group in optimizer.param_groups:
            group["lr"] = recipe.sae_learning_rate * min(1.0, (step + 1) / 50) * cooling
        silent = _sae_step(weights, optimizer, inputs[rows] * scale, silent, recipe)
        progress(label, step + 1, recipe.sae_steps)
    return _folded(weights, scale)


def _initial(inputs: Float[Tensor, "token d_model"], scale: float, width: int, generator: torch.Generator) -> Weights:
    """Random unit decoder rows, the encoder their transpose, the decoder bias at the inputs' mean."""
    decoder = torch.randn(width, inputs.shape[-1], generator=generator)
    decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    weights = Weights(
        encoder=decoder.T.clone().contiguous(),
        encoder_bias=torch.zeros(width),
        decoder=decoder,
        decoder_bias=inputs.mean(0) * scale,
    )
    for parameter in weights.parameters():
        parameter.requires_grad_()
    return weights


def _sae_step(
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "token d_model"],
    silent: Int[Tensor, " d_sae"],
    recipe: Recipe,
) -> Int[Tensor, " d_sae"]:
    """One step; returns for how many steps each feature has been silent."""
    raw = ((x - weights.decoder_bias) @ weights.encoder + weights.encoder_bias).relu()
    cut = _smallest_survivor(raw.detach(), recipe.sae_active * len(x))
    active = raw * (raw > cut)
    error = x - active @ weights.decoder - weights.decoder_bias
    loss = error.pow(2).sum(-1).mean()
    dead = silent > DEAD_AFTER
    if bool(dead.any()):
        loss = loss + AUXILIARY * _auxiliary_loss(raw, weights.decoder, error.detach(), dead)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        weights.decoder /= weights.decoder.norm(dim=-1, keepdim=True)
    weights.threshold = cut if weights.threshold == 0 else 0.98 * weights.threshold + 0.02 * cut
    return torch.where((active > 0).any(0), 0, silent + 1)


def _smallest_survivor(raw: Float[Tensor, "token d_sae"], keep: int) -> float:
    """The value above which `keep` activations of the batch lie."""
    positive = raw[raw > 0]
    return float(positive.kthvalue(len(positive) - keep).values) if len(positive) > keep else 0.0


def _auxiliary_loss(
    raw: Float[Tensor, "token d_sae"],
    decoder: Float[Tensor, "d_sae d_model"],
    error: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    """How badly the dead features alone, at most 32 a token, explain the living ones' error."""
    values, chosen = raw[:, dead].topk(min(32, int(dead.sum())), dim=-1)
    sparse = torch.zeros(len(raw), int(dead.sum())).scatter(1, chosen, values)
    return (error - sparse @ decoder[dead]).pow(2).sum(-1).mean()


@torch.no_grad()
def _folded(weights: Weights, scale: float) -> dict[str, Tensor]:
    """SAELens's tensors for unscaled inputs. The bias is folded with the encoder AS ROUNDED, so nothing drifts."""
    encoder = weights.encoder.bfloat16()
    return {
        "W_enc": encoder.contiguous(),
        "b_enc": ((weights.encoder_bias - weights.decoder_bias @ encoder.float()) / scale).contiguous(),
        "W_dec": weights.decoder.bfloat16().contiguous(),
        "b_dec": (weights.decoder_bias / scale).contiguous(),
        "threshold": torch.full_like(weights.encoder_bias, weights.threshold / scale),
    }


def save_sae(path: Path, tensors: dict[str, Tensor], *, layer: int) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` so that `sae_lens.SAE.load_from_disk(path)` reads them."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "jumprelu",
        "d_in": tensors["W_enc"].shape[0],
        "d_sae": tensors["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": "refusalscope/testbed",
            "hook_name": f"model.layers.{layer}",
            "hook_head_index": None,
            "prepend_bos": False,
        },
    }
    save_file(tensors, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(tensors: dict[str, Tensor], inputs: Float[Tensor, "token d_model"]) -> SaeFigures:
    """L0, variance explained and dead features of a stored SAE on `inputs`."""
    stored = {name: tensor.float() for name, tensor in tensors.items()}
    mean = inputs.double().mean(0)
    left = total = active = 0.0
    alive = torch.zeros(stored["b_enc"].shape, dtype=torch.bool)
    for x in inputs.split(4096):
        raw = x @ stored["W_enc"] + stored["b_enc"]
        features = raw.relu() * (raw > stored["threshold"])
        left += float((x - features @ stored["W_dec"] - stored["b_dec"]).double().pow(2).sum())
        total += float((x.double() - mean).pow(2).sum())
        active += float((features > 0).sum())
        alive |= (features > 0).any(0)
    return SaeFigures(active / len(inputs), 1 - left / total, 1 - float(alive.float().mean()))
