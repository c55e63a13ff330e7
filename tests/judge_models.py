"""Judges as their hub repositories hold them: real classes, tokenizer formats and cards' structure; contents invented.

Weights are random, but for the rows of the unembedding that make a model answer with one of its words. Templates and
chat templates are in words of our own.
"""

import json
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.processors import TemplateProcessing
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = "Yes No yes no Safe Unsafe safe unsafe\n\nsafe\n\nunsafe Is this tea warm, or is it cold?"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
HARMBENCH = "[INST] Is the tea warm? One word.\n[ASKED] {behavior}\n[SAID] {generation}\n{{tea}} Yes or no? [/INST]"
WILDGUARD = "<s><|user|>\n[INST] Tea?\nA guest: {prompt}\nA host: {response}\nThree lines. [/INST]\n<|assistant|>"
STRONGREJECT = "How warm?\nasked: {forbidden_prompt}\nsaid: {response}\nFrom 1 to 5: "
ANSWERS = ("no", "", "Is this tea warm?", "I cannot {help} you.", "a1", "b 2", "so cold", "{behavior}\n[SAID] warm")
ASKED = tuple(f"Ask {at} {'x' * at}" for at in range(len(ANSWERS)))
LINES = ("Harmful request: no\n", "Response refusal: yes\n", "Harmful response: no")
GUARD_TEXT = """\
{{ bos_token }}<|start_header_id|>user<|end_header_id|>

Is the last {{ messages[-1].role }} cold?
{% for m in messages %}{{ m.role }}: {{ CONTENT | trim }}
{% endfor %}Say safe or unsafe.<|eot_id|><|start_header_id|>assistant<|end_header_id|>"""
GUARD = {
    "meta-llama/Llama-Guard-3-8B": GUARD_TEXT.replace("CONTENT", "m['content']"),
    "meta-llama/Llama-Guard-3-1B": GUARD_TEXT.replace("CONTENT", "m['content'][0]['text']"),
}


def card(name: str, assigned: str, *, fence: str = "```[python]") -> str:
    """A model card whose first block assigns a template and whose second uses it."""
    used = "```python\nfrom somewhere import model\nprint(model(TEMPLATE.format(behavior='b', generation='g')))\n```"
    return f"---\nlicense: mit\n---\n# {name}\nRead this.\n\n{fence}\n{assigned}\n```\n\nSo:\n\n{used}\n"


def harmbench(folder: Path, *, mistral: bool = False) -> Any:
    """A HarmBench classifier that says Yes or No, whichever its random layers lean to."""
    tokenizer = _sentencepiece()
    made = _model(MistralForCausalLM if mistral else LlamaForCausalLM, tokenizer, sliding=mistral)
    texts = [HARMBENCH.format(behavior=asked, generation=said) for asked, said in zip(ASKED, ANSWERS, strict=True)]
    leaning = _telling_apart(made, [tokenizer(text).input_ids for text in texts])
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    made.lm_head.weight.data *= 0.01
    made.lm_head.weight.data[yes], made.lm_head.weight.data[no] = leaning, -leaning
    variable = "MISTRAL_CLS_PROMPT" if mistral else "LLAMA2_CLS_PROMPT"
    more = f'"prompt_contextual": """About {{context}}: {HARMBENCH}"""'
    assigned = f'{variable} = {{\n"description": "a tea judge",\n"prompt": """{HARMBENCH}""",\n{more}}}'
    return _save(folder, made, tokenizer, card("Tea", assigned))


def wildguard(folder: Path, said: Sequence[str] = LINES) -> Any:
    """A WildGuard that always says these lines, one token each."""
    tokenizer = _sentencepiece(plain=said)
    made = _model(MistralForCausalLM, tokenizer, sliding=True)
    _recites(made, [_last(tokenizer, WILDGUARD), *tokenizer.convert_tokens_to_ids(list(said)), tokenizer.eos_token_id])
    return _save(folder, made, tokenizer, card("Guard", f'instruction_format = """{WILDGUARD}"""', fence="```python"))


def llama_guard(folder: Path, template: str) -> Any:
    """A Llama Guard that says a blank line, then safe or unsafe, the latter with a category."""
    tokenizer = _llama_3()
    tokenizer.add_tokens(["\nS2,S10"])
    tokenizer.chat_template = template
    made = _model(LlamaForCausalLM, tokenizer)
    ids = ("<|end_header_id|>", "ĊĊ", "safe", "unsafe", "\nS2,S10", "<|eot_id|>")
    turn, blank, safe, unsafe, categories, end = tokenizer.convert_tokens_to_ids(list(ids))
    # Each token all but decides the next one, but for the word, which the small remainder of the layers decides.
    for layer in made.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    embedding, head = made.model.embed_tokens.weight.data, made.lm_head.weight.data
    embedding /= embedding.norm(dim=1, keepdim=True) / 3
    said = [_chat(asked, answer) for asked, answer in zip(ASKED, ANSWERS, strict=True)]
    if "[0]" in template:
        said = [[{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat] for chat in said]
    rows = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in said]
    leaning = _telling_apart(made, [[*row, blank] for row in rows])
    head *= 0.1
    head[safe], head[unsafe] = 6 * embedding[blank] + leaning, 6 * embedding[blank] - leaning
    head[blank], head[categories] = 4 * embedding[turn], 4 * embedding[unsafe]
    head[end] = 4 * embedding[safe] + 4 * embedding[categories]
    return _save(folder, made, tokenizer, "# A guard\n")


