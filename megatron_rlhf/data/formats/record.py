"""One record of the user's data, and messages about what is wrong with it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlhf.config.errors import UserError

TELLTALE = {
    frozenset({"conversations"}): "sharegpt",
    frozenset({"instruction", "output"}): "alpaca",
    frozenset({"instruction", "completions"}): "ultrafeedback",
    frozenset({"prompt", "answers"}): "nectar",
    frozenset({"info", "summaries"}): "tldr",
    frozenset({"answer_0", "answer_1"}): "webgpt",
    frozenset({"prediction 1"}): "qa_feedback",
    frozenset({"message_tree_id"}): "oasst",
    frozenset({"chosen", "rejected"}): "hh_rlhf",
}
"""By which columns a known format is recognised where ours are missing."""
MADE_BY_TEMPLATES = ("prompt", "response", "messages", "responses", "ranks", "chosen", "rejected")


@dataclass(frozen=True)
class Record:
    """One record and where it was read, so that whatever finds a mistake in it can say where."""

    where: str
    """File and line, such as `sft.jsonl, line 12`, or dataset and row where there are no lines."""

    fields: Mapping[str, Any]
    lenient: bool = False
    """Of a published format, whose files have known flaws: an answer that is missing is counted, not an error."""

    def __contains__(self, column: str) -> bool:
        return self.fields.get(column) is not None

    def mistake(self, message: str) -> UserError:
        """The error to raise for a mistake in this record."""
        return UserError(f"{self.where}: {message}")

    def value(self, column: str) -> Any:
        """The field, of any type. A missing one, or null, is a `UserError` that lists the columns there are."""
        if column in self:
            return self.fields[column]
        if column in self.fields:
            raise self.mistake(f"column {column!r} is null")
        raise self.mistake(
            f"no column {column!r}{nearest(column, self.fields)}; there are: {', '.join(self.fields)}{self._cure(column)}"
        )

    def _cure(self, column: str) -> str:
        """How to make a column from the others, if there is a key for it."""
        texts = [name for name, value in self.fields.items() if isinstance(value, str)] or ["NAME"]
        if column not in MADE_BY_TEMPLATES:
            return ""
        source = texts[-1] if column == "response" else texts[0]
        known = next(
            (f", or data.format={name}" for columns, name in TELLTALE.items() if columns <= self.fields.keys()), ""
        )
        return f'; make it of others, as in data.columns.{column}="{{{source}}}"{known} (prepare: --column, --format)'

    def text(self, column: str) -> str:
        """The field, which must be text."""
        return self.as_text(column, self.value(column))

    def response(self, column: str) -> str:
        """The field, which must be text and not blank."""
        return self.as_response(column, self.value(column))

    def as_text(self, column: str, value: Any) -> str:
        """`text` for an item of a list in the column."""
        if not isinstance(value, str):
            raise self.mistake(f"column {column!r} must hold text, not {type(value).__name__} {value!r:.60}")
        return value

    def as_response(self, column: str, value: Any) -> str:
        """`response` for an item of a list in the column."""
        if not self.as_text(column, value).strip():
            raise self.mistake(
                f"column {column!r} has an empty response {value!r}; give it a text or remove the record"
            )
        return value


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The candidate that was most likely meant, as the end of a message; empty if none is near."""
    found = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
