"""Random models and SAEs in the shapes of published ones, made where they are to compute: nothing is read from a disk.

The configuration classes are the real ones; `toy` makes everything else small. Every token is a word of its own, so
that a prompt has as many positions as it is asked to have and answers may use the whole vocabulary. Needs torch and
transformers alone: the SAEs stand in for SAELens's.
"""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refusalscope.core.encoding import jump_relu
from refusalscope.core.types import Direction, Label, Prompt, Prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import LayerSae, SaeBank

ACTIVE = 50
"""Features that fire at a token, about."""
SPECIAL = ("<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>", "<unk>", "user", "model")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn> {{ 'model' if m.role == 'assistant' else m.role }} "
    "{{ m.content }}<end_of_turn> {% endfor %}{% if add_generation_prompt %}<start_of_turn> model {% endif %}"
)
AROUND = 6
"""Tokens that the template writes around the words of a prompt."""


class Shape(NamedTuple):
    """A configuration class of transformers, what it is given, and d_sae."""

    configuration: str
    given: Mapping[str, Any]
    features: int

    @property
    def config(self) -> Any:
        import transformers

        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return getattr(transformers, self.configuration)(**self.given, **ids)

    @property
    def width(self) -> int:
        return int(self.given["hidden_size"])

    def toy(self) -> "Shape":
        return Shape(self.configuration, {**self.given, **TOY}, 64)


TOY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
PUBLISHED = {
    "gemma-2-2b": Shape(
        "Gemma2Config",
        {
            **{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
            **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
            **{"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            "max_position_embeddings": 8192,
        },
        65536,
    ),
    "llama-3.1-8b": Shape(
        "LlamaConfig",
        {
            **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
            "max_position_embeddings": 131072,
        },
        32768,
    ),
    "gemma-3-270m": Shape(
        "Gemma3TextConfig",
        {
            **{"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
            **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256},
            **{"sliding_window": 512, "max_position_embeddings": 32768},
        },
        16384,
    ),
}


def bare(shape: Shape, device: str) -> Any:
    """The model in bfloat16 with random weights; without any on the device `meta`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)


def chat_model(shape: Shape, device: str) -> ChatModel:
    return ChatModel(bare(shape, device), tokenizer(shape.given["vocab_size"]), name="random", identity="random")


def tokenizer(size: int) -> Any:
    """A vocabulary of `size` words, and a chat template like Gemma's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), size)))
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end_of_turn>", "unk_token": "<unk>"},
        additional_special_tokens=["<start_of_turn>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def prompts(shape: Shape, label: Label, count: int, positions: int) -> Prompts:
    """Prompts of random words that are `positions` tokens each in their chat."""
    made = torch.Generator().manual_seed(len(label))
    drawn = torch.randint(len(SPECIAL), shape.given["vocab_size"], (count, positions - AROUND), generator=made)
    texts = (" ".join(f"w{number}" for number in row) for row in drawn.tolist())
    return Prompts(label, tuple(Prompt(f"{label}-{at}", text, label) for at, text in enumerate(texts)))


def direction(shape: Shape, layers: int) -> Direction:
    """A random direction; its refusal token opens no answer, so that every prompt counts as flipped."""
    vector = torch.randn(shape.width, generator=torch.Generator().manual_seed(0))
    return Direction(vector, layers // 2, torch.zeros(layers), (0,), (), {})


class JumpRelu(nn.Module):
    """What `LayerSae` needs of SAELens's JumpReLU SAE, encoder and decoder each other's transpose."""

    W_dec: Tensor
    W_enc: Tensor
    b_dec: Tensor
    b_enc: Tensor
    threshold: Tensor

    def __init__(self, shape: Shape, threshold: float, encoder: Tensor, decoder: Tensor) -> None:
        super().__init__()
        device = decoder.device
        self.register_buffer("W_dec", decoder)
        self.register_buffer("W_enc", encoder)
        self.register_buffer("b_dec", torch.zeros(shape.width, device=device))
        self.register_buffer("b_enc", torch.zeros(shape.features, device=device))
        self.register_buffer("threshold", torch.full((shape.features,), threshold, device=device))
        self.cfg = SimpleNamespace(
            architecture=lambda: "jumprelu",
            d_in=shape.width,
            d_sae=shape.features,
            normalize_activations="none",
            apply_b_dec_to_input=False,
            reshape_activations="none",
            metadata=SimpleNamespace(hook_name=None, hf_hook_name=None),
        )

    def encode(self, residual: Tensor) -> Tensor:
        return jump_relu(residual @ self.W_enc + self.b_enc, self.threshold)


def bank(shape: Shape, model: ChatModel, asked: Prompts) -> SaeBank:
    """An SAE for every layer, at which about `ACTIVE` features fire: the same weights, so that none takes time to make.

    A random feature's pre-activation is normal with the residual's root mean square as its deviation.
    """
    layers = range(len(model.layers))
    residuals = model.run(model.tokens(asked[:4]), keep=layers).residuals
    deviations = torch.special.ndtri(torch.tensor(1 - min(0.5, ACTIVE / shape.features), dtype=torch.float64))
    thresholds = {layer: float(deviations * part.float().square().mean().sqrt()) for layer, part in residuals.items()}
    weights = _weights(shape, str(model.device))
    loaders = {layer: partial(_made, shape, *weights, threshold) for layer, threshold in thresholds.items()}
    # Read ahead, an SAE would be moved to the host.
    return SaeBank(loaders, identity="random", device=str(model.device), read_ahead=False)


def _made(shape: Shape, encoder: Tensor, decoder: Tensor, threshold: float, _device: str) -> JumpRelu:
    return JumpRelu(shape, threshold, encoder, decoder)


def _weights(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Encoder and decoder."""
    torch.manual_seed(1)
    decoder = torch.randn(shape.features, shape.width, device=device)
    # In place: a copy would be half as large as the SAE.
    decoder /= decoder.norm(dim=1, keepdim=True)
    return decoder.T.contiguous(), decoder


def outline(shape: Shape) -> LayerSae:
    """An SAE without weights, for whoever only asks how large it is."""
    return LayerSae(0, JumpRelu(shape, 0.0, *_weights(shape, "meta")))
