"""The embedded model's tokenizer: byte-level BPE of the grammar's own text, with a chat template like Gemma's.

The template writes the beginning-of-sequence token itself, so text rendered with it must be encoded with
`add_special_tokens=False`. After the user's text follow five template tokens up to the first token of the answer, and
"I", which opens every refusal, is one token.
"""

from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from refusalscope.testbed import grammar

PAD, BOS, END, START = "<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>"

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('this chat template knows the roles user and assistant, not ' + message['role']) }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
    {{- message['content'] + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""


def prompt_text(user: str) -> str:
    """What the chat template makes of one user message, generation prompt included."""
    return f"{BOS}{START}user\n{user}{END}\n{START}model\n"


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token that the vocabulary must have; ValueError if it has not."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}: it is not one of the testbed's")
    return found


def train_tokenizer(*, vocabulary: int, seed: int, texts: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts` training chats; the same vocabulary for the same arguments."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _corpus(seed: int, texts: int) -> Iterator[str]:
    for example, response in islice(grammar.training_examples(seed), texts):
        yield f"user\n{example.text}"
        yield f"model\n{response}"
