"""One way to read records, wherever they are stored: a file, a `datasets` folder, a name on the Hugging Face hub."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.files.plain import plain
from megatron_rlhf.data.files.text_files import Progress, is_text_file, iterate_text_file
from megatron_rlhf.data.formats.record import Record, nearest
from megatron_rlhf.data.formats.shape import Shape

Columns = Mapping[str, Any] | Shape | None
"""How to make our columns of a record's own: templates by column, or a whole shape."""
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it says, it raises too
FORMATS = ".jsonl, .json, .csv, .txt (each also .gz) or .parquet"


def read_records(
    source: str | Path, columns: Columns = None, progress: Progress | None = None, kind: str | None = None
) -> Iterator[Record]:
    """Reads records one by one, in a fixed order, the same on every rank and without network access for what is on disk. Their
    values are JSON, wherever they come from: see `plain`.

    Args:
        source: A file (.jsonl, .json, .csv, .txt, each also .gz, or .parquet), a folder that `datasets` can load or has
            saved, or a dataset's name on the Hugging Face hub, `name` or `name:configuration`. Folders and names take a
            split, `name#validation`; without one it is `train`.
        columns: Columns to make from others, each a format template: `{"prompt": "{instruction}\\n{input}\\n",
            "response": "{output}"}`. A template that is one field, such as `{output}`, keeps that field's type. Among
            several fields a null becomes empty text, unless all are null. The other columns stay. Or a whole `Shape`.
        progress: Called with the bytes read from disk, for text files only.
        kind: What the records are for, `demonstrations`, `comparisons` or `prompts`: see `Shape.records`.

    Raises:
        UserError: A source that does not exist, is empty, or has a mistake in it, with file and line. Raised while iterating.
    """
    shape = columns if isinstance(columns, Shape) else Shape.of(columns=columns)
    empty = True
    for record in shape.records((_record(*row) for row in _rows(str(source), progress)), kind):
        empty = False
        yield record
    if empty:
        raise UserError(f"{source}: empty; at least one record is needed")


def _record(where: str, fields: Mapping[str, Any]) -> Record:
    try:
        return Record(where, plain(fields))
    except RecursionError as error:
        raise UserError(f"{where}: objects or lists inside of each other, more levels than can be read") from error


def _rows(source: str, progress: Progress | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, _, split = (source, "", "") if Path(source).exists() else source.partition("#")
    path = Path(name).expanduser()
    if path.is_file() and is_text_file(path):
        if split:
            raise UserError(f"{source}: a file has no splits; leave out '#{split}'")
        for line, fields in iterate_text_file(path, progress):
            yield f"{path}, line {line}", fields
    else:
        rows = iter(_load_dataset(name, path, split))
        for row in itertools.count(1):
            fields = _load(name, lambda: next(rows, None))
            if fields is None:
                return
            yield f"{source}, row {row}", fields


def _load_dataset(name: str, path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """A parquet file, a folder or a hub name, by the `datasets` library; what it can stream is never held as a whole."""
    hub_name, _, configuration = name.partition(":")
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"{name}: a file must end in {FORMATS}")
        return _load(
            name, lambda: datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _choose_split(name, _load(name, lambda: datasets.load_from_disk(str(path))), split)
    if path.is_dir():
        return _choose_split(name, _load(name, lambda: datasets.load_dataset(str(path))), split)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".parquet" or is_text_file(path):
        neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such file or folder{nearest(path.name, neighbours)}")
    # Without a network it is in the library's cache, which it does not stream from.
    streaming = {} if datasets.config.HF_HUB_OFFLINE else {"streaming": True}
    load = functools.partial(
        datasets.load_dataset, hub_name, configuration or None, split=split or "train", **streaming
    )
    return _load(name, load)


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
        raise UserError(f"{name}: no split {split!r}{nearest(split, loaded)}; there are: {', '.join(loaded)}")
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
