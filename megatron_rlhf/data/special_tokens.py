"""Which tokens begin and end a text: what the tokenizer's folder says about them, file by file."""

import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
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
    """The token with which the chat template ends an answer; the end of text if there is no template.

    A template may put more than one token behind an answer: the end of the turn is the last of those that stay when the
    conversation goes on, or the first where none does.
    """
    if hf.chat_template is None:
        return hf.eos_token_id
    question, answer = {"role": "user", "content": "Is it a question?"}, "It is an answer."
    turns = [question, {"role": "assistant", "content": answer}]
    try:
        last = _behind(hf, turns, answer)
    except Exception as error:  # templates are programs: one may need more than it gets
        log.warning("%s: its chat template cannot be used (%s): %s ends", hf.name_or_path, error, hf.eos_token)
        return hf.eos_token_id
    try:
        earlier = _behind(hf, [*turns, question], answer)
    except Exception:  # a template of a single question and its answer
        earlier = last
    special = {hf.eos_token_id, *(id for id, token in hf.added_tokens_decoder.items() if token.special)}
    stays = [id for id, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False))]
    ends = [id for id in stays if id in special][-1:] or [id for id in last if id in special]
    return next(iter(ends), hf.eos_token_id)


def _behind(hf: PreTrainedTokenizerFast, turns: list[dict[str, str]], answer: str) -> list[int]:
    """The tokens behind the answer in what the template makes of the turns."""
    _, found, behind = str(hf.apply_chat_template(turns, tokenize=False)).rpartition(answer)
    return hf.backend_tokenizer.encode(behind, add_special_tokens=False).ids if found else []


def read_object(path: Path) -> dict[str, Any]:
    """A file with a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def warn_of_contradiction(settings: Path, begins: bool) -> None:
    """Where tokenizer_config.json says otherwise than the post-processor does: whether texts begin with a token."""
    # transformers uses tokenizer.json if there is one, and so does whatever serves the model.
    says = read_object(settings).get("add_bos_token") if settings.is_file() else None
    if says is not None and bool(says) != begins:
        log.warning(
            "%s says add_bos_token: %s, yet the post-processor %s texts with a token; it is the one that counts",
            settings,
            json.dumps(says),
            "begins" if begins else "does not begin",
        )
