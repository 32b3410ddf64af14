"""Text files to (line, record) pairs: .jsonl, .json, .csv and .txt, each also as .gz.

These are parsed here and not by `datasets`, because its reader guesses types (a column of dates turns into timestamps,
the rank "1" into 1, a missing field into None) and its errors do not name the line.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rlhf.config.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
DOCUMENT_CHARACTERS = 4096

csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a long document

Progress = Callable[[int], object]
"""Called with the number of bytes on disk read since the last call."""


def is_text_file(path: Path) -> bool:
    """Whether the name ends like a file that `iterate_text_file` can read."""
    return _format(path) in _READERS


def iterate_text_file(path: Path, progress: Progress | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, record): the line, counted from 1, on which each record starts.

    A .jsonl file holds one object per line; a .json file an array of objects, or the same as .jsonl; a .csv file has a
    header; a .txt file gives records {"text": document}, see `split_documents`.

    Raises:
        UserError: Names the file and, if the mistake is in one line, the line.
    """
    return _READERS[_format(path)](path, progress)


def split_documents(lines: Iterable[tuple[int, str]], marked: bool) -> Iterator[tuple[int, str]]:
    """Yields (first line, text) of each document of a plain text.

    With `marked`, a line that is just `<|endoftext|>` ends a document. Otherwise nothing in the text distinguishes a
    new document from a new paragraph, so paragraphs are joined until a blank line comes after 4,096 characters or more:
    the model sees paragraphs follow each other, and there are enough documents to hold some out.
    """
    document: list[str] = []
    first, characters = 0, 0
    for number, line in lines:
        blank = not line.strip()
        if line.strip() == END_OF_DOCUMENT if marked else blank and characters >= DOCUMENT_CHARACTERS:
            if document:
                yield first, "".join(document).strip("\r\n")
            document, characters = [], 0
        elif document or not blank:  # blank lines before a document are not part of it
            first = first if document else number
            document.append(line)
            characters += len(line)
    if document:
        yield first, "".join(document).strip("\r\n")


def _format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _read_lines(path: Path, progress: Progress | None) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else raw as lines:
            position = 0
            for number, line in enumerate(lines, start=1):
                if progress is not None:
                    progress(raw.tell() - position)
                    position = raw.tell()
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: cannot be read after line {number}: {error}") from error


def _object(path: Path, line: int, value: Any) -> tuple[int, dict[str, Any]]:
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {line}: a record must be an object {{...}}, not {value!r:.60}")
    return line, value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that occurs twice, a parser would keep the last value and say nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"an object has the key {_repeated(key for key, _ in pairs)!r} twice")
    return made


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _json_lines(path: Path, progress: Progress | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _read_lines(path, progress):
        if line.strip():
            try:
                value = _DECODER.decode(line)
            except json.JSONDecodeError as error:
                if line.lstrip().startswith("{") and error.pos >= len(line.rstrip()):
                    raise UserError(
                        f"{path}, line {number}: not JSON that ends on its line; write each record on one line, or, in a "
                        ".json file, all of them in an array [...]"
                    ) from error
                excerpt = line[max(0, error.pos - 20) : error.pos + 20].strip()
                raise UserError(
                    f"{path}, line {number}: not JSON: {error.msg}, column {error.colno}, near {excerpt!r}"
                ) from error
            except (ValueError, RecursionError) as error:  # an endless number, or endless brackets
                raise UserError(f"{path}, line {number}: not JSON that can be read: {error}") from error
            yield _object(path, number, value)


def _json_array_or_lines(path: Path, progress: Progress | None) -> Iterator[tuple[int, dict[str, Any]]]:
    first = next((line.lstrip() for _, line in _read_lines(path, None) if line.strip()), "")
    if not first.startswith("["):
        yield from _json_lines(path, progress)
        return
    # The array is decoded element by element: that is the only way to know the line of each.
    text = "".join(line for _, line in _read_lines(path, progress))
    decode = _DECODER.raw_decode
    position, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    try:
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            value, position = decode(text, position)
            yield _object(path, line, value)
            position = _skip_space(text, position)
            if text.startswith(",", position):
                position = _skip_space(text, position + 1)
            elif not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        end = _skip_space(text, position + 1)
        if end < len(text):
            raise json.JSONDecodeError("one array is all that a file may hold; there is more behind its ']'", text, end)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {line}: not JSON that can be read: {error}") from error


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def iterate_table(
    path: Path, progress: Progress | None = None, delimiter: str = ","
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`iterate_text_file` of a table with a header, whatever the file's name ends with."""
    reader = csv.reader((line for _, line in _read_lines(path, progress)), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    line = 1
    try:
        for row in reader:
            if not row:  # a blank line
                pass
            elif header is None:
                header = row
                if (name := _repeated(filter(None, header))) is not None:  # without the empty columns of spreadsheets
                    raise UserError(f"{path}, line {line}: two columns have the name {name!r}; rename or remove one")
            elif len(row) != len(header):
                raise UserError(f"{path}, line {line}: the row does not have {len(header)} fields, as the header does")
            else:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV: {error}") from error


def _plain_text(path: Path, progress: Progress | None) -> Iterator[tuple[int, dict[str, Any]]]:
    marked = any(line.strip() == END_OF_DOCUMENT for _, line in _read_lines(path, None))
    for line, text in split_documents(_read_lines(path, progress), marked):
        yield line, {"text": text}


_READERS = {".jsonl": _json_lines, ".json": _json_array_or_lines, ".csv": iterate_table, ".txt": _plain_text}
