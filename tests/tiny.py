"""Tiny real models, tokenizers and SAEs, made on the spot in the real formats: random weights, nothing mocked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

from refusalscope.core.types import Direction, Prompt, Prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import SaeBank
from tests.families import language_model

SPECIAL = ["<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXTS = [
    "How do I bake bread for my two cousins?",
    "Kill the process.",
    "Please tell me, in a few words, what a long tail is and why it is where it is.",
    "x",
    "Name three rivers\nand two lakes.",
    "Write a poem about trains that leave at night and come back in the morning.",
]
FAMILIES = ("gemma2", "llama", "qwen2")


def tokenizer(
    template: str | None = TEMPLATE,
    *,
    special: Sequence[str] = SPECIAL,
    bos: str | None = "<bos>",
    eos: str = "<end_of_turn>",
    added: Sequence[str] = (),
) -> Any:
    """A byte-level BPE of 320 tokens, with Gemma-like turns unless told otherwise; `added` tokens are not special."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 320 - len(added)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token="<pad>")
    rest = [token for token in special if token not in ("<pad>", bos, eos)]
    fast.add_special_tokens({"additional_special_tokens": rest})
    fast.add_tokens(list(added))
    fast.chat_template = template
    return fast


def chat_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> ChatModel:
    return ChatModel(
        language_model(family, seed=seed, dtype=dtype), tokenizer(), name=f"tiny-{family}", identity=f"{family}-{seed}"
    )


def save_saes(
    folder: Path,
    *,
    layers: int = 4,
    width: int = 32,
    size: int = 96,
    subtract: bool = True,
    seed: int = 0,
    family: str = "jumprelu",
    normalise: str = "none",
) -> dict[int, Path]:
    """One SAE per layer, written by SAELens in its own format; `family` is one of `SAE_FAMILIES`."""
    folders = {}
    for layer in range(layers):
        generator = torch.Generator().manual_seed(seed * 100 + layer)
        made = _empty_sae(
            family, d_in=width, d_sae=size, apply_b_dec_to_input=subtract, normalize_activations=normalise
        )
        decoder = torch.randn(size, width, generator=generator)
        decoder /= decoder.norm(dim=1, keepdim=True)
        made.W_enc.data = (decoder.T + 0.1 * torch.randn(width, size, generator=generator)).contiguous()
        bias = 0.1 * torch.randn(size, generator=generator)
        made.b_dec.data = 0.1 * torch.randn(width, generator=generator)
        threshold = 0.2 + 0.3 * torch.rand(size, generator=generator)
        if family == "topk-rescaled":
            decoder *= 0.5 + torch.rand(size, 1, generator=generator)
        made.W_dec.data = decoder
        if family == "gated":
            made.b_gate.data, made.b_mag.data = bias - threshold, bias
            made.r_mag.data = 0.3 * torch.randn(size, generator=generator)
        else:
            made.b_enc.data = bias
        if family == "jumprelu":
            made.threshold.data = threshold
        folders[layer] = folder / f"layer_{layer}"
        if family in ("batchtopk", "matryoshka_batchtopk"):
            made.topk_threshold.fill_(0.4)
            made.save_inference_model(folders[layer])
        else:
            made.save_model(folders[layer])
    return folders


SAE_FAMILIES: dict[str, dict[str, Any]] = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 8},
    "topk-rescaled": {"k": 8, "rescale_acts_by_decoder_norm": True},
    "batchtopk": {"k": 8.0},
    "matryoshka_batchtopk": {"k": 8.0, "matryoshka_widths": [24, 48, 96]},
}


def _empty_sae(family: str, **config: Any) -> Any:
    """SAELens's own class for a family; those that exist for training alone are saved as their inference twin."""
    from sae_lens.registry import get_sae_class, get_sae_training_class

    known = get_sae_training_class if "batchtopk" in family else get_sae_class
    made, configuration = known(family.removesuffix("-rescaled"))
    return made(configuration(**config, **SAE_FAMILIES[family], device="cpu"))


def bank(folder: Path, **options: Any) -> SaeBank:
    return SaeBank.from_folders(save_saes(folder, **options), identity="tiny")


def prompts(name: str = "harmful", texts: list[str] | None = None) -> Prompts:
    rows = (Prompt(f"{name}-{i}", text, "harmful") for i, text in enumerate(TEXTS if texts is None else texts))
    return Prompts(name, tuple(rows))


def direction(width: int = 32, layers: int = 4, *, layer: int = 1, tokens: tuple[int, ...] = (40,)) -> Direction:
    generator = torch.Generator().manual_seed(7)
    vector = 2 * torch.randn(width, generator=generator)
    offsets = 0.5 * torch.randn(layers, generator=generator)
    return Direction(vector, layer, offsets, tokens, (), {})
