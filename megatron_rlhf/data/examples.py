"""What demonstrations, comparisons and prompts have in common: a sequence of items, and a count of what was dropped."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.tokenizer import Tokens

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def require_prompt(record: Record, prompt: str, tokens: Tokens) -> None:
    """A model needs a token to start from: an empty prompt is one only if the tokenizer begins texts with a token of its own."""
    if not len(tokens):
        what = (
            f"the tokenizer has no token for the prompt {prompt!r:.60}, nor a"
            if prompt
            else "the prompt is empty; this tokenizer has no"
        )
        raise record.mistake(
            f"{what} beginning-of-text token that it puts before a text, so there is nothing to start from"
        )


def require_response(record: Record, response: str, tokens: Tokens) -> None:
    """The tokens of a response, its end not among them."""
    if not len(tokens):
        raise record.mistake(
            f"the tokenizer has no token for the response {response!r:.60}; remove the record, or take another tokenizer"
        )


def read_user(record: Record) -> str | None:
    """Who wrote the record's prompt, a text or a number; None where the column is missing, null or blank (as in CSV files)."""
    user = record.fields.get("user")
    if user is None:
        return None
    if isinstance(user, float) and user.is_integer():
        user = int(user)  # a column of whole numbers in which some are missing
    if not isinstance(user, str | int) or isinstance(user, bool):
        raise record.mistake(
            f"column 'user' must hold a text or a whole number, not {type(user).__name__} {user!r:.60}"
        )
    return str(user).strip() or None


MUCH = 0.2
"""A larger share of the records dropped is worth a warning."""


class Examples(Generic[Item]):
    """The items of a source in their order, and how many of its records were dropped for which reason.

    Nothing is ever cut to fit: a text that ends early teaches the model to end early.
    """

    def __init__(
        self,
        source: str,
        items: Sequence[Item],
        dropped: Mapping[str, int],
        limits: Mapping[str, str] | None = None,
        records: int | None = None,
        left_out: Mapping[str, int] | None = None,
    ):
        """Args:
            dropped: Reason -> records.
            limits: Reason -> the limit that it stands for, such as `max_prompt_tokens=1024`.
            records: How many records the items were made from, where that is another number.
            left_out: Reason -> parts that are missing from records that are kept, such as responses.

        Raises `UserError` if no item is left.
        """
        self.source = source
        self.items = items
        self.records = len(items) if records is None else records
        self.dropped = _counted(dropped)
        self.left_out = _counted(left_out or {})
        self.limits = dict(limits or {})
        if not len(items):
            raise UserError(f"{source}: nothing left to train on: {self.describe()}{self._binding()}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def about(self) -> dict[str, Any]:
        """All but the items, as JSON: `Examples(items=..., **about)` is the same again."""
        names = ("source", "dropped", "limits", "records", "left_out")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Records of the source."""
        return self.records + sum(self.dropped.values())

    def describe(self) -> str:
        """One line for the log, such as `1090 of 1100 records kept; dropped: 10 prompt_too_long`."""
        made = f" as {len(self)} examples" if self.records != len(self) else ""
        without = f"; left out of them: {_listed(self.left_out)}" if self.left_out else ""
        return f"{self.records} of {self.total} records kept{made}{without}; dropped: {_listed(self.dropped) or 'none'}"

    def warning(self) -> str | None:
        """What to say where much was dropped: its share, and the limit that binds."""
        share = sum(self.dropped.values()) / self.total
        if share <= MUCH:
            return None
        return f"{self.source}: {share:.0%} of the records are dropped: {_listed(self.dropped)}{self._binding()}"

    def _binding(self) -> str:
        worst = max(self.dropped, key=lambda reason: self.dropped[reason], default="")
        return f"; the limit that binds: {self.limits[worst]}" if worst in self.limits else ""

    def report(self) -> None:
        """Says in the log what was kept, with a warning where that is little."""
        log.info(self.describe())
        if (warning := self.warning()) is not None:
            log.warning(warning)


def windows(items: Iterable[Item], size: int = 5000) -> Iterator[list[Item]]:
    """Consecutive items, some at a time: all of them may not fit in memory."""
    remaining = iter(items)
    while window := list(itertools.islice(remaining, size)):
        yield window


def length_limits(prompt: int, response: int | None = None, total: int | None = None) -> dict[str, str]:
    """The limits behind the reasons `..._too_long`."""
    return {
        "prompt_too_long": f"data.max_prompt_tokens={prompt}",
        "response_too_long": f"data.max_response_tokens={response}",
        "total_too_long": f"the model's context of {total} tokens, prompt and response together",
    }


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    """Only what occurred."""
    return {reason: count for reason, count in counts.items() if count}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
