"""Tokenizer folders of the kinds that models come with, small enough to work by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def bytes_alone() -> dict[str, int]:
    return {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def opt(folder: Path, add_bos_token: bool = True) -> Path:
    """No tokenizer.json; the end of text is also its beginning."""
    vocabulary = {"<pad>": 0, "</s>": 1, **{letter: id + 2 for letter, id in bytes_alone().items()}}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": add_bos_token, **end},
    )
    return folder


def llama3(folder: Path, chat_template: str | None = LLAMA3_CHAT) -> Path:
    """A beginning added by the post-processor; answers end with a token of their own, texts with another."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=bytes_alone(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|head|>", "<|eot_id|>"])
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 256)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        chat_template=chat_template,
    ).save_pretrained(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [257, 259], "temperature": 0.6})
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": 257})
    return folder


def sentencepiece(folder: Path, shared_data: Path, template: str = "<s> $A") -> Path:
    """Llama 2's form: the small real one, with its beginning of text in the post-processor."""
    shutil.copytree(shared_data / "tinystories_260k", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    definition = json.loads((folder / "tokenizer.json").read_text())
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def word_level(folder: Path, words: str = "[UNK] a b end stop", **settings: Any) -> Path:
    """Words only: no token is declared as an end."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: id for id, word in enumerate(words.split())}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **settings).save_pretrained(folder)
    return folder


def gpt2(folder: Path, shared_data: Path) -> Path:
    """GPT-2's own files, which do not name special tokens."""
    shutil.copytree(shared_data / "gpt2_tokenizer", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "opt": lambda folder, shared: opt(folder),
    "opt_without_beginning": lambda folder, shared: opt(folder, add_bos_token=False),
    "llama3": lambda folder, shared: llama3(folder),
    "llama3_base": lambda folder, shared: llama3(folder, chat_template=None),
    "sentencepiece": sentencepiece,
    "tinystories": lambda folder, shared: sentencepiece(folder, shared, "$A"),
    "gpt2": gpt2,
}
