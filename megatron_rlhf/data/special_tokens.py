"""Which tokens begin and end a text: what the tokenizer's folder says about them, file by file."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from megatron_rlhf.config.errors import UserError

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_MODEL = "config.json"
_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""Where to look for the end of text when no file of the folder names it (GPT-2's own files do not)."""


def start_of_text(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's own post-processor puts before every text."""
    for text in backend.get_vocab():  # the first one that is not tokenised into nothing
        encoding = backend.encode(text, add_special_tokens=True)
        places = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        if places:
            return tuple(encoding.ids[: places[0]])
    raise UserError("the tokenizer gives no token for any word of its own vocabulary")


def end_tokens(folder: Path | None) -> list[int]:
    """All that `generation_config.json` and `config.json` name as `eos_token_id`, one or a list, in this order."""
    ends: list[Any] = []
    for name in (GENERATION, _MODEL):
        if folder is not None and (folder / name).is_file():
            found = read_object(folder / name).get("eos_token_id")
            ends += found if isinstance(found, list) else [found]
            if not all(end is None or type(end) is int for end in ends):
                raise UserError(
                    f"{folder / name}: eos_token_id must be a token id or a list of them, not {found!r:.60}"
                )
    return [end for end in dict.fromkeys(ends) if end is not None]


def name_end_of_text(hf: PreTrainedTokenizerFast, ends: Iterable[int]) -> None:
    """Set the tokenizer's `eos_token` if its own files do not set it: from `ends`, else a usual name.

    Raises:
        UserError: The tokenizer has no such token.
    """
    if hf.eos_token is not None:
        return
    tokens = {id: token for token, id in hf.get_vocab().items()}
    named = (tokens[id] for id in ends if id in tokens)
    usual = (name for name in _NAMES if name in hf.get_vocab())
    hf.eos_token = next(named, next(usual, None))
    if hf.eos_token is None:
        raise UserError(
            f"{hf.name_or_path}: the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json"
        )


def end_of_response(hf: PreTrainedTokenizerFast) -> int:
    """The token that the chat template puts after an answer; the end of text if there is no template."""
    if hf.chat_template is None:
        return hf.eos_token_id
    question, answer = "Is it a question?", "It is an answer."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        text = str(hf.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:  # templates are programs: one may need more than it gets
        log.warning("%s: its chat template cannot be used (%s): %s ends", hf.name_or_path, error, hf.eos_token)
        return hf.eos_token_id
    behind = hf.backend_tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False).ids
    special = {hf.eos_token_id, *(id for id, token in hf.added_tokens_decoder.items() if token.special)}
    return next((id for id in behind if id in special), hf.eos_token_id)


def read_object(path: Path) -> dict[str, Any]:
    """A file with a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content
