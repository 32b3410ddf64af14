"""Small chat templates, one for each way in which those of real models behave, and a tokenizer to try them with."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>", "<|inner|>"]
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
"""Each turn between two marks, and a new line behind, as ChatML has it."""
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
THINKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>assistant\\n' + m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
"""Forgets what was thought in earlier turns."""
INJECTS = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}" + PLAIN
)
STRIPS = PLAIN.replace("m['content']", "m['content'] | trim")
OTHER_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    + ASK
)
"""The last answer ends otherwise than earlier ones."""
TAIL = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|inner|><|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Two marks behind every turn, and an end of text behind the conversation."""
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[I] ' + m['content'] + ' [/I]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""No beginning of an answer to ask with."""
ASKS_TO_THINK = PLAIN.replace("assistant\\n' }}", "assistant\\n<think>' }}")
"""Asks with a beginning that its answers do not have."""
RAISES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    + (TURN + "{% endfor %}" + ASK)
)
DROPS = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + ASK
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REWRITES = "{% for m in messages %}{{ loop.length ~ ' ' }}" + TURN + "{% endfor %}" + ASK
"""Every turn says how many turns there are."""


def chat_tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """Byte-level BPE with a few merges across words and lines; every text begins with `<bos>`, but no conversation."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["user\n\n Hello there, assistant\n\n\n the answer is here\n\nuser"] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=template
    ).save_pretrained(folder)
    return load_tokenizer(folder)
