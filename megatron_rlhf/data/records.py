"""One way to read records, wherever they are stored: a file, a `datasets` folder, a name on the Hugging Face hub."""

import difflib
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.text_files import Progress, is_text_file, iterate_text_file

MADE_BY_TEMPLATES = ("prompt", "response", "responses", "ranks", "chosen", "rejected")
MAY_BE_NULL = ("user",)
FORMATS = ".jsonl, .json, .csv, .txt (each also .gz) or .parquet"


@dataclass(frozen=True)
class Record:
    """One record and where it was read, so that whatever finds a mistake in it can say where."""

    where: str
    """File and line, such as `sft.jsonl, line 12`, or dataset and row where there are no lines."""

    fields: Mapping[str, Any]

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
            f"no column {column!r}{_nearest(column, self.fields)}; there are: {', '.join(self.fields)}{self._cure(column)}"
        )

    def _cure(self, column: str) -> str:
        """How to make a column from the others, if there is a key for it."""
        texts = [name for name, value in self.fields.items() if isinstance(value, str)] or ["NAME"]
        if column not in MADE_BY_TEMPLATES:
            return ""
        source = texts[-1] if column == "response" else texts[0]
        return f'; make it of others, as in data.columns.{column}="{{{source}}}" (prepare_data.py: --column)'

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
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.mistake(f"column {column!r} is not valid Unicode: {error.reason}") from error
        return value

    def as_response(self, column: str, value: Any) -> str:
        """`response` for an item of a list in the column."""
        if not self.as_text(column, value).strip():
            raise self.mistake(
                f"column {column!r} has an empty response {value!r}; give it a text or remove the record"
            )
        return value


def read_records(
    source: str | Path, columns: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Iterator[Record]:
    """Reads records one by one, in a fixed order, the same on every rank and without network access for what is on disk.

    Args:
        source: A file (.jsonl, .json, .csv, .txt, each also .gz, or .parquet), a folder that `datasets` can load or has
            saved, or a dataset's name on the Hugging Face hub, `name` or `name:configuration`. Folders and names take a
            split, `name#validation`; without one it is `train`.
        columns: Columns to make from others, each a format template: `{"prompt": "{instruction}\\n{input}\\n",
            "response": "{output}"}`. A template that is one field, such as `{output}`, keeps that field's type. Among
            several fields a null becomes empty text, unless all are null. The other columns stay.
        progress: Called with the bytes read from disk, for text files only.

    Raises:
        UserError: A source that does not exist, is empty, or has a mistake in it, with file and line. Raised while iterating.
    """
    templates = {name: _Template(name, template) for name, template in (columns or {}).items()}
    empty = True
    for where, fields in _rows(str(source), progress):
        empty = False
        record = Record(where, fields)
        if templates:
            made = {name: template.fill(record) for name, template in templates.items()}
            record = Record(where, {**fields, **made})
        yield record
    if empty:
        raise UserError(f"{source}: empty; at least one record is needed")


class _Template:
    """A column made from others."""

    def __init__(self, column: str, template: str):
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"columns.{column}={template!r}: {error}; write {{name}} for a column") from error
        self.column = column
        self.parts = [(literal, name) for literal, name, _, _ in parts]
        if not any(name for _, name in self.parts) or any(style or conversion for _, _, style, conversion in parts):
            raise UserError(f"columns.{column}={template!r}: write {{name}}, and no more, for at least one column")

    def fill(self, record: Record) -> Any:
        match self.parts:
            case [("", str(name))]:
                null = self.column in MAY_BE_NULL and name in record.fields
                return record.fields[name] if null else record.value(name)
        names = [name for _, name in self.parts if name is not None]
        if not any(name in record for name in names):
            return record.value(names[0])  # a mistake: there is nothing to fill in
        # Null means empty in a column that only some records fill, such as Alpaca's `input`.
        texts = {name: record.text(name) if record.fields.get(name, "") is not None else "" for name in names}
        return "".join(literal + texts.get(name or "", "") for literal, name in self.parts)


def _rows(source: str, progress: Progress | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, _, split = (source, "", "") if Path(source).exists() else source.partition("#")
    path = Path(name).expanduser()
    if path.is_file() and is_text_file(path):
        if split:
            raise UserError(f"{source}: a file has no splits; leave out '#{split}'")
        for line, fields in iterate_text_file(path, progress):
            yield f"{path}, line {line}", fields
    else:
        for row, fields in enumerate(_load_dataset(name, path, split)):
            yield f"{source}, row {row + 1}", fields


def _load_dataset(name: str, path: Path, split: str) -> datasets.Dataset:
    """A parquet file, a folder or a hub name, by the `datasets` library."""
    hub_name, _, configuration = name.partition(":")
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"{name}: a file must end in {FORMATS}")
        return _load(name, lambda: datasets.load_dataset("parquet", data_files=str(path), split="train"))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _choose_split(name, _load(name, lambda: datasets.load_from_disk(str(path))), split)
    if path.is_dir():
        return _choose_split(name, _load(name, lambda: datasets.load_dataset(str(path))), split)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".parquet" or is_text_file(path):
        neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such file or folder{_nearest(path.name, neighbours)}")
    return _load(name, lambda: datasets.load_dataset(hub_name, configuration or None, split=split or "train"))


def _load(name: str, load: Callable[[], Any]) -> Any:
    try:
        with _quiet():
            return load()
    except Exception as error:  # the library raises a dozen kinds of exception for what the user got wrong
        reason = str(error.__cause__ or error).partition("\n")[0]
        missing = "" if Path(name).expanduser().exists() else "no such file or folder, and "
        raise UserError(f"{name}: {missing}`datasets` cannot load it: {reason}") from error


def _choose_split(name: str, loaded: datasets.Dataset | datasets.DatasetDict, split: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        if split:
            raise UserError(f"{name}: has no splits; leave out '#{split}'")
        return loaded
    split = split or "train"
    if split not in loaded:
        raise UserError(f"{name}: no split {split!r}{_nearest(split, loaded)}; there are: {', '.join(loaded)}")
    return loaded[split]


@contextmanager
def _quiet() -> Iterator[None]:
    was_silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_silent:
            datasets.enable_progress_bars()


def _nearest(name: str, candidates: Any) -> str:
    nearest = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
