"""What a command may write over: what it made itself before, and nothing else."""

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from megatron_rlhf.config.errors import UserError


def require_new(path: str | Path, option: str = "--output") -> None:
    """Raise UserError where something other than an empty folder is there already, or nothing can be written."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{option} {path}: is there already; name another, or delete it first")
    require_folder(target, path, option)


def require_new_file(path: str | Path, option: str = "--output") -> None:
    """`require_new` of a file, in a folder that is there."""
    if Path(path).is_dir() or str(path).endswith(os.sep):
        raise UserError(f"{option} {path}: is a folder; name a file in it")
    if not (folder := Path(path).parent).is_dir():
        raise UserError(f"{option} {path}: there is no folder {folder}")
    require_new(path, option)


def require_new_corpus(prefix: str, option: str = "--output") -> None:
    """`require_new` of the token files that begin with `prefix`."""
    if not prefix or prefix.endswith(os.sep) or Path(prefix).name in ("", ".."):
        raise UserError(f"{option} {prefix}: name what the files' names begin with, such as {Path(prefix) / 'corpus'}")
    for suffix in (".bin", ".idx"):
        require_new(f"{prefix}{suffix}", option)


def require_page(path: str | Path, option: str = "--output") -> None:
    """Raise UserError where a page would replace anything but a page."""
    with_page = _begins(Path(path), option).lstrip().lower().startswith(b"<!doctype html")
    _require_own(Path(path), option, with_page, "no page (.html)")


def require_lines(path: str | Path, columns: Collection[str], option: str = "--output") -> None:
    """Raise UserError where JSON lines would replace anything but lines that have these columns."""
    try:
        record = json.loads(_begins(Path(path), option).splitlines()[0])
    except (ValueError, RecursionError, IndexError):
        record = None
    holds = isinstance(record, dict) and set(columns) <= set(record)
    _require_own(Path(path), option, holds, "no earlier export")


def _begins(path: Path, option: str) -> bytes:
    if not path.exists():
        return b""
    if not path.is_file():
        raise UserError(f"{option} {path}: is no file; name another")
    with path.open("rb") as file:
        return file.read(2**24)


def _require_own(path: Path, option: str, is_own: bool, what: str) -> None:
    if path.exists() and not is_own:
        raise UserError(f"{option} {path}: is there already, and is {what}; name another file")
    require_folder(path.parent, path, option)


def require_folder(folder: Path, path: str | Path, option: str = "--output") -> None:
    """Raise UserError where `path` cannot be written because `folder` is none, or takes no files."""
    absolute = folder.absolute()
    above = next(each for each in (absolute, *absolute.parents) if os.path.exists(each))
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is a file; name a folder")
    try:  # permissions alone do not say it: of /proc, of a full or read-only disk
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: nothing can be written to {above}: {error.strerror}") from error
