"""Tiny models of every family, of the real configuration classes, with random weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
SLIDING: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
# As many layers in the vision tower as in the text stack, so that counting layers cannot tell them apart.
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
PATCHES: dict[str, Any] = {"image_size": 28, "patch_size": 14}
QWEN_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 4,
    "num_heads": 2,
    "out_hidden_size": 32,
}


def _plain(name: str, **changes: Any) -> Callable[[], Any]:
    """A family whose text model is made from SHAPE with a few changes."""

    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**SHAPE, **SLIDING)
    vision = transformers.SiglipVisionConfig(**VISION, **PATCHES)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=8,
        eoi_token_index=9,
        image_token_index=10,
    )
    config.eos_token_id = 3
    return transformers.Gemma3ForConditionalGeneration(config)


def _gemma3_text() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHAPE, **SLIDING))


def _qwen35_text() -> Any:
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SHAPE, **LINEAR))


def _qwen35() -> Any:
    text = transformers.Qwen3_5TextConfig(**SHAPE, **LINEAR)
    config = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=QWEN_VISION)
    return transformers.Qwen3_5ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma2": _plain("Gemma2", **SLIDING),
    "llama": _plain("Llama", tie_word_embeddings=False),
    "qwen2": _plain("Qwen2"),
    "gemma3": _gemma3_text,
    "gemma3-multimodal": _gemma3,
    "qwen3": _plain("Qwen3", head_dim=16),
    "mistral": _plain("Mistral", sliding_window=8),
    "phi3": _plain("Phi3", sliding_window=8),
    "olmo2": _plain("Olmo2"),
    "neox": _plain("GPTNeoX"),
    "qwen3-moe": _plain("Qwen3Moe", **EXPERTS),
    "gpt-oss": _plain("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8),
    "qwen3.5": _qwen35_text,
    "qwen3.5-multimodal": _qwen35,
}


def language_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model with random weights, large enough that its layers matter."""
    torch.manual_seed(seed)
    made = FAMILIES[family]()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return made.to(dtype).eval()


def scripted(ids: Sequence[int], *, after: int, ends: Sequence[int]) -> Any:
    """A GPT-2 that writes `ids` after a prompt of `after` tokens, whatever it says: only positions reach its logits."""
    size = after + len(ids) + 1
    config = transformers.GPT2Config(vocab_size=320, n_positions=size, n_embd=2 * size, n_layer=2, n_head=1)
    config.tie_word_embeddings = False
    made = transformers.GPT2LMHeadModel(config)
    for parameter in made.parameters():
        parameter.data.zero_()
    made.transformer.ln_f.weight.data.fill_(1.0)
    made.transformer.wpe.weight.data[:, :size] = torch.eye(size)
    for at, token in enumerate(ids):
        made.lm_head.weight.data[token, after - 1 + at] = 1.0
    made.generation_config.eos_token_id = list(ends)
    return made.eval()
