"""Chat models as their hub repositories hold them: real classes, layer counts and file formats; contents invented.

Each tokenizer has its family's class, special tokens and BOS; each chat template, in words of our own, its family's
order of blocks and its way with system prompts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
)

SIZE = 720
"""Tokens of every vocabulary, 256 bytes among them."""
VERBS = ("frobnicate", "quimble", "zanter", "plorp", "drindle", "skive", "mordle", "bramp", "fleen")
THINGS = tuple(
    first + last for first in ("zor", "quen", "bim", "tal", "wex", "pog") for last in ("b", "do", "lin", "va")
)
TEXTS = (
    " ".join(VERBS + THINGS),
    "Explain how to frobnicate the zorb.",
    "What colour is a quen that can sleep?",
    "I cannot help. Here is a list of three.",
    "user\nmodel\nsystem\nassistant\n\nA calm guide speaks.",
)
GEMMA_2 = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}\
{% for m in messages %}\
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns take turns') }}{% endif %}\
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
GEMMA_3 = """\
{{ bos_token }}{% set first = '' %}{% set turns = messages %}\
{% if messages[0].role == 'system' %}\
{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}\
{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ first if loop.first else '' }}\
{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}\
{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
LLAMA_3 = """\
{{ bos_token }}{% set day = date_string if date_string is defined else '26 Jul 2024' %}\
{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}\
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
<|start_header_id|>system<|end_header_id|>

Learned until: some winter
This day: {{ day }}

{{ system }}<|eot_id|>{% for m in turns %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
QWEN_2 = """\
{% if messages[0].role != 'system' %}<|im_start|>system
A calm guide speaks.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN_3_5 = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""


class Family(NamedTuple):
    """What the repositories of one family share."""

    build: Callable[[int, int, dict[str, Any]], Any]
    """(layers, width, ids of the vocabulary) -> a model."""
    tokenizer: Callable[[], Any]
    template: str
    ends: tuple[str, ...]
    """The end tokens of its generation_config.json."""
    sampling: dict[str, Any]
    """The sampling defaults there."""


class Repository(NamedTuple):
    """A model on the hub: its family, its real number of layers, and our width."""

    family: str
    layers: int
    width: int = 32


def save(name: str, folder: Path) -> None:
    """Write the files of the model repository `name` (bfloat16 weights of seed 0) to `folder`."""
    repository = REPOSITORIES[name]
    family = FAMILIES[repository.family]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = family.template
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "pad")}
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    torch.manual_seed(0)
    model = family.build(repository.layers, repository.width, {"vocab_size": len(tokenizer), **ids})
    _calm(model, gemma=repository.family.startswith("gemma"))
    model.generation_config = GenerationConfig(eos_token_id=ends, **ids, **family.sampling)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _calm(model: Any, *, gemma: bool) -> None:
    """Let each block change the residual stream a little: a stack of random blocks bends every path through it."""
    embedding = model.get_input_embeddings().weight.data
    embedding /= embedding.pow(2).mean().sqrt() * (embedding.shape[1] ** 0.5 if gemma else 1)
    for layer in model.get_decoder().layers:
        if gemma:
            # Its norms after a block multiply by 1 + weight.
            share = 0.4 / (2 * len(model.get_decoder().layers)) ** 0.5
            layer.post_attention_layernorm.weight.data.fill_(share - 1)
            layer.post_feedforward_layernorm.weight.data.fill_(share - 1)
        else:
            attention = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj
            for output in (attention, layer.mlp.down_proj):
                output.weight.data *= 0.03 / model.config.get_text_config().initializer_range


def _shape(layers: int, width: int) -> dict[str, Any]:
    # A narrow stream needs larger weights for its layers to matter.
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.02 if width > 1000 else 0.3,
    }


def _gemma_2(layers: int, width: int, ids: dict[str, Any]) -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**_shape(layers, width), **ids, query_pre_attn_scalar=8))


def _gemma_3_text(layers: int, width: int, ids: dict[str, Any]) -> dict[str, Any]:
    return {**_shape(layers, width), **ids, "query_pre_attn_scalar": 8, "sliding_window": 512}


def _gemma_3(layers: int, width: int, ids: dict[str, Any]) -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**_gemma_3_text(layers, width, ids)))


def _gemma_3_wrapped(layers: int, width: int, ids: dict[str, Any]) -> Any:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 27, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    text = _gemma_3_text(layers, width, ids)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)  # type: ignore[reportCallIssue]
    )


def _llama_3(layers: int, width: int, ids: dict[str, Any]) -> Any:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return LlamaForCausalLM(
        LlamaConfig(**_shape(layers, width), **ids, rope_parameters=rope, max_position_embeddings=131072)
    )


