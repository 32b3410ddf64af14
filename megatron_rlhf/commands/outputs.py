"""What a command may write over: what it made itself before, and nothing else."""

import json
from collections.abc import Collection
from pathlib import Path

from megatron_rlhf.config.errors import UserError


def require_new(path: str | Path, option: str = "--output") -> None:
    """Raise UserError where something other than an empty folder is there already, or its folder is a file."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{option} {path}: is there already; name another, or delete it first")
    _require_folder(target, option)


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
    _require_folder(path, option)


def _require_folder(path: Path, option: str) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is a file; name a folder")
