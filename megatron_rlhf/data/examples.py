"""What demonstrations, comparisons and prompts have in common: a sequence of items, and a count of what was dropped."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.records import Record
from megatron_rlhf.data.tokenizer import Tokenizer

Item = TypeVar("Item")


def read_prompt(record: Record, tokenizer: Tokenizer) -> str:
    """The record's prompt; it may be empty only if the tokenizer begins a text with a token of its own."""
    prompt = record.text("prompt")
    if not prompt and not tokenizer.start_ids:
        raise record.mistake(
            "column 'prompt' is empty; this tokenizer has no beginning-of-text token that it puts before a text, so there is "
            "nothing to start from"
        )
    return prompt


def read_user(record: Record) -> str | None:
    """Who wrote the record's prompt; None where the column is missing, null or blank (as in CSV files)."""
    return record.text("user").strip() or None if "user" in record else None


class Examples(Generic[Item]):
    """The items of a source in their order, and how many of its parts were dropped for which reason.

    Nothing is ever cut to fit: a text that ends early teaches the model to end early.
    """

    def __init__(self, source: str, items: list[Item], dropped: Mapping[str, int], records: int | None = None):
        """`records`: how many records the items were made from, if several may make one. Raises `UserError` if no item
        is left."""
        self.source = source
        self.items = items
        self.records = len(items) if records is None else records
        self.dropped = {reason: count for reason, count in dropped.items() if count}
        """Reason -> count, only of the reasons that occurred."""
        if not items:
            raise UserError(f"{source}: nothing left to train on: {self.describe()}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def describe(self) -> str:
        """One line for the log, such as `1090 kept; dropped: 10 prompt_too_long`."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        of = f" (of {self.records} records)" if self.records != len(self) else ""
        return f"{len(self)} kept{of}; dropped: {dropped or 'none'}"