def _qwen_2(layers: int, width: int, ids: dict[str, Any]) -> Any:
    shape = {**_shape(layers, width), "num_attention_heads": 2}
    del shape["head_dim"]
    return Qwen2ForCausalLM(Qwen2Config(**shape, **ids))


def _qwen_3_5(layers: int, width: int, ids: dict[str, Any]) -> Any:
    text = {**_shape(layers, width), **ids, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [1, 0, 0]}
    vision = {"hidden_size": 8, "intermediate_size": 8, "depth": 27, "num_heads": 1, "out_hidden_size": width}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision)  # type: ignore[reportCallIssue]
    )


def _learned(tokens: list[str], *, gemma: bool) -> Tokenizer:
    """A byte-pair encoding of TEXTS whose first entries are `tokens`."""
    made = Tokenizer(models.BPE(unk_token="<unk>" if gemma else None, byte_fallback=gemma, fuse_unk=gemma))
    if gemma:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(Regex("▁|\n"), "merged_with_next")
        tokens = [*tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = ByteLevelDecoder()
    alphabet = [] if gemma else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    # A pair that stands there once is not learned.
    made.train_from_iterator(TEXTS * 2, trainer)
    return made


def _vocabulary(tokens: list[str], *, gemma: bool) -> dict[str, Any]:
    model = json.loads(_learned(tokens, gemma=gemma).to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _opens_with(tokenizer: Any, bos: str) -> Any:
    ids = [(bos, tokenizer.convert_tokens_to_ids(bos))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=ids)
    return tokenizer


def _gemma_tokenizer() -> Any:
    turns = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
    vocabulary = _vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns], gemma=True)
    return _opens_with(GemmaTokenizer(**vocabulary, extra_special_tokens=turns), "<bos>")


def _llama_tokenizer() -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_learned(special, gemma=False),
        bos_token=special[0],
        eos_token="<|eot_id|>",
        extra_special_tokens=special[1:],
    )
    return _opens_with(made, special[0])


def _qwen_tokenizer(kind: Any, *, plain: tuple[str, ...] = ()) -> Any:
    turns = ["<|im_start|>", "<|im_end|>"]
    vocabulary = _vocabulary(["<|endoftext|>", *turns, *plain], gemma=False)
    made = kind(**vocabulary, eos_token="<|im_end|>", extra_special_tokens=turns)
    made.add_tokens(list(plain))
    return made


GEMMA = {"do_sample": True, "top_k": 64, "top_p": 0.95}
LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
GEMMA_ENDS = ("<eos>", "<end_of_turn>")
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "gemma-2": Family(_gemma_2, _gemma_tokenizer, GEMMA_2, GEMMA_ENDS, {}),
    "gemma-3": Family(_gemma_3, _gemma_tokenizer, GEMMA_3, GEMMA_ENDS, GEMMA),
    "gemma-3-wrapped": Family(_gemma_3_wrapped, _gemma_tokenizer, GEMMA_3, GEMMA_ENDS, GEMMA),
    "llama-3": Family(_llama_3, _llama_tokenizer, LLAMA_3, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), LLAMA),
    "qwen-2": Family(_qwen_2, lambda: _qwen_tokenizer(Qwen2Tokenizer), QWEN_2, QWEN_ENDS, QWEN),
    "qwen-3.5": Family(
        _qwen_3_5,
        lambda: _qwen_tokenizer(Qwen3_5Tokenizer, plain=("<think>", "</think>")),
        QWEN_3_5,
        QWEN_ENDS,
        {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 20},
    ),
}
REPOSITORIES = {
    # SAELens knows these widths by name, so they are the real ones.
    "google/gemma-2-2b-it": Repository("gemma-2", 26, 2304),
    "google/gemma-2-9b-it": Repository("gemma-2", 42, 3584),
    "Qwen/Qwen3.5-27B": Repository("qwen-3.5", 64, 5120),
    "google/gemma-3-270m-it": Repository("gemma-3", 18),
    "google/gemma-3-1b-it": Repository("gemma-3", 26),
    "google/gemma-3-4b-it": Repository("gemma-3-wrapped", 34),
    "google/gemma-3-12b-it": Repository("gemma-3-wrapped", 48),
    "google/gemma-3-27b-it": Repository("gemma-3-wrapped", 62),
    "meta-llama/Llama-3.1-8B-Instruct": Repository("llama-3", 32),
    "Qwen/Qwen2.5-7B-Instruct": Repository("qwen-2", 28),
}
