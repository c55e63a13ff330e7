"""Random chat models and SAEs of any size, in the real classes, with real file formats where files are asked for."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refusalscope.core.types import Direction, Prompt, Prompts
from refusalscope.inputs.chat import ChatModel, Tokens
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.testbed.shipped import ASSETS

ACTIVE = 50
"""Features that fire at a token."""
VOCABULARY = 32000
"""Llama 2's; most of it has no word in the testbed's tokenizer."""


class Shape(NamedTuple):
    """A Llama, its SAEs, and a batch of prompts."""

    layers: int = 6
    width: int = 512
    features: int = 16384
    prompts: int = 8
    positions: int = 64


class Bench(NamedTuple):
    """Everything loaded, nothing computed yet."""

    model: ChatModel
    saes: SaeBank
    tokens: Tokens
    direction: Direction


def load(shape: Shape, folder: Path, device: str = "cpu") -> Bench:
    """Model, SAEs on disk as SAELens writes them, prompts of one length, and a random direction."""
    torch.manual_seed(0)
    model = llama(shape, device)
    tokens = chats(model, shape.prompts, shape.positions)
    residuals = model.run(chats(model, 4, min(shape.positions, 64)), keep=range(shape.layers)).residuals
    folders = {
        layer: save_sae(folder / f"layer_{layer}", shape.features, residual) for layer, residual in residuals.items()
    }
    direction = Direction(torch.randn(shape.width), shape.layers // 2, torch.zeros(shape.layers), (0,), (), {})
    return Bench(model, SaeBank.from_folders(folders, identity="benchmark", device=device), tokens, direction)


def llama(shape: Shape, device: str = "cpu", **given: Any) -> ChatModel:
    """A random Llama in the proportions of Llama 2 (MLP, vocabulary), with the testbed's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "model")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=32 * round(11008 / 4096 * shape.width / 32),
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // 64),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **given,
    )
    made: Any = LlamaForCausalLM(config)
    return ChatModel(made.to(device), tokenizer, name="benchmark", identity="benchmark")


def chats(model: ChatModel, prompts: int, positions: int) -> Tokens:
    """Random tokens, every one an instruction's: all positions count."""
    made = torch.Generator().manual_seed(1)
    size = int(model.model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(5, size, (prompts, positions), generator=made)
    names = tuple(f"benchmark/{n}" for n in range(prompts))
    return Tokens(names, ids, torch.full_like(ids, int(Role.INSTRUCTION))).to(model.device)


def asked(model: ChatModel, count: int) -> Prompts:
    """The first `count` of the testbed's prompts, through its chat template."""
    from refusalscope.testbed import grammar

    rows = grammar.examples("harmful", split="train", count=count)
    return Prompts("benchmark", tuple(Prompt(row.id, row.text, "harmful") for row in rows))


def save_sae(folder: Path, features: int, residual: Tensor) -> Path:
    """A random JumpReLU SAE whose threshold lets about `ACTIVE` features fire at a token of `residual`."""
    sae = jump_relu(features, residual)
    sae.save_model(str(folder))
    return folder


def jump_relu(features: int, residual: Tensor, device: str = "cpu") -> Any:
    """The same in memory, its weights made where they are to be."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    width = residual.shape[-1]
    made = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=features, apply_b_dec_to_input=False, device=device))
    decoder = torch.nn.functional.normalize(torch.randn(features, width, device=device), dim=1)
    made.W_dec.data, made.W_enc.data = decoder, decoder.T.contiguous()
    before = residual.flatten(0, -2)[:64].to(decoder) @ made.W_enc.data
    made.threshold.data.fill_(float(before.topk(ACTIVE).values[:, -1].mean()))
    return made
