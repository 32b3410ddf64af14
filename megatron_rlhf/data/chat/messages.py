"""Lists of messages in a record: what is one, and the forms in which records hold prompts and answers as messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rlhf.data.formats.record import Record

ASSISTANT = "assistant"
Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a chat template reads, such as `tool_calls`."""
Messages = tuple[Message, ...]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""What a chat template gets of a record besides its messages."""


@dataclass(frozen=True)
class Conversation:
    """Messages that a record holds, or that are made of several of its columns."""

    record: Record
    messages: Messages
    learned_from: int = 0
    """The first message that may be learned; those before it are given."""

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's turns that may be learned."""
        return [i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT and i >= self.learned_from]

    @property
    def prompt(self) -> Messages:
        """Without the assistant's turns at its end."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == ASSISTANT:
            end -= 1
        return self.messages[:end]

    @property
    def given(self) -> dict[str, Any]:
        """The columns of a record from which the prompt is rendered as it is from this one."""
        variables = {name: self.record.fields[name] for name in TEMPLATE_COLUMNS if name in self.record}
        return {"prompt": [dict(message) for message in self.prompt], **variables}

    def variables(self) -> dict[str, Any]:
        """What a chat template gets in addition to the messages: the columns `tools` and `chat_template_kwargs`."""
        tools = {"tools": self.record.fields["tools"]} if "tools" in self.record else {}
        more = self.record.fields.get("chat_template_kwargs") or {}
        if not isinstance(more, Mapping):
            raise self.record.mistake(f"column 'chat_template_kwargs' must be an object, not {more!r:.60}")
        return {**tools, **more}


def holds_messages(record: Record, column: str) -> bool:
    """Whether the column holds a message or a list of them, and no text."""
    value = record.fields.get(column)
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def read_messages(record: Record, column: str) -> Messages:
    """The column's messages, checked: each an object with a role, and text where it has content."""
    return as_messages(record, column, record.value(column))


def as_messages(record: Record, column: str, value: Any) -> Messages:
    """`read_messages` for an item of a list in the column."""
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, list) or not found:
        raise record.mistake(
            f"column {column!r} must be a list of messages {{'role': ..., 'content': ...}}, not {value!r:.60}"
        )
    return tuple(_message(record, column, turn, item) for turn, item in enumerate(found, start=1))


def _message(record: Record, column: str, turn: int, value: Any) -> Message:
    place = f"column {column!r}, turn {turn}"
    if not isinstance(value, Mapping):
        raise record.mistake(f"{place}: a message must be an object {{'role': ..., 'content': ...}}, not {value!r:.60}")
    if not isinstance(value.get("role"), str):
        hint = "; these are ShareGPT's: data.format=sharegpt" if {"from", "value"} <= value.keys() else ""
        raise record.mistake(f"{place}: a message must name its role; there are: {', '.join(value)}{hint}")
    if value["role"] != ASSISTANT and value["role"].strip().lower() == ASSISTANT:
        raise record.mistake(f"{place}: the role of who answers is {ASSISTANT!r}, not {value['role']!r}")
    message = {name: item for name, item in value.items() if item is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = message["content"] = "".join(_part(record, place, part) for part in content)
    if not isinstance(content, str | None):
        raise record.mistake(f"{place}: content must be text, not {type(content).__name__} {content!r:.60}")
    return message


def _part(record: Record, place: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise record.mistake(f"{place}: content may be text, or a list of parts of type 'text', not {part!r:.60}")


def is_blank(message: Message) -> bool:
    """Neither text nor anything else to learn, such as a tool call."""
    others = message.keys() - {"role", "content", "name"}
    return not str(message.get("content") or "").strip() and not any(message[name] for name in others)


def read_conversation(record: Record) -> Conversation | None:
    """The record's messages, of the column `messages` or `prompt`; None if it holds text."""
    column = "messages" if "messages" in record else "prompt"
    if column == "prompt" and not holds_messages(record, column):
        return None
    return Conversation(record, read_messages(record, column))


def readable(messages: Sequence[Message]) -> str:
    """The turns for people to read: who says what. A single turn of the user's is its text."""
    turns = []
    for message in messages:
        others = {name: item for name, item in message.items() if name not in ("role", "content")}
        said = [str(message.get("content") or ""), json.dumps(others, ensure_ascii=False) if others else ""]
        turns.append((message["role"], "\n".join(filter(None, said))))
    return turns[0][1] if [role for role, _ in turns] == ["user"] else "\n\n".join(map(": ".join, turns))


def read_turns(record: Record, column: str, role: str) -> Messages:
    """The column's messages; a text is one turn of this role."""
    return as_turns(record, column, record.value(column), role)


def as_turns(record: Record, column: str, value: Any, role: str) -> Messages:
    """`read_turns` for an item of a list in the column."""
    if isinstance(value, str):
        return ({"role": role, "content": record.as_text(column, value)},)
    return as_messages(record, column, value)
