"""Prompts for PPO, and the paper's filters for them: a limit per user, near-duplicates removed (splits by user: splits.py)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlhf.data.chat.messages import Conversation, Messages, read_conversation
from megatron_rlhf.data.chat.template import Chat
from megatron_rlhf.data.examples import Examples, length_limits, read_user, require_prompt, windows
from megatron_rlhf.data.files.item_store import IN_MEMORY, InMemory
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.records import Columns, read_records
from megatron_rlhf.data.seen import Seen
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt; its id is its place in the source and so does not change when the limits do."""

    id: int
    text: str
    """As the model reads it: of messages, what the chat template makes of them."""
    user: str | None
    tokens: Tokens
    """Beginning of text, if the tokenizer adds one, and text, [t]."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of its line."""
    messages: Messages | None = None
    """The conversation that is to be answered."""

    @property
    def given(self) -> dict[str, Any]:
        """The columns of a record from which training reads the same tokens again."""
        if self.messages is None:
            return {"prompt": self.text}
        return Conversation(Record(f"prompt {self.id}", self.record), self.messages).given


def load_prompts(
    source: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_per_user: int | None = None,
    deduplicate_prefix_tokens: int | None = None,
    columns: Columns = None,
    into: InMemory = IN_MEMORY,
) -> Examples[Prompt]:
    """Reads records {"prompt", "user" (optional), others, for reward functions}, or with {"messages"} or a "prompt" of messages
    instead; `source` and `columns` as in `read_records`. Of a conversation that ends with the assistant's turn, that turn is left
    out.

    Args:
        max_prompt_tokens: A longer prompt is dropped, and counted as `prompt_too_long`.
        max_per_user: Only this many of a user's prompts are kept, the first ones (the paper: 200), the others counted
            as `over_user_limit`.
        deduplicate_prefix_tokens: Of prompts that agree in this many first tokens (shorter ones: in all tokens), only
            the first is kept, the others counted as `duplicate`.
        into: Where the prompts are kept.

    Raises:
        UserError: A mistake in the source, an empty prompt (with its line), or nothing left.
    """
    dropped: Counter[str] = Counter()
    users, prefixes = Seen(), Seen()

    def is_kept(prompt: Prompt) -> bool:
        user = None if max_per_user is None or prompt.user is None else prompt.user.encode()
        prefix = None if deduplicate_prefix_tokens is None else prompt.tokens[:deduplicate_prefix_tokens].tobytes()
        if len(prompt.tokens) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
        elif prefix is not None and prefixes.count(prefix):
            dropped["duplicate"] += 1
        elif user is not None and max_per_user is not None and users.count(user) >= max_per_user:
            dropped["over_user_limit"] += 1
        else:
            if prefix is not None:
                prefixes.add(prefix)
            if user is not None:
                users.add(user)
            return True
        return False

    records = read_records(source, columns, into.progress, "prompts")
    items = into(filter(is_kept, _prompts(records, tokenizer)))
    limits = {
        **length_limits(max_prompt_tokens),
        "over_user_limit": f"data.max_per_user={max_per_user}",
        "duplicate": f"data.deduplicate_prefix_tokens={deduplicate_prefix_tokens}",
    }
    return Examples(str(source), items, dropped, limits)


def _prompts(records: Iterable[Record], tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Each record's prompt."""
    chat, count = Chat(tokenizer), 0
    begin = np.array(tokenizer.start_ids, dtype=np.int32)  # templates begin texts themselves
    for window in windows(records):
        conversations = [read_conversation(record) for record in window]
        texts = [
            chat.prompt_text(conversation) if conversation else record.text("prompt")
            for record, conversation in zip(window, conversations, strict=True)
        ]
        encoded = tokenizer.encode_stream(texts)
        for record, conversation, text, ids in zip(window, conversations, texts, encoded, strict=True):
            tokens = ids if conversation else np.concatenate([begin, ids])
            require_prompt(record, text, tokens)
            others = {name: value for name, value in record.fields.items() if name not in ("prompt", "user")}
            messages = conversation.prompt if conversation else None
            yield Prompt(count, text, read_user(record), tokens, others, messages)
            count += 1
