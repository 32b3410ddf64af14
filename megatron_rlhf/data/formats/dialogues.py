"""Dialogues in one text, with marks before each turn: hh-rlhf's "\\n\\nHuman: ... \\n\\nAssistant: ..."."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record


@dataclass(frozen=True)
class Dialogue:
    """The marks of the turns."""

    user: str = "\n\nHuman:"
    assistant: str = "\n\nAssistant:"

    def __post_init__(self) -> None:
        marks = (self.user, self.assistant)
        if not all(isinstance(mark, str) and mark for mark in marks) or self.user == self.assistant:
            raise UserError(f"dialogue: user and assistant must be two different texts, not {marks!r:.60}")

    def split(self, record: Record, chat: bool) -> Record:
        """Prompt and answers of a record with `prompt`, or with `chosen` and `rejected`, which are whole dialogues: as text, or
        as turns."""
        names = [name for name in ("prompt", "chosen", "rejected") if isinstance(record.fields.get(name), str)]
        if chat:
            made: dict[str, Any] = {
                name: self.turns(record, name) for name in names if record.fields[name].startswith(self.user)
            }
        elif "prompt" in names or "chosen" not in names:
            return record
        elif "rejected" in names:
            prompt, chosen, rejected = self.split_pair(record)
            made = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        else:
            prompt, mark, answer = record.text("chosen").rpartition(self.assistant)
            made = {"prompt": prompt + mark, "chosen": answer}
        return Record(record.where, {**record.fields, **made}, record.lenient)

    def split_pair(self, record: Record) -> tuple[str, str, str]:
        """The prompt, which ends with the last mark of the assistant's up to which both dialogues are the same, and the rest of
        each."""
        chosen, rejected = record.text("chosen"), record.text("rejected")
        turn = chosen.rfind(self.assistant)
        while turn >= 0 and not rejected.startswith(chosen[: turn + len(self.assistant)]):
            turn = chosen.rfind(self.assistant, 0, turn)
        if turn < 0:
            raise record.mistake(
                f"'chosen' and 'rejected' share no {self.assistant!r}, so where the response starts is unknown; "
                "add a column 'prompt'"
            )
        end = turn + len(self.assistant)
        return chosen[:end], chosen[end:], rejected[end:]

    def turns(self, record: Record, column: str) -> list[dict[str, str]]:
        """The dialogue as messages; a last turn of the assistant's that is empty is left out."""
        marks = {self.user: "user", self.assistant: "assistant"}
        pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
        head, *parts = re.split(f"({pattern})", record.text(column))
        if head.strip():
            raise record.mistake(f"column {column!r} must begin with {self.user!r}, not {head!r:.60}")
        messages = [
            {"role": marks[mark], "content": text.strip()} for mark, text in zip(parts[::2], parts[1::2], strict=True)
        ]
        while messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
        return messages