def strongreject(adapter: Path, base: Path) -> Any:
    """A Gemma and a LoRA adapter for it, saved by peft; the tokenizer lies with the adapter."""
    from peft import LoraConfig, get_peft_model

    tokenizer = _gemma()
    plain = _model(GemmaForCausalLM, tokenizer)
    for at in "12345":
        plain.lm_head.weight.data[tokenizer.convert_tokens_to_ids(at)] *= 8
    _save(base, plain, tokenizer, "# A base\n")
    plain.name_or_path = "google/gemma-2b"
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks transformers by a name that is going away; only peft can change that.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        made = get_peft_model(plain, lora)
    adapter.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(str(adapter), save_embedding_layers=False)
    tokenizer.save_pretrained(adapter)
    (adapter / "README.md").write_text("# An adapter without a template\n")
    return made.eval()


def minos(folder: Path, labels: Sequence[str] = ("Non-refusal", "Refusal")) -> Any:
    """A ModernBERT that tells refusals from the rest."""
    tokenizer = _bert()
    ids = {f"{role}_token_id": tokenizer.convert_tokens_to_ids(f"[{role.upper()}]") for role in ("cls", "sep", "pad")}
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        **ids,
        bos_token_id=ids["cls_token_id"],
        eos_token_id=ids["sep_token_id"],
        id2label=dict(enumerate(labels)),
        label2id={label: at for at, label in enumerate(labels)},
    )
    made = ModernBertForSequenceClassification(config)
    return _save(folder, made, tokenizer, "# A refusal classifier\n")


def _save(folder: Path, made: Any, tokenizer: Any, readme: str) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(readme)
    return made.eval()


def _model(kind: Any, tokenizer: Any, *, sliding: bool = False) -> Any:
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    config = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig, GemmaForCausalLM: GemmaConfig}[kind]
    more = {"sliding_window": None} if sliding else {"head_dim": 16} if kind is GemmaForCausalLM else {}
    longest = {"max_position_embeddings": 1024} if kind is GemmaForCausalLM else {}
    torch.manual_seed(0)
    return kind(config(**{**SHAPE, **longest}, **ids, **more, vocab_size=len(tokenizer)))


def _chat(asked: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@torch.no_grad()
def _telling_apart(made: Any, rows: Sequence[list[int]]) -> Any:
    """A direction in which the states after these texts lie on either side of nought, and their mean at it."""
    states = torch.cat([made.model(torch.tensor([row])).last_hidden_state[:, -1] for row in rows])
    centre = states.mean(0)
    found = torch.linalg.svd(states - centre).Vh[0]
    found = found - found @ centre / (centre @ centre) * centre
    return 4 * found / ((states - centre) @ found).abs().max()


def _recites(made: Any, chain: Sequence[int]) -> None:
    """After each token of the chain comes the next, whatever stood before: the layers write nothing."""
    for layer in made.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    embedding = made.model.embed_tokens.weight.data
    made.lm_head.weight.data *= 0.01
    for now, after in pairwise(chain):
        made.lm_head.weight.data[after] = embedding[now]


def _last(tokenizer: Any, template: str) -> int:
    return tokenizer(template, add_special_tokens=False).input_ids[-1]


def _trained(special: list[str], texts: Sequence[str], *, sentencepiece: bool) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>" if sentencepiece else None, byte_fallback=sentencepiece))
    if sentencepiece:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(Regex("▁|\n"), "merged_with_next")
        special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = ByteLevelDecoder()
    alphabet = list("12345") if sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(list(texts) * 4, trainer)
    return made


def _vocabulary(special: list[str]) -> dict[str, Any]:
    model = json.loads(_trained(special, [WORDS, WORDS.replace(" ", "\n")], sentencepiece=True).to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _opens_with(tokenizer: Any, bos: str) -> Any:
    ids = [(bos, tokenizer.convert_tokens_to_ids(bos))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=ids)
    return tokenizer


def _sentencepiece(*, plain: Sequence[str] = ()) -> Any:
    """Llama 2's and Mistral's kind: <s> before every text, no pad token of its own."""
    made = LlamaTokenizer(**_vocabulary(["<unk>", "<s>", "</s>"]))
    made.add_tokens(list(plain))
    return _opens_with(made, "<s>")


def _gemma() -> Any:
    return _opens_with(GemmaTokenizer(**_vocabulary(["<pad>", "<eos>", "<bos>", "<unk>"])), "<bos>")


def _llama_3() -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_trained(special, [WORDS, "unsafe", "safe", "\n\n"], sentencepiece=False),
        bos_token=special[0],
        eos_token="<|eot_id|>",
        extra_special_tokens=special[1:],
    )
    return _opens_with(made, special[0])


def _bert() -> Any:
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_trained(special, [WORDS], sentencepiece=False),
        **{f"{role}_token": f"[{role.upper()}]" for role in ("pad", "cls", "sep", "unk", "mask")},
    )
    ids = [(token, made.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    made.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=ids)
    return made
