"""Chat templates shaped like those of real families: their special tokens, blocks, BOS and system handling.

The words in them are invented.
"""

from typing import Any, NamedTuple

from tests import tiny

QUESTION = "Name three rivers."
SYSTEM = "Speak like a gnome."


class Family(NamedTuple):
    """A template, its tokens, and what it must make of QUESTION with reasoning skipped."""

    template: str | None
    special: tuple[str, ...]
    bos: str | None
    eos: str
    header: str
    closing: str
    end: str
    """The template's own end of turn."""
    system_header: str
    """The header when SYSTEM is the system prompt."""
    folded: bool = False
    """Whether it takes our hand to fit the system prompt in."""
    dated: bool = False
    added: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        special = dict.fromkeys(token for token in ("<pad>", self.bos, *self.special, self.eos) if token)
        return tiny.tokenizer(self.template, special=tuple(special), bos=self.bos, eos=self.eos, added=self.added)


GEMMA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('one voice only') }}\
{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
GEMMA3 = """{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}\
{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}{% else %}\
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ ns.first if loop.index0 < 2 }}{{ m.content | trim }}<end_of_turn>
{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
LLAMA = """{{ bos_token }}{% set asked = messages[1:] if messages[0].role == 'system' else messages %}\
<|start_header_id|>system<|end_header_id|>

Baked in: May 2001
Now: {{ strftime_now('%d %b %Y') }}

{{ messages[0].content | trim if messages[0].role == 'system' }}<|eot_id|>{% for m in asked %}\
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
QWEN = """{% if messages[0].role != 'system' %}<|im_start|>system
You are Moss, a hat rack.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN3 = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
MISTRAL = """{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}\
{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}{% elif m.role == 'user' %}\
[INST] {{ ns.first }}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"""
PHI3 = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
OLMO = """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{{ eos_token if m.role == 'assistant' and loop.last else '\n' }}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}\
<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""
HARMONY = """<|start|>system<|message|>You are Moss.
Now: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}{% if m.role == 'system' %}\
<|start|>developer<|message|># Rules

{{ m.content }}<|end|>{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}\
{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}\
<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
GEMMA4 = """{{ bos_token }}{% if enable_thinking or messages[0].role == 'system' %}<|turn>system
{{ '<|think|>\n' if enable_thinking }}{{ messages[0].content if messages[0].role == 'system' }}<turn|>
{% endif %}{% for m in messages if m.role != 'system' %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.reasoning %}<|channel>thought
{{ m.reasoning }}<channel|>{% endif %}{{ m.content | trim }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{% endif %}"""
DEAF = "{{ bos_token }}{% for m in messages if m.role == 'user' %}Q: {{ m.content }}\nA:{% endfor %}"
PYTHIA = "{% for m in messages %}{{ 'Asked: ' if m.role == 'user' else 'Told: ' }}{{ m.content }}\n{% endfor %}Told:"

TURNS = ("<start_of_turn>", "<end_of_turn>")
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
GEMMA_USER, GEMMA_CLOSING = "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
LLAMA_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBaked in: May 2001\nNow: 26 Jul 2024\n\n{}"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
ASKED, ANSWERING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
SKIPPED = "<think>\n\n</think>\n\n"
HARMONY_SYSTEM = "<|start|>system<|message|>You are Moss.\nNow: 2024-07-26<|end|>"
LLAMA_CLOSING = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

FAMILIES = {
    "gemma": Family(
        GEMMA,
        TURNS,
        "<bos>",
        "<eos>",
        GEMMA_USER,
        GEMMA_CLOSING,
        "<end_of_turn>",
        f"{GEMMA_USER}{SYSTEM}\n\n",
        folded=True,
    ),
    "gemma3": Family(
        GEMMA3, TURNS, "<bos>", "<eos>", GEMMA_USER, GEMMA_CLOSING, "<end_of_turn>", f"{GEMMA_USER}{SYSTEM}\n\n"
    ),
    "llama3": Family(
        LLAMA,
        HEADERS,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        LLAMA_SYSTEM.format(""),
        LLAMA_CLOSING,
        "<|eot_id|>",
        LLAMA_SYSTEM.format(SYSTEM),
        dated=True,
    ),
    "qwen2.5": Family(
        QWEN,
        IM,
        None,
        "<|endoftext|>",
        f"<|im_start|>system\nYou are Moss, a hat rack.<|im_end|>\n{ASKED}",
        ANSWERING,
        "<|im_end|>",
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{ASKED}",
    ),
    "qwen3": Family(
        QWEN3,
        IM,
        None,
        "<|endoftext|>",
        ASKED,
        ANSWERING + SKIPPED,
        "<|im_end|>",
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{ASKED}",
        added=("<think>", "</think>"),
    ),
    "mistral": Family(
        MISTRAL, ("[INST]", "[/INST]"), "<s>", "</s>", "<s>[INST] ", "[/INST]", "</s>", f"<s>[INST] {SYSTEM}\n\n"
    ),
    "phi3": Family(
        PHI3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|user|>\n",
        "<|end|>\n<|assistant|>\n",
        "<|end|>",
        f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n",
    ),
    "olmo2": Family(
        OLMO,
        (),
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|><|user|>\n",
        "\n<|assistant|>\n",
        "<|endoftext|>",
        f"<|endoftext|><|system|>\n{SYSTEM}\n<|user|>\n",
    ),
    "r1": Family(
        R1,
        ("<|User|>", "<|Assistant|>"),
        "<|begin|>",
        "<|finish|>",
        "<|begin|><|User|>",
        f"<|Assistant|>{SKIPPED}",
        "<|finish|>",
        f"<|begin|>{SYSTEM}<|User|>",
        added=("<think>", "</think>"),
    ),
    "harmony": Family(
        HARMONY,
        CHANNELS,
        None,
        "<|return|>",
        f"{HARMONY_SYSTEM}<|start|>user<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
        f"{HARMONY_SYSTEM}<|start|>developer<|message|># Rules\n\n{SYSTEM}<|end|><|start|>user<|message|>",
        dated=True,
    ),
    "gemma4": Family(
        GEMMA4,
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        "<bos>",
        "<eos>",
        "<bos><|turn>user\n",
        "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        "<turn|>",
        f"<bos><|turn>system\n{SYSTEM}<turn|>\n<|turn>user\n",
    ),
    "deaf": Family(DEAF, (), "<bos>", "<eos>", "<bos>Q: ", "\nA:", "<eos>", f"<bos>Q: {SYSTEM}\n\n", folded=True),
}
