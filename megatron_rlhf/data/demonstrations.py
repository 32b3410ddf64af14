"""Demonstrations for supervised fine-tuning: a prompt and the response that a labeler wrote, or a whole conversation."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_rlhf.data.chat.messages import (
    ASSISTANT,
    Conversation,
    holds_messages,
    is_blank,
    read_messages,
    read_turns,
)
from megatron_rlhf.data.chat.template import Chat, Rendered
from megatron_rlhf.data.examples import Examples, length_limits, require_prompt, require_response, windows
from megatron_rlhf.data.files.item_store import IN_MEMORY, InMemory
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.records import Columns, read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True, eq=False)
class Demonstration:
    """Tokens, and which of them the loss is on."""

    tokens: Tokens
    """Prompt, response and the token that ends a response, [t]; or a conversation."""

    prompt_length: int
    """What precedes the first token that is learned."""

    turns: npt.NDArray[np.bool_] | None = None
    """bool [t]: the assistant's turns in a conversation; None: all behind the prompt."""

    @property
    def target(self) -> npt.NDArray[np.bool_]:
        """bool [t]: the tokens that are learned, ends of responses included."""
        return np.arange(len(self.tokens)) >= self.prompt_length if self.turns is None else self.turns

    def up_to_end(self, end_id: int) -> Tokens:
        """The tokens up to the end of the last response: a template may put more behind it."""
        return self.tokens[: int(np.flatnonzero(self.target & (self.tokens == end_id)).max(initial=-1)) + 1 or None]


def load_demonstrations(
    source: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_length: int,
    columns: Columns = None,
    last_turn_only: bool = False,
    into: InMemory = IN_MEMORY,
) -> Examples[Demonstration]:
    """Reads records {"prompt", "response"} of text, or of messages as in {"messages"}, {"prompt": [...], "response": [...]} and
    TRL's {"prompt": [...], "completion": [...]}; `source` and `columns` as in `read_records`.

    Args:
        max_prompt_tokens: The limit of what precedes the first response, beginning of text included.
        max_response_tokens: The limit of each response, its end included, as when sampling.
        max_length: The limit of both together: the model's context.
        last_turn_only: Of a conversation, learn the last of the assistant's turns, not all.
        into: Where the demonstrations are kept.

    What is over a limit is dropped and counted as `prompt_too_long`, `response_too_long` or `total_too_long`. A conversation is
    several demonstrations where the chat template renders earlier turns in another way than last ones.

    Raises:
        UserError: A mistake in the source, an empty prompt or response (with its line), or nothing left.
    """
    dropped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    records_kept = 0

    def kept_of(window: list[Record]) -> Iterator[Demonstration]:
        nonlocal records_kept
        records = [record for record in window if not (record.lenient and _has_no_answer(record))]
        dropped["empty_response"] += len(window) - len(records)
        for parts in _tokenized(records, tokenizer, last_turn_only):
            reasons = [_too_long(part, max_prompt_tokens, max_response_tokens, max_length) for part in parts]
            kept = [part for part, reason in zip(parts, reasons, strict=True) if reason is None]
            if kept:
                left_out.update(filter(None, reasons))
                records_kept += 1
            else:
                dropped.update(reasons[:1])  # type: ignore[arg-type]
            yield from kept

    read = windows(read_records(source, columns, into.progress, "demonstrations"))
    items = into(item for window in read for item in kept_of(window))
    limits = length_limits(max_prompt_tokens, max_response_tokens, max_length)
    return Examples(str(source), items, dropped, limits, records_kept, left_out)


def _has_no_answer(record: Record) -> bool:
    if holds_messages(record, "messages"):
        return not Conversation(record, read_messages(record, "messages")).answers
    return isinstance(response := record.fields.get("response"), str) and not response.strip()


def _too_long(part: Demonstration, max_prompt_tokens: int, max_response_tokens: int, max_length: int) -> str | None:
    if part.prompt_length > max_prompt_tokens:
        return "prompt_too_long"
    if _longest_run(part.target) > max_response_tokens:
        return "response_too_long"
    return "total_too_long" if len(part.tokens) > max_length else None


def _tokenized(records: list[Record], tokenizer: Tokenizer, last_turn_only: bool) -> Iterator[list[Demonstration]]:
    """Of each record its demonstrations: one, or several of a conversation."""
    read = [_conversation(record) or (record.text("prompt"), record.response("response")) for record in records]
    texts = [pair for pair in read if isinstance(pair, tuple)]
    prompts = tokenizer.encode_stream((prompt for prompt, _ in texts), bos=True)
    responses = tokenizer.encode_stream((response for _, response in texts), continuation=True)
    chat = Chat(tokenizer)
    for record, each in zip(records, read, strict=True):
        if isinstance(each, Conversation):
            yield [_of_conversation(rendered) for rendered in chat.learned(each, last_turn_only)]
        else:
            prompt, response = next(prompts), next(responses)
            require_prompt(record, each[0], prompt)
            require_response(record, each[1], response)
            tokens = np.append(np.concatenate([prompt, response]), np.int32(tokenizer.end_id))
            yield [Demonstration(tokens, len(prompt))]


def _of_conversation(rendered: Rendered) -> Demonstration:
    return Demonstration(rendered.tokens, int(rendered.targets.argmax()), rendered.targets)


def _conversation(record: Record) -> Conversation | None:
    """The record's messages; None if it holds text."""
    response = "completion" if "completion" in record and "response" not in record else "response"
    if "messages" in record:
        conversation = Conversation(record, read_messages(record, "messages"))
    elif holds_messages(record, "prompt") or holds_messages(record, response):
        prompt = read_turns(record, "prompt", "user")
        conversation = Conversation(record, (*prompt, *read_turns(record, response, ASSISTANT)), len(prompt))
    else:
        return None
    for place in conversation.answers:
        if is_blank(conversation.messages[place]):
            raise record.mistake(f"turn {place + 1} is an empty response; give it a text or remove the record")
    return conversation


def _longest_run(target: npt.NDArray[np.bool_]) -> int:
    """Tokens of the longest response."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], target, [False]]).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))
