"""A column made from others by a format template."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record, nearest

MAY_BE_NULL = ("user", "messages", "tools")
"""Columns that are optional: null is as if they were not there."""


class Template:
    """Text with {names} of columns: `{question}`, `{info.title}` inside of an object, `{answers[].text}` of each item of a list.

    A template that is one name keeps the value as it is. Among several, null becomes empty text, unless all are null.
    """

    def __init__(self, column: str, template: str):
        if not isinstance(template, str):
            raise UserError(f"columns.{column}: a template is text, not {template!r:.60}")
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"columns.{column}={template!r}: {error}; write {{name}} for a column") from error
        self.column = column
        self.parts = [(literal, name) for literal, name, _, _ in parts]
        self.names = [name for _, name in self.parts if name]
        if not self.names or any(style or conversion for _, _, style, conversion in parts):
            raise UserError(f"columns.{column}={template!r}: write {{name}}, and no more, for at least one column")

    def fill(self, record: Record) -> Any:
        """The column's value. `UserError` for a name that the record does not have, or text that is none."""
        match self.parts:
            case [("", str(name))]:
                value = look_up(record, name)
                return record.value(name) if value is None and self.column not in MAY_BE_NULL else value
        values = {name: look_up(record, name) for name in self.names}
        if all(value is None for value in values.values()):
            return record.value(self.names[0])  # a mistake: there is nothing to fill in
        # Null means empty in a column that only some records fill, such as Alpaca's `input`.
        texts = {name: "" if value is None else record.as_text(name, value) for name, value in values.items()}
        return "".join(literal + texts.get(name or "", "") for literal, name in self.parts)

    def blank(self, record: Record) -> bool:
        """One of the columns is missing, null or blank."""
        try:
            values = [look_up(record, name) for name in self.names]
        except UserError:
            return True
        return any(value is None or not str(value).strip() for value in values)


def look_up(record: Record, path: str) -> Any:
    """The value at a path in the record; None where it is null. `UserError` where it is not there."""
    if path in record.fields:
        return record.fields[path]
    first, *rest = path.replace("[]", ".[]").split(".")
    if first not in record.fields or not rest:
        return record.value(path)  # the mistake that lists the columns
    return _inside(record, path, record.fields[first], rest)


def _inside(record: Record, path: str, value: Any, steps: Sequence[str]) -> Any:
    if value is None or not steps:
        return value
    step, *rest = steps
    if step == "[]":
        if not isinstance(value, list):
            raise record.mistake(f"column {path!r}: a list is expected before '[]', not {value!r:.60}")
        return [_inside(record, path, item, rest) for item in value]
    if not isinstance(value, Mapping):
        raise record.mistake(f"column {path!r}: an object with {step!r} is expected, not {value!r:.60}")
    if step not in value:
        raise record.mistake(f"column {path!r}: no {step!r}{nearest(step, value)}; there are: {', '.join(value)}")
    return _inside(record, path, value[step], rest)
