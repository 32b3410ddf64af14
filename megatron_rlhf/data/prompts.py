"""Prompts for PPO, and the paper's filters for them: a limit per user, near-duplicates removed (splits by user: splits.py)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlhf.data.examples import Examples, read_prompt, read_user
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt; its id is its place in the source and so does not change when the limits do."""

    id: int
    text: str
    user: str | None
    tokens: Tokens
    """Beginning of text, if the tokenizer adds one, and text, [t]."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of its line."""


def load_prompts(
    source: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_per_user: int | None = None,
    deduplicate_prefix_tokens: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Examples[Prompt]:
    """Reads records {"prompt", "user" (optional), others, for reward functions}; `source` and `columns` as in `read_records`.

    Args:
        max_prompt_tokens: A longer prompt is dropped, and counted as `prompt_too_long`.
        max_per_user: Only this many of a user's prompts are kept, the first ones (the paper: 200), the others counted
            as `over_user_limit`.
        deduplicate_prefix_tokens: Of prompts that agree in this many first tokens (shorter ones: in all tokens), only
            the first is kept, the others counted as `duplicate`.

    Raises:
        UserError: A mistake in the source, an empty prompt (with its line), or nothing left.
    """
    records = list(read_records(source, columns))
    users = [read_user(record) for record in records]
    texts = [read_prompt(record, tokenizer) for record in records]
    items: list[Prompt] = []
    dropped: Counter[str] = Counter()
    of_user: Counter[str] = Counter()
    prefixes: set[bytes] = set()
    for index, tokens in enumerate(tokenizer.encode_stream(texts, bos=True)):
        user = users[index]
        prefix = tokens[:deduplicate_prefix_tokens].tobytes()
        if len(tokens) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
        elif deduplicate_prefix_tokens is not None and prefix in prefixes:
            dropped["duplicate"] += 1
        elif user is not None and max_per_user is not None and of_user[user] >= max_per_user:
            dropped["over_user_limit"] += 1
        else:
            prefixes.add(prefix)
            if user is not None:
                of_user[user] += 1
            others = {name: value for name, value in records[index].fields.items() if name not in ("prompt", "user")}
            items.append(Prompt(index, texts[index], user, tokens, others))
    return Examples(str(source), items, dropped)
